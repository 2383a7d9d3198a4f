"""A replayed draft is kept as often as the reference decoder keeps it."""

import pytest
import torch

from speculators_core.diagnosis.replay import Reading, first_token_log_probs, replay, see
from tests.conftest import DRAFTS, make_draft

PROMPTS = ([5, 9, 17, 3], [40, 41], list(range(20, 50)))


@pytest.mark.parametrize("name", DRAFTS)
def test_replay_counts_what_the_reference_decoder_counts(name, verifier):
    model = make_draft(name, verifier)
    for prompt in PROMPTS:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=40,
            num_assistant_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
        )
        text = see(verifier, prompt, output.sequences[0, len(prompt) :].tolist())
        expected = output.acceptance[0].accepted
        found = replay(Reading(model), text, 3).accepted
        assert len(expected) - 4 <= len(found) < len(expected)
        assert found == expected[: len(found)]


@pytest.mark.parametrize("name", DRAFTS)
def test_log_probs_are_those_of_one_forward(name, verifier):
    """Read token by token or at once, a draft says the same."""
    model = make_draft(name, verifier)
    text = see(verifier, [5, 9, 17], [4, 8, 15, 16, 23, 42])
    whole = first_token_log_probs(Reading(model), text)
    assert len(whole) == 5
    tail = see(verifier, [5, 9, 17, 4, 8], [15, 16, 23, 42])
    assert torch.allclose(whole[2:], first_token_log_probs(Reading(model), tail), atol=1e-5)


def test_a_token_that_the_draft_cannot_say_counts_as_its_last_choice(verifier):
    from speculators_core.format.vocabulary import choose_draft_vocabulary

    maps = choose_draft_vocabulary({i: 1 for i in range(20, 60)}, 40, 96, always=[])
    model = DRAFTS["eagle3"].from_training_args(
        verifier.config, *maps, verifier=verifier, aux_layer_ids=(1, 2, 3)
    )
    text = see(verifier, [5, 9], [30, 70, 30])
    log_probs = first_token_log_probs(Reading(model), text)
    assert log_probs.isfinite().all()
    assert log_probs[0] < -torch.log(torch.tensor(40.0))  # token 70 is none of the 40


def test_states_of_other_layers_and_places(verifier):
    text = see(verifier, [5, 9, 17], [4, 8])
    assert set(text.states) == set(range(5))
    both = text.aux_states([1, 3])
    assert torch.equal(both, torch.cat([text.states[1], text.states[3]], dim=-1))
    assert torch.equal(text.aux_states([2], shift=1)[0], text.states[2][1])
    assert torch.equal(text.aux_states([2], shift=-1)[3], text.states[2][2])
