"""A checkpoint may hold anything: it is refused in one line, or served with the verifier's text.

Damages are of four kinds: values of ``config.json`` (every key, drawn with a fixed seed), its text,
the tensors, and the files. Each is looked at as vLLM does before it loads weights; some of those
that pass are then served for real.
"""

import copy
import json
import logging
import os
import random
import re
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PretrainedConfig

from speculators_core.errors import SpeculatorError
from speculators_vllm import offline
from speculators_vllm.plugin.speculative_config import complete
from tests.data import INTEROP, interop_acceptance

pytestmark = pytest.mark.vllm

KINDS = ("eagle3", "peagle", "dflash", "mtp")
VERIFIER = INTEROP / "verifier"
DRAWN_PER_KIND = 120
LONGEST_S = 2.0
HANGS_S = 20
MISSING = object()
VALUES: dict[str, Any] = {
    "missing": MISSING,
    "null": None,
    "empty": "",
    "word": "x",
    "NaN as text": "NaN",
    "number as text": "3",
    "false as text": "false",
    "NaN": float("nan"),
    "infinity": float("inf"),
    "negative": -1,
    "zero": 0,
    "million": 10**6,
    "huge": 10**30,
    "half": 0.5,
    "true": True,
    "list": [],
    "object": {},
    "list of one": [1],
    "nested": {"a": {"b": [None]}},
    "marks and surrogates": "\u202e\x00\ud83d",
    "lines": "one\ntwo\r\x1b[31m",
    "path": "../../etc/passwd",
    "long": "x" * 100_000,
}
Damage = Callable[[Path], None]


@pytest.fixture
def checkpoint(tmp_path) -> Callable[[str], Path]:
    """A folder with a speculator to damage; the weights are a link until they are rewritten."""

    def copy_of(kind: str) -> Path:
        folder = tmp_path / "draft"
        folder.mkdir()
        shutil.copy(INTEROP / kind / "config.json", folder)
        (folder / "config.json").chmod(0o644)
        (folder / "model.safetensors").symlink_to(INTEROP / kind / "model.safetensors")
        return folder

    return copy_of


@pytest.fixture(scope="module")
def verifier() -> PretrainedConfig:
    """Its config, once all that is imported on the way has been."""
    config = AutoConfig.from_pretrained(VERIFIER)
    complete({"model": str(INTEROP / "mtp")}, {}, config, str(VERIFIER))
    return config


@pytest.fixture
def judge(verifier, caplog) -> Iterator[Callable[..., str | None]]:
    """What `complete` says against a folder, or None; fails where it does not say it well."""
    logger = logging.getLogger("speculators_vllm.plugin.speculative_config")
    logger.addHandler(caplog.handler)
    before = signal.signal(signal.SIGALRM, _give_up)

    def say(folder: Path, *names: str) -> str | None:
        caplog.clear()
        start = time.process_time()
        signal.alarm(HANGS_S)
        try:
            complete({"model": str(folder)}, {}, verifier, str(VERIFIER))
        except SpeculatorError as error:
            message = str(error)
            assert message.isprintable(), ascii(message)[:300]
            assert len(message) < 1000, message[:300]
            assert any(name in message for name in (str(folder), *names)), message
            return message
        finally:
            signal.alarm(0)
            assert time.process_time() - start < LONGEST_S  # of this process: others may be busy
        faults = [record for record in caplog.records if record.exc_info]
        assert not faults, faults[0].exc_text or str(faults[0].exc_info)
        return None

    yield say
    signal.signal(signal.SIGALRM, before)
    logger.removeHandler(caplog.handler)


def _give_up(number: int, frame: Any) -> None:
    pytest.fail(f"not judged after {HANGS_S} s")


# ---- values of config.json ----


def paths(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Where every value inside ``value`` stands."""
    if at:
        yield at
    inside = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list) else inside:
        yield from paths(item, (*at, key))


def changed(config: dict[str, Any], at: tuple, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    place: Any = config
    for key in at[:-1]:
        place = place[key]
    if value is MISSING:
        del place[at[-1]]
    else:
        place[at[-1]] = value
    return config


def drawn() -> Iterator[Any]:
    for kind in KINDS:
        config = json.loads((INTEROP / kind / "config.json").read_text())
        every = [(at, name) for at in paths(config) for name in VALUES]
        for at, name in random.Random(kind).sample(every, DRAWN_PER_KIND):
            yield pytest.param(kind, at, name, id=f"{kind}-{'.'.join(map(str, at))}-{name}")


@pytest.mark.parametrize(("kind", "at", "name"), drawn())
def test_any_value_of_the_config_is_taken_or_refused(checkpoint, judge, kind, at, name):
    folder = checkpoint(kind)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(changed(config, at, VALUES[name])))
    judge(folder, str(at[-1]))


def layer(**keys: Any) -> dict[str, Any]:
    return {"transformer_layer_config": keys}


def inner(**keys: Any) -> dict[str, Any]:
    return {"speculators_config": keys}


def method(**keys: Any) -> dict[str, Any]:
    whole = {"proposal_type": "greedy", "speculative_tokens": 3, **keys}
    return inner(proposal_methods=[{k: v for k, v in whole.items() if v is not MISSING}])


FAULTY: dict[str, tuple[str, dict[str, Any], str]] = {
    "no layers": ("eagle3", layer(num_hidden_layers=0), "num_hidden_layers must be"),
    "a million layers": ("eagle3", layer(num_hidden_layers=10**6), "num_hidden_layers must be"),
    "layers without kinds": ("dflash", layer(num_hidden_layers=10**6), "num_hidden_layers"),
    "no heads": ("peagle", layer(num_attention_heads=0), "modulo by zero"),
    "minus one key head": ("mtp", layer(num_key_value_heads=-1), "num_key_value_heads must be"),
    "three key heads": ("mtp", layer(num_key_value_heads=3), "has shape"),
    "heads without end": ("mtp", layer(head_dim=10**30), "head_dim must be"),
    "no positions": ("mtp", layer(max_position_embeddings=0), "max_position_embeddings must be"),
    "an unknown activation": ("dflash", layer(hidden_act="swooosh"), "hidden_act 'swooosh'"),
    "epsilon without end": ("eagle3", layer(rms_norm_eps=float("inf")), "rms_norm_eps must be"),
    "an epsilon that is no number": ("mtp", layer(rms_norm_eps=float("nan")), "rms_norm_eps must"),
    "theta of zero": ("mtp", layer(rope_parameters={"rope_theta": 0}), "rope_theta must be above"),
    "theta in words": ("dflash", layer(rope_parameters={"rope_theta": "1e4"}), "rope_theta must"),
    "an unknown rope": ("mtp", layer(rope_parameters={"rope_type": "spiral"}), "'spiral' is not"),
    "yarn without a factor": ("mtp", layer(rope_parameters={"rope_type": "yarn"}), "factor"),
    "another model's layers": ("eagle3", layer(model_type="mistral"), "model_type mistral"),
    "layers of no model": ("eagle3", layer(model_type="nonsense"), "nonsense"),
    "layers of a vision model": ("mtp", layer(model_type="clip"), "'clip'; expected one"),
    "a nearly right key": (
        "mtp",
        layer(hidden_size=MISSING, hiden_size=128),
        "Did you mean 'hidden_size'",
    ),
    "another hidden size": ("eagle3", layer(hidden_size=64), "the speculator was made for 64"),
    "another vocabulary": ("mtp", layer(vocab_size=4096), "made for 4096"),
    "another depth": ("mtp", layer(num_hidden_layers=7, layer_types=None), "made for 7"),
    "no layer config": ("mtp", {"transformer_layer_config": None}, "transformer_layer_config"),
    "a list for the layer config": ("dflash", {"transformer_layer_config": [1]}, "a JSON object"),
    "another algorithm": ("eagle3", inner(algorithm="mtp"), "'mtp' contradicts"),
    "another kind": ("eagle3", {"speculators_model_type": "mtp"}, "unknown key|contradicts"),
    "another kind with the same keys": (
        "eagle3",
        {"speculators_model_type": "peagle", **inner(algorithm="peagle")},
        "mask_token_id is missing|mask_token_id",
    ),
    "a kind that is a list": ("mtp", {"speculators_model_type": ["mtp"]}, "unknown speculators"),
    "no kind": ("mtp", {"speculators_model_type": MISSING}, "unknown speculators_model_type None"),
    "no speculators_config": ("mtp", {"speculators_config": MISSING}, "has no speculators_config"),
    "speculators_config null": ("dflash", {"speculators_config": None}, "has no speculators_conf"),
    "no methods": ("mtp", inner(proposal_methods=[]), "proposal_methods"),
    "methods in an object": ("mtp", inner(proposal_methods={"a": 1}), "proposal_methods"),
    "methods that are text": ("mtp", inner(proposal_methods=["greedy"]), "proposal_methods"),
    "a default that is not there": ("mtp", inner(default_proposal_method="best"), "'best'"),
    "no verifier": ("mtp", inner(verifier=MISSING), "verifier"),
    "no token": ("eagle3", method(speculative_tokens=0), "speculative_tokens"),
    "more tokens than vLLM verifies": ("mtp", method(speculative_tokens=129), "at most 128"),
    "tokens without end": ("peagle", method(speculative_tokens=10**30), "at most 128"),
    "layer ids twice": (
        "eagle3",
        {"eagle_aux_hidden_state_layer_ids": [1, 3, 3]},
        r"for 3 aux hidden states, but the config has 2 aux layer ids \(\[1, 3\]\)",
    ),
    "layer ids below zero": ("dflash", {"aux_hidden_state_layer_ids": [-1, 3, 4]}, "layer_ids"),
    "layer ids as text": ("eagle3", {"eagle_aux_hidden_state_layer_ids": ["1", "3", "4"]}, "int"),
    "layer ids beyond the verifier": (
        "peagle",
        {"eagle_aux_hidden_state_layer_ids": [1, 3, 70]},
        "70 is out of range",
    ),
    "no layer ids": ("dflash", {"aux_hidden_state_layer_ids": MISSING}, "state_layer_ids"),
    "fewer layer ids": ("peagle", {"eagle_aux_hidden_state_layer_ids": [1, 3]}, "has shape"),
    "no mask token": ("peagle", {"mask_token_id": MISSING}, "mask_token_id"),
    "a mask token out of the vocabulary": ("dflash", {"mask_token_id": 2048}, "mask_token_id 2048"),
    "a mask token as text": ("dflash", {"mask_token_id": "3"}, "mask_token_id"),
    "false as text": ("eagle3", {"norm_before_residual": "false"}, "norm_before_residual"),
    "a norm without weights": ("eagle3", {"norm_before_fc": True}, "is missing"),
    "two norms": ("eagle3", {"norm_before_fc": True, "fc_norm": True}, "exclude each other"),
    "a smaller vocabulary": ("peagle", {"draft_vocab_size": 100}, "d2t|has shape"),
    "a larger vocabulary": ("peagle", {"draft_vocab_size": 9999}, "at most 2048"),
    "a block of one": ("dflash", {"block_size": 1}, "block_size"),
    "from the anchor": ("dflash", {"sample_from_anchor": True}, "sample_from_anchor is true"),
    "two layers ahead": ("mtp", {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
    "a state of no kind": ("mtp", {"verifier_state": "mid_norm"}, "verifier_state"),
    "an integer dtype": ("mtp", {"dtype": "int8"}, "dtype 'int8'"),
    "no dtype of torch": ("mtp", {"dtype": "../../x"}, "dtype"),
}


def merged(config: dict[str, Any], edit: dict[str, Any]) -> dict[str, Any]:
    config = dict(config)
    for key, value in edit.items():
        if value is MISSING:
            config.pop(key, None)
        elif isinstance(value, dict) and isinstance(config.get(key), dict):
            config[key] = merged(config[key], value)
        else:
            config[key] = value
    return config


def edit_config(folder: Path, edit: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(merged(config, edit)))


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_config_is_refused_with_its_reason(checkpoint, judge, name):
    kind, edit, reason = FAULTY[name]
    folder = checkpoint(kind)
    edit_config(folder, edit)
    message = judge(folder)
    assert message is not None, "accepted"
    assert re.search(reason, message), message


# ---- the text of config.json ----

TEXTS: dict[str, bytes] = {
    "empty": b"",
    "blanks": b" \n\n ",
    "cut": b'{"speculators_model_type": "mtp", "spec',
    "a list": b"[]",
    "a word": b'"mtp"',
    "null": b"null",
    "a number": b"7",
    "python": b"{'speculators_model_type': 'mtp'}",
    "comments": b"// mtp\n{}",
    "nested without end": b"[" * 100_000,
    "nested objects": b'{"speculators_config": ' + b'{"a": ' * 50_000 + b"1" + b"}" * 50_001,
    "a number of ten thousand digits": b'{"speculators_model_type": ' + b"9" * 10_000 + b"}",
    "bytes": bytes(range(256)),
    "UTF-16": '{"speculators_model_type": "mtp"}'.encode("utf-16"),
    "byte-order mark": b"\xef\xbb\xbf{}",
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_config_that_is_no_json_object_is_refused(checkpoint, judge, name):
    folder = checkpoint("mtp")
    (folder / "config.json").write_bytes(TEXTS[name])
    assert judge(folder) is not None


# ---- tensors ----


def with_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        (folder / "model.safetensors").unlink()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def first_of(tensors: dict[str, torch.Tensor], dims: int = 2) -> str:
    return next(name for name in sorted(tensors) if tensors[name].dim() == dims)


def drop(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def replace_first(make: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = first_of(tensors)
        tensors[name] = make(tensors[name]).contiguous()

    return with_tensors(change)


def set_one(value: float) -> Damage:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first_of(tensors)][-1, -1] = value

    return with_tensors(change)


def rename(old_to_new: Callable[[str], str]) -> Damage:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = first_of(tensors)
        tensors[old_to_new(name)] = tensors.pop(name)

    return with_tensors(change)


def with_bytes(change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").write_bytes(change(content))

    return damage


def with_header(change: Callable[[dict[str, Any]], None]) -> Damage:
    def edited(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return with_bytes(edited)


def entry(**keys: Any) -> Damage:
    """Of the first tensor in the header."""

    def change(header: dict[str, Any]) -> None:
        header[next(name for name in sorted(header) if name != "__metadata__")].update(keys)

    return with_header(change)


TENSORS: dict[str, Damage] = {
    "one is missing": with_tensors(lambda t: drop(t, next(name for name in t if "o_proj" in name))),
    "a norm is missing": with_tensors(lambda t: drop(t, first_of(t, 1))),
    "all are missing": with_tensors(lambda t: t.clear()),
    "one is too much": with_tensors(lambda t: t.update(extra=torch.zeros(2))),
    "one of a verifier": with_tensors(lambda t: t.update({"model.norm.weight": torch.ones(128)})),
    "a prefix": rename(lambda name: f"module.{name}"),
    "a name of two lines": rename(lambda name: f"{name}\ninjected: line"),
    "a name of marks": rename(lambda name: "\u202e\x1b[31m" + name),
    "a name without end": rename(lambda name: name * 2000),
    "an empty name": rename(lambda name: ""),
    "one row less": replace_first(lambda t: t[:-1]),
    "transposed": replace_first(lambda t: t.T[None]),
    "flat": replace_first(lambda t: t.flatten()),
    "empty": replace_first(lambda t: t[:0]),
    "a number": replace_first(lambda t: t[0, 0]),
    "a NaN": set_one(float("nan")),
    "an infinity": set_one(float("inf")),
    "minus infinity": set_one(-float("inf")),
    "integers": replace_first(lambda t: t.to(torch.int64)),
    "bytes": replace_first(lambda t: t.to(torch.uint8)),
    "booleans": replace_first(lambda t: t > 0),
    "complex numbers": replace_first(lambda t: t.to(torch.complex64)),
    "nothing": with_bytes(lambda content: b""),
    "seven bytes": with_bytes(lambda content: content[:7]),
    "half a header": with_bytes(lambda content: content[:100]),
    "half a file": with_bytes(lambda content: content[: len(content) // 2]),
    "one byte less": with_bytes(lambda content: content[:-1]),
    "one byte more": with_bytes(lambda content: content + b"\x00"),
    "zeros alone": with_bytes(lambda content: bytes(len(content))),
    "ones alone": with_bytes(lambda content: b"\xff" * 4096),
    "a pickle": with_bytes(lambda content: b"PK\x03\x04" + content),
    "a page of the web": with_bytes(lambda content: b"<!DOCTYPE html><html>404</html>"),
    "a pointer of git": with_bytes(
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    ),
    "a header without end": with_bytes(lambda c: struct.pack("<Q", 2**63) + c[8:]),
    "a header that is no JSON": with_bytes(lambda c: c[:8] + b"#" * 64 + c[72:]),
    "a header that is a list": with_bytes(lambda c: struct.pack("<Q", 2) + b"[]" + c),
    "a shape below zero": entry(shape=[-1, 128]),
    "a shape without end": entry(shape=[2**62, 4]),
    "a shape in words": entry(shape="all"),
    "a dtype of no kind": entry(dtype="BF17"),
    "offsets backwards": entry(data_offsets=[64, 0]),
    "offsets beyond the file": entry(data_offsets=[0, 2**40]),
    "metadata in numbers": with_header(lambda h: h.update(__metadata__={"format": 7})),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TENSORS)
def test_damaged_tensors_are_refused(checkpoint, judge, kind, name):
    folder = checkpoint(kind)
    TENSORS[name](folder)
    assert judge(folder) is not None, "accepted"


REDUCED = 512
"""Tokens in the vocabulary of `reduce_vocabulary`."""


def reduce_vocabulary(folder: Path) -> None:
    """EAGLE-3 and P-EAGLE with every fourth token of the verifier's vocabulary."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        kept = torch.arange(REDUCED) * 4
        tensors["lm_head.weight"] = tensors["lm_head.weight"][kept].contiguous()
        tensors["d2t"] = kept - torch.arange(REDUCED)
        tensors["t2d"] = torch.isin(torch.arange(2048), kept)

    with_tensors(change)(folder)
    edit_config(folder, {"draft_vocab_size": REDUCED})


MAPS: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "d2t is missing": lambda t: drop(t, "d2t"),
    "t2d is missing": lambda t: drop(t, "t2d"),
    "d2t one short": lambda t: t.update(d2t=t["d2t"][:-1].clone()),
    "d2t beyond the vocabulary": lambda t: t["d2t"].__setitem__(-1, 5000),
    "d2t below zero": lambda t: t["d2t"].__setitem__(0, -1),
    "d2t twice the same": lambda t: t["d2t"].__setitem__(1, -1),
    "d2t holds the tokens themselves": lambda t: t.update(d2t=t["d2t"] + torch.arange(REDUCED)),
    "d2t of numbers with a point": lambda t: t.update(d2t=t["d2t"].float()),
    "d2t of NaN": lambda t: t.update(d2t=torch.full([REDUCED], float("nan"))),
    "t2d of another vocabulary": lambda t: t.update(t2d=t["t2d"].roll(1)),
    "t2d of bytes": lambda t: t.update(t2d=t["t2d"].to(torch.uint8) * 2),
    "no token": lambda t: t.update(t2d=torch.zeros(2048, dtype=torch.bool)),
}


@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
@pytest.mark.parametrize("name", MAPS)
def test_maps_that_contradict_each_other_are_refused(checkpoint, judge, kind, name):
    folder = checkpoint(kind)
    reduce_vocabulary(folder)
    assert judge(folder) is None
    with_tensors(MAPS[name])(folder)
    message = judge(folder)
    if name != "t2d is missing":
        assert message is not None, "accepted"


# ---- files ----


def in_two_shards(change: Callable[[dict[str, Any]], Any] = lambda index: None) -> Damage:
    """The weights in two files and an index, which ``change`` edits or replaces."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        names = sorted(tensors)
        (folder / "model.safetensors").unlink()
        weight_map = {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            shard = f"model-0000{number}-of-00002.safetensors"
            save_file({n: tensors[n] for n in part}, folder / shard, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, shard)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        replaced = change(index)
        written = index if replaced is None else replaced
        (folder / "model.safetensors.index.json").write_text(json.dumps(written))

    return damage


def point_to(shard: Any) -> Damage:
    """The index says that the first tensor lies there."""

    def change(index: dict[str, Any]) -> None:
        index["weight_map"][min(index["weight_map"])] = shard

    return in_two_shards(change)


def point_outside(name_of: Callable[[Path], str]) -> Damage:
    """The index says that the first tensor lies in a good file beside the folder."""

    def damage(folder: Path) -> None:
        outside = folder.parent / "outside.safetensors"
        shutil.copy(folder / "model.safetensors", outside)
        point_to(name_of(outside))(folder)

    return damage


def after(first: Damage, then: Callable[[Path], Any]) -> Damage:
    def damage(folder: Path) -> None:
        first(folder)
        then(folder)

    return damage


def as_folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return damage


def as_link(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


def as_pipe(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00002.safetensors"
FILES: dict[str, Damage] = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "a config that is a folder": as_folder("config.json"),
    "a config that leads nowhere": as_link("config.json", "/nowhere/config.json"),
    "a config that leads to itself": as_link("config.json", "config.json"),
    "a config that is a pipe": as_pipe("config.json"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights that are a folder": as_folder("model.safetensors"),
    "weights that lead nowhere": as_link("model.safetensors", "/nowhere/model.safetensors"),
    "weights that lead to themselves": as_link("model.safetensors", "model.safetensors"),
    "weights that are a pipe": as_pipe("model.safetensors"),
    "weights that are the config": as_link("model.safetensors", "config.json"),
    "weights under another name": lambda folder: (folder / "model.safetensors").rename(
        folder / "pytorch_model.bin"
    ),
    "an index that is a folder": as_folder(INDEX),
    "an index that is a list": in_two_shards(lambda index: [1]),
    "an index without a map": in_two_shards(lambda index: {}),
    "an index with an empty map": in_two_shards(lambda index: {"weight_map": {}}),
    "an index with a list for a map": in_two_shards(lambda index: {"weight_map": ["a"]}),
    "an index with numbers for files": point_to(7),
    "an index that names no file": point_to(""),
    "an index that names the folder": point_to("."),
    "an index that names the folder above": point_to(".."),
    "an index that leads out": point_outside(lambda file: f"../{file.name}"),
    "an index that leads out from the root": point_outside(str),
    "an index that leads to the root": point_to("/etc/passwd"),
    "an index with a zero in a name": point_to("model\x00.safetensors"),
    "an index with lines in a name": point_to("model\n.safetensors"),
    "an index with a name without end": point_to("m" * 5000),
    "an index that names a shard that is not there": point_to("model-3.safetensors"),
    "an index that names the other shard": point_to(SECOND),
    "an index that forgets a tensor": in_two_shards(
        lambda index: index["weight_map"].pop(min(index["weight_map"])) and None
    ),
    "an index that knows one more": in_two_shards(
        lambda index: index["weight_map"].update(extra=SECOND)
    ),
    "an index without shards": after(
        in_two_shards(), lambda folder: [p.unlink() for p in folder.glob("model-*")]
    ),
    "a shard that is missing": after(in_two_shards(), lambda folder: (folder / SECOND).unlink()),
    "a shard that is empty": after(
        in_two_shards(), lambda folder: (folder / SECOND).write_bytes(b"")
    ),
    "a shard that is a folder": after(in_two_shards(), as_folder(SECOND)),
    "a shard that leads nowhere": after(in_two_shards(), as_link(SECOND, "/nowhere/shard")),
    "an index that is no JSON": after(
        in_two_shards(), lambda folder: (folder / INDEX).write_text('{"weight_map":')
    ),
    "a folder that is a file": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
    "a folder that is empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "no folder": lambda folder: shutil.rmtree(folder),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_refused(checkpoint, judge, name):
    folder = checkpoint(KINDS[sorted(FILES).index(name) % len(KINDS)])
    FILES[name](folder)
    assert judge(folder) is not None, "accepted"


@pytest.mark.parametrize("kind", KINDS)
def test_vllm_is_stopped_before_it_loads_anything(checkpoint, kind):
    from vllm.engine.arg_utils import EngineArgs

    folder = checkpoint(kind)
    TENSORS["a NaN"](folder)
    settings = {"speculative_config": {"model": str(folder)}, "dtype": "float32"}
    with pytest.raises(SpeculatorError, match="holds a NaN"):
        EngineArgs(model=str(VERIFIER), **settings).create_engine_config()


@pytest.mark.parametrize("kind", KINDS)
def test_shards_and_an_index_are_taken(checkpoint, judge, kind):
    folder = checkpoint(kind)
    in_two_shards()(folder)
    assert judge(folder) is None


# ---- what passes is served ----


def bare_layer(folder: Path) -> None:
    """No key but those that have no default: vLLM knows none of Transformers'."""
    config = json.loads((folder / "config.json").read_text())
    kept = ("model_type", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")
    kept += ("num_key_value_heads", "num_hidden_layers", "head_dim")
    old = config["transformer_layer_config"]
    config["transformer_layer_config"] = {key: old[key] for key in kept}
    (folder / "config.json").write_text(json.dumps(config))


def config_edit(edit: dict[str, Any]) -> Damage:
    return lambda folder: edit_config(folder, edit)


def fill(value: float) -> Damage:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.fill_(value)

    return with_tensors(change)


def without_ends(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["embed_tokens.weight"], tensors["lm_head.weight"]

    with_tensors(change)(folder)


SERVED: dict[str, tuple[str, list[Damage]]] = {
    "bare layer, other epsilon, two shards": (
        "eagle3",
        [bare_layer, config_edit(layer(rms_norm_eps=0.5)), in_two_shards()],
    ),
    "bare layer of Qwen3": ("mtp", [bare_layer]),
    "verifier's ends, norm options turned": (
        "eagle3",
        [without_ends, config_edit({"norm_before_residual": False, "norm_output": True})],
    ),
    "a vocabulary of every fourth token, another theta": (
        "peagle",
        [
            reduce_vocabulary,
            config_edit(layer(rope_parameters={"rope_theta": 3.0, "rope_type": "default"})),
        ],
    ),
    "fewer positions than the text": ("mtp", [config_edit(layer(max_position_embeddings=16))]),
    "weights at their largest, for a block": ("dflash", [fill(-3e38)]),
    "more tokens than were trained": ("dflash", [config_edit(method(speculative_tokens=40))]),
    "another mask token and garbage that nobody reads": (
        "peagle",
        [
            config_edit({"mask_token_id": 2047, "architectures": [{"a": 1}]}),
            config_edit(method(speculative_tokens=MISSING)),
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_what_passes_gives_the_verifiers_text(checkpoint, judge, name):
    from vllm import SamplingParams

    kind, damages = SERVED[name]
    folder = checkpoint(kind)
    for damage in damages:
        damage(folder)
    assert judge(folder) is None
    recorded = interop_acceptance()
    decoding = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    with offline.loaded(
        model=str(VERIFIER),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        num_gpu_blocks_override=64,
        speculative_config={"model": str(folder)},
    ) as llm:
        answers = offline.continue_all(llm, recorded["prompts"][:6], decoding)
    expected = [ids[:16] for ids in recorded["verifier_only"][:6]]
    assert [answer.token_ids for answer in answers] == expected
    assert all(answer.accepted for answer in answers), "nothing was drafted"


def test_enough_was_damaged():
    assert len(KINDS) * (DRAWN_PER_KIND + len(TENSORS)) + len(FAULTY) + len(FILES) > 700
