"""Callbacks between steps: evaluation, saving, early stop, display."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from speculators_core.console import LINE_EVERY_S, console
from speculators_core.data_generation.lengths import Lengths
from speculators_core.files import write_text
from speculators_core.training.evaluation import worst_cell_of
from speculators_core.training.rows.sources import Stream

LEAST_BETWEEN = 20
"""Fewest steps between evaluations where the plan does not state a number."""
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
    """Evaluates and saves at regular steps, and at the last one."""

    def __init__(
        self,
        eval_every: int | None,
        save_every: int | None,
        patience: int | None,
        evaluate: Callable[[], object],
    ):
        """Where ``eval_every`` is None, evaluations are a tenth of the run apart, and at least
        `LEAST_BETWEEN` steps; where ``save_every`` is None, a state is saved at each evaluation.
        After ``patience`` evaluations without a new best the run ends. ``evaluate`` makes up for an
        evaluation that a signal interrupted.
        """
        self.eval_every, self.save_every, self.patience = eval_every, save_every, patience
        self.evaluate = evaluate
        self.has_ended = False
        """Whether patience ended the run."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        now = [line for line in state.log_history if line["step"] == state.global_step]
        if state.global_step and self._is_due(state) and not any("eval_runtime" in x for x in now):
            self.evaluate()
        self.has_ended = self._is_patience_spent(state)
        # A run that was killed between its last state and its report has no step left.
        control.should_training_stop |= self.has_ended or state.global_step >= state.max_steps

    def _is_due(self, state: TrainerState) -> bool:
        every = self.eval_every or max(LEAST_BETWEEN, state.max_steps // 10)
        return state.global_step >= state.max_steps or state.global_step % every == 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        is_last, is_due = state.global_step >= state.max_steps, self._is_due(state)
        control.should_evaluate |= is_due
        if self.save_every is None:
            control.should_save |= is_due
        else:
            control.should_save |= is_last or state.global_step % self.save_every == 0
        # The log has a line at each saved state, so that a resumed run has the same lines.
        control.should_log |= control.should_save or control.should_evaluate

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if self._is_patience_spent(state):
            self.has_ended = True
            control.should_training_stop = control.should_save = True

    def _is_patience_spent(self, state: TrainerState) -> bool:
        if self.patience is None:
            return False
        steps = [line["step"] for line in state.log_history if "eval_acceptance_length" in line]
        return sum(step > (state.best_global_step or 0) for step in steps) >= self.patience


class MarkRowsUsed(TrainerCallback):
    """Marks the rows of a stream used when their step is over.

    The lengths of their examples are part of the saved state: of a queue, a resumed run receives
    the examples after it alone.
    """

    KEY = "example_lengths"

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        saved = state.stateful_callbacks.get(self.KEY)
        if saved is not None and self._stream.is_held:
            self._stream.lengths = Lengths.model_validate(saved)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._stream.mark_used()
        state.stateful_callbacks[self.KEY] = self._stream.lengths.model_dump(mode="json")


class LogFile(TrainerCallback):
    """Writes each line of the log as JSON; a resumed run keeps those up to its state."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if state.is_world_process_zero:
            write_text(self.path, "".join(f"{json.dumps(line)}\n" for line in state.log_history))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(state.log_history[-1])}\n")


class Display(TrainerCallback):
    """A bar and the last evaluations on a terminal, lines where there is none."""

    def __init__(self, tokens_per_step: int) -> None:
        """``tokens_per_step``: tokens of all ranks, padding included."""
        self.tokens_per_step = tokens_per_step
        self._live: Live | None = None
        self._start = time.monotonic()
        self._next_line = 0.0
        self._first = 0
        self._share = 0.0
        """Share of the present step that is done."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
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
        steps = state.global_step - self._first + self._share
        return steps * self.tokens_per_step / max(seconds, 1e-9)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._share += 1 / args.gradient_accumulation_steps
        self._tell(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._share = 0.0
        self._tell(state)

    def _tell(self, state: TrainerState) -> None:
        """Moves the bar; without one, writes a line as soon as there is a rate, then at times."""
        if self._live is None:
            if state.is_world_process_zero and time.monotonic() >= self._next_line:
                loss = next((x["loss"] for x in reversed(state.log_history) if "loss" in x), None)
                self._write(state, [] if loss is None else [f"loss {loss:.3f}"])
            return
        what = f"training, {self._rate(state):.0f} tokens/s"
        self._bar.update(self._task, completed=state.global_step, description=what)
        self._live.update(Group(self._bar, evaluation_table(state.log_history)))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        line = state.log_history[-1]
        if self._live is not None or not state.is_world_process_zero:
            return
        if any(name.startswith("eval_") for name in line):
            if worst := worst_cell_of(line, "eval_"):
                where = f"step {state.global_step} of {state.max_steps}"
                console.print(f"{where}: worst at {worst}", markup=False)
            self._write(
                state, [f"{SHOWN[name]} {line[name]:.3f}" for name in SHOWN if name in line]
            )

    def _write(self, state: TrainerState, figures: Sequence[str]) -> None:
        shown = ", ".join([*figures, f"{self._rate(state):.0f} tokens/s"])
        console.print(f"step {state.global_step} of {state.max_steps}: {shown}", markup=False)
        self._next_line = time.monotonic() + LINE_EVERY_S

    def on_train_end(self, *_: object, **__: object) -> None:
        self.close()

    def close(self) -> None:
        """Restores the terminal; also called after an error."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def evaluation_table(history: Sequence[Mapping[str, float]]) -> Table:
    """The last evaluations, one per line, with the loss before each."""
    worst = next(filter(None, (worst_cell_of(line, "eval_") for line in reversed(history))), None)
    title = f"worst at {worst}\nevaluations" if worst else "evaluations"
    table = Table(title=title, title_justify="left")
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
