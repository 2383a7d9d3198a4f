import json

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from benchmarks import playground
from benchmarks.playground import corpus
from benchmarks.playground.speculators import PLANS
from benchmarks.playground.verifier import grow, verifier_config
from speculators_core.data_generation.settings import read_plan
from speculators_core.decoding.prompts import read_prompts, tokenize
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.registry import MODELS
from speculators_core.training.settings import read_training_plan
from speculators_core.verifier.reading import read_verifier_config
from tests.conftest import pack_texts


def test_prompts_are_held_out_and_balanced():
    prompts = [json.loads(line) for line in playground.PROMPTS.read_text().splitlines()]
    counts = {p["category"]: 0 for p in prompts}
    for prompt in prompts:
        counts[prompt["category"]] += 1
        assert corpus.SourceFile(path=prompt["source"], text="").is_held_out
    assert len(prompts) == 48 and set(counts.values()) == {12}


def test_it_is_small_bf16_and_whole():
    size = sum(f.stat().st_size for f in playground.CHECKPOINTS.rglob("*") if f.is_file())
    assert size <= 25e6
    verifier = Qwen3ForCausalLM.from_pretrained(playground.VERIFIER)
    assert verifier.dtype == torch.bfloat16
    for name, folder in playground.SPECULATORS.items():
        speculator = SpeculatorModel.from_pretrained(folder, verifier_attachment_mode="full")
        assert speculator.config.speculators_model_type == name
        assert speculator.config.verifier.name_or_path == "../verifier"
        assert speculator.dtype == torch.bfloat16
    log = json.loads((playground.VERIFIER / "training_log.json").read_text())
    assert log["seconds"] > 0 and any("eval_loss" in entry for entry in log["history"])


@pytest.mark.parametrize("name", playground.SPECULATORS)
def test_speculators_are_what_their_plans_say(name):
    """Their shape, their learning rate, and how long they were trained."""
    plan = read_training_plan(PLANS / f"{name}.yaml")
    states = read_plan(PLANS / "answers.yaml").data.states
    folder = playground.SPECULATORS[name]
    found = SpeculatorModel.from_pretrained(folder)
    recipe = dict(plan.model.recipe)
    if "aux_layer_ids" in type(found).recipe_class.model_fields:
        recipe["aux_layer_ids"] = states.layer_ids
    planned = MODELS.load(name).from_training_args(
        read_verifier_config(str(playground.VERIFIER)),
        name_or_path=plan.model.verifier_name,
        **recipe,
    )
    assert found.config.to_dict() | {"dtype": None} == planned.config.to_dict() | {"dtype": None}
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").open()]
    assert max(line["epoch"] for line in lines) == pytest.approx(plan.run.epochs, abs=0.01)
    assert any("eval_acceptance_length" in line for line in lines)
    card = (folder / "README.md").read_text()
    rate = f"learning rate {plan.optimizer.learning_rate:g}"
    assert f"Optimizer: {plan.optimizer.name}, {rate}" in card
    assert not (folder / "run.json").exists()


def test_chat_template_is_what_the_verifier_learnt():
    tokenizer = AutoTokenizer.from_pretrained(playground.VERIFIER)
    messages = [{"role": "user", "content": "Write `f(x)`."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nWrite `f(x)`.<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == text


def test_grown_verifier_repeats_its_layers():
    tokenizer = AutoTokenizer.from_pretrained(playground.VERIFIER)
    shallow, deep = (Qwen3ForCausalLM(verifier_config(tokenizer, n)) for n in (2, 6))
    grow(shallow, deep)
    for index in range(6):
        ours = deep.model.layers[index].state_dict()
        for name, tensor in shallow.model.layers[index % 2].state_dict().items():
            assert torch.equal(ours[name], tensor)
    assert torch.equal(deep.lm_head.weight, shallow.model.embed_tokens.weight)


def test_functions_carry_their_request():
    text = '''
class A:
    def f(self, n):
        """Double it.

        Yes."""
        return 2 * n
'''
    file = corpus.SourceFile(path="x.py", text=text)
    (function,) = corpus.functions(file)
    assert function.request == "Write `f(self, n)`. Double it."
    assert function.source.startswith("def f(self, n):\n    ")


@pytest.mark.parametrize("name", ["peagle", "dflash"])
def test_training_forward_foresees_what_decoding_keeps(name):
    """Both propose all tokens in one pass, so teacher forcing on the output is the decoding."""
    model = SpeculatorModel.from_pretrained(
        playground.SPECULATORS[name], verifier_attachment_mode="full", dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(playground.VERIFIER)
    (prompt, *_) = tokenize(read_prompts(playground.PROMPTS, 1), tokenizer, 512)
    start, k = len(prompt.token_ids), model.config.proposal.speculative_tokens
    output = model.generate(
        torch.tensor([prompt.token_ids]),
        max_new_tokens=40,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    ids = output.sequences[0].tolist()
    batch = pack_texts(model.verifier, [{"input_ids": ids}], None, model.aux_layer_ids)
    with torch.no_grad():
        if name == "dflash":
            anchors = torch.arange(start, len(ids) - 1)
            said = dict(
                zip(anchors.tolist(), model(batch, anchors=anchors)[0].tolist(), strict=True)
            )
        else:
            kwargs, _ = model.get_trainer_kwargs(
                num_depths=k, max_anchors=None, down_sample_ratio=1.0
            )
            by_depth = model(batch, **kwargs)[0][:, 0]  # [depths, seq]
            # The anchor of a bonus token at p is row p - 1; depth d stands at row p - 1 + d.
            said = {
                p: [by_depth[d, p - 1 + d].item() for d in range(k)]
                for p in range(start, len(ids) - k)
            }
    position, foreseen = start, []
    while position < len(ids) - k - 1:
        text = ids[position + 1 : position + 1 + k]
        wrong = [ours != own for ours, own in zip(said[position], text, strict=True)]
        foreseen.append(wrong.index(True) if True in wrong else k)
        position += foreseen[-1] + 1
    assert output.acceptance[0].accepted[: len(foreseen)] == foreseen
    assert sum(foreseen) > 5
