"""The draft to train: fresh, shaped or continued."""

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from speculators_core.data_generation.examples import Schema
from speculators_core.errors import SpeculatorError
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.format.vocabulary import choose_draft_vocabulary, special_token_ids
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.registry import MODELS
from speculators_core.training.settings import TrainModelConfig
from speculators_core.verifier.reading import read_tokenizer, read_verifier_config

CountTokens = Callable[[], Int64[Tensor, "vocab"]]
"""How often each token is one to learn in the data."""


def draft_class(model: TrainModelConfig) -> type[SpeculatorModel]:
    """The class of the draft, whose options have been checked.

    Raises:
        SpeculatorError: the algorithm is unknown, or one of its options is unknown or out of
            bounds.
    """
    if model.algorithm is None:
        assert model.start_from is not None
        config = SpeculatorModelConfig.from_pretrained(model.start_from)
        found = SpeculatorModel.registered_model_class_from_config(config)
    else:
        found = MODELS.load(model.algorithm)
    if model.start_from is None and model.draft_config is None:
        found.recipe_class.read(model.recipe, f"model.recipe of {found.__name__}")
    found.objective_class.read(model.objective, f"model.objective of {found.__name__}")
    return found


def make_draft(
    model: TrainModelConfig,
    verifier: PreTrainedModel | None,
    schema: Schema,
    count_tokens: CountTokens | None,
) -> SpeculatorModel:
    """The draft in float32, with ``verifier`` attached, or the verifier's head alone where None.

    Raises:
        SpeculatorError: the section's options, the data and the verifier do not fit together.
    """
    if model.start_from is not None:
        draft = SpeculatorModel.from_pretrained(
            model.start_from,
            verifier=verifier or model.verifier,
            verifier_attachment_mode="train_only" if verifier is None else "full",
            dtype=torch.float32,
            trust_remote_code=model.trust_remote_code,
        )
    else:
        draft = _fresh(model, draft_class(model), schema, count_tokens)
        _attach(draft, model, verifier)
    if draft.get_input_embeddings() is not None or draft.get_output_embeddings() is not None:
        _check_special_tokens(draft, model)
    return draft.float()


def _fresh(
    model: TrainModelConfig,
    of_class: type[SpeculatorModel],
    schema: Schema,
    count_tokens: CountTokens | None,
) -> SpeculatorModel:
    if model.draft_config is not None:
        return _shaped(model, of_class, count_tokens)
    config = read_verifier_config(model.verifier, model.trust_remote_code)
    t2d, d2t = _vocabulary(model, model.draft_vocab_size, count_tokens)
    recipe = dict(model.recipe)
    if "aux_layer_ids" in of_class.recipe_class.model_fields and "aux_layer_ids" not in recipe:
        recipe["aux_layer_ids"] = list(stored_layer_ids(schema))
    try:
        return of_class.from_training_args(config, t2d, d2t, name_or_path=_name(model), **recipe)
    except SpeculatorError as error:
        raise SpeculatorError(f"model.recipe: {error}") from error


def _shaped(
    model: TrainModelConfig, of_class: type[SpeculatorModel], count_tokens: CountTokens | None
) -> SpeculatorModel:
    """A fresh draft of the shape of ``draft_config``, for another verifier."""
    assert model.draft_config is not None
    folder = model.draft_config.parent if model.draft_config.is_file() else model.draft_config
    config = SpeculatorModelConfig.from_pretrained(folder)
    if config.speculators_model_type != model.algorithm:
        raise SpeculatorError(
            f"{model.draft_config}: config of a {config.speculators_model_type} draft; expected "
            f"{model.algorithm}, which is model.algorithm. Change either."
        )
    vocabulary = config.vocabulary
    size = None if vocabulary.is_whole else vocabulary.size
    t2d, d2t = _vocabulary(model, size, count_tokens)
    config.verifier.name_or_path = _name(model)
    config.name_or_path = ""
    draft = of_class(config)
    draft.start_fresh(t2d, d2t)
    return draft


def _attach(
    draft: SpeculatorModel, model: TrainModelConfig, verifier: PreTrainedModel | None
) -> None:
    if verifier is not None:
        draft.attach_verifier(verifier)
    else:
        draft.attach_verifier(model.verifier, "train_only", model.trust_remote_code)


def _name(model: TrainModelConfig) -> str:
    """The name of the verifier in the checkpoint."""
    if model.verifier_name is not None:
        return model.verifier_name
    folder = Path(model.verifier)
    return str(folder.resolve()) if folder.is_dir() else model.verifier


def stored_layer_ids(schema: Schema) -> tuple[int, ...]:
    """The aux layers whose states are in the data."""
    return schema.layer_ids[:-1] if schema.has_last else schema.layer_ids


def _vocabulary(
    model: TrainModelConfig, size: int | None, count_tokens: CountTokens | None
) -> tuple[Tensor | None, Tensor | None]:
    if size is None:
        return None, None
    if count_tokens is None:
        raise SpeculatorError(
            f"a draft vocabulary of {size} tokens is chosen by counts over all data, which a "
            "queue does not have. Set data.store or data.texts, or use the whole vocabulary."
        )
    counts = count_tokens()
    always = special_token_ids(read_tokenizer(model.verifier, model.trust_remote_code), len(counts))
    if not len(always) <= size <= len(counts):
        raise SpeculatorError(
            f"model.draft_vocab_size is {size}; expected {len(always)} (the special tokens) to "
            f"{len(counts)} (the verifier's vocabulary)."
        )
    seen = {token: count for token, count in enumerate(counts.tolist()) if count}
    return choose_draft_vocabulary(seen, size, len(counts), always)


def _check_special_tokens(draft: SpeculatorModel, model: TrainModelConfig) -> None:
    """Raises SpeculatorError where the draft cannot propose a token that ends or marks a text."""
    token_ids = draft.draft_token_ids
    if token_ids is None:
        return
    tokenizer = read_tokenizer(model.verifier, model.trust_remote_code)
    vocab_size = draft.config.transformer_layer_config.vocab_size
    missing = sorted(special_token_ids(tokenizer, vocab_size) - set(token_ids.tolist()))
    if missing:
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in missing[:5])
        raise SpeculatorError(
            f"the draft's vocabulary of {len(token_ids)} tokens lacks {names}, which it could "
            "never propose. Train a fresh draft with model.draft_vocab_size, which includes them."
        )
