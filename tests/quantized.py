"""Verifiers with the tensors and the config that llm-compressor writes."""

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Kind = Literal["int8", "fp8"]
LARGEST = {"int8": 127.0, "fp8": 448.0}


def quantize(folder: Path, kind: Kind, head: bool = False) -> dict[str, Tensor]:
    """Quantizes a verifier's layers in place, a scale for each row; returns what they now mean.

    ``head``: quantizes the head too, which most checkpoints keep.
    """
    path = folder / "model.safetensors"
    stored, meant = {}, {}
    for name, weight in load_file(path).items():
        is_layer = "layers." in name and name.endswith("proj.weight")
        if not is_layer and not (head and name == "lm_head.weight"):
            stored[name] = weight
            continue
        scale = weight.float().abs().amax(1, keepdim=True) / LARGEST[kind]
        values = weight.float() / scale
        packed = values.round().to(torch.int8) if kind == "int8" else values.to(torch.float8_e4m3fn)
        stored |= {name: packed, f"{name}_scale": scale.to(weight.dtype)}
        meant[name] = packed.float() * scale.to(weight.dtype).float()
    save_file(stored, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization_config(kind, *(() if head else ("lm_head",)))
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def quantization_config(kind: Kind, *ignore: str) -> dict:
    """Weights by rows, activations by tokens."""
    number = {"num_bits": 8, "type": "int" if kind == "int8" else "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if kind == "int8" else "float-quantized",
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**number, "strategy": "channel", "dynamic": False},
                "input_activations": {**number, "strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
    }
