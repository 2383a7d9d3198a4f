from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speculators_core.models.parts import attention
from speculators_core.models.parts.attention import (
    FAR,
    DraftCache,
    OwnKey,
    Spans,
    _attend_fused,
    _attend_plainly,
    attend_packed,
)
from tests.models.parts.test_masks import picture

HEAD_DIM = 4


def dense(queries, keys, values, visible):
    """The plain twin: every query against every key under one mask, [batch, 1, queries, keys]."""
    groups = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ values


def dense_packed(queries, keys, values, spans, own):
    """`attend_packed` by `dense`: own keys stand behind the context, each for one query."""
    index = torch.arange(keys.shape[2])
    masks = [(index >= spans.first[:, None]) & (index < spans.last[:, None])]
    for key in own:
        diagonal = torch.eye(queries.shape[2], dtype=torch.bool)
        masks.append(diagonal if key.is_visible is None else diagonal & key.is_visible)
    keys = torch.cat([keys, *(key.keys for key in own)], dim=2)
    values = torch.cat([values, *(key.values for key in own)], dim=2)
    return dense(queries, keys, values, torch.cat(masks, dim=1))


@st.composite
def packed_rows(draw):
    """Arguments of `attend_packed` in which every query sees something."""
    num_queries, num_keys = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batch = draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(heads, length):
        shape = (batch, heads, length, HEAD_DIM)
        return torch.randn(shape, generator=generator).requires_grad_()

    def ends():
        bounds = st.integers(0, num_keys)
        return torch.tensor(draw(st.lists(bounds, min_size=num_queries, max_size=num_queries)))

    own = []
    for _ in range(draw(st.integers(0, 3))):
        is_visible = None
        if draw(st.booleans()):
            is_visible = torch.rand(num_queries, generator=generator) < 0.5
        own.append(OwnKey(normal(kv_heads, num_queries), normal(kv_heads, num_queries), is_visible))
    first, last = ends(), ends()
    blind = first >= last
    for key in own:
        blind &= torch.tensor(False) if key.is_visible is None else ~key.is_visible
    spans = Spans(first.masked_fill(blind, 0), last.masked_fill(blind, 1))
    queries = normal(kv_heads * groups, num_queries)
    return queries, normal(kv_heads, num_keys), normal(kv_heads, num_keys), spans, own


@pytest.mark.parametrize(
    ("attend", "recompute_scores"),
    [(_attend_fused, 0), (_attend_plainly, 0), (_attend_plainly, attention.RECOMPUTE_SCORES)],
    ids=["fused", "again", "kept"],
)
@given(packed_rows(), st.integers(1, 25))
@settings(max_examples=40, deadline=None)
def test_attention_equals_its_dense_twin(attend, recompute_scores, arguments, query_block):
    queries, keys, values, spans, own = arguments
    tensors = [queries, keys, values, *(t for key in own for t in (key.keys, key.values))]
    cotangent = torch.linspace(-1, 1, queries.numel()).view(queries.shape)
    expected = dense_packed(*arguments)
    wanted = torch.autograd.grad(expected, tensors, cotangent)
    with mock.patch.multiple(attention, QUERY_BLOCK=query_block, RECOMPUTE_SCORES=recompute_scores):
        attended = attend(*arguments)
        found = torch.autograd.grad(attended, tensors, cotangent)
    assert (attended - expected).abs().max() < 1e-5
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() < 1e-5


def causal_row(num_rows, num_heads=2):
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 1, num_heads, num_rows, HEAD_DIM).requires_grad_()
    rows = torch.arange(num_rows)
    return queries, keys, values, Spans(torch.zeros_like(rows), rows + 1)


@pytest.mark.parametrize(("limit", "made"), [(0, [3, 6]), (2**20, [3, 3])])
def test_scores_above_the_limit_are_made_again(monkeypatch, limit, made):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 10)
    monkeypatch.setattr(attention, "RECOMPUTE_SCORES", limit)
    arguments = causal_row(30)
    with mock.patch.object(
        attention, "_attend_block", side_effect=attention._attend_block
    ) as block:
        attended = _attend_plainly(*arguments, ())
        counts = [block.call_count]
        attended.sum().backward()
        assert [*counts, block.call_count] == made


def test_limit_counts_heads_and_the_keys_that_blocks_read(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 10)
    *_, spans = causal_row(30)
    assert spans.num_keys == 10 * 10 + 10 * 20 + 10 * 30
    early, late = Spans(torch.tensor([5]), torch.tensor([3])), spans[20:]
    assert early.ends == (0, 0) and late.ends == (0, 30)


def test_blocks_read_the_keys_between_their_ends_alone(monkeypatch):
    """No mask of rows by rows: with a window the work grows with the row, not with its square."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    rows = torch.arange(64)
    queries, keys, values, _ = causal_row(64)
    spans = Spans((rows - 3).clamp_min(0), rows + 1)
    assert max(piece.keys.stop - piece.keys.start for piece in spans.pieces) == 8 + 3
    with mock.patch.object(
        attention, "_attend_block", side_effect=attention._attend_block
    ) as block:
        _attend_plainly(queries, keys, values, spans, ())
    assert max(call.args[1].shape[2] for call in block.call_args_list) == 8 + 3


def documents(*lengths):
    """Spans of documents next to each other, each query to itself."""
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).repeat_interleave(torch.tensor(lengths))
    return Spans(starts, torch.arange(sum(lengths)) + 1)


def test_long_documents_are_attended_to_whole_and_short_ones_together():
    pieces = documents(70, 200, 64).pieces
    assert [(p.rows.start, p.rows.stop, p.is_causal) for p in pieces] == [
        (0, 70, True),
        (70, 270, True),
        (270, 334, True),
    ]
    (short,) = documents(3, 2, 4).pieces
    assert not short.is_causal and short.keys == slice(0, 9)
    one = Spans(torch.zeros(5, dtype=torch.long), torch.arange(5) + 3)  # keys before it as well
    assert [piece.is_causal for piece in one.pieces] == [False]


def test_no_keys_at_all_leave_the_own_ones():
    queries, keys, values, _ = causal_row(4)
    none = torch.zeros(4, dtype=torch.long)
    own = OwnKey(keys, values)
    attended = attend_packed(queries, keys[:, :, :0], values[:, :, :0], Spans(none, none), [own])
    assert torch.allclose(attended, values)


def test_no_gradient_means_nothing_to_make_again(monkeypatch):
    monkeypatch.setattr(attention, "RECOMPUTE_SCORES", 0)
    monkeypatch.setattr(attention, "checkpoint", None)
    with torch.no_grad():
        assert _attend_plainly(*causal_row(5), ()).shape == (1, 2, 5, HEAD_DIM)


@pytest.mark.parametrize("strided", [0, 1, 2], ids=["queries", "keys", "values"])
def test_strides_of_heads_change_nothing(strided):
    *tensors, spans = causal_row(70)
    expected = attend_packed(*tensors, spans)
    other = tensors[strided].transpose(2, 3).contiguous().transpose(2, 3)
    assert other.stride(-1) != 1
    attended = attend_packed(*tensors[:strided], other, *tensors[strided + 1 :], spans)
    assert torch.equal(attended, expected)


def test_half_precision_hides_what_it_must():
    queries, keys, values, spans = causal_row(6)
    queries, keys, values = (t.detach().bfloat16() for t in (queries * 40, keys * 40, values))
    before = attend_packed(queries, keys, values, spans)
    keys, values = keys.clone(), values.clone()
    keys[:, :, -1], values[:, :, -1] = 1e4, 1e4
    after = attend_packed(queries, keys, values, spans)
    assert before.isfinite().all() and torch.equal(before[:, :, :-1], after[:, :, :-1])


# ---- kept keys ----


def test_kept_keys_are_seen_by_position_and_padding_by_none():
    cache = DraftCache()
    cache.extend_positions(torch.tensor([[0, 1, 2], [-1, 0, 1]]))
    cache.extend_positions(torch.tensor([[-1, -1, 3], [2, 3, 4]]))
    assert cache.positions is not None
    assert cache.positions.tolist() == [[0, 1, 2, FAR, FAR, 3], [FAR, 0, 1, 2, 3, 4]]
    queries = torch.tensor([[2, 3, 4], [-1, 2, 4]])
    first, second = cache.visible(queries)[:, 0]
    assert picture(first) == ["xxx...", "xxx..x", "xxx..x"]
    assert picture(second) == ["......", ".xxx..", ".xxxxx"]
    first, second = cache.visible(queries, window=2)[:, 0]
    assert picture(first) == [".xx...", "..x..x", ".....x"]
    assert picture(second) == ["......", "..xx..", "....xx"]


def kept(cache, layer):
    """What a layer holds, as the numbers that `fill` gave it."""
    keys, values = cache.layers[layer]
    assert torch.equal(keys, -values)
    return keys[:, 0, :, 0].tolist()


def fill(cache, layer, rows):
    numbers = torch.tensor(rows, dtype=torch.float32)[:, None, :, None].expand(-1, 2, -1, 3)
    return cache.append(layer, numbers, -numbers)


def test_cache_takes_tokens_back_and_rows_out():
    cache = DraftCache()
    cache.crop(0), cache.select_rows(torch.tensor([0]))  # nothing there yet
    assert cache.length == 0
    for layer in (0, 1):
        fill(cache, layer, [[10, 11, 12], [20, 21, 22]])
    cache.extend_positions(torch.tensor([[0, 1, 2], [-1, 0, 1]]))
    cache.crop(5)  # longer than it is
    assert cache.length == 3
    cache.crop(2)
    cache.extend_positions(torch.tensor([[2], [1]]))
    for layer in (0, 1):
        keys, _ = fill(cache, layer, [[13], [23]])
        assert keys.shape == (2, 2, 3, 3)
        assert kept(cache, layer) == [[10, 11, 13], [20, 21, 23]]
    cache.select_rows(torch.tensor([1]))
    assert kept(cache, 1) == [[20, 21, 23]]
    assert cache.positions is not None and cache.positions.tolist() == [[FAR, 0, 1]]
