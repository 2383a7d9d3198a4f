import pytest
import torch

from speculators_core.decoding.drafter import Chooser, Confirmed
from speculators_core.decoding.generation import generate
from speculators_core.decoding.independent import (
    LanguageModelDraft,
    PromptLookupDraft,
)
from speculators_core.format.proposals import GreedyTokenProposalConfig, SamplingTokenProposalConfig
from tests.conftest import VOCAB_SIZE, make_verifier

GREEDY = GreedyTokenProposalConfig(speculative_tokens=4)


@pytest.fixture(scope="module")
def small():
    return make_verifier(num_hidden_layers=2, initializer_range=0.3)


def prompts(*lengths):
    """Left-padded prompts and their mask."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, VOCAB_SIZE, (length,), generator=generator)
        mask[row, -length:] = 1
    return ids, mask


@pytest.mark.parametrize("lengths", [(7,), (3, 9, 1, 5)])
@pytest.mark.parametrize("kind", ["small", "itself", "text"])
def test_greedy_output_equals_verifier_alone(verifier, small, kind, lengths):
    draft = {
        "small": LanguageModelDraft(small),
        "itself": LanguageModelDraft(verifier),
        "text": PromptLookupDraft(),
    }[kind]
    ids, mask = prompts(*lengths)
    settings = {"attention_mask": mask, "max_new_tokens": 30, "pad_token_id": 0}
    alone = verifier.generate(ids, do_sample=False, **settings)
    ours = generate(draft, verifier, GREEDY, ids, return_dict_in_generate=True, **settings)
    assert torch.equal(ours.sequences, alone)
    if kind == "itself":
        assert {count for row in ours.acceptance for count in row.accepted} == {4}
    if kind == "text":  # a random model repeats itself soon
        assert sum(sum(row.accepted) for row in ours.acceptance) > 0


def test_rows_of_a_batch_are_accepted_as_alone(verifier, small):
    ids, mask = prompts(3, 9, 1, 5)
    settings = {"max_new_tokens": 20, "pad_token_id": 0, "return_dict_in_generate": True}
    draft = LanguageModelDraft(small)
    together = generate(draft, verifier, GREEDY, ids, attention_mask=mask, **settings).acceptance
    for row, length in enumerate((3, 9, 1, 5)):
        alone = generate(draft, verifier, GREEDY, ids[row : row + 1, -length:], **settings)
        assert alone.acceptance[0].accepted == together[row].accepted


def test_sampled_run_repeats_under_its_seed(verifier, small):
    ids, _ = prompts(6)
    proposal = SamplingTokenProposalConfig(speculative_tokens=3)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate(
            LanguageModelDraft(small),
            verifier,
            proposal,
            ids,
            do_sample=True,
            generator=generator,
            max_new_tokens=20,
            pad_token_id=0,
        )

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_look_up_takes_the_longest_and_then_the_latest_match():
    draft = PromptLookupDraft(max_matched=2)
    assert draft.look_up([7, 8, 9, 1, 7, 8]) == [9, 1, 7, 8]
    assert draft.look_up([8, 5, 7, 8, 9, 8, 6, 7, 8]) == [9, 8, 6, 7, 8]
    assert draft.look_up([8, 5, 8, 6, 8]) == [6, 8]
    assert draft.look_up([1, 2, 3]) == []
    assert PromptLookupDraft(3, 3).look_up([8, 5, 8, 6, 8]) == []


def test_prompt_lookup_says_nothing_where_nothing_matches():
    draft = PromptLookupDraft()
    tokens = torch.tensor([[1, 2, 3, 4]])
    confirmed = Confirmed(tokens, torch.arange(3)[None], torch.zeros(1, 3, 0))
    assert draft.propose(draft.start_drafting(), confirmed, 3, Chooser()).token_ids.shape == (1, 0)


@pytest.mark.parametrize("bounds", [(2, 3), (3, 0)])
def test_prompt_lookup_refuses_empty_ranges(bounds):
    with pytest.raises(ValueError, match="1 <= min_matched <= max_matched"):
        PromptLookupDraft(*bounds)


def test_filling_of_a_batch_counts_for_nobody(verifier):
    ids, mask = prompts(4, 9, 2, 12)
    settings = {"max_new_tokens": 30, "pad_token_id": 0, "return_dict_in_generate": True}
    together = generate(
        PromptLookupDraft(), verifier, GREEDY, ids, attention_mask=mask, **settings
    ).acceptance
    for row, length in enumerate((4, 9, 2, 12)):
        prompt = ids[row : row + 1, -length:]
        alone = generate(PromptLookupDraft(), verifier, GREEDY, prompt, **settings)
        assert alone.acceptance[0].accepted == together[row].accepted
