import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import playground
from benchmarks.acceptance.drafts import find_draft
from benchmarks.acceptance.engines import Decoding, Draft
from benchmarks.acceptance.measurement import measure, measure_and_write
from benchmarks.acceptance.report import print_report, report_k, write_report
from benchmarks.acceptance.settings import AcceptanceConfig
from benchmarks.acceptance.transformers_engine import TransformersRunner
from speculators_core.console import console
from speculators_core.decoding.independent import LanguageModelDraft
from speculators_core.decoding.prompts import TokenizedPrompt
from speculators_core.diagnosis.acceptance_report import DraftReport
from speculators_core.errors import SpeculatorError, UnreadFormatError
from speculators_core.provenance import hash_weights
from speculators_core.verifier.reading import read_verifier_config
from tests.benchmarks.acceptance.test_statistics import record
from tests.conftest import VOCAB_SIZE, make_verifier

EAGLE3 = str(playground.EAGLE3)
QUICK = {
    "engine": "transformers",
    "limit_per_category": 1,
    "max_tokens": 12,
    "model": (EAGLE3,),
}


@pytest.fixture(scope="module")
def report():
    return measure(AcceptanceConfig(**QUICK, k=(1, 3)))


def test_report_can_be_recomputed_from_its_raw_counts(report, tmp_path):
    write_report(report, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.json",
        "acceptance.png",
        "acceptance-dark.png",
    }
    written = json.loads((tmp_path / "report.json").read_text())
    for entry in written["drafts"][0]["by_k"]:
        accepted = [count for request in entry["requests"] for count in request["accepted"]]
        assert entry["pooled"]["acceptance_length"] == 1 + sum(accepted) / len(accepted)
        assert max(accepted) <= entry["speculative_tokens"]
    assert written["verifier_sha256"] == hash_weights(report.verifier)
    assert written["settings"]["max_tokens"] == 12
    assert {"torch", "transformers", "device"} <= set(written["environment"])


def test_categories_add_up_to_the_whole(report):
    for entry in report.drafts[0].by_k:
        assert sum(s.num_drafts for s in entry.categories.values()) == entry.pooled.num_drafts
        assert set(entry.categories) == {"class", "function", "body", "chat"}


def test_contexts_add_up_to_the_whole(report):
    for entry in report.drafts[0].by_k:
        parts = entry.contexts.values()
        assert {"<128", "128-512"} <= set(entry.contexts)
        assert sum(part.num_drafts for part in parts) == entry.pooled.num_drafts
        kept = [
            sum(column) for column in zip(*(p.accepted_per_position for p in parts), strict=True)
        ]
        assert kept == entry.pooled.accepted_per_position


class ShortSighted(LanguageModelDraft):
    """Proposes what the verifier will say, and nonsense from 512 tokens on."""

    def propose(self, state, confirmed, num_tokens, choose):
        proposal = super().propose(state, confirmed, num_tokens, choose)
        if confirmed.positions.max() + 2 < 512:  # tokens so far, the bonus token among them
            return proposal
        return replace(proposal, token_ids=(proposal.token_ids + 1) % VOCAB_SIZE)


def test_a_draft_that_fails_beyond_a_length_shows_it(report):
    verifier = make_verifier(max_position_embeddings=1024)
    prompts = [
        TokenizedPrompt(category="a", token_ids=[7 * i % VOCAB_SIZE for i in range(length)])
        for length in (100, 400, 500)
    ]
    draft = Draft("language-model", "short-sighted", 4)
    runner = TransformersRunner(verifier, draft, ShortSighted(verifier), 1)
    records = runner.run(prompts, Decoding(80, 0.0, 0, ignore_eos=True), lambda: None)
    entry = report_k(4, [records], [], greedy=True)
    lengths = {name: part.acceptance_length for name, part in entry.contexts.items()}
    assert lengths == {"<128": 5.0, "128-512": 5.0, "512-2k": 1.0}
    by_k = [DraftReport(name="short-sighted", kind="speculator", sha256=None, by_k=[entry])]
    with console.capture() as shown:
        print_report(report.model_copy(update={"drafts": by_k}))
    line, tables = shown.get().split("acceptance", 1)
    assert "512-2k" in tables.split("by context length")[1]
    num = entry.contexts["512-2k"].num_drafts
    worst = f"worst at position 1 with 512-2k tokens of context, 0 of {num} kept (0.00)"
    assert f"short-sighted, K = 4: {worst}" in " ".join(line.split())


def test_no_cell_is_named_where_drafts_are_few(report):
    few = report.drafts[0].by_k[0]
    contexts = {name: part for name, part in few.contexts.items() if part.num_drafts < 50}
    assert contexts
    by_k = [few.model_copy(update={"contexts": contexts})]
    drafts = [report.drafts[0].model_copy(update={"by_k": by_k})]
    with console.capture() as shown:
        print_report(report.model_copy(update={"drafts": drafts}))
    assert "by context length" in shown.get() and "tokens of context" not in shown.get()


@pytest.mark.parametrize("learnt", [40, 4000])
def test_a_draft_measured_in_longer_texts_than_it_has_learnt_is_named(report, tmp_path, learnt):
    folder = shutil.copytree(playground.EAGLE3, tmp_path / "draft")
    front = f"---\ntrained_lengths: {{longest: {learnt}, mean: 30}}\n---\n"
    (folder / "README.md").write_text(front)
    config = AcceptanceConfig(
        **QUICK | {"model": (str(folder),), "max_tokens": 2}, verifier=report.verifier
    )
    found = measure(config)
    longest = max(r.num_prompt_tokens for r in found.baseline_requests) + 2
    told = f"at most 40 tokens (30 on average), measured in texts of up to {longest}"
    assert found.remarks == [f"draft: trained on examples of {told}"] * (learnt == 40)


LOOP, OTHER = [1, 2] * 20, list(range(40))


@pytest.mark.parametrize("outputs", [[LOOP, OTHER], [OTHER, OTHER], [LOOP, LOOP]])
def test_the_loop_free_tau_comes_first_where_text_repeats_itself(report, outputs):
    ours = [record([3, k], output_ids=ids) for k, ids in enumerate(outputs)]
    alone = [record([], output_ids=ids) for ids in outputs]
    entry = report_k(3, [ours], [alone], greedy=True)
    by_k = [DraftReport(name="draft", kind="speculator", sha256=None, by_k=[entry])]
    with console.capture() as shown:
        print_report(report.model_copy(update={"drafts": by_k, "baseline_requests": alone}))
    rows = [line.split() for line in shown.get().splitlines()]
    names, row = (next(row for row in rows if word in row) for word in ("tau", "3"))
    tau, pooled = row[5], f"{1 + 7 / 4:.3f}"
    if outputs[0] is OTHER:
        assert names[5] == "tau" and tau == pooled and "flatters" not in shown.get()
        return
    assert names[5:7] == ["loop-free", "tau"] and row[9] == pooled
    assert tau == ("3.000" if outputs[1] is OTHER else "-")
    assert "flatters the pooled tau" in " ".join(shown.get().split())


def test_a_report_is_drawn_again_without_measuring(report, tmp_path):
    write_report(report, tmp_path)
    drawn = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert drawn["acceptance.png"] != drawn["acceptance-dark.png"]
    for name in drawn:
        (tmp_path / name).unlink()
    config = AcceptanceConfig(report=tmp_path / "report.json")
    with console.capture() as shown:
        measure_and_write(config)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == drawn
    assert "loop-free" in shown.get()
    elsewhere = config.model_copy(update={"output": tmp_path / "elsewhere"})
    measure_and_write(elsewhere)
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == set(drawn)


@pytest.mark.parametrize(
    ("options", "content", "message"),
    [
        ({"k": (3,)}, None, "--k: without effect with --report"),
        ({"server": {"base_url": "http://x"}}, None, "--base-url: without effect"),
        ({}, "{}", "not a report of `speculators acceptance`: settings"),
        ({}, None, "holds no report.json; expected a report"),
    ],
)
def test_what_cannot_be_drawn_again_is_one_line(options, content, message, tmp_path):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    config = AcceptanceConfig(report=tmp_path / "report.json", **options)
    assert not config.runs_vllm
    with pytest.raises(SpeculatorError, match=message):
        config.check()
        measure_and_write(config)


def test_outputs_are_the_verifiers_own(report):
    by_k = report.drafts[0].by_k
    assert [entry.num_identical for entry in by_k] == [4, 4]
    assert by_k[0].first_differences == {}


def test_table_says_what_matters(report):
    with console.capture() as shown:
        print_report(report)
    for words in ("tau", "speed-up", "identical", "8-grams repeat", "4 of 4", "eagle3"):
        assert words in shown.get()


def test_every_kind_of_draft_stands_in_one_table():
    names = (EAGLE3, "prompt-lookup", "assisted", str(playground.VERIFIER))
    report = measure(AcceptanceConfig(**QUICK | {"model": names}))
    assert [draft.short_name for draft in report.drafts] == [
        "eagle3",
        "prompt-lookup",
        "assisted",
        "verifier",
    ]
    kinds = [draft.kind for draft in report.drafts]
    assert kinds == ["speculator", "prompt-lookup", "assisted", "language-model"]
    assert [draft.by_k[0].num_identical for draft in report.drafts] == [4, 4, 4, 4]
    itself = report.drafts[3].by_k[0].pooled
    assert itself.acceptance_length == 4.0  # the verifier agrees with itself
    with console.capture() as shown:
        print_report(report)
    (assisted,) = [line for line in shown.get().splitlines() if "assisted" in line]
    assert assisted.count(" - ") == 4  # Transformers does not say what it kept


def test_concurrent_requests_are_the_same_requests(report):
    together = measure(AcceptanceConfig(**QUICK, k=(3,), concurrency=4))
    (entry,) = together.drafts[0].by_k
    assert entry.num_identical == 4
    assert (
        entry.pooled.accepted_per_position == report.drafts[0].by_k[1].pooled.accepted_per_position
    )


def test_sampled_outputs_are_not_compared():
    report = measure(AcceptanceConfig(**QUICK, temperature=1.0))
    assert report.drafts[0].by_k[0].num_identical is None
    assert report.drafts[0].by_k[0].pooled.num_drafts > 0


def test_runs_repeat_everything():
    report = measure(AcceptanceConfig(**QUICK, runs=2))
    assert len(report.baseline_tokens_per_s) == 2
    assert len(report.drafts[0].by_k[0].requests) == 8


def test_own_prompts_and_end_of_text(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "import os\\n", "category": "mine"}\n')
    report = measure(
        AcceptanceConfig(
            engine="transformers",
            model=(EAGLE3,),
            prompts=str(file),
            max_tokens=9,
            ignore_eos=True,
        )
    )
    assert set(report.drafts[0].by_k[0].categories) == {"mine"}
    assert len(report.baseline_requests[0].output_ids) == 9


def test_differing_outputs_are_found():
    ours = [[record([1], output_ids=[1, 2, 3]), record([1], output_ids=[4])]]
    alone = [[record([], output_ids=[1, 9, 3]), record([], output_ids=[4])]]
    entry = report_k(1, ours, alone, greedy=True)
    assert entry.num_identical == 1
    assert entry.first_differences == {0: 1}
    assert report_k(1, ours, alone, greedy=False).num_identical is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"engine_args": {"max_model_len": 64}},
            "--engine-args max_model_len: these are",
        ),
        ({"model": ("prompt-lookup",)}, "no verifier is named"),
        ({"model": ("assisted",), "concurrency": 2}, "one request at a time"),
        ({"engine": "vllm", "model": ("assisted",)}, "one request at a time"),
        ({"engine": "vllm", "model": ("prompt-lookup",), "k": (1, 2)}, "pass one number to --k"),
        ({"engine": "vllm", "engine_args": {"max_model_len": "x"}}, "found 'x', expected a number"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_loads(settings, message):
    with pytest.raises(SpeculatorError, match=message):
        measure(AcceptanceConfig(**QUICK | settings))


def test_a_path_that_vllm_would_misread_is_refused_before_anything_loads(tmp_path):
    link = tmp_path / "eagle3_or_mtp"
    link.symlink_to(playground.SPECULATORS["mtp"])
    with pytest.raises(SpeculatorError, match="the path holds 'eagle3'"):
        measure(AcceptanceConfig(**QUICK | {"engine": "vllm", "model": (str(link),)}))


def test_drafts_of_one_folder_name_are_told_apart(report):
    twice = report.model_copy(update={"drafts": [report.drafts[0], report.drafts[0].model_copy()]})
    twice.drafts[1].name = "elsewhere/eagle3"
    with console.capture() as shown:
        print_report(twice)
    assert "elsewhere/eagle3" in shown.get()


def test_a_draft_in_its_authors_format_is_not_decoded_with_random_weights(tmp_path):
    raw = {"model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(SpeculatorError, match="EAGLE-3 in its authors' own format"):
        find_draft(str(tmp_path), for_vllm=False)


def test_a_pickled_draft_is_measured_by_vllm_alone(tmp_path, caplog):
    folder = shutil.copytree(playground.EAGLE3, tmp_path / "draft")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    draft, name = find_draft(str(folder), for_vllm=False), str(playground.VERIFIER)
    with pytest.raises(UnreadFormatError, match="the weights are pickled"):
        draft.check(name, read_verifier_config(name), for_vllm=False)
    draft.check(name, read_verifier_config(name), for_vllm=True)
    assert "vLLM runs the draft unchecked" in caplog.text


def test_a_verifier_that_the_draft_names_and_cannot_be_read_is_called_so(tmp_path):
    shutil.copytree(EAGLE3, tmp_path / "draft")
    content = json.loads((tmp_path / "draft" / "config.json").read_text())
    (tmp_path / "file").touch()
    for name in ("/model/from_s3", str(tmp_path / "file")):
        content["speculators_config"]["verifier"]["name_or_path"] = name
        (tmp_path / "draft" / "config.json").write_text(json.dumps(content))
        with pytest.raises(
            SpeculatorError, match=f"names the verifier {name}, which cannot.*--ver"
        ):
            measure(AcceptanceConfig(**QUICK | {"model": (str(tmp_path / "draft"),)}))
