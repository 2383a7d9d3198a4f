"""A request's hidden states, as record and file.

A file appears under its name when it is whole. If it cannot be written, a file beside it holds the
reason in one line: ``name.safetensors`` or ``name.error``, never both.
"""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from speculators_core.errors import SpeculatorError, first_line
from speculators_core.files import make_folder, replaced, write_text
from speculators_vllm.hidden_states.settings import path_for

FORMAT: Final = "speculators-hidden-states-1"
POLL_S = 0.005


@dataclass(frozen=True)
class HiddenStates:
    """Row t is token t of the request: its id, and the verifier's states when it read it."""

    request_id: str
    name: str
    layer_ids: tuple[int, ...]
    """Id k is the residual stream after k layers; the last id is before the final norm."""
    num_prompt_tokens: int
    token_ids: Int64[Tensor, "seq"]
    hidden_states: Float[Tensor, "seq layers hidden"]

    @property
    def size_bytes(self) -> int:
        return self.token_ids.nbytes + self.hidden_states.nbytes

    def faults(self) -> str | None:
        """The first inconsistency in one line; None where there is none."""
        tokens, states = self.token_ids, self.hidden_states
        if tokens.dtype != torch.int64 or tokens.dim() != 1 or not states.is_floating_point():
            return f"token_ids are {tokens.dtype} {list(tokens.shape)}, states {states.dtype}"
        if states.dim() != 3 or states.shape[:2] != (len(tokens), len(self.layer_ids)):
            return (
                f"hidden_states are {list(states.shape)} for {len(tokens)} tokens "
                f"and {len(self.layer_ids)} layers"
            )
        if not 1 <= self.num_prompt_tokens <= len(tokens):
            return f"{self.num_prompt_tokens} prompt tokens of {len(tokens)}"
        return None


class FileWriter:
    """Writes below one folder, which it makes."""

    def __init__(self, folder: Path) -> None:
        """Raises:
        SpeculatorError: the folder cannot be made.
        """
        self.folder = folder
        try:
            make_folder(folder)
        except OSError as error:
            raise SpeculatorError(
                f"{folder} cannot be made: {first_line(error)}. Choose a folder of the sink that "
                "the engine can write."
            ) from error

    def write(self, states: HiddenStates) -> None:
        """The file is on disk afterwards.

        Raises:
            OSError: the file cannot be written; nothing of it is left.
            SafetensorError: the same.
            SpeculatorError: the name leads out of the folder.
        """
        path = self._path(states.name)
        with replaced(path) as temporary:
            save_file(
                {"token_ids": states.token_ids, "hidden_states": states.hidden_states},
                temporary,
                metadata={
                    "format": FORMAT,
                    "request_id": states.request_id,
                    "name": states.name,
                    "layer_ids": json.dumps(states.layer_ids),
                    "num_prompt_tokens": str(states.num_prompt_tokens),
                },
            )

    def report(self, request_id: str, name: str, reason: str) -> None:
        """Leaves the reason where the reader looks for the file, if anything can be written."""
        with suppress(OSError, SpeculatorError):
            write_text(self._path(name).with_suffix(".error"), reason)

    def _path(self, name: str) -> Path:
        """The file of this name; a folder of a nested name is made, the sink's is not."""
        path = path_for(self.folder, name)
        if path.parent != self.folder.resolve() and self.folder.is_dir():
            make_folder(path.parent)
        return path

    def stop(self) -> None:
        """Files are written to their end."""

    def close(self) -> None:
        """Nothing is held."""


def read_hidden_states(
    answer: Mapping[str, object] | None, timeout_s: float = 30.0
) -> HiddenStates:
    """The states of a request, by the ``kv_transfer_params`` of its output, once they are written.

    An engine inside this process writes only while it is stepped: call `drain` first.

    Raises:
        SpeculatorError: the request got none, they could not be written, or did not come in time.
    """
    if answer is None:
        raise SpeculatorError(
            "The request got no hidden states: it asked for none, or was aborted, as it is "
            'by a `stop` string. Send kv_transfer_params {"hidden_states": "all"}.'
        )
    if "error" in answer:
        raise SpeculatorError(f"The request got no hidden states: {answer['error']}")
    path = Path(str(answer["hidden_states_path"]))
    folder = path.parents[str(answer["name"]).count("/")]
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if path.with_suffix(".error").exists():
            raise SpeculatorError(
                f"{path} was not written: {path.with_suffix('.error').read_text()}"
            )
        if not folder.is_dir():
            raise SpeculatorError(f"{path} was not written: {folder} is gone. Make it again.")
        if time.monotonic() > deadline:
            raise SpeculatorError(
                f"{path} was not there after {timeout_s} s. Wait longer, or look into the "
                "engine's log; an engine in this process needs hidden_states.drain(llm) first."
            )
        time.sleep(POLL_S)
    return read_file(path)


def read_file(path: Path) -> HiddenStates:
    """The states in a file.

    Raises:
        SpeculatorError: it cannot be read, or does not hold what this module writes.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise SpeculatorError(
                    f"{path} has format {metadata.get('format')!r}, expected {FORMAT}. Choose "
                    "a file that FileSink wrote."
                )
            states = HiddenStates(
                request_id=metadata["request_id"],
                name=metadata["name"],
                layer_ids=tuple(json.loads(metadata["layer_ids"])),
                num_prompt_tokens=int(metadata["num_prompt_tokens"]),
                token_ids=file.get_tensor("token_ids"),
                hidden_states=file.get_tensor("hidden_states"),
            )
    except SpeculatorError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise SpeculatorError(
            f"{path} cannot be read: {first_line(error)}. Generate its states again."
        ) from error
    if faults := states.faults():
        raise SpeculatorError(f"{path} is inconsistent: {faults}. Generate its states again.")
    return states
