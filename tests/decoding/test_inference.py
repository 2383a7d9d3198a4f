"""The inference engine of two whole models."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from speculators_core import GlobalConfig, SpeculativeDecodingConfig
from speculators_core.decoding.inference import (
    Continued,
    SpeculativeConfig,
    SpeculativeInferenceEngine,
)
from speculators_core.errors import SpeculatorError
from tests.conftest import VOCAB_SIZE, make_verifier


@pytest.fixture(scope="module")
def small():
    return make_verifier(num_hidden_layers=2, initializer_range=0.3)


def make_tokenizer(last: str = "w95") -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCAB_SIZE - 1)} | {last: VOCAB_SIZE - 1}
    words["<pad>"] = words.pop("w0")
    inner = Tokenizer(models.WordLevel(words, unk_token="w1"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="w2")


@pytest.fixture(scope="module")
def folders(verifier, small, tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    for name, model in (("main", verifier), ("draft", small)):
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return root


def test_engine_continues_prompts_as_the_main_model_does(folders, verifier):
    config = SpeculativeConfig(
        main_model_path=str(folders / "main"),
        draft_model_path=str(folders / "draft"),
        max_speculative_tokens=3,
        max_new_tokens=15,
    )
    result = SpeculativeInferenceEngine.from_config(config).generate(["w5 w6 w7", "w9"])
    for row, ids in enumerate(([5, 6, 7], [9])):
        alone = verifier.generate(torch.tensor([ids]), max_new_tokens=15, do_sample=False)
        assert result.token_ids[row] == alone[0, len(ids) :].tolist()
        assert result.acceptance[row].speculative_tokens == 3
        assert result.texts[row].split() == [f"w{i}" for i in result.token_ids[row]]


def test_engine_samples_by_its_settings(folders):
    def run(**kwargs):
        config = SpeculativeConfig(
            main_model_path=str(folders / "main"),
            draft_model_path=str(folders / "draft"),
            max_new_tokens=15,
            **kwargs,
        )
        return SpeculativeInferenceEngine.from_config(config).generate("w5 w6").token_ids

    greedy = run()
    assert run(temperature=1.0, seed=1) == run(temperature=1.0, seed=1)
    assert run(temperature=1.0, seed=1) != run(temperature=1.0, seed=2)
    assert run(temperature=1.0, seed=1, top_k=1) == greedy
    assert run(temperature=1.0, seed=1, top_p=1e-6) == greedy
    assert run(max_speculative_tokens=1) == greedy


def test_models_of_different_vocabularies_are_refused(verifier):
    other = make_verifier(vocab_size=VOCAB_SIZE + 1)
    config = SpeculativeConfig(main_model_path="main", draft_model_path="other")
    with pytest.raises(SpeculatorError, match="other: vocabulary of 97 tokens, but main has"):
        SpeculativeInferenceEngine(verifier, other, make_tokenizer(), config)


def test_models_of_different_tokenizers_are_refused(folders, tmp_path, small):
    small.save_pretrained(tmp_path / "other")
    make_tokenizer(last="another").save_pretrained(tmp_path / "other")
    config = SpeculativeConfig(
        main_model_path=str(folders / "main"), draft_model_path=str(tmp_path / "other")
    )
    with pytest.raises(SpeculatorError, match="its tokenizer is not that of"):
        SpeculativeInferenceEngine.from_config(config)


def test_the_callers_tokenizer_is_left_alone(verifier, small):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "right"
    config = SpeculativeConfig(main_model_path="a", draft_model_path="b", max_new_tokens=2)
    SpeculativeInferenceEngine(verifier, small, tokenizer, config).generate(["w5", "w6 w7"])
    assert tokenizer.padding_side == "right"


# ---- the documented form ----


@pytest.fixture
def engine(verifier, small):
    config = SpeculativeConfig(
        main_model_path="a",
        draft_model_path="b",
        max_speculative_tokens=3,
        max_new_tokens=9,
        temperature=0.7,
        seed=0,
    )
    return SpeculativeInferenceEngine(
        main_model=verifier, draft_model=small, tokenizer=make_tokenizer(), config=config
    )


def test_ids_give_ids_with_the_new_ones_after_them(engine, verifier):
    ids, mask = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    found = engine.generate(input_ids=ids, attention_mask=mask, max_new_tokens=15, do_sample=False)
    alone = verifier.generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=False)
    assert torch.equal(found, alone)
    assert engine.generate(input_ids=ids, do_sample=False).shape == (2, 3 + 9)
    drawn = engine.generate(input_ids=ids, attention_mask=mask, do_sample=True)
    assert torch.equal(drawn, engine.generate(input_ids=ids, attention_mask=mask))
    assert not torch.equal(drawn, found[:, :12])


def test_rows_that_end_early_are_padded_on_the_right(engine):
    engine._backend.continue_all = lambda *_: [Continued([4, 2], None), Continued([5], None)]
    ids = torch.tensor([[7], [8]])
    assert engine.generate(input_ids=ids).tolist() == [[7, 4, 2], [8, 5, 0]]


def test_a_call_without_its_texts_or_temperature_is_refused(engine):
    for arguments in ({}, {"prompts": "w5", "input_ids": torch.tensor([[5]])}):
        with pytest.raises(ValueError, match="either prompts"):
            engine.generate(**arguments)
    engine.config = SpeculativeConfig(main_model_path="a", draft_model_path="b")
    with pytest.raises(ValueError, match="do_sample with temperature 0"):
        engine.generate(input_ids=torch.tensor([[5]]), do_sample=True)


def test_models_may_be_objects(folders):
    from transformers import AutoModelForCausalLM

    names = {"main_model_path": "main", "draft_model_path": "draft"}
    objects = {
        field: AutoModelForCausalLM.from_pretrained(folders / name) for field, name in names.items()
    }
    engine = SpeculativeInferenceEngine.from_config(SpeculativeConfig(**objects, max_new_tokens=5))
    by_name = SpeculativeInferenceEngine.from_config(
        SpeculativeConfig(
            **{field: str(folders / name) for field, name in names.items()}, max_new_tokens=5
        )
    )
    assert engine.generate("w5 w6") == by_name.generate("w5 w6")


def test_a_threshold_accepts_more_greedy_tokens_and_no_sampled_ones(verifier, small):
    def run(threshold, temperature=0.0):
        config = SpeculativeConfig(
            main_model_path="a",
            draft_model_path="b",
            max_new_tokens=40,
            acceptance_threshold=threshold,
            temperature=temperature,
        )
        return SpeculativeInferenceEngine(verifier, small, make_tokenizer(), config).generate("w9")

    exact, loose = (run(threshold).acceptance[0] for threshold in (1.0, 1e-9))
    assert loose.acceptance_length > exact.acceptance_length
    assert loose.acceptance_length == 6
    with pytest.raises(ValueError, match="accept_tolerance: for greedy decoding alone"):
        run(0.5, temperature=1.0)


def test_the_documents_configs_say_the_same(folders):
    speculative = {
        "main_model_path": str(folders / "main"),
        "draft_model_path": str(folders / "draft"),
        "max_speculative_tokens": 2,
    }
    short = SpeculativeConfig.of(SpeculativeDecodingConfig(**speculative))
    assert (short.temperature, short.top_p, short.max_new_tokens) == (0.7, 0.9, 128)
    whole = GlobalConfig.model_validate(
        {"speculative": speculative, "inference": {"max_new_tokens": 4, "do_sample": False}}
    )
    assert GlobalConfig.model_validate_json(whole.model_dump_json()) == whole
    result = SpeculativeInferenceEngine.from_config(whole).generate(["w5 w6"])
    assert len(result.token_ids[0]) == 4 and result.acceptance[0].speculative_tokens == 2
    with pytest.raises(ValueError, match="does not run on DeepSpeed"):
        SpeculativeDecodingConfig(**speculative, deepspeed_config_path="ds.json")


def test_vllm_takes_names_and_is_exact(small):
    names = {"main_model_path": "a", "draft_model_path": "b", "use_vllm": True}
    for wrong, complaint in (
        ({"draft_model_path": small}, "draft_model_path: vLLM loads it from a folder"),
        ({"acceptance_threshold": 0.5}, "vLLM accepts exactly"),
        ({"device": "cuda"}, "vLLM chooses its device"),
    ):
        with pytest.raises(ValueError, match=complaint):
            SpeculativeConfig(**names | wrong)
