"""The growing sequences of a batch, and their ends."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LogitsProcessor
from transformers.generation import logits_process

from speculators_core.decoding.acceptance import AcceptanceCounts
from speculators_core.decoding.rules import Rules


class Sequence:
    """One row of the batch: its prompt, padding included, and the tokens generated so far."""

    def __init__(self, row: int, prompt: Int[Tensor, "seq"], rules: Rules):
        self.rules = rules
        self.ids = prompt
        self.prompt_length = len(prompt)
        self.end: int | None = None
        """Its length when it ended."""
        self.counts = AcceptanceCounts(rules.num_tokens)
        self.scores: list[Float[Tensor, "1 vocab"]] = []
        self.logits: list[Float[Tensor, "1 vocab"]] = []
        self._processors = [_for_row(processor, row) for processor in rules.logits_processor]

    def process(
        self, drafted: Int[Tensor, "draft"], logits: Float[Tensor, "places vocab"]
    ) -> Float[Tensor, "places vocab"]:
        """Scores of each place after this sequence, each under the drafted tokens before it."""
        ids = torch.cat([self.ids, drafted])[None]
        places = []
        for place in range(len(logits)):
            scores = logits[None, place]
            for processor in self._processors:
                scores = processor(ids[:, : len(self.ids) + place], scores)
            places.append(scores)
        return torch.cat(places)

    def append(
        self,
        tokens: Int[Tensor, "new"],
        scores: Float[Tensor, "places vocab"],
        logits: Float[Tensor, "places vocab"],
    ) -> None:
        """Takes tokens; those after an end token are left out."""
        start = len(self.ids)
        self.ids = torch.cat([self.ids, tokens])
        if self.rules.keeps_scores:
            self.scores += scores.float().split(1)
        if self.rules.keeps_logits:
            self.logits += logits.float().split(1)
        if self.end is None:
            lengths = range(start + 1, len(self.ids) + 1)
            self.end = next((length for length in lengths if self._is_end(length)), None)
            if self.end is not None and self.rules.pad_token_id is not None:
                self.ids = self.ids[: self.end]
        num_new = len(self.ids) - self.prompt_length
        del self.scores[num_new:], self.logits[num_new:]

    def _is_end(self, length: int) -> bool:
        scores = tuple(self.scores[: length - self.prompt_length])
        known = scores if self.rules.keeps_scores else None
        return bool(self.rules.stopping_criteria(self.ids[None, :length], known).all())


def _for_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    """The processor for one row alone: prefix constraints get the row's number."""
    if isinstance(processor, logits_process.PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        return logits_process.PrefixConstrainedLogitsProcessor(
            lambda _, prefix: allowed(row, prefix), num_beams=1
        )
    return processor


class Sequences:
    """The rows of a batch, each as far as it has come."""

    def __init__(self, prompts: Int[Tensor, "batch seq"], rules: Rules):
        self.rules = rules
        self.rows = [Sequence(row, prompt, rules) for row, prompt in enumerate(prompts)]
        self._num_streamed = prompts.shape[1]  # Transformers hands the prompt to the streamer

    @property
    def length(self) -> int | None:
        """Length of the longest sequence with its prompt; None while one has not ended."""
        ends = [sequence.end for sequence in self.rows if sequence.end is not None]
        return max(ends) if len(ends) == len(self.rows) else None

    def unwritten(self) -> list[int]:
        """Rows that need further tokens."""
        if self.rules.pad_token_id is not None:
            return [row for row, sequence in enumerate(self.rows) if sequence.end is None]
        goal = self.length or self.rules.stopping_criteria.max_length
        return [row for row, t in enumerate(self.rows) if goal is None or len(t.ids) < goal]

    def padded(self, length: int) -> Int[Tensor, "batch length"]:
        """The start of every sequence, padded after its end."""
        pad = self.rules.pad_token_id or 0
        rows = [nn.functional.pad(t.ids, (0, length - len(t.ids)), value=pad) for t in self.rows]
        return torch.stack(rows)

    def stream(self) -> None:
        """Gives the streamer, as Transformers does, one token of every row at a time."""
        if self.rules.streamer is None:
            return
        lengths = [len(self.rows[row].ids) for row in self.unwritten()]
        length = min(lengths) if lengths else self.length
        assert length is not None
        for tokens in self.padded(length)[:, self._num_streamed :].T:
            self.rules.streamer.put(tokens.cpu())
        self._num_streamed = length


def by_place(rows: list[list[Tensor]], num_places: int) -> tuple[Tensor, ...]:
    """One tensor for each place, as Transformers has it; ended rows hold zeros."""
    blank = torch.zeros_like(rows[0][0])
    return tuple(
        torch.cat([row[place] if place < len(row) else blank for row in rows])
        for place in range(num_places)
    )


def until_end(tokens: list[int], stop_ids: int | list[int] | None) -> list[int]:
    """The tokens up to the first stop token; padding follows it.

    [5 6 2 0 0], stop 2 -> [5 6 2]
    """
    stops = {stop_ids} if isinstance(stop_ids, int) else set(stop_ids or ())
    ends = (place + 1 for place, token in enumerate(tokens) if token in stops)
    return tokens[: next(ends, len(tokens))]
