"""Private points of Transformers' Trainer that training relies on.

Transformers may change any of them without notice. Each is checked when a trainer is made, so that
a version that lacks one is refused by name before the first step.
"""

import functools
import inspect
import logging
from typing import NamedTuple

import transformers
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from speculators_core.errors import SpeculatorError

logger = logging.getLogger(__name__)

TESTED = ((5, 16), (5, 24))
"""First and last minor version of Transformers that training was tested with.

The tests of the trainer and of resumed runs passed with 5.16, 5.18, 5.19, 5.20 and 5.24.
"""


class Point(NamedTuple):
    """A method or an attribute of a class of Transformers."""

    owner: type
    name: str
    why: str
    parameters: tuple[str, ...] | None = None
    """All parameters of a method in their order; None for an attribute."""
    since: tuple[int, int] = TESTED[0]
    """First version that has it; a point that came later is needed for sharded drafts alone."""

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}"


POINTS = (
    # ---- the loop ----
    Point(
        Trainer,
        "_run_epoch",
        "a run that is over takes no step, and one whose data end is stopped and saved",
        (
            "self",
            "model",
            "epoch",
            "train_dataloader",
            "steps_in_epoch",
            "num_update_steps_per_epoch",
            "trial",
            "ignore_keys_for_eval",
            "start_time",
            "resume_from_checkpoint",
            "epochs_trained",
            "steps_trained_in_current_epoch",
        ),
    ),
    Point(
        Trainer,
        "_maybe_log_save_evaluate",
        "a run that is interrupted between two steps is logged and saved",
        (
            "self",
            "tr_loss",
            "grad_norm",
            "model",
            "trial",
            "epoch",
            "ignore_keys_for_eval",
            "start_time",
            "learning_rate",
        ),
    ),
    Point(Trainer, "_tr_loss", "the loss since the last line of the log, for that line"),
    Point(
        Trainer,
        "get_batch_samples",
        "tokens are counted over the batches of a step and over all ranks",
        ("self", "epoch_iterator", "num_batches", "device"),
    ),
    Point(
        Trainer,
        "_get_grad_norm",
        "a gradient that is not finite ends the run before the optimizer's step",
        ("self", "model", "grad_norm"),
    ),
    Point(
        CallbackHandler,
        "on_evaluate",
        "callbacks hear of the evaluation, which is not Trainer's",
        ("self", "args", "state", "control", "metrics", "kwargs"),
    ),
    # ---- the model ----
    Point(
        Trainer,
        "model_accepts_loss_kwargs",
        "Trainer does not divide the loss, which is weighted already",
    ),
    Point(
        Trainer,
        "is_distributed_loading_by_transformers",
        "Trainer neither places nor wraps a draft whose weights are sharded",
        since=(5, 19),
    ),
    Point(TrainingArguments, "_n_gpu", "a process trains on one device"),
    # ---- saved states ----
    Point(
        Trainer,
        "_save_checkpoint",
        "a state is written by `states`, without pickle",
        ("self", "model", "trial"),
    ),
    Point(
        Trainer,
        "_prepare_for_training",
        "weights of a saved state are read before DeepSpeed shards them",
        ("self", "max_steps", "train_dataloader", "resume_from_checkpoint"),
        since=(5, 19),
    ),
    Point(
        Trainer,
        "_load_from_checkpoint",
        "weights are read together with the optimizer",
        ("self", "resume_from_checkpoint", "model"),
    ),
    Point(
        Trainer,
        "_load_optimizer_and_scheduler",
        "weights, optimizer and scheduler are read from such a state",
        ("self", "checkpoint"),
    ),
    Point(
        Trainer,
        "_load_rng_state",
        "random states are restored when Trainer has skipped the rows that were used",
        ("self", "checkpoint"),
    ),
    Point(
        Trainer,
        "_save",
        "a model is saved without Trainer's arguments, which are a pickle",
        ("self", "output_dir", "state_dict"),
    ),
)


def check_trainer(is_sharded: bool) -> None:
    """Compares the installed Transformers with `POINTS`; an untested version is warned of once.

    ``is_sharded``: the draft's weights are sharded, which needs points that came later.

    Raises:
        SpeculatorError: a point is missing, or a method has other parameters.
    """
    _warn_of_untested_version()
    for point in POINTS:
        fault = _fault_of(point)
        if fault is not None and (is_sharded or point.since == TESTED[0]):
            raise SpeculatorError(
                f"transformers {transformers.__version__}: {fault}, on which training relies "
                f"({point.why}). Install transformers {_shown(point.since)} to "
                f"{_shown(TESTED[1])}."
            )


def _fault_of(point: Point) -> str | None:
    if point.parameters is None:
        return None if _mentions(point.owner, point.name) else f"{point} does not exist"
    method = getattr(point.owner, point.name, None)
    if method is None:
        return f"{point} does not exist"
    found = tuple(inspect.signature(method).parameters)
    if found == point.parameters:
        return None
    return f"{point} has the parameters {', '.join(found)}; expected {', '.join(point.parameters)}"


def _mentions(owner: type, name: str) -> bool:
    """Whether a method of the class reads or writes this attribute, which only instances have."""
    members = (getattr(member, "fget", member) for member in vars(owner).values())
    methods = filter(inspect.isfunction, map(inspect.unwrap, filter(callable, members)))
    return any(name in method.__code__.co_names for method in methods)


@functools.cache
def _warn_of_untested_version() -> None:
    """One warning a process where Transformers is older or newer than what was tested."""
    found = tuple(map(int, transformers.__version__.split(".")[:2]))
    if not TESTED[0] <= found <= TESTED[1]:
        logger.warning(
            "training was tested with transformers %s to %s; found %s",
            *map(_shown, TESTED),
            transformers.__version__,
        )


def _shown(version: tuple[int, int]) -> str:
    return "{}.{}".format(*version)
