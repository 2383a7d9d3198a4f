"""What the tests of several drafts do alike: small rows, decoding in pieces, and what is seen."""

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from speculators_core.batch import PADDING, Batch
from speculators_core.decoding.drafter import Chooser, Confirmed, Proposal
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.format.vocabulary import choose_draft_vocabulary
from speculators_core.models.speculator import SpeculatorModel
from tests.conftest import VOCAB_SIZE, make_verifier
from tests.data import INTEROP
from tests.models.parts.test_masks import picture

HIDDEN_SIZE = 32
REDUCED = choose_draft_vocabulary({i: i for i in range(40, 90)}, 30, VOCAB_SIZE, always=[0, 2])
"""t2d and d2t of a reduced vocabulary with gaps in it."""


def liven(model: nn.Module) -> None:
    """Gives what trains weights so large that each shows in the output; same name, same weights."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and "embed_tokens" not in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(weight.shape, generator=generator)
            gain = 1.0 + 0.3 * values  # of norms
            weight.data.copy_(gain if weight.ndim == 1 else 1.5 * values / weight.shape[-1] ** 0.5)


def lively_verifier(**kwargs):
    """A verifier whose final norm has gains, so that leaving it out is no matter of scale."""
    verifier = make_verifier(**kwargs)
    liven(verifier.model.norm)
    return verifier


# ---- packed rows ----


def make_document(length: int, loss_mask: Sequence[bool] | None = None, seed: int = 0, num_aux=3):
    """One document in a row of its own; states are random, as no draft knows better."""
    generator = torch.Generator().manual_seed(seed)
    mask = [True] * length if loss_mask is None else loss_mask
    return Batch(
        input_ids=torch.randint(3, VOCAB_SIZE, (1, length), generator=generator),
        document_ids=torch.zeros(1, length, dtype=torch.long),
        position_ids=torch.arange(length)[None],
        loss_mask=torch.tensor(mask)[None],
        aux_hidden_states=torch.randn(1, length, num_aux * HIDDEN_SIZE, generator=generator),
        last_hidden_states=torch.randn(1, length, HIDDEN_SIZE, generator=generator),
    )


def pack(documents: Sequence[Batch], padding: int = 0) -> Batch:
    """Documents end to end, and rows of noise after them that belong to none."""
    numbered = [
        dataclasses.replace(document, document_ids=torch.full_like(document.document_ids, number))
        for number, document in enumerate(documents)
    ]
    if padding:
        rest = make_document(padding, seed=99)
        numbered.append(
            dataclasses.replace(
                rest,
                document_ids=torch.full_like(rest.document_ids, PADDING),
                loss_mask=torch.zeros_like(rest.loss_mask),
            )
        )
    names = [f.name for f in dataclasses.fields(Batch)]
    return Batch(**{n: torch.cat([getattr(d, n) for d in numbered], dim=1) for n in names})


@st.composite
def packings(draw: st.DrawFn, longest: int = 9) -> tuple[list[Batch], int]:
    """One to four documents, some tokens of them without loss, and a number of padding rows."""
    documents = []
    for seed in range(draw(st.integers(1, 4))):
        mask = draw(st.lists(st.sampled_from([True, True, False]), min_size=1, max_size=longest))
        documents.append(make_document(len(mask), mask, seed))
    return documents, draw(st.integers(0, 3))


def offsets(documents: Sequence[Batch]) -> list[int]:
    """The row in which each document starts, once packed."""
    lengths = [document.input_ids.shape[1] for document in documents]
    return [sum(lengths[:i]) for i in range(len(lengths))]


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    """The gradient of a loss by every trained weight, as one vector."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


# ---- decoding ----


@dataclass(frozen=True)
class Recorder(Chooser):
    """Chooses as its base does, or says the given tokens; keeps the logits that it was shown."""

    dictated: list[int] = field(default_factory=list)
    shown: list[Tensor] = field(default_factory=list)

    def __call__(
        self, logits: Tensor, token_ids: Tensor | None = None, vocab_size: int | None = None
    ) -> Proposal:
        self.shown.append(logits)
        if self.dictated:
            said = [self.dictated[sum(part.shape[1] for part in self.shown) - 1]]
            return Proposal(torch.tensor([said]))
        return super().__call__(logits, token_ids, vocab_size)

    @property
    def logits(self) -> Tensor:
        """[batch, tokens, draft_vocab]"""
        return torch.cat(self.shown, dim=1)


def confirm(document: Batch, first: int, last: int, states: str) -> Confirmed:
    """Rows ``first`` to ``last`` of a document, the token of row ``last`` being the bonus token."""
    rows = slice(first, last)
    return Confirmed(
        document.input_ids[:, first : last + 1],
        document.position_ids[:, rows],
        getattr(document, states)[:, rows],
    )


def align_right(rows: Sequence[Confirmed]) -> Confirmed:
    """Rows of unequal length as one batch; the padding's tokens and states are noise."""
    longest = max(row.positions.shape[1] for row in rows)

    def padded(name: str, padding: int) -> Tensor:
        parts = []
        for row in rows:
            values = getattr(row, name)
            missing = longest - row.positions.shape[1]
            noise = torch.full((1, missing, *values.shape[2:]), padding).to(values)
            parts.append(torch.cat([noise, values], dim=1))
        return torch.cat(parts)

    return Confirmed(
        padded("token_ids", 7), padded("positions", PADDING), padded("hidden_states", 5)
    )


def served(
    model: SpeculatorModel,
    document: Batch,
    ends: Sequence[int],
    num_tokens: int,
    states: str = "aux_hidden_states",
    dictate: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """Logits of each proposal while a document is confirmed piece by piece, up to each end.

    Where the text is dictated, a draft that reads its own tokens reads the document's.
    """
    state, first = model.start_drafting(), 0
    for last in ends:
        text = document.input_ids[0, last + 1 :].tolist() if dictate else []
        recorder = Recorder(dictated=text)
        model.propose(state, confirm(document, first, last, states), num_tokens, recorder)
        yield last, recorder.logits[0]
        first = last


def check_batch_equals_rows_alone(
    model: SpeculatorModel, num_tokens: int, states: str = "aux_hidden_states", num_aux: int = 3
) -> None:
    """Three texts with unequal numbers of new tokens; the second one ends before the others."""
    ends = ([2, 3, 9, 10], [6, 7], [1, 5, 7, 12])
    documents = [make_document(14, seed=seed, num_aux=num_aux) for seed in range(3)]
    alone = [
        dict(served(model, document, row_ends, num_tokens, states))
        for document, row_ends in zip(documents, ends, strict=True)
    ]
    state, rows = model.start_drafting(), [0, 1, 2]
    for step in range(4):
        if step == 2:
            state.select_rows(torch.tensor([0, 2]))
            rows = [0, 2]
        spans = [(ends[row][step - 1] if step else 0, ends[row][step]) for row in rows]
        recorder = Recorder()
        model.propose(
            state,
            align_right(
                [
                    confirm(documents[row], *span, states)
                    for row, span in zip(rows, spans, strict=True)
                ]
            ),
            num_tokens,
            recorder,
        )
        for logits, row in zip(recorder.logits, rows, strict=True):
            assert_close(logits, alone[row][ends[row][step]])


def check_proposals_leave_no_trace(
    model: SpeculatorModel, states: str = "aux_hidden_states", num_aux: int = 3
) -> None:
    """What was proposed and rejected earlier changes nothing."""
    document = make_document(12, num_aux=num_aux)
    ((_, at_once),) = served(model, document, [9], 3, states)
    state, recorder = model.start_drafting(), Recorder()
    model.propose(state, confirm(document, 0, 4, states), 5, Chooser())
    model.propose(state, confirm(document, 4, 6, states), 1, Chooser())
    model.propose(state, confirm(document, 6, 9, states), 3, recorder)
    assert_close(recorder.logits[0], at_once)


def proposed_probs_error(model: SpeculatorModel, document: Batch) -> float:
    """How far a proposal's probabilities are from the draft's own, by the token ids of t2d."""
    ids = model.t2d.nonzero().flatten()
    ((_, logits),) = served(model, document, [6], 4)
    proposal = model.propose(
        model.start_drafting(), confirm(document, 0, 6, "aux_hidden_states"), 4, Chooser(1.0)
    )
    assert proposal.probs is not None
    expected = torch.zeros(4, VOCAB_SIZE)
    expected[:, ids] = logits.softmax(-1)
    return (proposal.probs[0] - expected).abs().max().item()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to the tolerance, relative where values are large; and finite."""
    assert found.shape == expected.shape
    bound = tolerance * max(1.0, expected.abs().max().item()) if expected.numel() else 0.0
    difference = (found - expected).abs().max().item() if expected.numel() else 0.0
    assert difference <= bound, f"{difference:.3g} > {bound:.3g}"


# ---- pictures ----


def seen(run: Callable[[], Tensor], module: nn.Module) -> list[str]:
    """Which rows of an output (down) change with which rows of a module's output (across)."""
    inputs: list[Tensor] = []
    with module.register_forward_hook(lambda *call: inputs.append(call[2])):
        before = run()
    columns = []
    for column in range(inputs[0].shape[1]):
        noise = torch.zeros_like(inputs[0])
        noise[:, column] = 1.0 + torch.arange(noise.shape[2]) % 3
        with module.register_forward_hook(lambda *call, noise=noise: call[2] + noise):
            changed = (run() - before).abs().flatten(1).amax(1) > 1e-6
        columns.append(changed)
    return picture(torch.stack(columns, dim=1))


# ---- configs ----


def interop_config(name: str) -> dict[str, Any]:
    """What another implementation wrote."""
    return json.loads((INTEROP / name / "config.json").read_text())


def changed_config(model: SpeculatorModel, **change: Any) -> Any:
    """A model's config with other keys; ``layer`` are those of ``transformer_layer_config``."""
    written = model.config.to_dict()
    layer = {**written["transformer_layer_config"], **change.pop("layer", {})}
    return SpeculatorModelConfig.from_dict({**written, "transformer_layer_config": layer, **change})


# ---- another implementation's speculator ----


def recorded_metric(case: Mapping[str, Tensor], loss: str, metric: str) -> float:
    """The recorded value of ``loss``, ``full_acc``, ``eal`` or ``acc_<slot or depth>``."""
    name = metric
    if metric.startswith("acc_"):
        name = f"position_{metric.removeprefix('acc_')}_acc"
    key = f"expected.metric.{loss}.{name}"
    return (case[f"{key}_sum"] / case[f"{key}_total"]).item()


def norms_of(model: nn.Module) -> list[str]:
    return [n for n, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")]


def without(model: nn.Module, name: str) -> Callable[[], None]:
    """Takes a module out of a model; the returned function puts it back."""
    parent, child = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    module = getattr(parent, child)
    setattr(parent, child, nn.Identity())
    return lambda: setattr(parent, child, module)


def misaligned(batch: Batch) -> dict[str, Batch]:
    """The row of an interop case, with one thing wrong in each."""
    chunks = batch.aux_hidden_states.chunk(3, dim=-1)
    positions = batch.position_ids.clone()
    positions[:, batch.input_ids.shape[1] // 4 :] += 1
    changes = {
        "aux states shifted": {"aux_hidden_states": batch.aux_hidden_states.roll(1, dims=1)},
        "last states shifted": {"last_hidden_states": batch.last_hidden_states.roll(1, dims=1)},
        "layers swapped": {
            "aux_hidden_states": torch.cat([chunks[1], chunks[0], chunks[2]], dim=-1)
        },
        "tokens shifted": {"input_ids": batch.input_ids.roll(1, dims=1)},
        "a position left out": {"position_ids": positions},
        "documents merged": {"document_ids": torch.zeros_like(batch.document_ids)},
    }
    return {what: dataclasses.replace(batch, **change) for what, change in changes.items()}


def check_round_trip(name: str, tmp_path: Path, added_keys: Sequence[str] = ()) -> None:
    """Load and save keep every tensor bit for bit, every key, and what the config means."""
    ours, theirs = tmp_path / name, INTEROP / name
    SpeculatorModel.from_pretrained(theirs).save_pretrained(ours)
    stored, written = (load_file(folder / "model.safetensors") for folder in (theirs, ours))
    assert written.keys() == stored.keys()
    for tensor_name, tensor in stored.items():
        assert tensor.dtype == written[tensor_name].dtype
        assert torch.equal(tensor, written[tensor_name]), tensor_name
    one, other = (
        SpeculatorModelConfig.from_pretrained(folder).to_dict() for folder in (theirs, ours)
    )
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (theirs, ours))
    for config in (one, other, before, after):
        verifier = config["speculators_config"]["verifier"]
        verifier["name_or_path"] = str((theirs / verifier["name_or_path"]).resolve())
        config.pop("speculators_version"), config.pop("transformers_version")
    assert one == other
    assert set(after) == {*before, *added_keys}
    for key in before:
        assert after[key] == before[key], key
