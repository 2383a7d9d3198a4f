"""Why a draft accepts less than it could: other ways to read its weights, tried one by one.

A draft that was trained well and is read in another way than it was trained proposes badly without
any error. Each `Suspect` reads the same weights in another way. Where one of them is kept far more
often than the checkpoint as it stands, that is what the checkpoint, or what serves it, has wrong.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from speculators_core.diagnosis.replay import Reading, SeenText, first_token_log_probs, replay_all
from speculators_core.errors import Cause, SpeculatorError
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.verifier.taps import default_aux_layer_ids

DEAD_BELOW = 1.05
"""Acceptance length under which a draft costs more than it gives."""
MIN_GAIN_NATS = 0.02
MIN_T = 5.0
"""What a suspect must gain in the mean log-probability of the verifier's tokens, and by how many
standard errors of the paired differences, to be believed."""
NORM_OPTIONS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
MAX_PERMUTED = 4


@dataclass(frozen=True)
class Suspect:
    """One other way to read the same weights."""

    cause: Cause
    description: str
    """What is read otherwise, in words that name the key to change."""
    reading: Reading


@dataclass(frozen=True)
class Trial:
    """How a suspect did beside the checkpoint as it stands; holds no model."""

    cause: Cause
    description: str
    gain_nats: float
    """In the mean log-probability of the verifier's next token."""
    t: float
    """The gain in standard errors."""

    @property
    def is_better(self) -> bool:
        return self.gain_nats >= MIN_GAIN_NATS and self.t >= MIN_T


@dataclass(frozen=True)
class Diagnosis:
    """What was tried, and the suspect that explains the loss, if one does."""

    acceptance_length: float
    """Of the checkpoint as it stands, over the replayed texts."""
    trials: tuple[Trial, ...]
    """Best first."""
    culprit: Trial | None
    mended_acceptance_length: float | None
    """Of the culprit's reading."""


def diagnose(
    model: SpeculatorModel, verifier: PreTrainedModel, texts: Sequence[SeenText], num_tokens: int
) -> Diagnosis:
    """Tries every suspect on texts that the verifier wrote; ``model`` has it attached.

    A suspect is believed if it gives the verifier's tokens more probability by far more than
    chance, and the draft is then worth serving. What a draft was trained to read it reads best, so
    a sound checkpoint has no culprit; nor has one that has learnt too little for any reading.
    """
    stands = Reading(model)
    known = [first_token_log_probs(stands, text) for text in texts]
    trials, culprit, mended = [], None, None
    for suspect in suspects(model, verifier):
        trial = _try(suspect, texts, known)
        trials.append(trial)
        if trial.is_better and (culprit is None or trial.gain_nats > culprit.gain_nats):
            length = replay_all(suspect.reading, texts, num_tokens).acceptance_length
            if length >= DEAD_BELOW:
                culprit, mended = trial, length
    trials.sort(key=lambda trial: (not trial.is_better, -trial.gain_nats))
    length = replay_all(stands, texts, num_tokens).acceptance_length
    return Diagnosis(length, tuple(trials), culprit, mended)


def _try(suspect: Suspect, texts: Sequence[SeenText], known: Sequence[Tensor]) -> Trial:
    """A suspect that does no better on a quarter of the texts is not tried on the rest."""
    screening = max(1, len(texts) // 4)
    gains: list[Tensor] = []
    for number, (text, stands) in enumerate(zip(texts, known, strict=True), start=1):
        gains.append(first_token_log_probs(suspect.reading, text) - stands)
        if number == screening and torch.cat(gains).mean() <= 0:
            break
    gained = torch.cat(gains)
    error = float(gained.std()) / len(gained) ** 0.5
    gain = float(gained.mean())
    return Trial(suspect.cause, suspect.description, gain, gain / max(error, 1e-9))


def suspects(model: SpeculatorModel, verifier: PreTrainedModel) -> Iterator[Suspect]:
    """Every other reading that this kind of draft has."""
    yield from _other_layers(model, verifier)
    yield from _other_norms(model, verifier)
    yield from _other_vocabularies(model)
    yield from _other_ropes(model, verifier)
    for shift, whose in ((1, "its own state"), (-1, "the state of the token two before it")):
        yield Suspect(
            "position shift",
            f"each token beside {whose} instead of the state of the token before it",
            Reading(model, shift=shift),
        )
    state = getattr(model.config, "verifier_state", None)
    if state is not None:
        other = "pre_norm" if state == "post_norm" else "post_norm"
        yield Suspect(
            "hidden-state timing",
            f"verifier_state {other!r} instead of {state!r}: the verifier's last state "
            f"{'before' if other == 'pre_norm' else 'after'} its final norm",
            Reading(_variant(model, verifier, {"verifier_state": other})),
        )


def _other_layers(model: SpeculatorModel, verifier: PreTrainedModel) -> Iterator[Suspect]:
    """Neighbouring ids, the usual ones, and the same ones in another order."""
    if not hasattr(model.config, "stated_layer_ids"):
        return
    stated = tuple(model.aux_layer_ids)
    depth = verifier.config.get_text_config().num_hidden_layers
    others = [tuple(layer_id + by for layer_id in stated) for by in (-1, 1)]
    if len(stated) <= MAX_PERMUTED:
        others += itertools.permutations(stated)
    try:
        usual = tuple(default_aux_layer_ids(depth))
        others += [tuple(layer_id + by for layer_id in usual) for by in (0, -1, 1)]
    except SpeculatorError:
        pass  # the verifier is too shallow to have usual ids
    for ids in dict.fromkeys(others):
        fits = len(ids) == len(stated) and all(0 <= layer_id <= depth for layer_id in ids)
        if fits and ids != stated:
            yield Suspect(
                "wrong layer ids",
                f"aux layer ids {list(ids)} instead of {list(stated)}",
                Reading(model, layer_ids=ids),
            )


def _other_norms(model: SpeculatorModel, verifier: PreTrainedModel) -> Iterator[Suspect]:
    """Each norm option the other way; a norm without weights in the checkpoint scales by one."""
    for option in NORM_OPTIONS:
        value = getattr(model.config, option, None)
        if value is None or (option == "norm_output" and not hasattr(model, "unroll")):
            continue
        changes: dict[str, Any] = {option: not value}
        if not value and option in ("norm_before_fc", "fc_norm"):
            changes |= {other: False for other in ("norm_before_fc", "fc_norm") if other != option}
        yield Suspect(
            "missing norm",
            f"{option} {str(not value).lower()} instead of {str(value).lower()}",
            Reading(_variant(model, verifier, changes)),
        )


def _other_vocabularies(model: SpeculatorModel) -> Iterator[Suspect]:
    """d2t as ids instead of offsets, or off by one."""
    if getattr(model, "draft_token_ids", None) is None:
        return
    d2t: Tensor = model.d2t  # type: ignore[assignment]  # a buffer
    vocab_size = model.config.transformer_layer_config.vocab_size
    steps = torch.arange(len(d2t), device=d2t.device)
    for description, other in (
        ("d2t holds the verifier's ids, not offsets from the draft's", d2t - steps),
        ("d2t is too large by one", d2t - 1),
        ("d2t is too small by one", d2t + 1),
    ):
        ids = other + steps
        if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            ids = ids.clamp(0, vocab_size - 1)
        yield Suspect("d2t offset", description, Reading(_with_token_ids(model, ids)))


def _other_ropes(model: SpeculatorModel, verifier: PreTrainedModel) -> Iterator[Suspect]:
    """The verifier's rotary embedding instead of the draft's own."""
    text = verifier.config.get_text_config()
    layer_config = model.config.transformer_layer_config
    own, theirs = (getattr(config, "rope_parameters", None) for config in (layer_config, text))
    if own == theirs or not isinstance(theirs, Mapping):
        return
    if any(isinstance(value, Mapping) for value in theirs.values()):
        return  # one rope for each kind of layer: none of them is the draft's for certain
    other = copy.deepcopy(layer_config)
    other.rope_parameters = dict(theirs)
    yield Suspect(
        "rope",
        f"rope_parameters {dict(theirs)}, the verifier's, instead of {own}",
        Reading(_variant(model, verifier, {"transformer_layer_config": other})),
    )


def _variant(
    model: SpeculatorModel, verifier: PreTrainedModel, changes: Mapping[str, Any]
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
