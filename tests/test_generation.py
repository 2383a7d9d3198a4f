import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from speculators_core.errors import SpeculatorError
from speculators_core.generation import AcceptanceCounts
from speculators_core.model import SpeculatorModel
from tests.conftest import make_eagle3, make_verifier
from tests.data import INTEROP, interop_acceptance


@pytest.fixture(scope="module")
def model(verifier):
    return make_eagle3(verifier)


def prompt(length, seed=0):
    return torch.randint(3, 96, (1, length), generator=torch.Generator().manual_seed(seed))


def verifier_alone(verifier, ids, **kwargs):
    return verifier.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **kwargs)


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 2, 17])
def test_greedy_output_equals_verifier_alone(model, verifier, length, num_tokens):
    ids = prompt(length, seed=length)
    alone = verifier_alone(verifier, ids, max_new_tokens=40)
    ours = model.generate(ids, max_new_tokens=40, num_assistant_tokens=num_tokens)
    assert torch.equal(ours, alone)


def test_output_equals_verifier_alone_up_to_its_last_position(model, verifier):
    ids = prompt(120)
    alone = verifier_alone(verifier, ids, max_length=128)
    assert torch.equal(model.generate(ids, max_new_tokens=500), alone)


def test_draft_that_is_the_verifier_is_kept_whole(verifier):
    """A draft whose proposals are the verifier's own greedy tokens: every one must be kept."""
    ids = prompt(6)
    text = verifier_alone(verifier, ids, max_new_tokens=60)[0]
    model = make_eagle3(verifier)

    def propose(state, next_tokens, hidden_states, num_tokens):
        state.length += next_tokens.shape[1]
        return text[state.length + 1 : state.length + 1 + num_tokens][None]

    model.propose = propose
    output = model.generate(ids, max_new_tokens=41, return_dict_in_generate=True)
    counts = output.acceptance[0]
    assert counts.accepted == [3] * 10
    assert counts.acceptance_length == 4.0
    assert torch.equal(output.sequences[0], text[: 6 + 41])


def test_interop_counts_are_the_recorded_ones():
    recorded = interop_acceptance()
    model = SpeculatorModel.from_pretrained(
        INTEROP / "eagle3", verifier_attachment_mode="full", dtype=torch.float32
    )
    requests = recorded["speculators"]["eagle3"]["requests"]
    for ids, expected, request in zip(
        recorded["prompts"], recorded["verifier_only"], requests, strict=True
    ):
        output = model.generate(
            torch.tensor([ids]),
            max_new_tokens=recorded["max_tokens"],
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        assert output.sequences[0, len(ids) :].tolist() == expected
        assert output.acceptance[0].num_drafts == request["drafts"]
        assert output.acceptance[0].accepted_per_position == request["accepted_per_position"]


def test_stops_at_any_end_token(model, verifier):
    ids = prompt(6)
    text = verifier_alone(verifier, ids, max_new_tokens=30)[0, 6:].tolist()
    stop = text[7]
    expected = text[: text.index(stop) + 1]
    ours = model.generate(ids, max_new_tokens=30, eos_token_id=[95, stop])
    assert ours[0, 6:].tolist() == expected


def test_streamer_gets_every_token_once(model):
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Collect()
    ids = prompt(5)
    output = model.generate(ids, max_new_tokens=12, streamer=streamer)
    assert streamer.tokens == output[0].tolist() and streamer.ended


@pytest.mark.parametrize(
    ("ids", "kwargs", "message"),
    [
        (None, {}, r"expected input_ids of shape \[1, seq\]"),
        (torch.zeros(2, 3, dtype=torch.long), {}, r"found \[2, 3\]"),
        (torch.zeros(1, 0, dtype=torch.long), {}, r"found \[1, 0\]"),
        (prompt(128), {}, "the prompt has 128 tokens; the verifier takes 128"),
        (prompt(4), {"do_sample": True}, "only greedy decoding"),
        (prompt(4), {"num_beams": 2}, "num_beams=2 is not supported"),
        (prompt(4), {"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not supported"),
        (prompt(4), {"max_length": 3}, "max_length 3 leaves"),
        (prompt(4), {"num_assistant_tokens": 0}, "at least 1"),
        (prompt(4), {"nonsense": 2}, "does not take nonsense"),
        (prompt(4), {"num_assistant_tokens": -1}, "at least 1"),
        (prompt(4), {"attention_mask": torch.tensor([[0, 1, 1, 1]])}, "masks tokens"),
    ],
)
def test_bad_argument_is_named(model, ids, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model.generate(ids, **kwargs)


def test_without_verifier_generate_says_what_to_do(verifier):
    model = make_eagle3(make_verifier())
    model.detach_verifier()
    with pytest.raises(SpeculatorError, match="Call attach_verifier"):
        model.generate(prompt(4))


def test_counts_are_joint():
    counts = AcceptanceCounts(3, [0, 1, 3, 3, 2])
    assert counts.accepted_per_position == [4, 3, 2]
    assert counts.acceptance_length == 1 + 9 / 5
    assert AcceptanceCounts(3).acceptance_length == 1.0


def test_verifier_with_a_sliding_window_gives_its_own_output():
    window = make_verifier(
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    ids = prompt(9)
    alone = verifier_alone(window, ids, max_new_tokens=40)
    assert torch.equal(make_eagle3(window).generate(ids, max_new_tokens=40), alone)


def test_given_config_is_laid_over_the_verifiers(model, verifier):
    ids = prompt(6)
    text = verifier_alone(verifier, ids, max_new_tokens=30)[0, 6:].tolist()
    verifier.generation_config.eos_token_id = text[4]
    try:
        stopped = model.generate(ids, GenerationConfig(max_new_tokens=30))
    finally:
        verifier.generation_config.eos_token_id = None
    assert stopped[0, 6:].tolist() == text[: text.index(text[4]) + 1]


def test_lossy_proposal_settings_are_not_ignored(verifier):
    lossy = make_eagle3(verifier)
    lossy.config.proposal.verifier_accept_k = 2
    with pytest.raises(ValueError, match="only exact acceptance"):
        lossy.generate(prompt(4))
