"""Errors of any kind are caught in few places, each with its reason."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ANY = ("Exception", "BaseException")
ALLOWED = {
    # The end of every command: the traceback, and an exit code that is no verdict.
    "speculators_core/cli.py _run",
    # One example or request of many failed; it is set aside with its reason, and the run goes on.
    "speculators_core/data_generation/engines/transformers.py _run",
    "speculators_vllm/generation/arrivals.py arrived",
    "speculators_vllm/generation/chat.py _enqueue",
    "speculators_vllm/generation/chat.py ask",
    "speculators_vllm/hidden_states/outbox.py _report",
    "speculators_vllm/hidden_states/outbox.py _send",
    # A thread ended: those that wait for it raise what it met.
    "speculators_core/data_generation/queues/io_thread.py _run",
    # The plug-in, in a process of vLLM's that may have no speculator at all.
    "speculators_vllm/plugin/register.py register",
    "speculators_vllm/plugin/registries.py register_networks",
    "speculators_vllm/plugin/speculative_config.py complete",
    "speculators_vllm/plugin/speculative_config.py _completed",
    # vLLM, datasets and Transformers raise a dozen kinds each, which become one SpeculatorError.
    "speculators_core/data_generation/texts/open_dataset.py open_rows",
    "speculators_core/data_generation/texts/sources.py rows_of",
    "speculators_core/decoding/prompts.py _read_hub",
    "speculators_core/verifier/proof.py _check_twin",
    "speculators_core/verifier/reading.py read_tokenizer",
    "speculators_vllm/generation/local.py run",
    "speculators_vllm/offline.py _start",
}


def caught(scope: ast.AST, name: str) -> Iterator[tuple[str, ast.ExceptHandler]]:
    """Handlers of any error, each with the name of the function that it is in."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.ExceptHandler) and is_of_any(node):
            yield name, node
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from caught(node, node.name if is_function else name)


def is_of_any(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(kind, ast.Name) and kind.id in ANY for kind in kinds)


def raises_again(handler: ast.ExceptHandler) -> bool:
    """Whether it only cleans up."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def test_errors_of_any_kind_are_caught_only_where_a_reason_is_listed():
    found = {
        f"{file.relative_to(ROOT)} {name}"
        for package in ("speculators_core", "speculators_vllm", "benchmarks")
        for file in (ROOT / package).rglob("*.py")
        for name, handler in caught(ast.parse(file.read_text(encoding="utf-8")), "module")
        if not raises_again(handler)
    }
    assert found == ALLOWED


def test_suppress_takes_no_error_of_any_kind():
    for package in ("speculators_core", "speculators_vllm", "benchmarks"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
                    kinds = {ast.unparse(kind) for kind in node.args}
                    assert kinds.isdisjoint(ANY), f"{file}: {node.lineno}"
