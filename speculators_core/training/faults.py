"""Causes of losses and gradients that are not finite."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from speculators_core.training.rows.sources import PackedRow

LOWER_RATE = "The data are finite. Lower optimizer.learning_rate."


def find_fault(
    batches: Sequence[PackedRow],
    losses: Sequence[Tensor],
    keys_of: Callable[[int], list[str]],
) -> str | None:
    """The first batch of this process's step that has a fault: in its data, or in its loss alone.

    ``keys_of`` returns the keys of a row.
    """
    for batch, loss in zip(batches, losses, strict=False):
        name = _name(batch, keys_of)
        if found := _find_in_data(batch, keys_of(_row(batch))):
            return f"the loss is {float(loss)} on {name}: {found}."
        if not math.isfinite(float(loss)):
            return f"the loss is {float(loss)} on {name}. {LOWER_RATE}"
    return None


def describe_no_fault(
    gradient_norm: float,
    ranks: Sequence[int],
    batches: Sequence[PackedRow],
    keys_of: Callable[[int], list[str]],
) -> str:
    """Why a step failed although the batches of this rank have no fault.

    ``ranks`` are those that found a fault in theirs.
    """
    if ranks:
        return (
            f"the loss is not finite on rank {', '.join(map(str, ranks))}, whose error names the "
            "row."
        )
    named = "; ".join(_name(batch, keys_of) for batch in batches)
    return (
        f"the norm of the gradient is {gradient_norm} after {named}, whose losses are finite. "
        f"{LOWER_RATE}"
    )


def _find_in_data(batch: PackedRow, keys: Sequence[str]) -> str | None:
    """The first token whose states are not finite."""
    for what in ("aux_hidden_states", "last_hidden_states"):
        states = batch.get(what)
        if states is None:
            continue
        is_fault = ~states[0].isfinite().all(-1)
        if not is_fault.any():
            continue
        place = int(is_fault.nonzero()[0, 0])
        document, position = int(batch["document_ids"][0, place]), batch["position_ids"][0, place]
        example = repr(keys[document]) if 0 <= document < len(keys) else f"number {document}"
        return (
            f"{what} of token {int(position)} of example {example} are not finite. Generate that "
            "example again, or leave it out"
        )
    return None


def _row(batch: PackedRow) -> int:
    return int(batch["row"][0]) if "row" in batch else -1


def _name(batch: PackedRow, keys_of: Callable[[int], list[str]]) -> str:
    """``row 7 (examples '0/3' to '0/9')``."""
    row = _row(batch)
    keys = keys_of(row)
    if not keys:
        return "a batch" if row < 0 else f"row {row}"
    return f"row {row} (examples {keys[0]!r} to {keys[-1]!r})"
