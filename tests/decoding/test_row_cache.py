import pytest
import torch
import transformers
from transformers import DynamicCache

from speculators_core.decoding.row_cache import RowCache
from speculators_core.errors import SpeculatorError
from tests.conftest import VOCAB_SIZE
from tests.verifier.test_verifier import GEMMA, MOE, SHAPE, make_family

WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
WINDOWED = {
    "mistral": ("Mistral", transformers.MistralConfig(**SHAPE, sliding_window=6)),
    "gemma3": ("Gemma3", transformers.Gemma3TextConfig(**GEMMA, **WINDOW)),
    "gpt-oss": (
        "GptOss",
        transformers.GptOssConfig(**SHAPE, **WINDOW, num_local_experts=4, num_experts_per_tok=2),
    ),
}
"""Verifiers with layers that see six tokens."""


def make_windowed(family):
    name, config = WINDOWED[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    return model.eval()


@pytest.fixture(scope="module", params=["full", *WINDOWED])
def model(request, verifier):
    return verifier if request.param == "full" else make_windowed(request.param)


def some_tokens(*shape, generator):
    return torch.randint(3, VOCAB_SIZE, shape, generator=generator)


@torch.no_grad()
def alone(model, text):
    """Logits of every token of one text, without a cache."""
    return model(torch.tensor([text]), use_cache=False).logits[0]


def is_same(logits, expected):
    return (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_going_on_after_forgetting_equals_a_fresh_run(model, seed):
    """Rows come, go and forget at random; what is read next is scored as in a text of its own."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [9, 1, 4, 12, 2]
    prompts = [some_tokens(n, generator=generator).tolist() for n in lengths]
    ids = torch.tensor([[0] * (12 - len(text)) + text for text in prompts])
    is_token = torch.tensor([[False] * (12 - n) + [True] * n for n in lengths])
    cache, texts = RowCache(model), prompts
    cache.run(ids, is_token)
    for step in range(8):
        if step in (3, 5):
            rows = torch.randperm(len(texts), generator=generator)[:-1]
            cache.select_rows(rows)
            texts = [texts[row] for row in rows.tolist()]
        new = some_tokens(len(texts), 4, generator=generator)
        logits = cache.run(new)
        texts = [text + row for text, row in zip(texts, new.tolist(), strict=True)]
        for text, row in zip(texts, logits, strict=True):
            assert is_same(row, alone(model, text)[-4:])
        least = 2 * (step == 6)  # once every row forgets
        counts = torch.randint(least, 5, (len(texts),), generator=generator)
        cache.forget(counts)
        texts = [
            text[: len(text) - count] for text, count in zip(texts, counts.tolist(), strict=True)
        ]
        assert cache.is_token.sum(1).tolist() == [len(text) for text in texts]


def test_a_row_that_forgets_more_moves_to_the_right(verifier):
    """
    a0 a1 a2 a3 a4     after forgetting 1 and 2:   a0 a1 a2 a3
     .  . b0 b1 b2                                  .  .  . b0
    """
    cache = RowCache(verifier)
    is_token = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
    cache.run(torch.arange(10).view(2, 5), is_token)
    keys = cache.cache.layers[0].keys
    cache.forget(torch.tensor([1, 2]))
    assert cache.is_token.tolist() == [[True] * 4, [False, False, False, True]]
    kept = cache.cache.layers[0].keys
    assert torch.equal(kept[0], keys[0, :, :4]) and torch.equal(kept[1, :, 3], keys[1, :, 2])


def test_columns_without_a_token_are_dropped(verifier):
    cache = RowCache(verifier)
    is_token = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]).bool()
    cache.run(torch.arange(10).view(2, 5), is_token)
    cache.select_rows(torch.tensor([1, 1]))
    cache.run(torch.tensor([[5, 6], [5, 6]]))
    cache.forget(torch.tensor([0, 1]))
    assert cache.is_token.tolist() == [[True] * 4, [False] + [True] * 3]
    assert cache.cache.layers[0].keys.shape[2] == 4


@torch.no_grad()
def test_hidden_tokens_inside_a_text_stay_hidden(model):
    """As in Transformers: they take no position, but a place in a window."""
    generator = torch.Generator().manual_seed(0)
    ids = some_tokens(2, 9, generator=generator)
    mask = torch.tensor([[1] * 9, [0, 1, 1, 0, 0, 1, 1, 1, 1]])
    rejected, kept = some_tokens(2, 2, generator=generator), some_tokens(2, 3, generator=generator)
    cache = RowCache(model)
    cache.run(ids, mask.bool())
    cache.run(rejected)
    cache.forget(torch.tensor([2, 2]))
    cache.run(rejected[:, :1])
    cache.forget(torch.tensor([0, 1]))
    logits = cache.run(kept)

    whole = torch.cat([ids[1:], kept[1:]], dim=1)
    whole_mask = torch.cat([mask[1:], torch.ones(1, 3, dtype=torch.long)], dim=1)
    positions = (whole_mask.cumsum(1) - 1).clamp_min(0)
    expected = model(whole, attention_mask=whole_mask, position_ids=positions).logits
    assert is_same(logits[1], expected[0, -3:])


def test_forgetting_everything_starts_anew(verifier):
    cache = RowCache(verifier)
    cache.run(torch.tensor([[7, 8, 9], [5, 6, 7]]))
    cache.forget(torch.tensor([3, 3]))
    logits = cache.run(torch.tensor([[4, 5], [9, 3]]))
    assert is_same(logits[1], alone(verifier, [9, 3]))


@torch.no_grad()
def test_positions_of_an_earlier_image_are_not_taken_up():
    """A vision model remembers how far the images of its last call had moved the positions."""
    model = make_family("qwen2.5-vl")
    expected = alone(model, [4, 5, 6, 7])
    model.model.rope_deltas = torch.tensor([[-3]])
    cache = RowCache(model)
    cache.run(torch.tensor([[4, 5]]))
    assert is_same(cache.run(torch.tensor([[6, 7]]))[0], expected[2:])


def test_a_recurrent_state_is_refused():
    config = transformers.Qwen3NextConfig(
        **SHAPE, **MOE, layer_types=["linear_attention", "full_attention"]
    )
    with pytest.raises(SpeculatorError, match="Qwen3NextForCausalLM keeps more than keys"):
        RowCache(transformers.Qwen3NextForCausalLM(config))


def test_transformers_own_cache_of_a_window_could_not_go_back():
    """Why every layer keeps all: once this fails, `RowCache` may ask Transformers for windows."""
    model = make_windowed("mistral")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.arange(9)[None], past_key_values=cache, use_cache=True)
    with pytest.raises(RuntimeError, match="does not track past states"):
        cache.crop(-1)
