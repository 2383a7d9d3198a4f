"""What happens between steps: evaluation, saving, an early stop, a signal, and what is shown."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from speculators_core.console import LINE_EVERY_S, console
from speculators_core.files import write_text

LEAST_BETWEEN = 20
"""Steps between evaluations, at least, where the plan does not say how many."""
SHOWN_EVALUATIONS = 8
"""Lines of the live table."""
SHOWN = {
    "eval_acceptance_length": "tau",
    "eval_predicted_acceptance_length": "tau predicted",
    "eval_loss": "eval loss",
    "loss": "loss",
}
"""Figures of an evaluation on the terminal."""


class Schedule(TrainerCallback):
    """Evaluates and saves every so many steps, and at the last one."""

    def __init__(
        self,
        eval_every: int | None,
        save_every: int | None,
        patience: int | None,
        evaluate: Callable[[], Any],
    ):
        """A tenth of the run or more where ``eval_every`` is None; with each evaluation is saved
        where ``save_every`` is None. ``patience``: evaluations without a new best, then it is over.
        ``evaluate`` makes up for an evaluation that a signal broke off.
        """
        self.eval_every, self.save_every, self.patience = eval_every, save_every, patience
        self.evaluate = evaluate
        self.has_ended = False
        """Patience ended the run."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        now = [line for line in state.log_history if line["step"] == state.global_step]
        if state.global_step and self._is_due(state) and not any("eval_runtime" in x for x in now):
            self.evaluate()
        self.has_ended = self._is_patience_spent(state)
        # The run had been killed between its last state and its report: no step is left.
        control.should_training_stop |= self.has_ended or state.global_step >= state.max_steps

    def _is_due(self, state: TrainerState) -> bool:
        every = self.eval_every or max(LEAST_BETWEEN, state.max_steps // 10)
        return state.global_step >= state.max_steps or state.global_step % every == 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        is_last, is_due = state.global_step >= state.max_steps, self._is_due(state)
        control.should_evaluate |= is_due
        if self.save_every is None:
            control.should_save |= is_due
        else:
            control.should_save |= is_last or state.global_step % self.save_every == 0
        # A line of the log ends where a state is saved, so that a resumed run has the same lines.
        control.should_log |= control.should_save or control.should_evaluate

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._is_patience_spent(state):
            self.has_ended = True
            control.should_training_stop = control.should_save = True

    def _is_patience_spent(self, state: TrainerState) -> bool:
        if self.patience is None:
            return False
        steps = [line["step"] for line in state.log_history if "eval_acceptance_length" in line]
        return sum(step > (state.best_global_step or 0) for step in steps) >= self.patience


class Settlement(TrainerCallback):
    """Says that the rows of a step have been used, when it is over."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle = settle

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._settle()


class Interrupted(Exception):
    """An evaluation, or a wait for a row, was broken off for the run to be stopped."""


class StopOnSignal(TrainerCallback):
    """After SIGTERM the step in hand is finished, the state saved, and the run is over.

    A row that does not come is not waited for, nor an evaluation where one process alone is at it:
    that is made up for when the run goes on.
    """

    def __init__(self) -> None:
        self.is_asked = False
        """Of this process; the others may hear of it a step later."""
        self.has_stopped = False
        self._may_interrupt = False

    def _hear(self, *_: Any) -> None:
        self.is_asked = True
        if self._may_interrupt:
            raise Interrupted

    def check(self) -> None:
        """Raises Interrupted once the signal came."""
        if self.is_asked:
            raise Interrupted

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """What may be broken off.

        Raises:
            Interrupted: it was.
        """
        if torch.distributed.is_initialized():  # the others would wait for this one
            yield
            return
        self._may_interrupt = True
        try:
            yield
        except Interrupted:
            self.has_stopped = True
            raise
        finally:
            self._may_interrupt = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Where this is the main thread, which alone can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if _any_rank(self.is_asked, args.device) and state.global_step < state.max_steps:
            self.has_stopped = True
            control.should_evaluate = False
            control.should_save = control.should_log = control.should_training_stop = True


def _any_rank(flag: bool, device: torch.device) -> bool:
    if not torch.distributed.is_initialized():
        return flag
    told = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(told)
    return bool(told > 0)


class LogFile(TrainerCallback):
    """Every line of the log as JSON; of a resumed run, those up to its state and what follows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            write_text(self.path, "".join(f"{json.dumps(line)}\n" for line in state.log_history))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(state.log_history[-1])}\n")


class Display(TrainerCallback):
    """A bar and the last evaluations on a terminal, lines where there is none."""

    def __init__(self, tokens_per_step: int) -> None:
        """``tokens_per_step``: of all ranks, padding included."""
        self.tokens_per_step = tokens_per_step
        self._live: Live | None = None
        self._start = self._last_line = time.monotonic()
        self._first = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._start, self._first = time.monotonic(), state.global_step
        if not state.is_world_process_zero or not console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("training", total=state.max_steps)
        self._live = Live(console=console, refresh_per_second=4)
        self._live.start()

    def _rate(self, state: TrainerState) -> float:
        seconds = time.monotonic() - self._start
        return (state.global_step - self._first) * self.tokens_per_step / max(seconds, 1e-9)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._live is None:
            return
        what = f"training, {self._rate(state):.0f} tokens/s"
        self._bar.update(self._task, completed=state.global_step, description=what)
        self._live.update(Group(self._bar, evaluation_table(state.log_history)))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        is_due = time.monotonic() - self._last_line >= LINE_EVERY_S
        line = state.log_history[-1]
        if self._live is not None or not state.is_world_process_zero:
            return
        if is_due or any(name.startswith("eval_") for name in line):
            shown = [f"{SHOWN[name]} {line[name]:.3f}" for name in SHOWN if name in line]
            shown.append(f"{self._rate(state):.0f} tokens/s")
            where = f"step {state.global_step} of {state.max_steps}"
            console.print(f"{where}: {', '.join(shown)}", markup=False)
            self._last_line = time.monotonic()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the terminal as it was; also after an error."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def evaluation_table(history: Sequence[dict[str, Any]]) -> Table:
    """The last evaluations, one a line, with the loss before each."""
    table = Table(title="evaluations", title_justify="left")
    for column in ("step", "loss", "eval loss", "tau", "tau predicted"):
        table.add_column(column, justify="right")
    loss, rows = None, []
    for line in history:
        loss = line.get("loss", loss)
        if "eval_loss" in line or "eval_acceptance_length" in line:
            figures = {"loss": loss, **line}
            names = ("loss", "eval_loss", "eval_acceptance_length")
            shown = [figures.get(name) for name in (*names, "eval_predicted_acceptance_length")]
            rows.append([line["step"], *shown])
    for step, *shown in rows[-SHOWN_EVALUATIONS:]:
        table.add_row(str(step), *("-" if figure is None else f"{figure:.3f}" for figure in shown))
    return table
