import torch

from speculators_core.masks import causal_mask, packed_causal_mask


def picture(mask):
    return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]


def test_causal_mask():
    rows = torch.arange(4)
    assert picture(causal_mask(rows, rows)) == ["x...", "xx..", "xxx.", "xxxx"]
    assert picture(causal_mask(rows, rows, window=2)) == ["x...", "xx..", ".xx.", "..xx"]
    assert picture(causal_mask(rows[2:], rows)) == ["xxx.", "xxxx"]


def test_packed_documents_do_not_see_each_other():
    documents = torch.tensor([[0, 0, 0, 1, 1, -1]])
    assert picture(packed_causal_mask(documents, 0, 6)[0]) == [
        "x.....",
        "xx....",
        "xxx...",
        "...x..",
        "...xx.",
        ".....x",
    ]
    assert picture(packed_causal_mask(documents, 2, 5, window=1)[0]) == ["..x..", "...x.", "....x"]
