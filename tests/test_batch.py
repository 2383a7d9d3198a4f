import pytest
import torch

from speculators_core.batch import Batch


def filled(num_rows):
    ids = torch.arange(4).expand(num_rows, -1)
    states = torch.randn(num_rows, 4, 6), torch.randn(num_rows, 4, 2)
    return Batch(ids, torch.zeros_like(ids), ids, ids > 1, *states)


def test_batch_is_one_row():
    assert filled(1).input_ids.shape == (1, 4)
    with pytest.raises(ValueError, match="one packed row, found 2 rows"):
        filled(2)


def test_batch_changes_the_type_of_its_states_alone():
    batch = filled(1)
    half = batch.to(torch.bfloat16)
    assert half.aux_hidden_states.dtype == half.last_hidden_states.dtype == torch.bfloat16
    assert batch.aux_hidden_states.dtype == torch.float32
    assert half.input_ids is batch.input_ids
