"""The playground's drafts as other writers would have stored them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import playground

Change = Callable[[Path], None]
Tensors = dict[str, Tensor]
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Draft:
    """A draft of the playground, changed."""

    algorithm: str
    change: Change
    is_stock: bool = True
    """vLLM serves it without the plug-in too."""
    is_same: bool = True
    """The network computes what the unchanged draft computes."""
    gains: bool = False
    """The plug-in repairs a fault of vLLM, by which more tokens are accepted."""

    def write(self, folder: Path) -> None:
        shutil.copytree(playground.SPECULATORS[self.algorithm], folder)
        if self.algorithm == "dflash" and not self.gains:
            tensors(one_key_norm)(folder)
        self.change(folder)


# ---- config.json ----


def config(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        edit(content)
        (folder / CONFIG).write_text(json.dumps(content))

    return change


def keys(**added: Any) -> Change:
    return config(lambda c: c.update(added))


def layer(*gone: str, **added: Any) -> Change:
    """Keys of the layers' config."""

    def edit(content: dict[str, Any]) -> None:
        layers = content["transformer_layer_config"]
        for key in gone:
            del layers[key]
        layers.update(added)

    return config(edit)


def keys_of_nobody(content: dict[str, Any]) -> None:
    inner = content["speculators_config"]
    for place in (content, inner, inner["verifier"], inner["proposal_methods"][0]):
        place.update(colour="blue", hidden_size=7)


def unnamed(content: dict[str, Any]) -> None:
    """Without what vLLM does not read of the proposals."""
    inner = content["speculators_config"]
    del inner["algorithm"], inner["default_proposal_method"]
    inner["proposal_methods"] = [{"speculative_tokens": 3, "verifier_accept_k": None}]
    inner["verifier"]["architectures"] = None


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


# ---- tensors ----


def tensors(edit: Callable[[Tensors], Tensors]) -> Change:
    def change(folder: Path) -> None:
        edited = edit(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).unlink()
        whole = {name: tensor.contiguous() for name, tensor in edited.items()}
        save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def more(**added: Tensor) -> Change:
    """Further tensors; a double underscore stands for a dot."""
    return tensors(lambda t: t | {name.replace("__", "."): value for name, value in added.items()})


def without(*names: str) -> Change:
    return tensors(lambda t: {name: value for name, value in t.items() if name not in names})


def stored_as(dtype: torch.dtype) -> Change:
    name = str(dtype).removeprefix("torch.")
    return both(tensors(lambda t: {k: v.to(dtype) for k, v in t.items()}), keys(dtype=name))


def one_key_norm(found: Tensors) -> Tensors:
    """The first layer's in all layers, as vLLM's kernel on CPUs takes it."""
    first = found["layers.0.self_attn.k_norm.weight"]
    return {n: first.clone() if n.endswith("k_norm.weight") else t for n, t in found.items()}


def of_authors(found: Tensors) -> Tensors:
    return {name.replace("layers.0.", "midlayer."): value for name, value in found.items()}


def fused(found: Tensors) -> Tensors:
    """Queries, keys and values of the first layer as one tensor."""
    stem = "layers.0.self_attn."
    parts = [found.pop(f"{stem}{part}_proj.weight") for part in "qkv"]
    return {**found, f"{stem}qkv_proj.weight": torch.cat(parts)}


def int8(found: Tensors) -> Tensors:
    """Linear weights of the layers as llm-compressor writes them, a scale for each output."""
    result: Tensors = {}
    for name, value in found.items():
        if "layers." in name and name.endswith("proj.weight"):
            scale = value.float().abs().amax(1, keepdim=True) / 127
            result[name] = (value.float() / scale).round().clamp(-128, 127).to(torch.int8)
            result[name.replace(".weight", ".weight_scale")] = scale.to(torch.bfloat16)
        else:
            result[name] = value
    return result


def quantization() -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": {**weights, "strategy": "channel"},
        "input_activations": {**inputs, "strategy": "token"},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*fc.*", "re:.*embed.*"],
        "config_groups": {"group_0": group},
    }


def every_second_token(found: Tensors) -> Tensors:
    """A draft vocabulary of half of the verifier's."""
    kept = torch.arange(0, 2048, 2)
    head = found.get("lm_head.weight", ends()["lm_head.weight"])
    return {
        **found,
        "lm_head.weight": head[kept],
        "d2t": kept - torch.arange(len(kept)),
        "t2d": torch.isin(torch.arange(2048), kept),
    }


def ends() -> Tensors:
    """The verifier's embeddings and head, which are one."""
    table = load_file(playground.VERIFIER / WEIGHTS)["model.embed_tokens.weight"]
    return {"embed_tokens.weight": table, "lm_head.weight": table.clone()}


def reduced(*gone: str) -> Change:
    return both(tensors(every_second_token), without(*gone), keys(draft_vocab_size=1024))


# ---- files ----


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def one_shard(folder: Path) -> None:
    """Without an index."""
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")


def two_shards(folder: Path) -> None:
    found = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, weight_map = sorted(found), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({n: found[n] for n in part}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def code(folder: Path) -> None:
    (folder / "config.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    keys(auto_map={"": "config.Config"})(folder)


# ---- all of them ----

AS_IS: Change = lambda folder: None  # noqa: E731  # a table of functions
IDS, DFLASH_IDS = "eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids"
ROTARY = {"layers__0__self_attn__rotary_emb__inv_freq": torch.ones(16)}
VERIFIERS = {
    "verifier_norm__weight": torch.ones(128),
    "verifier_lm_head__weight": torch.full((2048, 128), float("nan")),
}
OF_RELEASES = {
    "use_cache": True,
    "id2label": {"0": "LABEL_0"},
    "return_dict": True,
    "ttt_steps": 3,
    "draft_attn_impl": "simple_flex_attention",
}
ANY_DRAFT: dict[str, Change] = {
    "as it is": AS_IS,
    "keys of nobody": config(keys_of_nobody),
    "tied": keys(tie_word_embeddings=True),
    "two shards": two_shards,
    "float32": stored_as(torch.float32),
    "rotary buffers": more(**ROTARY),
    "flat rope": layer("rope_parameters", rope_theta=10000.0, rope_scaling=None),
}
EAGLE3: dict[str, Change] = {
    "keys of releases": keys(**OF_RELEASES),
    "a misspelt key": keys(norm_befor_fc=False),
    "a misspelt key of the layers": layer(mlp_biass=True),
    "layers tied": layer(tie_word_embeddings=True),
    "names of the authors": tensors(of_authors),
    "pickled": pickled,
    "projections fused": tensors(fused),
    "one shard": one_shard,
    "a state for masks": more(mask_hidden=torch.ones(1, 1, 384)),
    "t2d of a whole vocabulary": more(t2d=torch.ones(2048, dtype=torch.bool)),
    "without embeddings": without("embed_tokens.weight"),
    "without ends": without("embed_tokens.weight", "lm_head.weight"),
    "ids in another order": keys(**{IDS: [29, 2, 16]}),
    "an id twice": keys(**{IDS: [2, 16, 29, 16]}),
    "no ids": config(lambda c: c.pop(IDS)),
    "an empty list of ids": keys(**{IDS: []}),
    "rope of an older Transformers": layer(rope_parameters={"type": "default", "rope_theta": 1e4}),
    "no type of layers": layer("model_type"),
    "the number of ids": layer(num_aux_hidden_states=3),
    "architecture of another release": keys(architectures=["Eagle3Speculator"]),
    "code": code,
    "flags as numbers": keys(norm_before_fc=1, norm_before_residual=1, norm_output=1, fc_norm=0),
    "flags left open": keys(fc_norm=None, embed_requires_grad=None, tie_word_embeddings=None),
    "proposals without names": config(unnamed),
    "numbers of another kind": layer(attention_dropout=0, max_position_embeddings=2048.0),
    "no width of a head": layer("head_dim"),
    "an unknown proposal": config(
        lambda c: c["speculators_config"]["proposal_methods"].append(
            {"proposal_type": "tree", "speculative_tokens": 9}
        )
    ),
}
PEAGLE: dict[str, Change] = {
    "keys of releases": keys(num_depths=8, down_sample_ratio=0.7, down_sample_ratio_min=0.2),
    "names of the authors": tensors(of_authors),
    "ids in another order": keys(**{IDS: [29, 2, 16]}),
    "no type of layers": layer("model_type"),
}
DFLASH: dict[str, Change] = {
    "keys of releases": keys(max_anchors=3072),
    "the verifier's embeddings": tensors(lambda t: t | {"embed_tokens.weight": _table()}),
    "the verifier's ends": tensors(lambda t: t | ends()),
    "layers of Llama": layer(model_type="llama"),
    "layers of Mistral": layer(model_type="mistral"),
    "ids in another order": keys(**{DFLASH_IDS: [16, 2, 29]}),
    "no vocabulary size": keys(draft_vocab_size=None),
    "no width of a head": layer("head_dim"),
    "no block size": config(lambda c: c.pop("block_size")),
}
CHANGED: dict[str, tuple[str, Change]] = {
    "eagle3, int8": ("eagle3", both(tensors(int8), layer(quantization_config=quantization()))),
    "eagle3, int8, stated beside the layers": (
        "eagle3",
        both(tensors(int8), keys(quantization_config=quantization())),
    ),
    "eagle3, float16": ("eagle3", stored_as(torch.float16)),
    "eagle3, embeddings of its own": (
        "eagle3",
        tensors(lambda t: t | {"embed_tokens.weight": _mixed()}),
    ),
    "eagle3, half of the tokens": ("eagle3", reduced()),
    "eagle3, half of the tokens, no t2d": ("eagle3", reduced("t2d")),
    "eagle3, raw states are fed back": ("eagle3", keys(norm_output=False)),
    "eagle3, raw residual": ("eagle3", keys(norm_before_residual=False)),
    "peagle, half of the tokens": ("peagle", reduced()),
    "dflash, embeddings of its own": (
        "dflash",
        tensors(lambda t: t | {"embed_tokens.weight": _mixed()}),
    ),
    "dflash, a head of its own": (
        "dflash",
        tensors(lambda t: t | {"lm_head.weight": _mixed()}),
    ),
    "dflash, half of the tokens": ("dflash", reduced()),
}
"""Drafts that compute something else; stock vLLM serves them."""
PLUGIN_ALONE: dict[str, tuple[str, Change]] = {
    "eagle3, the verifier's norm and head": ("eagle3", more(**VERIFIERS)),
    "dflash, the verifier's norm and head": ("dflash", more(**VERIFIERS)),
    **{f"mtp, {name}": ("mtp", change) for name, change in ANY_DRAFT.items()},
    "mtp, keys of releases": ("mtp", keys(num_speculative_steps=3)),
    "mtp, the verifier's ends": ("mtp", tensors(lambda t: t | ends())),
    "mtp, the verifier's norm and head": ("mtp", more(**VERIFIERS)),
}
"""Drafts that stock vLLM refuses, most of them because it knows no MTP from a folder."""


def _table() -> Tensor:
    return ends()["embed_tokens.weight"]


def _mixed() -> Tensor:
    """The verifier's table with a part of other tokens' rows in each."""
    return _table() + 0.3 * _table().flip(0)


def _drafts() -> dict[str, Draft]:
    of_algorithm = {"eagle3": EAGLE3, "peagle": PEAGLE, "dflash": DFLASH}
    same = {
        f"{algorithm}, {name}": Draft(algorithm, change)
        for algorithm, own in of_algorithm.items()
        for name, change in (ANY_DRAFT | own).items()
    }
    changed = {name: Draft(*found, is_same=False) for name, found in CHANGED.items()}
    alone = {name: Draft(*found, is_stock=False) for name, found in PLUGIN_ALONE.items()}
    trained = {"dflash, as it was trained": Draft("dflash", AS_IS, is_same=False, gains=True)}
    return same | changed | alone | trained


DRAFTS = _drafts()
