"""`speculators check`: sound speculators pass, and each way to break one is named."""

import gc
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from benchmarks import playground
from speculators_core.data_generation.examples import GeneratedExample
from speculators_core.data_generation.packing import RowLayout
from speculators_core.diagnosis.replay import see
from speculators_core.errors import SpeculatorError
from speculators_core.format.vocabulary import choose_draft_vocabulary
from speculators_vllm import offline
from speculators_vllm.commands.check import run
from speculators_vllm.verdicts import verifiers
from speculators_vllm.verdicts.check import check, print_report
from speculators_vllm.verdicts.settings import CheckConfig
from speculators_vllm.verdicts.traces import compare
from tests.conftest import DRAFTS, make_verifier
from tests.quantized import quantize
from tests.vllm.serving import SMALL, fit, write_tokenizer

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A verifier with uneven final norm weights, its tokenizer, and prompts of the fitting."""
    folder = tmp_path_factory.mktemp("check")
    verifier = make_verifier(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    norm = verifier.get_decoder().norm.weight
    norm.data = torch.rand(norm.shape, generator=torch.Generator().manual_seed(3)) * 2 + 0.2
    verifier.save_pretrained(folder / "verifier")
    write_tokenizer(folder / "verifier", SMALL["vocab_size"])
    prompts = [{"prompt": str(first)} for first in range(3, 35, 4)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    return folder


@pytest.fixture(scope="module")
def fitted(small):
    """A draft of each kind that the tests break, trained for seconds."""
    verifier = AutoModelForCausalLM.from_pretrained(small / "verifier", dtype=torch.float32).eval()

    def shifted(batch):
        """Each token beside its own state: what a trainer with an off-by-one trains on."""
        return replace(batch, aux_hidden_states=batch.aux_hidden_states.roll(-1, 1))

    maps = choose_draft_vocabulary({i: 1 for i in range(8, 128)}, 120, 128, always=[0])
    kinds = {
        "eagle3": (
            "eagle3",
            (None, None),
            {"aux_layer_ids": (0, 1, 2), "fc_norm": True, "norm_before_fc": False},
            lambda batch: batch,
        ),
        "shifted": ("eagle3", (None, None), {"aux_layer_ids": (1, 2, 3)}, shifted),
        "reduced": ("eagle3", maps, {"aux_layer_ids": (1, 2, 3)}, lambda batch: batch),
        "mtp": ("mtp", (None, None), {}, lambda batch: batch),
    }
    for name, (algorithm, vocabulary, recipe, change) in kinds.items():
        torch.manual_seed(1)
        model = DRAFTS[algorithm].from_training_args(
            verifier.config,
            *vocabulary,
            verifier=verifier,
            name_or_path=str(small / "verifier"),
            **recipe,
        )
        fit(model, verifier, change)
        model.save_pretrained(small / name)
    return small


@pytest.fixture
def broken(fitted, tmp_path):
    """Copies a fitted draft with other keys of its config, or other tensors."""

    def edit(name, config=lambda config: None, tensors=lambda tensors: None) -> Path:
        folder = shutil.copytree(fitted / name, tmp_path / name)
        content = json.loads((folder / "config.json").read_text())
        config(content)
        (folder / "config.json").write_text(json.dumps(content))
        weights = load_file(folder / "model.safetensors")
        tensors(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return edit


def checked(folder, fitted, **settings):
    prompts = str(fitted / "prompts.jsonl")
    return check(str(folder), CheckConfig(prompts=prompts, max_tokens=40, **settings))


@pytest.mark.parametrize("name", ["eagle3", "reduced", "mtp"])
def test_sound_drafts_pass(fitted, name):
    report = checked(fitted / name, fitted)
    assert report.verdict == "fit to serve", report.faults
    assert report.served == report.reference
    assert report.reference.acceptance_length > 1.2
    assert max(difference for _, difference in report.stages) < 1e-4
    assert report.stages[-1][0] == "logits"


def off_by_one(tensors):
    tensors["d2t"] = (tensors["d2t"] - 1).clamp_min(0)
    del tensors["t2d"]


CAUSES = {
    "d2t": ("reduced", {"tensors": off_by_one}, "d2t offset"),
    "shift": ("shifted", {}, "position shift"),
    "timing": (
        "mtp",
        {"config": lambda c: c.update(verifier_state="pre_norm")},
        "hidden-state timing",
    ),
}


def test_few_positions_are_named(fitted, broken):
    folder = broken(
        "eagle3",
        config=lambda c: c["transformer_layer_config"].update(max_position_embeddings=16),
    )
    report = checked(folder, fitted)
    assert report.is_fit, report.faults
    (finding,) = (f for f in report.findings if "max_position_embeddings" in f.text)
    assert "is 16, and 512 positions are served" in finding.text


@pytest.mark.parametrize("what", CAUSES)
def test_a_misread_draft_is_named_with_its_cause(fitted, broken, what):
    name, edits, cause = CAUSES[what]
    report = checked(broken(name, **edits), fitted)
    assert report.verdict == f"not fit to serve: {cause}"
    (fault,) = report.faults
    assert "tau would be" in fault.text


def test_a_misread_draft_of_the_playground_is_named(tmp_path):
    folder = shutil.copytree(playground.EAGLE3, tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    config["eagle_aux_hidden_state_layer_ids"] = [14, 15, 16]
    (folder / "config.json").write_text(json.dumps(config))
    settings = CheckConfig(
        verifier=str(playground.VERIFIER),
        prompts=str(playground.PROMPTS),
        limit_per_category=2,
        max_tokens=40,
    )
    report = check(str(folder), settings)
    assert report.verdict == "not fit to serve: wrong layer ids"


SHORT = 24


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A draft trained on pieces of 24 tokens, with a card that states it, and long prompts."""
    home = tmp_path_factory.mktemp("short")
    verifier = make_verifier(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    verifier.save_pretrained(home / "verifier")
    write_tokenizer(home / "verifier", SMALL["vocab_size"])
    starts = torch.arange(3, 35, 4)[:, None]
    written = verifier.generate(
        starts,
        attention_mask=torch.ones_like(starts),
        max_new_tokens=440,
        do_sample=False,
        pad_token_id=0,
    )
    texts = [see(verifier, text[:400].tolist(), text[400:].tolist()) for text in written]
    torch.manual_seed(1)
    model = DRAFTS["peagle"].from_training_args(
        verifier.config,
        verifier=verifier,
        name_or_path=str(home / "verifier"),
        aux_layer_ids=(1, 2, 3),
        mask_token_id=2,
        speculative_tokens=4,
    )
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr=3e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        optimizer.zero_grad()
        model(pack_pieces(texts, model.aux_layer_ids, draw))[1].backward()
        optimizer.step()
    folder = home / "draft"
    model.save_pretrained(folder)
    front = f"---\ntrained_lengths:\n  longest: {SHORT}\n  mean: {SHORT}\n---\n"
    (folder / "README.md").write_text(front)
    prompts = [{"prompt": " ".join(map(str, text[:400].tolist()))} for text in written]
    (home / "long.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    return folder


def pack_pieces(texts, layer_ids, draw):
    """A row of 16 pieces of the texts, with the states that the verifier had there."""
    ids, examples = [*layer_ids, 4], []
    for number in range(16):
        text = texts[int(torch.randint(len(texts), (1,), generator=draw))]
        first = int(torch.randint(len(text.token_ids) - SHORT, (1,), generator=draw))
        piece = slice(first, first + SHORT)
        states = torch.stack([text.states[layer_id][piece] for layer_id in ids], 1)
        is_trained = torch.ones(SHORT, dtype=torch.bool)
        examples.append(GeneratedExample(str(number), text.token_ids[piece], is_trained, 1, states))
    return RowLayout(None, tuple(range(len(layer_ids))), len(layer_ids)).pack(examples)


def test_contexts_longer_than_trained_are_named(short, capsys):
    settings = CheckConfig(prompts=str(short.with_name("long.jsonl")), max_tokens=40)
    report = check(str(short), settings)
    assert report.verdict == "not fit to serve: context longer than trained"
    (fault,) = report.faults
    assert "contexts of up to 440 tokens, longer than 24 tokens: beyond these tau is" in fault.text
    assert list(report.reference.contexts) == ["128-512"]
    assert report.reference.contexts["128-512"].num_drafts == report.reference.num_drafts
    (warning,) = [one.text for one in report.findings if one.severity == "warning"]
    assert "on examples of at most 24 tokens (24 on average); the prompts reach 440" in warning
    assert "vLLM serves texts of up to 512. Beyond 24 tokens tau is 1." in warning
    print_report(report)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.index("worst at position") < printed.index("accepted by position")
    assert "by context length, reference decoder" in printed


def test_a_draft_that_nothing_mends_is_dead(fitted, broken):
    def scramble(tensors):
        generator = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if "layers" in name and tensor.ndim == 2:
                tensors[name] = torch.randn(tensor.shape, generator=generator)

    report = checked(broken("eagle3", tensors=scramble), fitted)
    assert report.verdict == "not fit to serve: dead draft"
    assert report.served.acceptance_length < 1.05


@pytest.mark.parametrize("name", ["eagle3", "mtp"])
def test_a_quantized_verifier_is_told_apart_from_its_draft(fitted, name, tmp_path):
    """Both engines quantize activations, with other kernels."""
    verifier = shutil.copytree(fitted / "verifier", tmp_path / "verifier")
    quantize(verifier, "int8")
    report = checked(fitted / name, fitted, verifier=str(verifier))
    assert report.is_fit, report.faults
    if report.verifier_difference is not None:
        (warning,) = (finding for finding in report.findings if finding.part == "verifier")
        assert "int-quantized) differently, without any draft" in warning.text


def test_a_draft_is_judged_where_the_verifiers_differ(fitted, monkeypatch):
    """The warning of the verifiers hides no fault of the draft."""
    from speculators_vllm.plugin.networks.mtp import MTPForCausalLM

    monkeypatch.setitem(verifiers.TOLERANCES, torch.float32, -1.0)
    report = checked(fitted / "mtp", fitted)
    assert report.is_fit and report.verifier_difference is not None
    assert all(difference < 1e-3 for _, difference in report.stages)
    compute = MTPForCausalLM.compute_logits
    monkeypatch.setattr(MTPForCausalLM, "compute_logits", lambda *given: 1.1 * compute(*given))
    report = checked(fitted / "mtp", fitted)
    assert [fault.text.partition(" is ")[0] for fault in report.faults] == ["logits"]


def test_a_network_of_vllm_that_computes_otherwise_is_named(monkeypatch):
    """vLLM's own DFlash on a CPU norms each layer's context keys by the first layer's weights."""
    from speculators_vllm.plugin.networks.dflash import DFlashNetwork

    monkeypatch.delattr(DFlashNetwork, "_normalize_context_k")
    settings = CheckConfig(prompts=str(playground.PROMPTS), limit_per_category=2, max_tokens=16)
    report = check(str(playground.SPECULATORS["dflash"]), settings)
    assert report.verdict == "not fit to serve: served otherwise"
    assert report.faults[0].text.startswith(
        "layers.1.self_attn.o_proj is the first tensor that vLLM computes otherwise"
    )


DAMAGE = {
    "missing norm": ("eagle3", {"tensors": lambda t: t.pop("fc_norm.1.weight")}, "fc_norm.1"),
    "d2t offset": ("reduced", {"tensors": lambda t: t.update(d2t=t["d2t"] + 1)}, "d2t and t2d"),
    "wrong layer ids": (
        "eagle3",
        {"config": lambda c: c.update(eagle_aux_hidden_state_layer_ids=[1, 2, 9])},
        "aux layer id 9 is out of range",
    ),
    "damaged checkpoint": (
        "eagle3",
        {"tensors": lambda t: t["fc.weight"].fill_(float("nan"))},
        "holds a NaN",
    ),
    "invalid config": (
        "eagle3",
        {"config": lambda c: c.update(draft_vocab_size=0)},
        "draft_vocab_size: ",
    ),
    "wrong verifier": (
        "eagle3",
        {
            "config": lambda c: c["speculators_config"]["verifier"].update(
                architectures=["LlamaForCausalLM"]
            )
        },
        "is a Qwen3ForCausalLM; the speculator was made for LlamaForCausalLM",
    ),
}


@pytest.mark.parametrize("cause", DAMAGE)
def test_a_damaged_folder_is_named_before_anything_runs(fitted, broken, cause):
    name, edits, words = DAMAGE[cause]
    report = checked(broken(name, **edits), fitted)
    assert report.verdict == f"not fit to serve: {cause}"
    assert words in report.faults[0].text
    assert report.reference is None and report.served is None


def test_an_id_too_many_is_a_fault_of_the_ids(fitted, broken):
    def one_more(config):
        config["eagle_aux_hidden_state_layer_ids"] = [0, 1, 2, 3]
        config["transformer_layer_config"].pop("num_aux_hidden_states", None)

    report = checked(broken("eagle3", config=one_more), fitted)
    assert report.verdict == "not fit to serve: wrong layer ids"
    assert "for 3 aux hidden states, but the config has 4 aux layer ids" in report.faults[0].text


def test_other_ways_to_write_a_sound_draft_are_notes(fitted, broken):
    def config(content):
        content |= {"tie_word_embeddings": True, "model_kind": "draft"}
        content["eagle_aux_hidden_state_layer_ids"].reverse()

    def tensors(found):
        found["lm_head.weight"] += 0.01 * found["lm_head.weight"].flip(0)
        found["verifier_norm.weight"] = torch.full((64,), float("nan"))

    report = checked(broken("eagle3", config=config, tensors=tensors), fitted)
    assert report.verdict == "fit to serve", report.faults
    notes = " ".join(finding.text for finding in report.findings)
    for words in (
        "keys of config.json without effect: model_kind",
        "tie_word_embeddings is true",
        "aux layer ids [2, 1, 0] are read as [0, 1, 2]",
        "tensors without use are ignored: verifier_norm.weight",
        "lm_head.weight is not the verifier's: the draft's is used",
    ):
        assert words in notes


def test_a_draft_that_is_not_read_here_is_not_called_unfit(fitted, broken, tmp_path):
    folder = broken("eagle3")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SpeculatorError, match="not checked. .*weights are pickled") as caught:
        checked(folder, fitted)
    assert caught.value.cause is None


@pytest.mark.parametrize("cause", DAMAGE)
def test_a_reworded_message_changes_no_verdict(fitted, broken, monkeypatch, cause):
    def say(self, message, *, cause=None):
        ValueError.__init__(self, "something is wrong with the norm: d2t, t2d, layer ids missing")
        self.cause = cause

    name, edits, _ = DAMAGE[cause]
    folder = broken(name, **edits)
    monkeypatch.setattr(SpeculatorError, "__init__", say)
    assert checked(folder, fitted).verdict == f"not fit to serve: {cause}"


def test_another_chat_template_beside_the_draft_is_named(fitted, broken):
    folder = broken("mtp")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}7 {{ m.content }} 9 {% endfor %}"
    )
    report = checked(folder, fitted)
    assert report.verdict == "not fit to serve: chat template"
    assert "'7 What is it? 9" in report.faults[0].text
    assert "--chat-template" in report.faults[0].text


def test_what_stock_vllm_would_do_is_said(fitted, broken):
    report = checked(fitted / "mtp", fitted)
    assert any("serves no mtp speculator" in f.text for f in report.findings)

    def second_method(config):
        inner = config["speculators_config"]
        inner["proposal_methods"].append({"proposal_type": "sampling", "speculative_tokens": 2})
        inner["default_proposal_method"] = "sampling"
        inner["proposal_methods"][0]["verifier_accept_k"] = 2

    report = checked(broken("eagle3", config=second_method), fitted)
    texts = " ".join(f.text for f in report.findings if f.part == "stock vLLM")
    assert "takes num_speculative_tokens 3 of the first proposal method" in texts
    assert report.speculative_tokens == 2


def test_k_engine_arguments_and_dtype_reach_both_sides(fitted):
    report = checked(fitted / "mtp", fitted, k=1, engine_args={"max_model_len": 64})
    assert len(report.served.accepted_per_position) == 1
    report = checked(fitted / "mtp", fitted, dtype="bfloat16", limit_per_category=2)
    assert max(difference for _, difference in report.stages) > 1e-4
    assert report.is_fit


def test_the_verifier_is_gone_before_vllm_takes_its_memory(fitted, monkeypatch):
    def alive():
        gc.collect()
        return sum(isinstance(found, Qwen3ForCausalLM) for found in gc.get_objects())

    before, start = alive(), offline.loaded

    def loaded(**arguments):
        assert alive() == before
        return start(**arguments)

    monkeypatch.setattr(offline, "loaded", loaded)
    assert checked(fitted / "mtp", fitted, limit_per_category=2).is_fit


def test_a_draft_that_vllm_cannot_serve_is_a_fault(tmp_path):
    folder = shutil.copytree(playground.SPECULATORS["dflash"], tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sample_from_anchor": True}))
    report = check(str(folder), CheckConfig(verifier=str(playground.VERIFIER)))
    assert "sample_from_anchor is true, which vLLM 0.32 does not serve" in report.faults[0].text
    assert report.verdict == "not fit to serve: unsupported by vLLM"


def test_tensors_without_the_same_numbers_are_unequal():
    ours = torch.tensor([[1.0, 2.0, -torch.inf]])
    for theirs in ([1.0, torch.nan, -torch.inf], [1.0, 2.0, 3.0], [torch.nan] * 3):
        (stage,) = compare({"logits": ours}, {"logits": torch.tensor([theirs])}, torch.float32)
        assert not stage.is_equal
    (stage,) = compare({"logits": ours}, {"logits": ours.clone()}, torch.float32)
    assert stage.is_equal and stage.difference == 0.0


@pytest.mark.parametrize(
    ("speculator", "settings", "words"),
    [
        ("/nowhere", {}, "no such folder"),
        (str(playground.EAGLE3), {"engine_args": {"dtype": "float16"}}, "decides it. Leave it out"),
        (str(playground.EAGLE3), {"engine_args": {"max_modl_len": 9}}, "Did you mean 'max_mod"),
        (str(playground.EAGLE3), {"engine_args": {"max_model_len": "4k"}}, "expected a number"),
        (str(playground.EAGLE3), {"prompts": "/nowhere.jsonl"}, "not a readable file of rows"),
        (str(playground.EAGLE3), {"verifier": "/nowhere"}, "no such folder"),
    ],
)
def test_what_cannot_be_checked_is_one_line(speculator, settings, words):
    with pytest.raises(SpeculatorError, match=words):
        check(speculator, CheckConfig(**settings))


@pytest.mark.slow
def test_the_command_prints_json_alone_and_leaves_with_its_verdict(fitted, broken):
    arguments = ["--prompts", str(fitted / "prompts.jsonl"), "--json"]
    command = [str(Path(sys.executable).with_name("speculators")), "check"]
    sound = subprocess.run(
        [*command, str(fitted / "mtp"), *arguments], capture_output=True, text=True
    )
    assert sound.returncode == 0, sound.stderr[-2000:]
    assert json.loads(sound.stdout)["verdict"] == "fit to serve"
    folder = broken("eagle3", tensors=lambda t: t.pop("fc.weight"))
    damaged = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    assert damaged.returncode == 1
    assert damaged.stdout.splitlines()[-1] == "not fit to serve: damaged checkpoint"
    absent = subprocess.run([*command, "/nowhere"], capture_output=True, text=True)
    assert absent.returncode == 2
    assert absent.stderr.splitlines()[-1].startswith("error: /nowhere: no such folder")


def test_the_report_is_printed(fitted, broken, capsys):
    folder = broken("eagle3", tensors=lambda t: t.pop("fc.weight"))
    with pytest.raises(SystemExit) as left:
        run(str(folder))
    assert left.value.code == 1
