"""Transformers in this process answers conversations."""

import pytest

from speculators_core.data_generation.answers.dialogues import Dialogue
from speculators_core.data_generation.answers.local_model import LocalModel
from speculators_core.data_generation.answers.settings import AnswersConfig
from speculators_core.errors import SpeculatorError
from tests.building.making import write_given


@pytest.fixture(scope="module")
def verifier(tmp_path_factory):
    return str(write_given(tmp_path_factory.mktemp("local")) / "verifier")


def ids_of(verifier, texts, **sampling):
    config = AnswersConfig.model_validate(
        {"verifier": verifier, "sampling": {"max_tokens": 5, **sampling}}
    )
    seed = sampling.get("seed", 0)
    dialogues = [
        Dialogue(text, [{"role": "user", "content": text}], seed=seed, keeps_cut=True)
        for text in texts
    ]
    answered = list(LocalModel(config).answer(iter(dialogues)))
    assert [dialogue.key for dialogue in answered] == list(texts)
    return [dialogue.token_rows[0].input_ids for dialogue in answered]


def test_greedy_answers_do_not_depend_on_what_is_answered_beside_them(verifier):
    texts = ["7 8", "9 10 11 12 13", "6"]
    assert ids_of(verifier, texts) == [ids_of(verifier, [text])[0] for text in texts]


def test_a_sampled_answer_follows_from_its_seed(verifier):
    hot = {"temperature": 5.0}
    assert ids_of(verifier, ["7"], **hot) == ids_of(verifier, ["7"], **hot)
    assert ids_of(verifier, ["7"], **hot) != ids_of(verifier, ["7"], seed=1, **hot)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "needs --verifier"),
        ({"verifier": "v", "endpoint": {"base_url": "http://h/v1"}}, "is for engine openai"),
        ({"verifier": "v", "offline": {"tool_call_parser": "x"}}, "engine transformers does not"),
    ],
)
def test_options_that_it_does_not_have_are_refused(options, complaint):
    with pytest.raises(SpeculatorError, match=complaint):
        LocalModel(AnswersConfig.model_validate(options))
