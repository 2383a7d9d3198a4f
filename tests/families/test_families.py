"""Verifiers as they are: a draft is made, trained, saved, read and decoded for many families."""

import gc

import pytest
import torch

from speculators_core.data_generation.examples import GeneratedExample
from speculators_core.data_generation.packing import RowLayout
from speculators_core.decoding.generation import neutral_generation
from speculators_core.errors import SpeculatorError
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.registry import MODELS
from speculators_core.verifier.taps import LayerTaps
from tests.families.making import FAMILIES, FAMILY, VOCAB_SIZE, make_verifier

RECIPES: dict[str, dict] = {
    "eagle3": {"speculative_tokens": 3},
    "peagle": {"speculative_tokens": 3, "mask_token_id": 2},
    "dflash": {"block_size": 4, "num_layers": 2, "mask_token_id": 2},
}
AUX_LAYER_IDS = (1, 2, 3)
WITHOUT_ROLLBACK = {
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "granitemoehybrid", "lfm2"),
    *("mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "bamba", "zamba2", "nemotron_h"),
    *("recurrent_gemma", "minimax", "rwkv"),
}
"""Families whose layers fold a text into a state: drafts train, and are not decoded here."""
REFUSED = {
    "openai-gpt": "OpenAIGPTLMHeadModel has no stack of layers with a final norm",
    "gemma3n_text": "more than one stream",
}
"""Families for which there is no draft, with the reason."""
IN_EVERY_RUN = ("gpt2", "falcon", "qwen3_vl", "qwen3_5_text", "glm4_moe", "gemma3n_text")
"""One of each kind: learned positions and layer norms, parallel blocks, a text model with pictures,
a hybrid of linear attention, experts, and one that is refused."""


def make_row(verifier, layer_ids):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCAB_SIZE, (16,), generator=generator)
    with torch.no_grad(), LayerTaps(verifier, layer_ids) as taps:
        verifier.get_decoder()(input_ids=ids[None], use_cache=False)
        states = taps.states(layer_ids)[0].unflatten(-1, (len(layer_ids), -1))
    example = GeneratedExample("0", ids, torch.ones(16, dtype=torch.bool), 1, states)
    return RowLayout(16, tuple(range(len(AUX_LAYER_IDS))), len(AUX_LAYER_IDS)).pack([example])


def train_two_steps(draft, row):
    """The losses of two steps; every weight that trains has moved."""
    weights = [weight for weight in draft.parameters() if weight.requires_grad]
    before = [weight.clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    losses = []
    for _ in range(2):
        _, loss, _ = draft.train()(row)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    moved = [not torch.equal(*pair) for pair in zip(before, weights, strict=True)]
    assert sum(moved) > len(moved) // 2
    draft.eval()
    return losses


def check_family(model_type, algorithm, folder):
    verifier = make_verifier(model_type)
    verifier.save_pretrained(folder / "verifier")
    name = str(folder / "verifier")
    recipe = {**RECIPES[algorithm], "aux_layer_ids": AUX_LAYER_IDS}
    torch.manual_seed(1)
    # By its name: embeddings and head are read from the files, without the layers.
    draft = MODELS.load(algorithm).from_training_args(verifier.config, verifier=name, **recipe)
    depth = verifier.config.get_text_config().num_hidden_layers
    losses = train_two_steps(draft, make_row(verifier, (*AUX_LAYER_IDS, depth)))
    assert all(0 < loss < 1e3 for loss in losses)
    draft.save_pretrained(folder / "draft")
    read = SpeculatorModel.from_pretrained(
        folder / "draft", verifier=name, verifier_attachment_mode="full"
    )
    for key, tensor in draft.state_dict().items():
        assert torch.equal(read.state_dict()[key], tensor), key
    prompt = torch.tensor([[5, 17, 40, 8, 23]])
    with neutral_generation(read.verifier):
        settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
        texts = [model.generate(prompt, **settings) for model in (read.verifier, read)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("algorithm", ["eagle3", "dflash"])
@pytest.mark.parametrize(
    "model_type",
    [
        model_type if model_type in IN_EVERY_RUN else pytest.param(model_type, marks=FAMILY)
        for model_type in FAMILIES
    ],
)
def test_draft_is_trained_saved_read_and_decoded(model_type, algorithm, tmp_path):
    refusal = REFUSED.get(model_type)
    if model_type in WITHOUT_ROLLBACK:
        refusal = "state that rejected tokens cannot be taken out of"
    if refusal is None:
        check_family(model_type, algorithm, tmp_path)
    else:
        with pytest.raises(SpeculatorError, match=refusal) as caught:
            check_family(model_type, algorithm, tmp_path)
        assert "\n" not in str(caught.value)
        assert (tmp_path / "draft").exists() == (model_type in WITHOUT_ROLLBACK)
    gc.collect()
