import torch

from speculators_core.models.parts.masks import document_starts, spans_before


def picture(mask):
    return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]


def seen(spans, num_keys):
    keys = torch.arange(num_keys)
    return picture((keys >= spans.first[:, None]) & (keys < spans.last[:, None]))


ROWS = torch.arange(6)
STARTS = document_starts(torch.tensor([0, 0, 0, 0, 1, 1]))


def test_every_row_knows_where_its_document_starts():
    documents = torch.tensor([0, 0, 0, 1, 1, 2, -1, -1])
    assert document_starts(documents).tolist() == [0, 0, 0, 3, 3, 5, 6, 6]
    assert document_starts(torch.tensor([-1, -1])).tolist() == [0, 0]


def test_rows_see_their_document_up_to_themselves():
    assert seen(spans_before(ROWS + 1, STARTS), 6) == [
        "x.....",
        "xx....",
        "xxx...",
        "xxxx..",
        "....x.",
        "....xx",
    ]


def test_window_counts_the_row_itself():
    assert seen(spans_before(ROWS + 1, STARTS, window=2), 6) == [
        "x.....",
        "xx....",
        ".xx...",
        "..xx..",
        "....x.",
        "....xx",
    ]


def test_window_counts_back_from_where_the_query_lies():
    two_steps_on = spans_before(ROWS + 1, STARTS, reach=2, window=4)
    assert seen(two_steps_on, 6) == ["x.....", "xx....", ".xx...", "..xx..", "....x.", "....xx"]
    out_of_reach = spans_before(ROWS + 1, STARTS, reach=2, window=2)
    assert seen(out_of_reach, 6) == ["......"] * 6
    assert seen(spans_before(ROWS + 1, STARTS, reach=2), 6) == seen(
        spans_before(ROWS + 1, STARTS), 6
    )


def test_every_query_has_its_own_end_and_reach():
    """A chain of depths 0 to 3 behind row 2, and what stands strictly before rows 3 and 4."""
    ends = torch.tensor([3, 3, 3, 3, 3, 4])
    starts = STARTS[torch.tensor([2, 2, 2, 2, 3, 4])]
    reach = torch.tensor([0, 1, 2, 3, 1, 1])
    assert seen(spans_before(ends, starts, reach, window=3), 6) == [
        "xxx...",
        ".xx...",
        "..x...",
        "......",
        ".xx...",
        "......",
    ]
