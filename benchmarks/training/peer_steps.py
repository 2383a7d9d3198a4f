"""Training steps of the public ``speculators`` library, 0.9.0.

It is imported from a given folder, in a fresh process. Draft, row, loss and what is timed are
those of `steps`; MTP learns the text's tokens, the only target that the library has for it.
"""

import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import nn
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3ForCausalLM

from benchmarks.training.settings import StepsBenchmarkConfig
from speculators_core.batch import Batch

SPECULATIVE_TOKENS = {"eagle3": 3, "peagle": 4, "dflash": 7, "mtp": 3}
MTP_STEP_WEIGHTS = (0.51, 0.31, 0.18)
"""The library's, for three steps."""
MASK_TOKEN_ID = 3
AUX_LAYER_IDS: list[JsonValue] = [1, 3, 4]
DRAFTS = {
    "eagle3": "Eagle3DraftModel",
    "peagle": "PEagleDraftModel",
    "dflash": "DFlashDraftModel",
    "mtp": "MTPDraftModel",
}


def peer_seconds(
    settings: StepsBenchmarkConfig, algorithm: str, config: Qwen3Config, batch: Batch
) -> float:
    """Median time of a step; for a process that imports nothing else afterwards."""
    sys.path.insert(0, str(settings.peer))
    torch.manual_seed(0)
    dtype = getattr(torch, settings.dtype)
    with tempfile.TemporaryDirectory() as folder:
        Qwen3ForCausalLM(config).save_pretrained(folder)
        model, arguments = _prepare(algorithm, config, Path(folder), batch)
    model = model.to(dtype).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def step() -> float:
        start = time.perf_counter()
        _, loss, _ = model(**arguments)
        loss.backward()
        seconds = time.perf_counter() - start
        for weight in weights:
            weight.grad = None
        return seconds

    step()
    return statistics.median(step() for _ in range(settings.timed))


def _prepare(
    algorithm: str, config: Qwen3Config, verifier: Path, batch: Batch
) -> tuple[nn.Module, Mapping[str, object]]:
    """A new draft of the library with its verifier's frozen ends, and its forward's arguments."""
    library = importlib.import_module("speculators")
    proposals = importlib.import_module("speculators.proposals.greedy")
    losses = importlib.import_module("speculators.losses")
    name = DRAFTS[algorithm]
    config_class = getattr(
        importlib.import_module(f"speculators.models.{algorithm}"),
        f"{name.removesuffix('DraftModel')}SpeculatorConfig",
    )
    proposal = proposals.GreedyTokenProposalConfig(speculative_tokens=SPECULATIVE_TOKENS[algorithm])
    speculators_config = library.SpeculatorsConfig(
        algorithm=algorithm,
        proposal_methods=[proposal],
        default_proposal_method="greedy",
        verifier=library.VerifierConfig(
            name_or_path=str(verifier), architectures=["Qwen3ForCausalLM"]
        ),
    )
    model = getattr(importlib.import_module("speculators.models"), name)(
        config_class(speculators_config=speculators_config, **_options(algorithm, config))
    )
    if hasattr(model, "load_vocab_mappings"):
        model.load_vocab_mappings(None, None)
    model.load_verifier_weights()
    for end in (model.embed_tokens, model.lm_head):
        end.weight.requires_grad_(False)
    return model, _arguments(algorithm, batch, losses.resolve_loss_config("kl_div", "eager"))


def _options(algorithm: str, config: Qwen3Config) -> dict[str, object]:
    """What a config of the algorithm has beside its verifier: the drafts of `steps`."""
    if algorithm == "mtp":
        layers = _layers(Qwen3Config, config, config.num_hidden_layers)
        return {"transformer_layer_config": layers}
    mask = {"mask_token_id": MASK_TOKEN_ID}
    ids = "aux_hidden_state_layer_ids"
    own: dict[str, dict[str, object]] = {
        "eagle3": {f"eagle_{ids}": AUX_LAYER_IDS, "norm_before_residual": True},
        "peagle": {f"eagle_{ids}": AUX_LAYER_IDS, **mask},
        "dflash": {ids: AUX_LAYER_IDS, **mask, "block_size": 8, "sliding_window_non_causal": True},
    }
    is_block = algorithm == "dflash"
    layers = _layers(Qwen3Config if is_block else LlamaConfig, config, 2 if is_block else 1)
    return {
        "transformer_layer_config": layers,
        "draft_vocab_size": config.vocab_size,
        **own[algorithm],
    }


def _layers(kind: type[PretrainedConfig], config: Qwen3Config, count: int) -> PretrainedConfig:
    """The verifier's shape with so many layers."""
    names = (
        "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads "
        "head_dim max_position_embeddings"
    ).split()
    shape = {name: getattr(config, name) for name in names}
    return kind(**shape, num_hidden_layers=count, attn_implementation="sdpa")


def _arguments(algorithm: str, batch: Batch, loss: object) -> Mapping[str, object]:
    """The row as each forward takes it: EAGLE's tokens lie one place ahead of its states."""
    if algorithm == "mtp":
        return {
            "input_ids": batch.input_ids,
            "hidden_states": batch.last_hidden_states,
            "position_ids": batch.position_ids,
            "loss_mask": batch.loss_mask,
            "step_weights": list(MTP_STEP_WEIGHTS),
        }
    ahead = slice(0 if algorithm == "dflash" else 1, None)
    states = batch.aux_hidden_states
    arguments: dict[str, object] = {
        "hidden_states": states if algorithm == "dflash" else states[:, :-1],
        "input_ids": batch.input_ids[:, ahead],
        "document_ids": batch.document_ids[:, ahead],
        "position_ids": batch.position_ids[:, ahead],
        "loss_mask": batch.loss_mask[:, ahead],
        "verifier_last_hidden_states": batch.last_hidden_states[:, ahead],
        "loss_config": loss,
    }
    own: dict[str, dict[str, object]] = {
        "eagle3": {"ttt_steps": 3, "ttt_step_loss_decay": 1.0},
        "peagle": {"num_depths": 4},
        "dflash": {"max_anchors": batch.input_ids.shape[1] // 8},
    }
    return arguments | own[algorithm]
