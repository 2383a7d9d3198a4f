import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speculators_core.data_generation.examples import GeneratedExample
from speculators_core.data_generation.packing import RowLayout
from speculators_core.errors import SpeculatorError
from tests.data_generation.making import HIDDEN_SIZE, generated, schema

LENGTHS = st.lists(st.integers(1, 12), max_size=20)
ROW_LENGTHS = st.one_of(st.none(), st.integers(1, 15))


def states(*numbers):
    """Of tokens with three states of width 2: token 1, layer 0 has [10, -10]."""
    tokens = torch.tensor(numbers, dtype=torch.float32)
    per_layer = 10 * tokens[:, None] + torch.arange(3)  # [seq, states]
    return torch.stack([per_layer, -per_layer], dim=-1)  # [seq, states, hidden]


TWO = [
    GeneratedExample(
        "0/0", torch.tensor([5, 6, 7]), torch.tensor([0, 1, 1]) > 0, 1, states(1, 2, 3)
    ),
    GeneratedExample("0/1", torch.tensor([8, 9]), torch.tensor([1, 0]) > 0, 2, states(4, 5)),
]
NARROW = schema(layer_ids=(1, 2, 4), hidden_size=2)


def examples_of(lengths, **content):
    return [generated(number, length, schema(**content)) for number, length in enumerate(lengths)]


def rows_of(lengths, row_length):
    examples = examples_of(lengths)
    return examples, list(RowLayout.of(schema(), None, row_length).rows(examples))


def test_a_row_holds_each_token_beside_what_belongs_to_it():
    row = RowLayout.of(NARROW, None, 7).pack(TWO)
    assert row.input_ids.tolist() == [[5, 6, 7, 8, 9, 0, 0]]
    assert row.document_ids.tolist() == [[0, 0, 0, 1, 1, -1, -1]]
    assert row.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert row.loss_mask.int().tolist() == [[0, 1, 1, 1, 0, 0, 0]]
    assert row.aux_hidden_states.tolist() == [
        [
            [10, -10, 11, -11],
            [20, -20, 21, -21],
            [30, -30, 31, -31],
            [40, -40, 41, -41],
            [50, -50, 51, -51],
            [0, 0, 0, 0],
            [0, 0, 0, 0],
        ]
    ]
    assert row.last_hidden_states.tolist() == [
        [[12, -12], [22, -22], [32, -32], [42, -42], [52, -52], [0, 0], [0, 0]]
    ]


def test_what_does_not_fit_is_cut():
    row = RowLayout.of(NARROW, None, 2).pack(TWO[:1])
    assert row.input_ids.tolist() == [[5, 6]]
    assert row.last_hidden_states.tolist() == [[[12, -12], [22, -22]]]


def test_a_row_without_a_length_is_as_long_as_its_examples():
    row = RowLayout.of(NARROW, None, None).pack(TWO)
    assert row.document_ids.tolist() == [[0, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("layer_ids", "expected"),
    [([1], [10, -10]), ([2, 1], [10, -10, 11, -11]), ([2, 4], [11, -11, 12, -12]), ([], [])],
    ids=str,
)
def test_a_draft_gets_its_own_layers_in_ascending_order(layer_ids, expected):
    row = RowLayout.of(NARROW, layer_ids, None).pack(TWO)
    assert row.aux_hidden_states[0, 0].tolist() == expected
    assert row.last_hidden_states[0, 0].tolist() == [12, -12]


def test_a_mean_is_one_state_and_the_last_can_be_one_of_the_drafts():
    mean = schema(reduce="mean", hidden_size=2)
    two_states = [
        GeneratedExample(e.key, e.input_ids, e.loss_mask, 1, e.hidden_states[:, 1:]) for e in TWO
    ]
    whole = RowLayout.of(mean, None, None).pack(two_states)
    assert whole.aux_hidden_states[0, 0].tolist() == [11, -11]
    last = RowLayout.of(mean, [4], None).pack(two_states)
    assert (
        last.aux_hidden_states[0, 0].tolist() == last.last_hidden_states[0, 0].tolist() == [12, -12]
    )


REFUSED = {
    "no last state": ({"has_last": False}, None, "without the last hidden state.*data.states.last"),
    "not stored": ({}, [1, 3], r"reads layers \[1, 3\], but the examples hold layers \[1, 2, 4\]"),
    "mean": ({"reduce": "mean"}, [1], r"hold layers \[4\] and the mean of others"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_examples_that_lack_a_state_are_refused(what):
    content, layer_ids, words = REFUSED[what]
    with pytest.raises(SpeculatorError, match=words):
        RowLayout.of(schema(**content), layer_ids, 8)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_states_have_the_type_that_is_asked_for(dtype):
    row = RowLayout.of(NARROW, None, 9, dtype).pack(TWO)
    assert row.aux_hidden_states.dtype == row.last_hidden_states.dtype == (dtype or torch.float32)
    assert row.input_ids.dtype is torch.int64


@given(LENGTHS, ROW_LENGTHS)
@settings(deadline=None)
def test_every_example_has_one_row_and_rows_are_full(lengths, row_length):
    examples, rows = rows_of(lengths, row_length)
    assert [e.key for row in rows for e in row] == [e.key for e in examples]
    assert all(rows)
    if row_length is None:
        assert [len(row) for row in rows] == [1] * len(examples)
        return
    used = [sum(len(e.input_ids) for e in row) for row in rows]
    for row, tokens, following in zip(rows, used, rows[1:], strict=False):
        assert tokens <= row_length or len(row) == 1
        assert tokens + len(following[0].input_ids) > row_length


@given(LENGTHS, ROW_LENGTHS)
@settings(deadline=None)
def test_a_full_row_comes_before_the_next_example_is_asked_for(lengths, row_length):
    asked = []
    examples = iter(examples_of(lengths))
    watched = (asked.append(example) or example for example in examples)
    num_given = 0
    for row in RowLayout.of(schema(), None, row_length).rows(watched):
        num_given += len(row)
        is_full = sum(len(e.input_ids) for e in row) >= (row_length or 1)
        assert len(asked) == num_given + (not is_full and num_given < len(lengths))


@given(LENGTHS, ROW_LENGTHS)
@settings(deadline=None, max_examples=50)
def test_each_document_of_a_row_is_its_example(lengths, row_length):
    layout = RowLayout.of(schema(), None, row_length)
    _, rows = rows_of(lengths, row_length)
    for examples in rows:
        row = layout.pack(examples)
        if row_length is not None:
            assert row.input_ids.shape == (1, row_length)
        for number, example in enumerate(examples):
            own = row.document_ids[0] == number
            count = min(len(example.input_ids), row_length or len(example.input_ids))
            expected = example.hidden_states[:count]
            assert torch.equal(row.input_ids[0, own], example.input_ids[:count])
            assert torch.equal(row.loss_mask[0, own], example.loss_mask[:count])
            assert row.position_ids[0, own].tolist() == list(range(count))
            assert torch.equal(row.aux_hidden_states[0, own], expected[:, :-1].flatten(1))
            assert torch.equal(row.last_hidden_states[0, own], expected[:, -1])
        padding = row.document_ids[0] == -1
        assert not row.loss_mask[0, padding].any() and not row.aux_hidden_states[0, padding].any()


def test_a_packed_row_is_a_copy():
    example = examples_of([4])[0]
    row = RowLayout.of(schema(), None, 4).pack([example])
    example.hidden_states.zero_()
    assert row.aux_hidden_states.any() and row.aux_hidden_states.shape == (1, 4, 2 * HIDDEN_SIZE)
