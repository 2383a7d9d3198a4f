from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from speculators_core.console import console
from speculators_core.data_generation.lengths import Lengths
from speculators_core.training import watch
from speculators_core.training.rows.sources import Stream
from speculators_core.training.watch import Display, MarkRowsUsed, evaluation_table


def evaluation(num_drafts):
    """The line of an evaluation whose drafts keep half of their first tokens, long or short."""
    line = {"step": 4, "eval_loss": 1.0, "eval_acceptance_length": 1.5}
    for name, rate in (("0-128", 0.5), ("128-512", 0.25)):
        start = f"eval_context_{name}"
        line |= {f"{start}_num_drafts": float(num_drafts), f"{start}_joint_1": rate}
    return line


@pytest.mark.parametrize("num_drafts", [40, 80])
def test_an_evaluation_names_its_worst_cell_before_the_mean(num_drafts):
    state = TrainerState()
    state.log_history = [evaluation(num_drafts)]
    display = Display(tokens_per_step=1)
    with console.capture() as shown:
        display.on_train_begin(None, state, TrainerControl())
        display.on_log(None, state, TrainerControl())
        console.print(evaluation_table([*state.log_history, {"step": 5, "loss": 1.0}]))
    told = " ".join(shown.get().split())
    worst = "worst at position 1 with 128-512 tokens of context, 20 of 80 kept (0.25)"
    assert told.count(worst) == (2 if num_drafts == 80 else 0)
    if num_drafts == 80:
        assert told.index(worst) < told.index("tau 1.500")


def test_without_a_terminal_a_rate_is_told_with_the_first_row_and_then_at_times(monkeypatch):
    """A step of many rows may take minutes."""
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    state, arguments = TrainerState(max_steps=3), SimpleNamespace(gradient_accumulation_steps=4)
    display = Display(tokens_per_step=400)

    with console.capture() as shown:
        display.on_train_begin(arguments, state, TrainerControl())
        for step in range(3):
            for _ in range(3):
                now[0] += 4
                display.on_substep_end(arguments, state, TrainerControl())
            now[0] += 4
            state.global_step = step + 1
            display.on_step_end(arguments, state, TrainerControl())
            state.log_history.append({"step": step + 1, "loss": 2.0})
            display.on_log(arguments, state, TrainerControl())

    assert shown.get().splitlines() == [
        "step 0 of 3: 25 tokens/s",  # at 4 s
        "step 2 of 3: loss 2.000, 25 tokens/s",  # at 36 s
    ]


class Rows(Stream):
    is_held = False

    def __init__(self, is_held, lengths):
        self.is_held, self.lengths, self.num_marked = is_held, lengths, 0

    def mark_used(self):
        self.num_marked += 1


@pytest.mark.parametrize("is_held", [True, False])
def test_lengths_of_a_queue_go_into_the_state_and_come_back(is_held):
    """Other streams give the rows that were used once more, and count them then."""
    rows = Rows(is_held=is_held, lengths=Lengths.of([7, 600]))
    state = TrainerState()
    callback = MarkRowsUsed(rows)
    callback.on_train_begin(None, state, TrainerControl())
    callback.on_step_end(None, state, TrainerControl())
    assert rows.num_marked == 1
    resumed = Rows(is_held=is_held, lengths=Lengths())
    MarkRowsUsed(resumed).on_train_begin(None, state, TrainerControl())
    assert resumed.lengths == (rows.lengths if is_held else Lengths())
