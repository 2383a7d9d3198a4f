"""Writes tiny checkpoints with a release of the public ``speculators`` package.

    pip install --no-deps --target DIR speculators==0.9.0
    PYTHONPATH=DIR python tests/data/releases/write.py tests/data/releases

Each is a draft with random weights in ``<release>/<algorithm>-<option>``, as that release saves it;
beside it, in ``<algorithm>-<option>.expected.safetensors``, the logits that the release itself
computes from ``inputs.safetensors``. What a release cannot make or run is left out, with a line.
``--verifier`` writes the verifier and the inputs instead, and needs no release. Releases 0.3 and
0.4 need Transformers 4.57 in ``DIR`` as well.
"""

import builtins
import dataclasses
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

os.environ.update(TORCHDYNAMO_DISABLE="1", LOGURU_LEVEL="ERROR", HF_HUB_OFFLINE="1")
builtins.torch = torch  # type: ignore[attr-defined]  # 0.3 and 0.4 name it in an annotation only

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

LENGTH = 129
"""The releases that have flex attention alone want rows of 128 after the shift by one."""
STRIDE = 16
"""Of the rows, this one in so many is kept."""
VOCAB = 64
REDUCED = 40
NUM_LAYERS = 7
"""The ids of a config without any, 2, n / 2 and n - 3, differ from here on."""
MASK = 3
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
LAYERS = {"llama": LlamaConfig, "qwen3": Qwen3Config, "qwen2": Qwen2Config}


@dataclasses.dataclass(frozen=True)
class Option:
    """What is switched on beside the defaults of this table."""

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    layer: str | None = None
    num_layers: int | None = None
    layer_keys: dict[str, Any] = dataclasses.field(default_factory=dict)
    draft_vocab: int = VOCAB


SLIDING = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
EAGLE = {
    "plain": Option(),
    "reduced": Option(draft_vocab=REDUCED),
    "norm_before_residual": Option({"norm_before_residual": True}),
    "qwen3": Option(layer="qwen3"),
    "two_layers": Option(num_layers=2),
    "aux_ids": Option({"eagle_aux_hidden_state_layer_ids": [1, 2, 4]}),
    "two_aux_ids": Option({"eagle_aux_hidden_state_layer_ids": [1, 3]}),
    "norm_before_fc": Option({"norm_before_fc": True}),
    "fc_norm": Option({"fc_norm": True}),
    "norm_output": Option({"norm_output": True}),
    "own_embeddings": Option({"embed_requires_grad": True}),
    "target_hidden_size": Option({"target_hidden_size": 16}),
    "sliding": Option(layer="qwen3", layer_keys={**SLIDING, "layer_types": ["sliding_attention"]}),
}
DFLASH = {
    "plain": Option(),
    "reduced": Option(draft_vocab=REDUCED),
    "block_size": Option({"block_size": 6}),
    "max_anchors": Option({"max_anchors": 11}),
    "five_aux_ids": Option({"aux_hidden_state_layer_ids": [0, 1, 2, 3, 4]}),
    "llama": Option(layer="llama"),
    "sliding": Option(layer_keys={**SLIDING, "layer_types": ["sliding_attention"] * 2}),
    "sliding_non_causal": Option(
        {"sliding_window_non_causal": True},
        layer_keys={**SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "sample_from_anchor": Option({"sample_from_anchor": True}),
}
MTP = {
    "qwen3": Option(),
    "qwen2": Option(layer="qwen2"),
    "llama": Option(layer="llama"),
}
OPTIONS = {
    "eagle3": EAGLE,
    "peagle": {
        **{name: option for name, option in EAGLE.items() if name != "norm_output"},
        "depths": Option({"num_depths": 3, "down_sample_ratio": 0.5}),
    },
    "dflash": DFLASH,
    "mtp": MTP,
}
WITHOUT_EFFECT = {"peagle 0.6.0": ("norm_before_fc", "sliding"), "dflash 0.5.0": ("sliding",)}
"""What a release stores and does not compute with."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "eagle3": {"config": {}, "layer": "llama", "num_layers": 1},
    "peagle": {"config": {"mask_token_id": MASK}, "layer": "llama", "num_layers": 1},
    "dflash": {
        "config": {
            "mask_token_id": MASK,
            "block_size": 4,
            "aux_hidden_state_layer_ids": [1, 2, 3],
        },
        "layer": "qwen3",
        "num_layers": 2,
    },
    "mtp": {"config": {}, "layer": "qwen3", "num_layers": NUM_LAYERS},
}
CLASSES = {
    "eagle3": ("Eagle3DraftModel", "Eagle3SpeculatorConfig"),
    "peagle": ("PEagleDraftModel", "PEagleSpeculatorConfig"),
    "dflash": ("DFlashDraftModel", "DFlashSpeculatorConfig"),
    "mtp": ("MTPDraftModel", "MTPSpeculatorConfig"),
}
ROW_COLUMNS = ("document_ids", "position_ids", "loss_mask", "input_ids")
NUM_TOKENS = {"eagle3": 3, "peagle": 4, "dflash": 3, "mtp": 3}


def enliven(model: torch.nn.Module, seed: int) -> None:
    """Random weights of a size that matters, exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        draw = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            value = 1 + 0.3 * draw if "norm" in name else 0.1 * draw
        else:
            value = draw if "embed" in name else 1.5 * draw * weight.shape[-1] ** -0.5
        weight.data = value.bfloat16().float()


def write_verifier(folder: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPE, num_hidden_layers=NUM_LAYERS, attn_implementation="eager")
    model = Qwen3ForCausalLM(config)
    enliven(model, 1)
    ids = torch.randint(4, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    before_norm: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_hook(lambda _, given, __: before_norm.append(given[0]))
    with torch.no_grad():
        states = model.model(ids, output_hidden_states=True).hidden_states
    hook.remove()
    columns = [*states[:-1], before_norm[0]]  # the last of `states` has the final norm on it
    content = {f"state_{k}": state[0] for k, state in enumerate(columns)}
    save_file(
        {**content, "post_norm": states[-1][0], "input_ids": ids[0]}, folder / "inputs.safetensors"
    )
    model.to(torch.bfloat16).save_pretrained(folder / "verifier")


def vocabulary(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``t2d`` and ``d2t`` of a draft vocabulary: every token of a fixed choice."""
    kept = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(size))[:size].sort().values
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[kept] = True
    return t2d, kept - torch.arange(size)


def make_config(algorithm: str, option: Option, verifier: str) -> Any:
    """A config of the installed release; None where it has not all of the option's keys."""
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    module = importlib.import_module(f"speculators.models.{algorithm}.config")
    config_class = getattr(module, CLASSES[algorithm][1])
    base = DEFAULTS[algorithm]
    keys = {**base["config"], **option.config}
    if not set(keys) <= set(config_class.model_fields):
        return None
    if algorithm != "mtp":
        keys["draft_vocab_size"] = option.draft_vocab
    if algorithm == "dflash" and "max_anchors" in config_class.model_fields:
        keys.setdefault("max_anchors", LENGTH - keys["block_size"])
    if algorithm == "peagle" and "num_depths" in config_class.model_fields:
        keys.setdefault("num_depths", NUM_TOKENS["peagle"])
        keys.setdefault("down_sample_ratio", 1.0)
        keys.setdefault("down_sample_ratio_min", 1.0)
    layer = LAYERS[option.layer or base["layer"]](
        **{**SHAPE, **option.layer_keys}, num_hidden_layers=option.num_layers or base["num_layers"]
    )
    layer._attn_implementation = "simple_flex_attention" if algorithm != "mtp" else "eager"
    return config_class(
        transformer_layer_config=layer,
        speculators_config=SpeculatorsConfig(
            algorithm=algorithm,
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=NUM_TOKENS[algorithm])],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=verifier, architectures=["Qwen3ForCausalLM"]),
        ),
        **keys,
    )


def make_model(algorithm: str, config: Any, option: Option, seed: int) -> Any:
    module = importlib.import_module(f"speculators.models.{algorithm}.core")
    model_class = getattr(module, CLASSES[algorithm][0])
    is_reduced = option.draft_vocab != VOCAB
    t2d, d2t = vocabulary(option.draft_vocab)
    if "t2d" in inspect.signature(model_class.__init__).parameters:
        can_be_whole = version("speculators") >= "0.4"
        maps = (t2d, d2t) if is_reduced or not can_be_whole else (None, None)
        model = model_class(config, *maps)
    else:
        model = model_class(config)
        if hasattr(model, "load_vocab_mappings"):
            model.load_vocab_mappings(*((t2d, d2t) if is_reduced else (None, None)))
        elif is_reduced:
            model.t2d.copy_(t2d)
            model.d2t.copy_(d2t)
        model.load_verifier_weights()
    # What is frozen is the verifier's.
    frozen = {
        name: weight.detach().clone()
        for name, weight in model.named_parameters()
        if not weight.requires_grad
    }
    enliven(model, seed)
    for name, weight in model.named_parameters():
        if name in frozen:
            weight.data = frozen[name]
    return model.float().eval()


@contextmanager
def recorded(owner: Any, name: str) -> Iterator[list[Any]]:
    """What a function of a module returned, each time that it was called."""
    original, returned = getattr(owner, name), []

    def function(*args: Any, **kwargs: Any) -> Any:
        returned.append(original(*args, **kwargs))
        return returned[-1]

    setattr(owner, name, function)
    try:
        yield returned
    finally:
        setattr(owner, name, original)


def call(model: Any, **arguments: Any) -> Any:
    """``forward`` with those of the arguments that this release knows."""
    known = inspect.signature(model.forward).parameters
    return model(**{name: value for name, value in arguments.items() if name in known})


def eager_losses() -> dict[str, Any]:
    """The loss that needs no Triton, where the release has several."""
    try:
        losses = importlib.import_module("speculators.losses")
    except ModuleNotFoundError:
        return {}
    return {"loss_config": losses.resolve_loss_config("kl_div", "eager")}


def expected_logits(
    algorithm: str, model: Any, config: Any, inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    module = importlib.import_module(f"speculators.models.{algorithm}.core")
    ids, last = inputs["input_ids"][None], inputs[f"state_{NUM_LAYERS}"][None]
    layer_ids = (
        getattr(config, "eagle_aux_hidden_state_layer_ids", None)
        or getattr(config, "aux_hidden_state_layer_ids", None)
        or [2, NUM_LAYERS // 2, NUM_LAYERS - 3]
    )
    aux = torch.cat([inputs[f"state_{k}"] for k in layer_ids], dim=-1)[None]
    logits: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _, __, given: logits.append(given[0]))
    row = dict(
        document_ids=torch.zeros_like(ids),
        lengths=torch.tensor([LENGTH]),
        position_ids=torch.arange(LENGTH)[None],
        loss_mask=torch.ones_like(ids).bool(),
        input_ids=ids,
        **eager_losses(),
    )
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        if algorithm == "mtp":
            call(
                model,
                **{**row, "hidden_states": inputs["post_norm"][None]},
                step_weights=[1.0, 1.0, 1.0],
            )
        elif algorithm == "dflash":
            with recorded(module, "select_anchors") as anchors:
                call(
                    model,
                    **row,
                    hidden_states=aux,
                    verifier_last_hidden_states=last,
                    max_anchors=LENGTH - config.block_size,
                )
            found["anchor"] = anchors[0][0][anchors[0][1]]
            logits = [logits[0].view(-1, config.block_size, logits[0].shape[-1])[anchors[0][1]]]
        else:
            shifted = {
                **row,
                **{name: row[name][:, 1:] for name in ROW_COLUMNS},
                "lengths": torch.tensor([LENGTH - 1]),
                "hidden_states": aux[:, :-1],
                "verifier_last_hidden_states": last[:, 1:],
            }
            if algorithm == "eagle3":
                # As later releases: the text's own tokens, not those that the draft chose.
                call(model, **shifted, ttt_steps=3, use_off_policy_tokens=True)
            else:
                with recorded(module, "generate_cod_sample_indices") as elements:
                    call(
                        model,
                        **shifted,
                        num_depths=4,
                        down_sample_ratio=1.0,
                        down_sample_ratio_min=1.0,
                    )
                found["anchor"], found["depth"] = elements[0]
    hook.remove()
    for number, step in enumerate(logits):
        found[f"logits_{number}"] = step[0] if step.ndim == 3 and len(step) == 1 else step
    return {name: column[::STRIDE].contiguous() for name, column in found.items()}


def write(folder: Path, only: Callable[[str], bool] = lambda _: True) -> None:
    inputs = load_file(folder / "inputs.safetensors")
    release = version("speculators")
    for algorithm, options in OPTIONS.items():
        for number, (name, option) in enumerate(options.items()):
            title = f"{algorithm}-{name}"
            target = folder / release / title
            if not only(title):
                continue
            if name in WITHOUT_EFFECT.get(f"{algorithm} {release}", ()):
                continue
            if algorithm == "dflash" and release < "0.6":  # it cannot run with the whole vocabulary
                option = dataclasses.replace(option, draft_vocab=REDUCED)
            try:
                config = make_config(algorithm, option, str(folder / "verifier"))
                if config is None:
                    continue
                torch.manual_seed(0)
                model = make_model(algorithm, config, option, 100 + number)
                expected = expected_logits(algorithm, model, config, inputs)
            except ModuleNotFoundError:
                print(release, title, "the release has no such algorithm")
                break
            except Exception as error:  # noqa: BLE001  # named, so that one sees what is missing
                print(release, title, "not made:", type(error).__name__, str(error)[:150])
                continue
            model.config.speculators_config.verifier.name_or_path = "../../verifier"
            model.to(torch.bfloat16).save_pretrained(target)
            for file in target.glob("*.py"):  # the release's code, which is not data
                file.unlink()
            save_file(expected, folder / release / f"{title}.expected.safetensors")
            print(release, title, json.dumps({k: list(v.shape) for k, v in expected.items()}))


if __name__ == "__main__":
    root = Path(sys.argv[1]).resolve()
    if "--verifier" in sys.argv:
        write_verifier(root)
    else:
        write(root, lambda title: all(word in title for word in sys.argv[2:]))
