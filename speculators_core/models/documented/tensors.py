"""Tensors of `forward` as the public documents have them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speculators_core.batch import PADDING, Batch
from speculators_core.errors import SpeculatorError
from speculators_core.models.speculator import SpeculatorModel

Forward = Callable[..., Any]


def takes_tensors(of_tensors: Forward) -> Callable[[Forward], Forward]:
    """Lets a ``forward`` of a `Batch` take tensors too, which ``of_tensors`` deals with."""

    def decorate(of_batch: Forward) -> Forward:
        def forward(self: SpeculatorModel, *args: Any, **kwargs: Any) -> Any:
            if "batch" in kwargs or (args and isinstance(args[0], Batch)):
                return forward.of_batch(self, *args, **kwargs)  # type: ignore[attr-defined]  # tests wrap it
            return of_tensors(self, *args, **kwargs)

        forward.of_batch = of_batch  # type: ignore[attr-defined]
        forward.__doc__, forward.__qualname__ = of_batch.__doc__, of_batch.__qualname__
        return forward

    return decorate


@dataclass(frozen=True)
class Rows:
    """A batch of rows end to end, with what is the same for every algorithm.

    Every row is a document unless ``document_ids`` or ``lengths`` divide it; tokens that
    ``attention_mask`` leaves out are padding.
    """

    shape: torch.Size
    input_ids: Tensor
    document_ids: Tensor
    position_ids: Tensor
    loss_mask: Tensor

    @classmethod
    def read(
        cls,
        input_ids: Tensor | None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        loss_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> "Rows":
        """Flat columns of [batch, seq] tensors.

        Raises:
            SpeculatorError: the tokens are missing, or a tensor has another shape.
        """
        if input_ids is None:
            raise SpeculatorError("input_ids is missing. Pass it as [batch, seq], or a Batch.")
        columns = {
            "document_ids": document_ids,
            "position_ids": position_ids,
            "loss_mask": loss_mask,
            "attention_mask": attention_mask,
        }
        for name, column in columns.items():
            if column is not None and column.shape[-1:] != input_ids.shape[-1:]:
                raise SpeculatorError(
                    f"{name} has shape {list(column.shape)}; expected {list(input_ids.shape)}, "
                    "as input_ids."
                )
        shape, device = input_ids.shape, input_ids.device
        if len(shape) != 2:
            raise SpeculatorError(f"input_ids has shape {list(shape)}; expected [batch, seq].")
        number = torch.arange(shape[0], device=device)[:, None]
        if document_ids is None and lengths is not None:
            ends = lengths.to(device).cumsum(0)
            document_ids = torch.searchsorted(
                ends, torch.arange(shape[1], device=device), right=True
            )
            document_ids = document_ids.masked_fill(document_ids >= len(ends), PADDING)
        within = torch.zeros(shape, dtype=torch.long, device=device)
        if document_ids is not None:
            within = document_ids.to(device).long().expand(shape)
        documents = (within + number * (1 + within.max())).masked_fill(within < 0, PADDING)
        if attention_mask is not None:
            documents = documents.masked_fill(attention_mask.expand(shape) == 0, PADDING)
        trained = torch.ones(shape, dtype=torch.bool, device=device)
        if loss_mask is not None:
            trained = loss_mask.expand(shape) != 0
        if position_ids is None:
            position_ids = _places(documents.flatten()).view(shape)
        return cls(
            shape,
            input_ids.long().flatten(),
            documents.flatten(),
            position_ids.to(device).expand(shape).flatten(),
            trained.flatten(),
        )

    def states(self, name: str, states: Tensor | None, width: int) -> Tensor:
        """Hidden states of each token.

        Raises:
            SpeculatorError: they are missing, or of another shape.
        """
        if states is None:
            raise SpeculatorError(
                f"{name} is missing: the draft reads the verifier's states, and learns what the "
                "verifier makes of them. Pass them as [batch, seq, hidden], or a Batch."
            )
        if states.shape != (*self.shape, width):
            raise SpeculatorError(
                f"{name} has shape {list(states.shape)}; expected {[*self.shape, width]}."
            )
        return states

    def batch(self, hidden_states: Tensor, last_hidden_states: Tensor) -> Batch:
        """Row t holds token t, its states and its document."""
        return Batch(
            self.input_ids[None],
            self.document_ids[None],
            self.position_ids[None],
            self.loss_mask[None],
            hidden_states.flatten(0, 1)[None],
            last_hidden_states.flatten(0, 1)[None],
        )

    def joined_batch(
        self, hidden_states: Tensor, last_hidden_states: Tensor
    ) -> tuple[Batch, Tensor]:
        """The batch of rows that join each token with the state before it, and their places in it.

        joined     g0 g1 g2      batch   row 0  1  2  3
                   x1 x2 x3              x   .  x1 x2 x3
                   y1 y2 y3              g   g0 g1 g2 .
                                         y   .  y1 y2 y3
        Every document gets one row more: that of its first token, which no draft reads.
        """
        rows = torch.arange(len(self.input_ids), device=self.input_ids.device)
        state_at = rows + torch.cumsum(_is_start(self.document_ids), 0) - 1
        token_at, total = state_at + 1, int(state_at[-1]) + 2

        def placed(column: Tensor, at: Tensor) -> Tensor:
            return column.new_zeros(total, *column.shape[1:]).index_copy(0, at, column)

        documents = placed(self.document_ids, state_at).index_copy(0, token_at, self.document_ids)
        positions = placed(self.position_ids - 1, state_at)
        batch = Batch(
            placed(self.input_ids, token_at)[None],
            documents[None],
            positions.index_copy(0, token_at, self.position_ids)[None],
            placed(self.loss_mask, token_at)[None],
            placed(hidden_states.flatten(0, 1), state_at)[None],
            placed(last_hidden_states.flatten(0, 1), token_at)[None],
        )
        return batch, state_at


def _is_start(documents: Tensor) -> Tensor:
    is_start = torch.ones_like(documents, dtype=torch.bool)
    is_start[1:] = documents[1:] != documents[:-1]
    return is_start


def _places(documents: Tensor) -> Tensor:
    """Each token's place in its document, from 0."""
    rows = torch.arange(len(documents), device=documents.device)
    return rows - (rows * _is_start(documents)).cummax(0).values


def forward_joined(
    model: SpeculatorModel,
    hidden_states: Tensor | None = None,
    input_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    loss_mask: Tensor | None = None,
    verifier_last_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    **options: Any,
) -> tuple[list[Tensor] | None, Tensor, dict[str, Tensor]]:
    """Training of EAGLE-3 and P-EAGLE as the documents call it.

    A row joins the aux states of a token with the token after it, whose last state and loss mask
    stand in the same row. Draft tokens come as a list of [batch, seq] by step; P-EAGLE has None.
    """
    rows = Rows.read(input_ids, document_ids, position_ids, loss_mask, attention_mask, lengths)
    batch, places = rows.joined_batch(
        *_states(rows, model, hidden_states, verifier_last_hidden_states)
    )
    tokens, loss, metrics = model(batch, _objective(model, options))
    if "loss" in metrics:  # one over all elements, which have no order by row
        return None, loss, metrics
    return [step[0, places].view(rows.shape) for step in tokens], loss, metrics


def forward_blocks(
    model: SpeculatorModel,
    hidden_states: Tensor | None = None,
    input_ids: Tensor | None = None,
    loss_mask: Tensor | None = None,
    verifier_last_hidden_states: Tensor | None = None,
    document_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    **options: Any,
) -> tuple[None, Tensor, dict[str, Tensor]]:
    """Training of DFlash as the documents call it; a row holds a token and its states."""
    rows = Rows.read(input_ids, document_ids, position_ids, loss_mask, attention_mask, lengths)
    batch = rows.batch(*_states(rows, model, hidden_states, verifier_last_hidden_states))
    _, loss, metrics = model(batch, _objective(model, options))
    return None, loss, metrics


def _states(
    rows: Rows, model: SpeculatorModel, aux: Tensor | None, last: Tensor | None
) -> tuple[Tensor, Tensor]:
    width = model.config.verifier_hidden_size
    return (
        rows.states("hidden_states", aux, len(model.aux_layer_ids) * width).to(model.dtype),
        rows.states("verifier_last_hidden_states", last, width),
    )


def _objective(model: SpeculatorModel, options: dict[str, Any]) -> Any:
    """The objective as given, or of options; the config states what they leave open."""
    objective = options.pop("objective", None)
    if objective is None:
        return model.trainer_kwargs(options)[0]["objective"]
    if options:
        raise SpeculatorError(f"{next(iter(options))} has no effect beside an objective.")
    stated = model.config.stated_objective().items()
    return objective.model_copy(
        update={key: value for key, value in stated if key not in objective.model_fields_set}
    )
