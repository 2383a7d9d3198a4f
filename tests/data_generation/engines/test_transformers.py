import pytest
import torch

from speculators_core.data_generation.engines.pipeline import InferencePipeline, schema_of
from speculators_core.data_generation.engines.transformers import TransformersPipeline
from speculators_core.data_generation.examples import Failure
from speculators_core.data_generation.settings import GenerationPlan
from speculators_core.errors import SpeculatorError
from tests.conftest import VOCAB_SIZE, make_verifier
from tests.data_generation.making import example

LENGTHS = (3, 17, 1, 30, 8, 17)


@pytest.fixture(scope="module")
def verifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verifier")
    model = make_verifier(eos_token_id=20, pad_token_id=0)
    model.save_pretrained(folder)
    return folder, model


def plan_of(folder, states=None, engine=None, **sections):
    content = {
        "data": {
            "verifier": str(folder),
            "datasets": [{"path": "x"}],
            "states": {"layer_ids": [1]} | (states or {}),
        },
        "engine": {"max_length": 40, "max_new_tokens": 12} | (engine or {}),
        "sync": {"path": "states", "dtype": "float32"},
    }
    return GenerationPlan.read(content | sections, "test")


def run(folder, examples, **options):
    with InferencePipeline.from_config(plan_of(folder, **options)) as pipeline:
        return pipeline.run(examples)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_states_are_those_between_the_layers_whatever_stands_beside(verifier, batch_size):
    folder, model = verifier
    examples = [example(i, length) for i, length in enumerate(LENGTHS)]
    results = run(folder, examples, states={"layer_ids": [0, 2]}, engine={"batch_size": batch_size})
    for given, made in zip(examples, results, strict=True):
        with torch.no_grad():
            states = model(given.input_ids[None], output_hidden_states=True).hidden_states
        assert made.key == given.key
        assert made.hidden_states.shape == (len(given.input_ids), 3, 32)
        for slot, layer in enumerate((0, 2)):
            assert torch.allclose(made.hidden_states[:, slot], states[layer][0], atol=1e-4)
        normed = model.model.norm(made.hidden_states[:, 2])  # kept before the norm, given after it
        assert torch.allclose(normed, states[4][0], atol=1e-4)
        assert torch.equal(made.loss_mask, given.loss_mask)


def test_batches_hold_as_many_texts_as_asked(verifier, monkeypatch):
    sizes = []
    together = TransformersPipeline._run_together
    monkeypatch.setattr(
        TransformersPipeline,
        "_run_together",
        lambda self, batch: (sizes.append(len(batch)), together(self, batch))[1],
    )
    run(verifier[0], [example(i, 4) for i in range(7)], engine={"batch_size": 3})
    assert sizes == [3, 3, 1]


def test_a_mean_is_over_the_layers_beside_the_last(verifier):
    given = [example(0, 6)]
    (whole,) = run(verifier[0], given, states={"layer_ids": [1, 2, 3]})
    (mean,) = run(verifier[0], given, states={"layer_ids": [1, 2, 3], "reduce": "mean"})
    expected = whole.hidden_states[:, :3].mean(1)
    assert mean.hidden_states.shape == (6, 2, 32)
    assert torch.allclose(mean.hidden_states[:, 0], expected, atol=1e-6)
    assert torch.equal(mean.hidden_states[:, 1], whole.hidden_states[:, 3])


@pytest.mark.parametrize("last", [True, False])
def test_logits_are_the_verifiers(verifier, last):
    folder, model = verifier
    given = [example(0, 6)]
    states = {"layer_ids": [1], "last": last}
    (full,) = run(folder, given, states=states | {"logits": "full"})
    (top,) = run(folder, given, states=states | {"logits": "top-k", "top_k": 5})
    with torch.no_grad():
        expected = model(given[0].input_ids[None]).logits[0]
    assert full.hidden_states.shape[1] == 1 + last
    assert torch.allclose(full.logits, expected, atol=1e-4)
    values, ids = expected.topk(5)
    assert torch.equal(top.logit_ids, ids) and torch.allclose(top.logits, values, atol=1e-4)


def test_what_the_verifier_writes_is_kept_but_its_last_token(verifier):
    folder, model = verifier
    examples = [example(i, length) for i, length in enumerate(LENGTHS)]
    results = run(folder, examples, states={"tokens": "all", "layer_ids": [1]})
    ended = 0
    for given, made in zip(examples, results, strict=True):
        with torch.no_grad():
            written = model.generate(
                given.input_ids[None],
                attention_mask=torch.ones_like(given.input_ids)[None],
                max_new_tokens=12,
                do_sample=False,
            )[0]
            states = model(written[None], output_hidden_states=True).hidden_states
        num_given, num_kept = len(given.input_ids), len(written) - 1
        ended += int(written[-1]) == 20
        assert made.input_ids.tolist() == written[:-1].tolist()
        assert made.num_prompt_tokens == num_given
        assert made.loss_mask.tolist() == [True] * num_kept
        assert torch.allclose(made.hidden_states[:, 0], states[1][0, :num_kept], atol=1e-4)
    assert 0 < ended < len(examples)  # some texts end by themselves, some by max_new_tokens


def test_nothing_is_written_behind_a_text_that_has_ended(verifier):
    ended, open_ = example(0, 6), example(1, 6)
    ended.input_ids[-1], open_.input_ids[-1] = 20, 21
    results = run(verifier[0], [ended, open_], states={"tokens": "all"})
    assert results[0].input_ids.tolist() == ended.input_ids.tolist()
    assert len(results[1].input_ids) > 6


def test_sampling_repeats_with_its_seed_and_differs_without(verifier):
    given = [example(0, 5)]
    texts = {}
    for name, temperature, seed in (("a", 1.0, 1), ("b", 1.0, 1), ("c", 1.0, 2), ("greedy", 0, 1)):
        (made,) = run(
            verifier[0],
            given,
            states={"tokens": "all"},
            engine={"temperature": temperature},
            run={"seed": seed},
        )
        texts[name] = made.input_ids.tolist()
    assert texts["a"] == texts["b"] != texts["c"]
    assert texts["a"] != texts["greedy"]
    (narrow,) = run(
        verifier[0],
        given,
        states={"tokens": "all"},
        engine={"temperature": 1.0, "top_p": 1e-6},
        run={"seed": 1},
    )
    assert narrow.input_ids.tolist() == texts["greedy"]


def test_an_example_that_cannot_be_run_leaves_the_others_alone(verifier):
    good = [example(0, 5), example(2, 9)]
    outside = example(1, 4)
    outside.input_ids[2] = VOCAB_SIZE
    results = run(verifier[0], [good[0], outside, example(3, 41), good[1]])
    assert results[1] == Failure("0/1", "token id 96 is not in the vocabulary of 96")
    assert results[2] == Failure("0/3", "41 tokens, expected 1 to 40 (engine.max_length)")
    alone = run(verifier[0], good)
    for made, expected in zip((results[0], results[3]), alone, strict=True):
        assert torch.equal(made.hidden_states, expected.hidden_states)


def test_a_batch_that_fails_is_run_text_by_text(verifier):
    with InferencePipeline.from_config(plan_of(verifier[0])) as pipeline:
        decoder = pipeline.model.get_decoder()

        def refuse(module, args, kwargs):
            if (kwargs["input_ids"] == 95).any():
                raise RuntimeError("out of memory\nand more")

        decoder.register_forward_pre_hook(refuse, with_kwargs=True)
        examples = [example(i, 6) for i in range(4)]
        for given in examples:
            given.input_ids.clamp_(max=90)
        examples[2].input_ids[1] = 95
        results = pipeline.run(examples)
    assert results[2] == Failure("0/2", "out of memory")
    assert [type(result).__name__ for result in results].count("Failure") == 1


def test_states_that_are_no_numbers_are_set_aside(verifier):
    with InferencePipeline.from_config(plan_of(verifier[0])) as pipeline:
        pipeline.model.get_input_embeddings().weight.data[3] = float("nan")
        odd, even = example(0, 5), example(1, 5)
        odd.input_ids[0], even.input_ids[:] = 3, 4
        results = pipeline.run([odd, even])
    assert results[0] == Failure("0/0", "the verifier's states are not finite in float32")
    assert not isinstance(results[1], Failure)


def test_states_that_the_store_cannot_hold_are_set_aside(verifier):
    plan = plan_of(verifier[0], sync={"path": "states", "dtype": "float16"})
    with InferencePipeline.from_config(plan) as pipeline:
        pipeline.model.get_input_embeddings().weight.data[3] = 1e5
        odd = example(0, 5)
        odd.input_ids[0] = 3
        (result,) = pipeline.run([odd])
    assert result == Failure("0/0", "the verifier's states are not finite in float16")


def test_the_verifiers_type_is_the_one_that_is_asked_for(verifier):
    (made,) = run(verifier[0], [example(0, 9)], engine={"dtype": "bfloat16"})
    (exact,) = run(verifier[0], [example(0, 9)])
    difference = (made.hidden_states - exact.hidden_states).norm() / exact.hidden_states.norm()
    assert 1e-4 < difference < 0.1


REFUSED = {
    "layer": (
        {"states": {"layer_ids": [5]}},
        r"is \[5\]; expected unique, ascending ids in 0..4",
    ),
    "order": ({"states": {"layer_ids": [2, 1]}}, "expected unique, ascending"),
    "top_k": ({"states": {"logits": "top-k", "top_k": 97}}, "top_k is 97; expected at most 96"),
    "length": ({"engine": {"max_length": 129}}, "add up to 129 tokens; expected at most 128"),
    "writing": (
        {"states": {"tokens": "all"}, "engine": {"max_length": 120}},
        "max_length and engine.max_new_tokens add up to 132",
    ),
    "engine": ({"engine": {"name": "transformer"}}, "unknown engine .* Did you mean"),
    "device": ({"engine": {"device": "cuda:77"}}, "engine.device cuda:77"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_plan_that_does_not_fit_its_verifier_is_refused(verifier, what):
    options, words = REFUSED[what]
    with pytest.raises(SpeculatorError, match=words):
        InferencePipeline.from_config(plan_of(verifier[0], **options))


def test_the_default_layers_are_eagle_3s(tmp_path):
    make_verifier(num_hidden_layers=8).config.save_pretrained(tmp_path)
    assert schema_of(plan_of(tmp_path, states={"layer_ids": None})).layer_ids == (2, 4, 5, 8)
    make_verifier().config.save_pretrained(tmp_path)
    with pytest.raises(SpeculatorError, match="data.states.layer_ids: a verifier of 4 layers"):
        schema_of(plan_of(tmp_path, states={"layer_ids": None}))
