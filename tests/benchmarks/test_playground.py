import json

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from benchmarks import playground
from benchmarks.playground import corpus
from benchmarks.playground.verifier import grow, verifier_config
from speculators_core.model import SpeculatorModel


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
    speculator = SpeculatorModel.from_pretrained(playground.EAGLE3, verifier_attachment_mode="full")
    assert speculator.config.verifier.name_or_path == "../verifier"
    for folder in (playground.VERIFIER, playground.EAGLE3):
        log = json.loads((folder / "training_log.json").read_text())
        assert log["seconds"] > 0 and any("eval_loss" in entry for entry in log["history"])


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
