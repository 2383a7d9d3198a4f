import pytest
from transformers import TrainerControl, TrainerState

from speculators_core.data_generation.lengths import Lengths
from speculators_core.training.rows.sources import Stream
from speculators_core.training.watch import MarkRowsUsed


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
