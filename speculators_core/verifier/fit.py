"""Compares a speculator with a verifier and its tokenizer."""

from os import PathLike
from pathlib import Path

from transformers import (
    PretrainedConfig,
)

from speculators_core.errors import SpeculatorError
from speculators_core.files import read_json
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.verifier.sizes import required_size


def check_verifier(
    speculator: SpeculatorModelConfig, verifier: PretrainedConfig, name: str | None = None
) -> None:
    """Compares what must agree between the two, and settles what the config leaves open.

    Raises:
        SpeculatorError: another hidden size, vocabulary, number of layers or architecture.
    """
    text = verifier.get_text_config()
    width, vocab_size, depth = (
        required_size(text, key) for key in ("hidden_size", "vocab_size", "num_hidden_layers")
    )
    layer = speculator.transformer_layer_config
    name = name or verifier.name_or_path or type(verifier).__name__
    for what, key, found, expected in (
        ("hidden size", "hidden_size", width, speculator.verifier_hidden_size),
        ("vocabulary size", "vocab_size", vocab_size, layer.vocab_size),
        (
            "number of layers",
            "num_hidden_layers",
            depth,
            speculator.verifier_depth or depth,
        ),
    ):
        if found != expected:
            raise SpeculatorError(
                f"{name}: {what} {found}; the speculator was made for {expected} ({key} in its "
                "config.json). Pass the verifier it was trained with "
                f"({speculator.verifier.name_or_path}).",
                cause="wrong verifier",
            )
    classes, made_for = verifier.architectures or [], speculator.verifier.architectures
    if text is verifier and classes and made_for and not set(classes) & set(made_for):
        raise SpeculatorError(
            f"{name} is a {', '.join(classes)}; the speculator was made for {', '.join(made_for)}. "
            f"Pass the verifier it was trained with ({speculator.verifier.name_or_path}).",
            cause="wrong verifier",
        )
    speculator.settle(text)
    layer_ids = speculator.aux_layer_ids
    if layer_ids and layer_ids[-1] > depth:
        raise SpeculatorError(
            f"aux layer id {layer_ids[-1]} is out of range: {name} has "
            f"{depth} layers. Correct the ids, or pass the verifier it was "
            f"trained with ({speculator.verifier.name_or_path}).",
            cause="wrong layer ids",
        )


TOKENIZER = "tokenizer.json"


def read_tokenizer_vocabulary(folder: str | PathLike) -> dict[str, int] | None:
    """Every token of a local folder's tokenizer with its id; None where there is none to read."""
    path = Path(folder) / TOKENIZER
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # a unigram model's, with scores
            vocabulary = {token: place for place, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        return {**vocabulary, **added}
    except (KeyError, TypeError, ValueError):
        return None


def check_tokenizer(
    speculator: str | PathLike, trained_with: str | None, served_with: str | PathLike
) -> None:
    """Compares the served tokenizer with the one beside the speculator, or else its verifier's.

    Only folders within reach are compared; ``trained_with`` is the verifier that the speculator
    names.

    Raises:
        SpeculatorError: a token has another id, or none.
    """
    for source in filter(None, (str(speculator), trained_with)):
        if (trained := read_tokenizer_vocabulary(source)) is None:
            continue
        served = read_tokenizer_vocabulary(served_with)
        if served is None or trained == served:
            return
        by_id = {token_id: token for token, token_id in served.items()}
        for token, token_id in trained.items():
            # A token that one side alone has is harmless: a mask, say, that no text holds.
            if served.get(token, token_id) != token_id or by_id.get(token_id, token) != token:
                raise SpeculatorError(
                    f"{served_with}: token {token_id} is {by_id.get(token_id)!r}; the speculator "
                    f"was trained with {source}, where it is {token!r}. Pass that tokenizer.",
                    cause="wrong tokenizer",
                )
        return
