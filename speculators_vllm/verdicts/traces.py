"""Tensors of a draft's first pass, in both engines.

Both run the same prompt. Tensors with the same name in both are compared in the order in which they
are computed, so that the first difference is where the two begin to differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.v1.engine.core_client import InprocClient

from speculators_core.decoding.drafter import Chooser, Confirmed, Proposal
from speculators_core.diagnosis.replay import SeenText
from speculators_core.models.speculator import SpeculatorModel
from speculators_vllm.plugin.proposers import PROPOSERS

STATES, LOGITS = "verifier's states", "logits"
COMPARED = (
    "fc",
    "input_norm",
    "hidden_norm",
    "token_layernorm",
    "hidden_layernorm",
    "input_proj",
    "input_layernorm",
    "o_proj",
    "post_attention_layernorm",
    "mlp",
    "final_layernorm",
    "norm",
)
"""Modules whose outputs mean the same in both; vLLM fuses or splits the others."""
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Bound on the largest difference over the largest value: rounding stays below it."""

Trace = dict[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """One tensor of both traces."""

    name: str
    difference: float
    """Largest difference over the largest value; infinite if only one side has numbers."""
    is_equal: bool


def compare(reference: Trace, served: Trace, dtype: torch.dtype) -> list[Stage]:
    """Every tensor that both have, in the reference's order.

    Of unequal numbers of rows the first ones are compared: one side may add rows of padding or
    masks after them.
    """
    stages = []
    for name, ours in reference.items():
        if name not in served:
            continue
        theirs = served[name]
        rows = min(len(ours), len(theirs))
        if ours.shape[1:] != theirs.shape[1:]:
            stages.append(Stage(name, float("inf"), False))
            continue
        ours, theirs = ours[:rows].float().cpu(), theirs[:rows].float().cpu()
        is_finite = ours.isfinite()  # tokens that a draft cannot propose are -inf
        if not torch.equal(is_finite, theirs.isfinite()) or not is_finite.any():
            stages.append(Stage(name, float("inf"), False))
            continue
        gap = (ours - theirs)[is_finite].abs().max() / ours[is_finite].abs().max().clamp_min(1e-9)
        stages.append(Stage(name, float(gap), float(gap) <= TOLERANCES[dtype]))
    return stages


@torch.no_grad()
def trace_reference(
    model: SpeculatorModel, text: SeenText, num_tokens: int, served_states: Tensor | None = None
) -> Trace:
    """The first proposal after a prompt; the answer's first token is the bonus token.

    ``served_states``: the verifier's states as vLLM handed them to its draft, in place of those of
    the text.
    """
    trace: Trace = {}
    length = text.prompt_length
    if served_states is None:
        states = text.aux_states(model.aux_layer_ids)[:length]
    else:
        states = _as_handed_by_vllm(model, served_states[:length])
    states = states.to(model.device, model.dtype)
    if model.aux_layer_ids:
        trace[STATES] = _as_vllm_hands_them(model, states)
    positions = torch.arange(length, device=model.device)
    confirmed = Confirmed(
        text.token_ids[None, : length + 1].to(model.device), positions[None], states[None]
    )
    with _Hooks(trace, model):
        vocab_size = model.config.transformer_layer_config.vocab_size
        chooser = _KeptLogits(trace=trace, verifier_vocab_size=vocab_size)
        model.propose(model.start_drafting(), confirmed, num_tokens, chooser)
    return trace


def _as_vllm_hands_them(model: SpeculatorModel, states: Tensor) -> Tensor:
    """With the method ``mtp`` vLLM gives a draft the normed last state, whatever it reads."""
    proposer = PROPOSERS.load(model.config.speculators_model_type)
    return model.verifier_head.norm(states) if proposer.method == "mtp" else states


def _as_handed_by_vllm(model: SpeculatorModel, states: Tensor) -> Tensor:
    """States from which the model makes those that vLLM handed to its draft."""
    states = states.to(model.device, model.dtype)
    if PROPOSERS.load(model.config.speculators_model_type).method != "mtp":
        return states
    gain = model.verifier_head.norm(torch.ones_like(states[:1]))  # the norm takes no scale
    return states / gain


class _Worker(Protocol):
    """Part of vLLM's worker."""

    def get_draft_model(self) -> nn.Module | None: ...


def trace_served(llm: LLM, prompt: Sequence[int]) -> Trace:
    """The same of vLLM's draft; empty if its network is in another process."""
    engine = llm.llm_engine
    is_here = isinstance(engine.engine_core, InprocClient)
    if not is_here or engine.vllm_config.parallel_config.world_size > 1:
        return {}
    trace: Trace = {}
    hooks: list[_Hooks] = []

    def attach(worker: _Worker) -> bool:
        network = worker.get_draft_model()
        if network is None:
            return False
        hooks.append(_Hooks(trace, network, served=True).attach())
        return True

    if not all(llm.collective_rpc(attach)) or not hooks:
        return {}
    try:
        parameters = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        asked: TokensPrompt = {"prompt_token_ids": list(prompt)}
        llm.generate(asked, parameters, use_tqdm=False)
    finally:
        for hook in hooks:
            hook.remove()
    return trace


@dataclass(frozen=True, kw_only=True)
class _KeptLogits(Chooser):
    """Keeps the logits of the first choice, over the verifier's vocabulary."""

    trace: Trace
    verifier_vocab_size: int

    def __call__(
        self, logits: Tensor, token_ids: Tensor | None = None, vocab_size: int | None = None
    ) -> Proposal:
        whole = logits
        if token_ids is not None:
            whole = logits.new_full((*logits.shape[:-1], self.verifier_vocab_size), float("-inf"))
            whole[..., token_ids] = logits
        self.trace.setdefault(LOGITS, whole[0].clone())
        return super().__call__(logits, token_ids, vocab_size)


class _Network(Protocol):
    """Part of vLLM's networks of drafts; those that read last hidden states do not combine."""

    combine_hidden_states: Callable[[Tensor], Tensor]
    compute_logits: Callable[..., Tensor | None]


class _Hooks:
    """Keeps the first output of each compared module of a network."""

    def __init__(self, trace: Trace, network: nn.Module, served: bool = False):
        self.trace, self.network, self.served = trace, network, served
        self.handles: list[RemovableHandle] = []

    def attach(self) -> "_Hooks":
        for name, module in self.network.named_modules():
            stem = name.split(".")[-1]
            if stem in COMPARED or ".fc_norm." in f".{name}":
                self._keep(module, _common_name(name))
        if self.served:
            self._keep_ends()
        return self

    __enter__ = attach

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for name in ("combine_hidden_states", "compute_logits"):
            vars(self.network).pop(name, None)

    def _keep(self, module: nn.Module, name: str) -> None:
        def hook(module: nn.Module, args: object, output: object) -> None:
            self._record(name, output[0] if isinstance(output, tuple) else output)

        self.handles.append(module.register_forward_hook(hook))

    def _keep_ends(self) -> None:
        """Records the states that vLLM's draft is given, and its logits."""
        network = cast(_Network, self.network)
        if hasattr(network, "combine_hidden_states"):
            combine = network.combine_hidden_states

            def combining(states: Tensor) -> Tensor:
                self._record(STATES, states)
                return combine(states)

            network.combine_hidden_states = combining
        else:

            def before(module: nn.Module, args: object, kwargs: dict[str, object]) -> None:
                self._record(STATES, kwargs["hidden_states"])

            hook = self.network.register_forward_pre_hook(before, with_kwargs=True)
            self.handles.append(hook)
        compute = network.compute_logits

        def computing(*args: object, **kwargs: object) -> Tensor | None:
            logits = compute(*args, **kwargs)
            self._record(LOGITS, logits)
            return logits

        network.compute_logits = computing

    def _record(self, name: str, output: object) -> None:
        if isinstance(output, Tensor) and name not in self.trace:
            tensor = output.detach()
            self.trace[name] = (tensor[0] if tensor.ndim == 3 else tensor).clone()


def _common_name(name: str) -> str:
    """The checkpoint's name of a module, from vLLM's."""
    return name.removeprefix("model.").replace(".block.", ".")
