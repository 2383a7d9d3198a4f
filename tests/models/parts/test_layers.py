import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from speculators_core.errors import SpeculatorError
from speculators_core.models.parts.attention import DraftCache
from speculators_core.models.parts.layers import (
    FAMILIES,
    InputLayer,
    UnrolledAttention,
    cached_attend,
    decoder_layer,
    family_of,
    rotate,
    sliding_window,
)
from tests.models.parts.test_masks import picture

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def small_config(name, window=None, num_layers=2):
    kind = "full_attention" if window is None else "sliding_attention"
    config = CONFIGS[name](
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        use_sliding_window=window is not None,
        sliding_window=window,
        layer_types=[kind] * num_layers,
    )
    config._attn_implementation = "eager"
    return config


def small_layer(name, **kwargs):
    torch.manual_seed(0)
    config = small_config(name, **kwargs)
    layer = FAMILIES[name].decoder_layer(config, 0)
    for weight in layer.parameters():
        nn.init.normal_(weight, std=0.4)
    return config, layer, FAMILIES[name].rotary(config)


# ---- who sees whom, read off the weights: equal keys, and each key's value names it ----


def unrolled_pictures(attend, num_rows, num_steps):
    """What the rows of each step see of the keys of each step, by an attention that averages."""
    names = num_rows * num_steps
    pictures = []
    for step in range(num_steps):
        rows = num_rows - step
        queries = keys = torch.zeros(1, 1, rows, names)
        values = torch.eye(names)[step * num_rows : step * num_rows + rows][None, None]
        weights = attend(0, queries, keys, values)[0, 0]
        seen = weights.view(rows, num_steps, num_rows).transpose(0, 1) > 0
        pictures.append([picture(of_step) for of_step in seen[: step + 1]])
    return pictures


def test_unrolled_rows_see_their_document_and_their_own_later_keys():
    attend = UnrolledAttention(small_config("llama"), torch.tensor([0, 0, 0, 1, 1, -1]))
    first = ["x.....", "xx....", "xxx...", "...x..", "...xx.", ".....x"]
    own = ["x.....", ".x....", "..x...", "...x..", "....x.", ".....x"]
    step_0, step_1, step_2 = unrolled_pictures(attend, 6, 3)
    assert step_0 == [first]
    assert step_1 == [first[:5], own[:5]]
    assert step_2 == [first[:4], own[:4], own[:4]]


def test_unrolled_window_counts_from_the_token_that_the_step_reads():
    attend = UnrolledAttention(small_config("llama", window=3), torch.tensor([0, 0, 0, 0, 0, 0]))
    own = ["x.....", ".x....", "..x...", "...x..", "....x."]
    nothing = ["......"] * 5
    step_0, step_1, step_2, step_3 = unrolled_pictures(attend, 6, 4)
    assert step_0 == [["x.....", "xx....", "xxx...", ".xxx..", "..xxx.", "...xxx"]]
    assert step_1 == [["x.....", "xx....", ".xx...", "..xx..", "...xx."], own]
    assert step_2 == [own[:4], own[:4], own[:4]]
    assert step_3 == [nothing[:3], own[:3], own[:3], own[:3]]


def test_unrolled_window_forgets_the_rows_own_keys_too():
    """As the cached decoder does: token i + 2 with a window of 2 does not see token i."""
    attend = UnrolledAttention(small_config("llama", window=2), torch.tensor([0, 0, 0, 0]))
    step_3 = unrolled_pictures(attend, 4, 4)[3]
    assert step_3 == [["...."], ["...."], ["x..."], ["x..."]]


# ---- laws ----


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_layer_equals_transformers_own(name, window):
    config, layer, rotary_emb = small_layer(name, window=window)
    hidden, positions = torch.randn(1, 7, 16), torch.arange(7)[None]
    rotary = rotary_emb(hidden, positions)
    row = torch.arange(7)
    distance = row[:, None] - row
    visible = (distance >= 0) & (distance < (window or 7))
    mask = torch.zeros(1, 1, 7, 7).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = layer(
        hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary
    )
    unrolled = UnrolledAttention(config, torch.zeros(7, dtype=torch.long))
    cached = cached_attend(config, DraftCache(), positions)
    for attend in (unrolled, cached):
        ours = decoder_layer(layer, 0, hidden, rotary, attend)
        assert (ours - expected).abs().max() < 1e-5


@pytest.mark.parametrize("window", [None, 3])
def test_kept_keys_equal_one_pass(window):
    config, layer, rotary_emb = small_layer("qwen3", window=window)
    hidden = torch.randn(1, 9, 16)
    cache, parts = DraftCache(), []
    for first, last in ((0, 4), (4, 5), (5, 9)):
        positions = torch.arange(first, last)[None]
        part = hidden[:, first:last]
        attend = cached_attend(config, cache, positions)
        parts.append(decoder_layer(layer, 0, part, rotary_emb(part, positions), attend))
    positions = torch.arange(9)[None]
    attend = cached_attend(config, DraftCache(), positions)
    whole = decoder_layer(layer, 0, hidden, rotary_emb(hidden, positions), attend)
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-5


def test_padding_changes_nothing_and_stays_finite():
    config, layer, rotary_emb = small_layer("llama")
    hidden = torch.randn(2, 5, 16)
    positions = torch.tensor([[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]])
    attend = cached_attend(config, DraftCache(), positions)
    together = decoder_layer(layer, 0, hidden, rotary_emb(hidden, positions), attend)
    assert together.isfinite().all()
    for row, start in ((0, 0), (1, 2)):
        alone, places = hidden[row : row + 1, start:], positions[row : row + 1, start:]
        attend = cached_attend(config, DraftCache(), places)
        expected = decoder_layer(layer, 0, alone, rotary_emb(alone, places), attend)
        assert (together[row : row + 1, start:] - expected).abs().max() < 1e-5


def test_rotation_depends_on_distance_alone():
    _, _, rotary_emb = small_layer("llama")
    x = torch.randn(1, 2, 4, 8)

    def scores(offset):
        rotated = rotate(x, rotary_emb(x, torch.tensor([[3, 7]]) + offset))
        return rotated[:, :, 0] * rotated[:, :, 1]

    assert torch.allclose(scores(0).sum(-1), scores(11).sum(-1), atol=1e-4)
    assert torch.equal(rotate(x, rotary_emb(x, torch.zeros(1, 2).long())), x.transpose(1, 2))


# ---- the first layer ----


@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_input_layer_reads_embedding_then_hidden(norm_before_residual):
    """Typed out from the contract: r + O Attn([norm(e) ; norm(h)]), then the MLP."""
    torch.manual_seed(0)
    config = small_config("llama")
    layer = InputLayer(config, norm_before_residual)
    for weight in layer.parameters():
        nn.init.normal_(weight, std=0.4)
    embedding, hidden = torch.randn(2, 1, 1, 16)
    positions = torch.tensor([[0]])
    rotary = FAMILIES["llama"].rotary(config)(hidden, positions)
    ours = layer(embedding, hidden, rotary, cached_attend(config, DraftCache(), positions))

    def normed(x, norm):
        return norm.weight * x * (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()

    read = torch.cat(
        [normed(embedding, layer.input_layernorm), normed(hidden, layer.hidden_norm)], dim=-1
    )
    # One token attends to itself alone: what it gets is its own value, for each group of heads.
    value = layer.self_attn.v_proj(read).view(1, 1, 2, 1, 8).expand(1, 1, 2, 2, 8)
    residual = normed(hidden, layer.hidden_norm) if norm_before_residual else hidden
    middle = residual + layer.self_attn.o_proj(value.reshape(1, 1, 32))
    expected = middle + layer.mlp(normed(middle, layer.post_attention_layernorm))
    assert (ours - expected).abs().max() < 1e-5


# ---- the config ----


def test_window_is_that_of_sliding_layers():
    config = small_config("qwen3", window=4)
    config.layer_types = ["full_attention", "sliding_attention"]
    assert [sliding_window(config, layer) for layer in (0, 1)] == [None, 4]
    config.layer_types = None
    assert sliding_window(config, 0) is None


def test_unknown_architecture_is_named():
    config = small_config("qwen2")
    assert family_of(config) is FAMILIES["qwen2"]
    with pytest.raises(SpeculatorError, match="'qwen2' has no draft layers; expected one of llama"):
        family_of(config, ("llama", "qwen3"))
