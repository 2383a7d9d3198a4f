"""The certificate by real engines: what is lossless passes, what is biased does not."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import playground
from speculators_core.cli import run_function
from speculators_core.errors import SpeculatorError
from speculators_vllm import offline
from speculators_vllm.commands import certify as command
from speculators_vllm.verdicts import certify as checks
from speculators_vllm.verdicts.certificate import Certificate, print_certificate, write_certificate
from speculators_vllm.verdicts.certify import certify
from speculators_vllm.verdicts.settings import CertifyConfig
from tests.conftest import make_verifier

pytestmark = pytest.mark.vllm

EAGLE3 = str(playground.EAGLE3)
BROKEN = 1e-4
ONE_ENGINE = ({"max_model_len": 256}, {"max_model_len": 256, "concurrency": 8})
QUICK = {"flags": ONE_ENGINE, "max_tokens": 16, "draws": 100, "sampled_prompts": 2}


@pytest.fixture
def accepting_everything(monkeypatch):
    """A rejection sampler that refuses nothing which the verifier may say at all."""
    from vllm.v1.sample import rejection_sampler

    def draw_zeros(num_tokens, num_draft_tokens, generators, device):
        return torch.zeros(num_tokens, dtype=torch.float64, device=device)

    monkeypatch.setattr(rejection_sampler, "generate_uniform_probs", draw_zeros)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = (
        "import os\n\n\ndef read(path):\n",
        "class Stack:\n    def push(",
        "for key, value in ",
    )
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(file)


@pytest.fixture(scope="module")
def honest(prompts) -> Certificate:
    probabilistic = {"draft_sample_method": "probabilistic"}
    return certify(
        EAGLE3, CertifyConfig(prompts=prompts, speculative_config=probabilistic, **QUICK)
    )


def test_the_playground_is_certified(honest):
    assert honest.verdict == "certified", honest.faults
    assert [(test.dtype, test.flags.concurrency) for test in honest.greedy] == [
        ("float32", 1),
        ("float32", 8),
        ("bfloat16", 1),
        ("bfloat16", 8),
    ]
    for test in honest.greedy:
        assert test.num_tokens == 3 * 16 and sum(map(sum, test.accepted)) > 10
        if test.dtype == "float32":
            assert test.alone == test.speculated and not test.divergences
    kinds = [(test.dtype, test.drawn) for test in honest.sampled]
    assert kinds[:2] == [("float32", "with speculation"), ("float32", "without")]
    for sampled in honest.sampled:
        assert [law.prompt for law in sampled.prompts] == [0, 1]
        assert sampled.degrees >= 2 and sampled.num_tokens == 5


def test_certificate_is_recomputed_from_its_raw_counts(honest, tmp_path):
    write_certificate(honest, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"certificate.json", "certificate.html"}
    written = json.loads((tmp_path / "certificate.json").read_text())
    assert written["verdict"] == "certified" and written["faults"] == []
    assert {"torch", "transformers", "device"} <= set(written["environment"])
    assert len(written["verifier_sha256"]) == len(written["speculator_sha256"]) == 64
    followed: dict[tuple, int] = {}
    for law in written["sampled"][0]["prompts"]:
        assert law["chi_square"] == pytest.approx(sum(map(_chi_square, law["prefixes"])))
        for prefix in law["prefixes"]:
            assert sum(prefix["counts"]) == pytest.approx(sum(prefix["expected"]), abs=0.01)
            followed[law["prompt"], *prefix["prefix"]] = sum(prefix["counts"])
    deeper = {prefix: n for prefix, n in followed.items() if prefix[:-1] in followed}
    assert deeper and all(n <= followed[prefix[:-1]] for prefix, n in deeper.items())
    del written["verdict"], written["faults"]
    assert Certificate.model_validate(written).model_dump() == honest.model_dump()


def _chi_square(prefix) -> float:
    pairs = list(zip(prefix["counts"], prefix["expected"], strict=True))
    if pairs[-1][1] < 5:
        pairs.pop()
    if len(pairs) < 2:
        return 0.0
    scale = sum(n for n, _ in pairs) / sum(e for _, e in pairs)
    return sum((n - scale * e) ** 2 / (scale * e) for n, e in pairs)


def test_page_is_readable_and_needs_no_network(honest, tmp_path):
    write_certificate(honest, tmp_path)
    page = (tmp_path / "certificate.html").read_text()
    for words in ("losslessness certificate", "verdict: certified", "concurrency=8", "chi-square"):
        assert words in page
    for fetched in ("http://", "https://", "src=", "<link", "<script"):
        assert fetched not in page


@pytest.fixture(scope="module")
def judged(prompts):
    """Draws of one engine at several seeds and biases, and an engine that judges them."""
    from vllm.v1.sample import rejection_sampler

    from speculators_vllm.verdicts.comparison import compare_draws, draw, find_divergences

    settings = CertifyConfig(prompts=prompts, dtypes=("float32",), draws=200)
    plan = checks._check(EAGLE3, settings)
    flags = plan.flag_sets[0]
    uniform = rejection_sampler.generate_uniform_probs
    samplers = {
        **{f"seed {seed}": uniform for seed in range(3)},
        "half as strict": lambda *args: 0.5 * uniform(*args),
        "accepts everything": lambda *args: 0.0 * uniform(*args),
    }
    drawn = {}
    with offline.loaded(**plan.speculating("float32", flags)) as llm:
        for seed, (name, sampler) in enumerate(samplers.items()):
            torch.manual_seed(seed)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(rejection_sampler, "generate_uniform_probs", sampler)
                drawn[name] = draw(llm, plan.contexts, 200, plan.num_sampled_tokens)
    with offline.loaded(**plan.arguments("float32", flags)) as llm:
        tests = compare_draws(llm, plan.contexts, drawn, plan.num_logprobs)
        ids = [prompt.token_ids for prompt in plan.prompts]
        alone = _greedy(llm, ids)
        wrong = [list(output) for output in alone]
        vocab_size = plan.pair.verifier_config.get_text_config().vocab_size
        wrong[1][3] = (wrong[1][3] + 1) % vocab_size
        wrong[2] = wrong[2][:-2]
        divergences = find_divergences(llm, ids, alone, wrong)
        assert find_divergences(llm, ids, alone, alone) == []
    return tests, alone, wrong, divergences


def _greedy(llm, prompts):
    from vllm import SamplingParams

    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = llm.generate(inputs, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("name", ["seed 0", "seed 1", "seed 2"])
def test_sampled_drafts_keep_the_verifiers_law(judged, name):
    from speculators_vllm.verdicts.chi_square import combine

    p_values = [law.p_value for law in judged[0][name]]
    assert len(p_values) == 3 and combine(p_values) > 1e-3


@pytest.mark.parametrize("name", ["half as strict", "accepts everything"])
def test_biased_sampler_is_caught(judged, name):
    from speculators_vllm.verdicts.chi_square import combine

    assert combine([law.p_value for law in judged[0][name]]) < BROKEN


def test_wrong_token_is_no_near_tie(judged):
    _, alone, wrong, (changed, shortened) = judged
    assert (changed.prompt, changed.position) == (1, 3)
    assert (changed.verifier_token, changed.speculated_token) == (alone[1][3], wrong[1][3])
    assert changed.gap > 0.25 and not changed.is_near_tie(0.25)
    assert (shortened.prompt, shortened.position) == (2, 10)
    assert shortened.speculated_token is None and not shortened.is_near_tie(1e9)


def test_biased_engine_is_not_certified(accepting_everything, prompts, capfd, monkeypatch):
    quick = ("--draws", "100", "--sampled-prompts", "1", "--max-tokens", "4", "--json")
    arguments = [EAGLE3, "--dtypes", "float32", "--prompts", prompts, "--flags", "{}", *quick]
    monkeypatch.setattr("sys.argv", ["certify", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_function(command.run)
    assert stopped.value.code == 1
    shown = capfd.readouterr()
    certificate = json.loads(shown.out[shown.out.index("{\n") :])  # log lines: pytest's stdout
    assert certificate["verdict"] == "not certified"
    speculated, alone = certificate["sampled"]
    assert speculated["p_value"] < BROKEN < alone["p_value"]
    (line,) = [line for line in shown.err.splitlines() if line.startswith("not certified: ")]
    assert "sampled with speculation, float32, plain: p " in line


REFUSED = {
    "--flags enable_prefix_cachin: vLLM has no such argument. Did you mean 'enable_prefix_": {
        "flags": ({"enable_prefix_cachin": False},)
    },
    "--flags dtype: this command decides it": {"flags": ({"dtype": "float16"},)},
    "--flags: concurrency is 0, expected an integer": {"flags": ({"concurrency": 0},)},
    "--flags: thinking_token_budget is -1, expected": {"flags": ({"thinking_token_budget": -1},)},
    "--engine-args seed": {"engine_args": {"seed": 1}},
    "--speculative-config model": {"speculative_config": {"model": "x"}},
    "--speculative-config draft_method: vLLM has no": {"speculative_config": {"draft_method": "x"}},
    "num_speculative_tokens is 0, expected an integer": {
        "speculative_config": {"num_speculative_tokens": 0}
    },
    "vLLM refuses the flags max_num_batched_tokens=0": {"flags": ({"max_num_batched_tokens": 0},)},
    "nowhere: no such folder": {"verifier": "/nowhere"},
    "nowhere.jsonl: not a readable file of rows": {"prompts": "nowhere.jsonl"},
    "holds no prompts": {"prompts": "empty.jsonl"},
    "expected fewer than 4": {"max_tokens": 60, "engine_args": {"max_model_len": 64}},
    "--output: a certificate cannot be written to file": {"output": Path("file")},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_at_fault_is_one_line_before_anything_loads(message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(offline, "loaded", None)
    with pytest.raises(SpeculatorError, match=message) as refused:
        certify(EAGLE3, CertifyConfig(**REFUSED[message]))
    assert "\n" not in str(refused.value)


def test_another_verifier_is_refused(tmp_path):
    make_verifier().save_pretrained(tmp_path)
    with pytest.raises(SpeculatorError, match="hidden size 32; the speculator was made for 128"):
        certify(EAGLE3, CertifyConfig(verifier=str(tmp_path)))
    with pytest.raises(SpeculatorError, match="/nowhere: no such folder"):
        certify("/nowhere", CertifyConfig())


def test_near_ties_are_told_from_losses():
    from speculators_vllm.verdicts.certificate import Divergence, FlagSet, GreedyTest

    def diverging(gap, later, bound):
        found = Divergence(
            prompt=0,
            position=1,
            verifier_token=5,
            speculated_token=6,
            gap=gap,
            largest_later_gap=later,
        )
        return GreedyTest(
            dtype="bfloat16",
            flags=FlagSet(engine_args={}, concurrency=1),
            near_tie_bound=bound,
            alone=[[4, 5]],
            speculated=[[4, 6]],
            accepted=[[1]],
            num_near_ties=0,
            divergences=[found],
        )

    assert diverging(0.2, 0.1, 0.25).faults == []
    assert "prompt 1 differs at token 2" in diverging(0.3, 0.1, 0.25).faults[0]
    assert diverging(0.2, 0.3, 0.25).faults and diverging(None, 0.0, 0.25).faults
    assert diverging(0.0, 0.0, None).faults  # where outputs must be equal


def test_verifiers_that_differ_are_no_fault_of_the_draft(honest):
    assert honest.verifiers.is_equal and honest.verifiers.num_tokens > 20
    apart = honest.verifiers.model_copy(update={"largest": 0.5, "quantization": "fp8"})
    accepted = [[0] * len(one) for one in honest.reference_accepted]
    changed = honest.model_copy(update={"reference_accepted": accepted, "verifiers": apart})
    assert changed.verdict == "certified"
    printed = Console(file=io.StringIO(), width=300)
    print_certificate(changed, printed)
    assert "Transformers and vLLM compute the verifier (fp8) differently" in printed.file.getvalue()


@pytest.mark.parametrize("arguments", [{"reasoning_parser": "qwen3"}, {"reasoning-config": {}}])
def test_where_thoughts_have_budgets_they_are_asked_for(arguments):
    flags = checks._read_flags(CertifyConfig(engine_args=arguments, max_tokens=40), 3)
    assert [one.thinking_token_budget for one in flags] == [None] * 4 + [10]
    assert not any(one.thinking_token_budget for one in checks._read_flags(CertifyConfig(), 3))


def test_without_drafts_nothing_is_certified(honest):
    (test, *_) = honest.greedy
    idle = test.model_copy(update={"accepted": [[], [], []]})
    assert "nothing was drafted" in idle.faults[0]


def test_vllm_keeps_what_the_reference_decoder_keeps(honest):
    reference, served = honest.served
    assert reference == served and reference.num_drafts > 10
    (first, *others) = honest.reference_accepted
    fewer = [max(0, kept - 1) for kept in first]
    changed = honest.model_copy(update={"reference_accepted": [fewer, *others]})
    assert changed.verdict == "not certified"
    assert "acceptance: at position 1 the reference decoder accepts" in changed.faults[0]
