"""The verifier beside a draft: attached, detached, and never saved with it."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file

from speculators_core.errors import SpeculatorError
from speculators_core.models.speculator import SpeculatorModel
from tests.conftest import DRAFTS, SMALL_RECIPES, make_draft, make_verifier

PROMPT = torch.tensor([[5, 6, 7]])


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """A verifier of which layers make up the most."""
    folder = tmp_path_factory.mktemp("wide") / "verifier"
    make_verifier(num_hidden_layers=8).save_pretrained(folder)
    return folder


def make_detached(name, verifier):
    torch.manual_seed(1)
    return DRAFTS[name].from_training_args(verifier.config, **SMALL_RECIPES[name])


def live_tensors():
    """All tensors that Python can still reach."""
    gc.collect()
    return [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]


class NewTensors:
    """The tensors that have come since; those from before are held, so that none of them goes.

    Other tests leave tensors behind, which Transformers may let go at any time.
    """

    def __init__(self):
        self.before = live_tensors()

    def num_bytes(self):
        """The bytes of their storages, each counted once."""
        return num_storage_bytes(live_tensors()) - num_storage_bytes(self.before)


def num_storage_bytes(tensors):
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def num_bytes(module):
    return sum(weight.nbytes for weight in module.parameters())


@pytest.mark.parametrize("name", DRAFTS)
def test_detaching_frees_the_whole_verifier(name, wide_folder):
    draft = make_draft(name, make_verifier(num_hidden_layers=8))
    draft.detach_verifier()
    new = NewTensors()

    draft.attach_verifier(wide_folder, "full")
    whole = num_bytes(draft.verifier)
    assert whole <= new.num_bytes() < 1.1 * whole
    draft.generate(PROMPT, max_new_tokens=12)
    watched = [weakref.ref(module) for module in draft.verifier.modules()]
    watched.append(weakref.ref(draft.verifier_head))

    draft.detach_verifier()
    assert new.num_bytes() == 0
    assert {ref() for ref in watched} == {None}
    assert draft.attached is None


@pytest.mark.parametrize("name", ["eagle3", "dflash"])
def test_for_training_the_ends_alone_are_held(name, wide_folder):
    draft = make_draft(name, make_verifier(num_hidden_layers=8))
    draft.detach_verifier()
    new = NewTensors()
    draft.attach_verifier(wide_folder, "train_only")
    ends = num_bytes(draft.verifier_head)
    assert new.num_bytes() == ends < num_bytes(make_verifier(num_hidden_layers=8)) / 4
    with pytest.raises(SpeculatorError, match=r"Call attach_verifier\(verifier, mode='full'\)"):
        draft.generate(PROMPT)
    draft.detach_verifier()
    assert new.num_bytes() == 0


@pytest.mark.parametrize("mode", ["full", "train_only"])
def test_a_verifier_that_somebody_holds_stays_whole(verifier, mode):
    draft = make_draft("eagle3", verifier)
    state = {name: tensor.clone() for name, tensor in verifier.state_dict().items()}
    draft.attach_verifier(verifier, mode)
    draft.detach_verifier()
    assert all(torch.equal(tensor, state[name]) for name, tensor in verifier.state_dict().items())
    draft.attach_verifier(verifier)
    assert draft.verifier is verifier


def test_attaching_again_lets_go_of_the_first(wide_folder):
    draft = make_draft("mtp", make_verifier(num_hidden_layers=8))
    first = weakref.ref(draft.verifier)
    draft.attach_verifier(wide_folder, "full")
    gc.collect()
    assert first() is None


@pytest.mark.parametrize("mode", ["full", "train_only"])
@pytest.mark.parametrize("name", DRAFTS)
def test_saved_state_never_holds_the_verifier(name, mode, verifier, tmp_path):
    draft = make_draft(name, verifier)
    own = set(make_detached(name, verifier).state_dict())
    draft.attach_verifier(verifier, mode)
    assert set(draft.state_dict()) == own
    assert {key for key, _ in draft.named_parameters()} <= own
    verifiers = {weight.data_ptr() for weight in verifier.parameters()}
    assert not verifiers & {tensor.data_ptr() for tensor in draft.state_dict().values()}
    draft.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == own
    draft.double()  # the verifier's type is its own
    assert draft.verifier_head.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("name", DRAFTS)
def test_a_saved_draft_proposes_as_before(name, verifier, verifier_folder, tmp_path):
    draft = make_draft(name, verifier, name_or_path=str(verifier_folder))
    draft.save_pretrained(tmp_path)
    loaded = SpeculatorModel.from_pretrained(tmp_path, verifier_attachment_mode="full")
    settings = {"max_new_tokens": 20, "return_dict_in_generate": True}
    first, second = draft.generate(PROMPT, **settings), loaded.generate(PROMPT, **settings)
    assert torch.equal(first.sequences, second.sequences)
    assert first.acceptance == second.acceptance


@pytest.mark.parametrize("name", DRAFTS)
def test_without_a_verifier_generate_says_what_to_do(name, verifier):
    draft = make_detached(name, verifier)
    with pytest.raises(SpeculatorError, match="no verifier is attached in full. Call"):
        draft.generate(PROMPT)


def test_unknown_mode_is_refused(verifier):
    with pytest.raises(ValueError, match="is 'detached', expected 'full' or 'train_only'"):
        make_detached("mtp", verifier).attach_verifier(verifier, "detached")


@pytest.mark.parametrize(
    ("name", "stated", "option"),
    [
        ("eagle3", {"ttt_steps": 5}, "ttt_steps"),
        ("peagle", {"num_depths": 5}, "num_depths"),
        ("peagle", {"down_sample_ratio": 0.5}, "down_sample_ratio"),
        ("peagle", {"down_sample_ratio_min": 0.5}, "down_sample_ratio_min"),
        ("dflash", {"max_anchors": 3072}, "max_anchors"),
        ("mtp", {"num_speculative_steps": 5}, "num_steps"),
    ],
)
def test_what_the_config_states_of_the_loss_is_its_default(verifier, name, stated, option):
    model = make_draft(name, verifier)
    model.config = type(model.config).from_dict({**model.config.to_dict(), **stated})
    (value,) = stated.values()
    train, evaluation = model.trainer_kwargs({})
    assert getattr(train["objective"], option) == value == getattr(evaluation["objective"], option)
    train, _ = model.trainer_kwargs({option: 1})
    assert getattr(train["objective"], option) == 1
