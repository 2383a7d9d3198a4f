import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speculators_core.batch import Batch
from speculators_core.training.batches import fill_rows, pack


def test_rows_hold_documents_end_to_end():
    row = pack(
        [
            {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]},
            {"input_ids": [8, 9], "loss_mask": [1, 1]},
        ],
        length=7,
    )
    assert row.input_ids.tolist() == [[5, 6, 7, 8, 9, 0, 0]]
    assert row.document_ids.tolist() == [[0, 0, 0, 1, 1, -1, -1]]
    assert row.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert row.loss_mask.tolist() == [[False, True, True, True, True, False, False]]


def test_what_does_not_fit_is_cut():
    row = pack([{"input_ids": list(range(9)), "loss_mask": [1] * 9}], length=4)
    assert row.input_ids.tolist() == [[0, 1, 2, 3]]


def test_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match="document 0 has 2 input_ids and 1 loss_mask"):
        pack([{"input_ids": [1, 2], "loss_mask": [1]}], 4)


@given(st.lists(st.integers(1, 30)), st.integers(1, 30))
@settings(deadline=None)
def test_every_document_has_one_row_and_rows_are_full(lengths, row_length):
    rows = list(fill_rows(lengths, row_length))
    assert [index for row in rows for index in row] == list(range(len(lengths)))
    for row, following in zip(rows, rows[1:], strict=False):
        used = sum(lengths[index] for index in row)
        assert used <= row_length or len(row) == 1
        assert used + lengths[following[0]] > row_length


def test_padding_is_no_document():
    row = pack([], 3)
    assert torch.equal(row.document_ids, torch.full((1, 3), -1))


def filled(num_rows):
    row = pack([{"input_ids": [5, 6, 7], "loss_mask": [1, 1, 1]}], 4)
    columns = [column.expand(num_rows, -1) for column in vars(row).values()]
    return Batch(*columns, torch.randn(num_rows, 4, 6), torch.randn(num_rows, 4, 2))


def test_batch_is_one_row():
    assert filled(1).input_ids.shape == (1, 4)
    with pytest.raises(ValueError, match="one packed row, found 2 rows"):
        filled(2)


def test_batch_changes_the_type_of_its_states_alone():
    batch = filled(1)
    half = batch.to(torch.bfloat16)
    assert half.hidden_states.dtype == half.last_hidden_states.dtype == torch.bfloat16
    assert batch.hidden_states.dtype == torch.float32
    assert half.input_ids is batch.input_ids
