"""Tries other ways to read a draft's weights.

A draft that was trained well and is read in another way than it was trained proposes badly without
any error. Each `Suspect` reads the same weights in another way. If the verifier accepts one of them
far more often than the checkpoint as is, that is what the checkpoint, or its server, has wrong.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from speculators_core.diagnosis.contexts import ContextTrial, try_shorter_contexts
from speculators_core.diagnosis.replay import Reading, SeenText, first_token_log_probs, replay_all
from speculators_core.errors import Cause
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.models.speculator import SpeculatorModel

DEAD_BELOW = 1.05
"""Acceptance length under which a draft costs more than it gives."""
MIN_GAIN_NATS = 0.02
MIN_T = 5.0
"""Least gain of a believed suspect in the mean log-probability of the verifier's tokens, and in
standard errors of the paired differences."""
MIN_GAIN_ACCEPTED = 0.05
"""Least gain of a believed suspect in accepted tokens, as a fraction of those as is. A draft that
learnt little may give tokens more probability in another reading and keep no more of them:
227 steps on the playground, 0.085 nats at 7.6 standard errors, tau 1.173 and 1.146. Wrong keys of
the playground's drafts cost 9 % or more."""


@dataclass(frozen=True)
class Suspect:
    """One other way to read the same weights."""

    cause: Cause
    description: str
    """What is read differently, in words that name the key to change."""
    reading: Reading


@dataclass(frozen=True)
class Trial:
    """How a suspect did beside the checkpoint as is; holds no model."""

    cause: Cause
    description: str
    gain_nats: float
    """Gain in the mean log-probability of the verifier's next token."""
    t: float
    """The gain in standard errors."""

    @property
    def is_better(self) -> bool:
        return self.gain_nats >= MIN_GAIN_NATS and self.t >= MIN_T


@dataclass(frozen=True)
class Diagnosis:
    """The suspects that were tried, and the one that explains the loss, if one does."""

    acceptance_length: float
    """Acceptance length of the checkpoint as is, over the replayed texts."""
    trials: tuple[Trial, ...]
    """Best first."""
    likely_cause: Trial | None
    acceptance_length_if_fixed: float | None
    """Acceptance length of the likely cause's reading."""
    context: ContextTrial | None = None
    """What shorter contexts would give; None where no context is longer than those tried."""

    @property
    def is_length_the_cause(self) -> bool:
        """Whether shorter contexts explain the loss, and better than the likely cause.

        Far beyond its training a draft may give tokens more probability when it is read wrongly,
        and keep no more of them.
        """
        if self.context is None or not self.context.is_cause:
            return False
        fixed = self.acceptance_length_if_fixed
        return fixed is None or self.context.short.acceptance_length > fixed


def diagnose(
    model: SpeculatorModel,
    verifier: PreTrainedModel,
    texts: Sequence[SeenText],
    num_tokens: int,
    longest_trained: int | None = None,
) -> Diagnosis:
    """Tries every suspect on texts that the verifier wrote; ``model`` has it attached.

    ``longest_trained`` is the length of the longest example that the draft was trained on, None
    where that is not known; see `try_shorter_contexts`.

    A suspect is believed if it gives the verifier's tokens more probability by far more than
    chance, keeps more of them, and the draft is then worth serving. A draft reads best what it was
    trained to read, so a sound checkpoint has no likely cause; nor has one that learnt too little
    for any reading.
    """
    as_is = Reading(model)
    known = [first_token_log_probs(as_is, text) for text in texts]
    kept = replay_all(as_is, texts, num_tokens).acceptance_length
    least = max(DEAD_BELOW, 1 + (1 + MIN_GAIN_ACCEPTED) * (kept - 1))
    trials, likely, fixed = [], None, None
    for suspect in suspects(model, verifier):
        trial = _try(suspect, texts, known)
        trials.append(trial)
        if trial.is_better and (likely is None or trial.gain_nats > likely.gain_nats):
            length = replay_all(suspect.reading, texts, num_tokens).acceptance_length
            if length >= least:
                likely, fixed = trial, length
    trials.sort(key=lambda trial: (not trial.is_better, -trial.gain_nats))
    context = try_shorter_contexts(model, texts, num_tokens, longest_trained)
    return Diagnosis(kept, tuple(trials), likely, fixed, context)


def _try(suspect: Suspect, texts: Sequence[SeenText], known: Sequence[Tensor]) -> Trial:
    """A suspect that does no better on a quarter of the texts is not tried on the rest."""
    screening = max(1, len(texts) // 4)
    gains: list[Tensor] = []
    for number, (text, as_is) in enumerate(zip(texts, known, strict=True), start=1):
        gains.append(first_token_log_probs(suspect.reading, text) - as_is)
        if number == screening and torch.cat(gains).mean() <= 0:
            break
    gained = torch.cat(gains)
    error = float(gained.std()) / len(gained) ** 0.5
    gain = float(gained.mean())
    return Trial(suspect.cause, suspect.description, gain, gain / max(error, 1e-9))


def suspects(model: SpeculatorModel, verifier: PreTrainedModel) -> Iterator[Suspect]:
    """Every other reading that this kind of draft has."""
    for other in model.config.other_readings(verifier.config.get_text_config()):
        variant = _variant(model, verifier, other.changes) if other.changes else model
        yield Suspect(other.cause, other.description, Reading(variant, other.layer_ids))
    yield from _other_vocabularies(model)
    for shift, whose in ((1, "its own state"), (-1, "the state of the token two before it")):
        yield Suspect(
            "position shift",
            f"each token beside {whose} instead of the state of the token before it",
            Reading(model, shift=shift),
        )


def _other_vocabularies(model: SpeculatorModel) -> Iterator[Suspect]:
    """d2t as ids instead of offsets, or off by one."""
    ids = model.draft_token_ids
    if ids is None:
        return
    vocab_size = model.config.vocabulary.verifier_size
    steps = torch.arange(len(ids), device=ids.device)
    for description, others in (
        ("d2t holds the verifier's ids, not offsets from the draft's", ids - steps),
        ("d2t is too large by one", ids - 1),
        ("d2t is too small by one", ids + 1),
    ):
        variant = _with_token_ids(model, others.clamp(0, vocab_size - 1))
        yield Suspect("d2t offset", description, Reading(variant))


def _variant(
    model: SpeculatorModel, verifier: PreTrainedModel, changes: Mapping[str, object]
) -> SpeculatorModel:
    """The same weights under other keys of the config; norms that are new scale by one."""
    config: SpeculatorModelConfig = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(config, key, value)
    other = type(model)(config)
    other.to(model.device, model.dtype)
    other.load_state_dict(model.state_dict(), strict=False)
    other.unset = set()
    other.attach_verifier(verifier, "full")
    return other.eval()


def _with_token_ids(model: SpeculatorModel, token_ids: Tensor) -> SpeculatorModel:
    other = copy.copy(model)
    other._buffers = dict(model._buffers)
    steps = torch.arange(len(token_ids), device=token_ids.device)
    other._buffers["d2t"] = token_ids - steps
    return other
