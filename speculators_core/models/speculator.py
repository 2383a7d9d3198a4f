"""What every speculator shares, from loading to `generate`."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from speculators_core.decoding.documented import check_unused, has_guidance
from speculators_core.decoding.drafter import Chooser, Confirmed, DraftState, Proposal
from speculators_core.decoding.generation import generate
from speculators_core.errors import (
    MissingAttributeError,
    SpeculatorError,
    UnsupportedError,
    WrongTypeError,
)
from speculators_core.format import checkpoint, loading
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.format.documented import OfClass, registers
from speculators_core.format.proposals import TokenProposalConfig
from speculators_core.models.documented.loading import (
    LoadingOptions,
    constructor_arguments,
    open_config,
)
from speculators_core.models.documented.training import TrainingArguments, objective_options
from speculators_core.models.parts.attention import DraftCache
from speculators_core.models.verifier_side import AttachmentMode, VerifierSide
from speculators_core.registry import MODELS
from speculators_core.settings import Settings
from speculators_core.verifier.attachment import NamedVerifier

logger = logging.getLogger(__name__)


class SpeculatorModel(VerifierSide, GenerationMixin, ABC):
    """A draft model, with or without its verifier.

    A subclass has ``config_class`` and ``forward``; `propose` lets it decode, and `fresh_config`
    with `start_fresh` lets it be trained from nothing.
    """

    config_class: ClassVar[type[SpeculatorModelConfig]] = SpeculatorModelConfig
    recipe_class: ClassVar[type[Settings]]
    """Options of `from_training_args`."""
    objective_class: ClassVar[type[Settings]]
    """Options of `get_trainer_kwargs`."""
    main_input_name = "input_ids"
    registry = OfClass[dict[str, type["SpeculatorModel"]]](
        lambda _: {name: MODELS.load(name) for name in MODELS.names()}
    )
    """Model classes by ``speculators_model_type``."""
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    # ---- disk ----

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike | None,
        *model_args: Any,
        verifier: NamedVerifier | None = None,
        verifier_attachment_mode: AttachmentMode | None = None,
        config: PretrainedConfig | str | PathLike | None = None,
        cache_dir: str | PathLike | None = None,
        ignore_mismatched_sizes: bool = False,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        use_safetensors: bool | None = None,
        weights_only: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Any:  # as in Transformers output_loading_info decides
        """Loads a speculator of whatever algorithm its config names.

        The verifier is attached in full unless the mode states otherwise: ``verifier``, or else
        the one that the config names. If the named one cannot be loaded, the draft is loaded
        without it and a warning says why. Names and shapes are checked before any tensor is read.

        Args:
            pretrained_model_name_or_path: folder or hub id; None with ``config``.
            model_args: ``verifier`` and ``verifier_attachment_mode`` by position.
            config: replaces the folder's: an object, a folder, a file or a hub id.
            ignore_mismatched_sizes: tensors of another shape keep their random values.
            use_safetensors: None or True; nothing else is read.
            weights_only: True; nothing else is read.
            state_dict: replaces the folder's weights.
            dtype: type of the draft; the config's where ``auto``.
            trust_remote_code: for the verifier's code; a speculator brings none.
            kwargs: ``device_map``, ``torch_dtype``, ``attn_implementation`` (of the verifier),
                ``low_cpu_mem_usage``, ``output_loading_info``, and keys of the config.

        Raises:
            SpeculatorError: the folder, its config, its tensors or the verifier is at fault.
        """
        options = LoadingOptions.take(kwargs, dtype, use_safetensors, weights_only)
        verifier, mode = constructor_arguments(model_args, verifier, verifier_attachment_mode)
        hub = checkpoint.HubOptions(cache_dir, force_download, local_files_only, token, revision)
        folder, opened = open_config(
            pretrained_model_name_or_path, config, state_dict is not None, hub, kwargs
        )
        model_class = cls.registered_model_class_from_config(opened)
        if not issubclass(model_class, cls):
            raise SpeculatorError(
                f"{folder or 'config'} holds a {opened.speculators_model_type} speculator; load it "
                f"with {model_class.__name__} or SpeculatorModel."
            )
        weights = loading.Weights(opened, folder, state_dict, ignore_mismatched_sizes)
        if weights.ignored:
            logger.warning(
                "%s has tensors without use, which were ignored: %s",
                folder or "state_dict",
                loading.names_of(weights.ignored),
            )
        model = model_class(opened)
        model.adopt(weights.adopted)
        model.unset = weights.missing
        tensors = dict(weights.read())
        model.to(
            options.device,
            checkpoint.as_dtype(opened.dtype if options.dtype == "auto" else options.dtype),
        )
        model.load_state_dict(tensors, strict=False)
        model.check_tensors(tensors)
        model.attach_loaded(verifier, mode, hub, trust_remote_code, options.attn_implementation)
        return (model.eval(), weights.loading_info) if options.has_info else model.eval()

    @property
    def optional(self) -> tuple[str, ...]:
        """All tensors that a checkpoint may leave out."""
        return self.from_verifier

    aliases: ClassVar[Mapping[str, str]] = {}
    """Beginnings of tensor names that other writers use, with those of the format."""
    unneeded: ClassVar[tuple[str, ...]] = ()
    """Tensors that other writers store for this kind of draft, and no reader uses."""

    @property
    def adoptable(self) -> dict[str, tuple[int, ...]]:
        """Tensors that a checkpoint may have in place of the verifier's, with their shapes."""
        return {}

    def adopt(self, names: Collection[str]) -> None:
        """Makes room for some of the `adoptable` tensors."""

    def differing_ends(self) -> list[str]:
        """Embeddings and head of the draft that are not its verifier's, which is attached."""
        return []

    def check_shapes(self, found: Mapping[str, tuple[int, ...]], where: str | PathLike) -> None:
        """Looks for faults in the stored shapes that have a more exact name than a wrong shape.

        Raises:
            SpeculatorError: there is one.
        """

    @staticmethod
    def check_tensors(tensors: Mapping[str, Tensor]) -> None:
        """Checks the values of loaded tensors; an algorithm adds its rules.

        Raises:
            SpeculatorError: tensors contradict each other.
        """

    def save_pretrained(
        self,
        save_directory: str | PathLike,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: str | int = "5GB",
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the checkpoint; files replace older ones when all are whole.

        A verifier that was named relative to the folder it was read from stays reachable.
        With ``push_to_hub`` the checkpoint is sent to ``repo_id``, the folder's name where None;
        ``kwargs`` are then those of Transformers' method ``push_to_hub``. Other arguments of
        Transformers' method are refused: they have no effect here.
        """
        for ignored in ("is_main_process", "save_function", "safe_serialization"):
            kwargs.pop(ignored, None)
        if kwargs and not push_to_hub:
            raise ValueError(f"save_pretrained of a speculator takes no {', '.join(kwargs)}")
        tensors = self.state_dict() if state_dict is None else state_dict
        self.config.dtype = self.dtype
        loading.write(save_directory, self.config, tensors, max_shard_size)
        if push_to_hub:
            self.push_to_hub(repo_id or Path(save_directory).name, **kwargs)

    # ---- registry and training ----

    @classmethod
    def register(cls, name: str | None = None) -> Any:
        """Decorator: makes a class of this process known to `from_pretrained`.

        A package has an entry point in the group ``speculators.models`` instead.

        Raises:
            SpeculatorError: the class is not a speculator of that type, or the name is taken.
        """
        return registers(cls, name, MODELS.add)

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Training: draft tokens or logits, the loss and metrics of a `Batch` or of tensors."""

    @classmethod
    def registered_model_class_from_config(
        cls, config: SpeculatorModelConfig
    ) -> type["SpeculatorModel"]:
        """The model class of a config.

        Raises:
            WrongTypeError: it is not a speculator's config, or of another class than its model's.
            SpeculatorError: its type is not registered.
        """
        if not isinstance(config, SpeculatorModelConfig):
            raise WrongTypeError(
                f"found a {type(config).__name__}; expected a SpeculatorModelConfig."
            )
        found: type[SpeculatorModel] = MODELS.load(config.speculators_model_type)
        if not isinstance(config, found.config_class):
            raise WrongTypeError(
                f"found a {type(config).__name__} of a {config.speculators_model_type} speculator; "
                f"expected a {found.config_class.__name__}."
            )
        return found

    @staticmethod
    def verify_training_compatible(model: object) -> None:
        """Checks that a model can be trained now.

        Raises:
            WrongTypeError: it is not a speculator (this is a ``TypeError``, too).
            MissingAttributeError: it has no ``layers`` (an ``AttributeError``, too).
            SpeculatorError: its class is not registered, nothing in it can be trained, or no
                verifier is attached.
        """
        if not isinstance(model, SpeculatorModel):
            raise WrongTypeError(
                f"{type(model).__name__} is not a speculator; expected one of "
                f"{', '.join(MODELS.names())}."
            )
        kind, name = model.config.speculators_model_type, type(model).__name__
        # Sharding puts a class of its own before the model's.
        own = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))
        if kind not in MODELS.names() or MODELS.load(kind) is not own:
            raise SpeculatorError(
                f"{name} is not registered as {kind!r}, and could not be loaded once it is saved. "
                "Put @SpeculatorModel.register() before the class."
            )
        if not hasattr(model, "layers"):
            raise MissingAttributeError(f"{name} has no attribute layers: expected a ModuleList.")
        if not any(weight.requires_grad for weight in model.parameters()):
            raise SpeculatorError(f"{name} has no weight that requires a gradient.")
        _ = model.verifier_head
        assert not model.unset

    @classmethod
    def from_training_args(
        cls,
        verifier_config: PretrainedConfig,
        t2d: Bool[Tensor, "vocab"] | None = None,
        d2t: Int[Tensor, "draft_vocab"] | None = None,
        *,
        verifier: NamedVerifier | None = None,
        name_or_path: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """A fresh draft shaped after its verifier; ``kwargs`` are fields of its `recipe_class`.

        With ``verifier`` (a model, a folder or a hub id) embeddings and head are copies of its.
        ``name_or_path`` is the verifier's name in the checkpoint.

        The public documents' names are taken, too. With ``verifier_name_or_path`` the call is in
        their form: that verifier gives embeddings and head, ``verifier_config`` is the config of
        the draft's layers, and arguments of other algorithms are ignored.

        Raises:
            SpeculatorError: a field is unknown or out of bounds, or the maps contradict each other.
        """
        vocab_size = verifier_config.get_text_config().vocab_size
        draft_vocab_size = vocab_size if d2t is None else len(d2t)
        arguments = TrainingArguments.read(
            cls.config_class.speculators_model_type,
            cls.recipe_class,
            verifier_config,
            draft_vocab_size,
            kwargs,
        )
        recipe = cls.recipe_class.read(arguments.recipe, "from_training_args")
        name = name_or_path or arguments.verifier
        config = cls.fresh_config(arguments.verifier_config, recipe, draft_vocab_size, name)
        arguments.shape(config)
        if config.guesses:
            logger.info(
                "chosen for the draft, since the verifier does not state it: %s; "
                "set other values in the recipe",
                ", ".join(config.guesses),
            )
        model = cls(config)
        model.start_fresh(t2d, d2t)
        if (source := verifier or arguments.verifier) is not None:
            model.attach_verifier(source, "full" if isinstance(source, nn.Module) else "train_only")
        return model

    @classmethod
    def fresh_config(
        cls,
        verifier_config: PretrainedConfig,
        recipe: Any,
        draft_vocab_size: int,
        name_or_path: str | None,
    ) -> SpeculatorModelConfig:
        """The config of a fresh draft; ``recipe`` is of the algorithm's `recipe_class`."""
        raise UnsupportedError(f"{cls.__name__} has no fresh_config: it makes no fresh drafts.")

    def start_fresh(self, t2d: Tensor | None, d2t: Tensor | None) -> None:
        """Takes the vocabulary maps, and marks as unset what the verifier will give."""

    @classmethod
    def get_trainer_kwargs(cls, **kwargs: Any) -> tuple[dict[str, Settings], dict[str, Settings]]:
        """What ``forward`` takes beside the batch, in training and in evaluation.

        ``kwargs`` are fields of the algorithm's `objective_class`, or the public documents' names
        of them: ``loss_fn``, ``dflash_decay_gamma``, ``num_speculative_steps`` and
        ``step_weight_beta``. An algorithm that evaluates otherwise than it trains overrides this.

        Raises:
            SpeculatorError: a field is unknown or out of bounds.
        """
        kind = cls.config_class.speculators_model_type
        options = objective_options(kind, cls.objective_class, kwargs)
        objective = cls.objective_class.read(options, "get_trainer_kwargs")
        return {"objective": objective}, {"objective": objective}

    def trainer_kwargs(
        self, objective: Mapping[str, Any]
    ) -> tuple[dict[str, Settings], dict[str, Settings]]:
        """`get_trainer_kwargs` for this draft: what its config states is the default.

        Raises:
            SpeculatorError: as `get_trainer_kwargs`.
        """
        stated = {} if "step_weights" in objective else self.config.stated_objective()
        return self.get_trainer_kwargs(**{**stated, **objective})

    # ---- decoding ----

    def start_drafting(self) -> DraftState:
        """The state that `propose` extends: keys and values of the tokens read so far."""
        return DraftCache()

    def propose(
        self, state: Any, confirmed: Confirmed, num_tokens: int, choose: Chooser
    ) -> Proposal:
        """The draft's next tokens, in the verifier's vocabulary."""
        raise UnsupportedError(f"{type(self).__name__} has no propose: it does not decode.")

    @property
    def draft_token_ids(self) -> Int[Tensor, "draft_vocab"] | None:
        """Verifier ids of the draft's tokens; None where the vocabulary is the verifier's."""
        return None

    @property
    def aux_layer_ids(self) -> list[int]:
        """Layers of the verifier that the draft reads; see the config's."""
        return self.config.aux_layer_ids

    @property
    def target_layer_ids(self) -> list[int]:
        """The documented name of `aux_layer_ids`; the last layer of MTP is not among them."""
        return self.aux_layer_ids

    def generate(
        self,
        inputs: Int[Tensor, "batch seq"] | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | list[LogitsProcessor] | None = None,
        stopping_criteria: StoppingCriteriaList | list[StoppingCriteria] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: PreTrainedModel | None = None,
        streamer: BaseStreamer | None = None,
        negative_prompt_ids: Int[Tensor, "batch negative"] | None = None,
        negative_prompt_attention_mask: Int[Tensor, "batch negative"] | None = None,
        use_model_defaults: bool | None = None,
        custom_generate: str | Callable[..., object] | None = None,
        *,
        proposal: TokenProposalConfig | None = None,
        **kwargs: Any,
    ) -> Any:  # as in Transformers an option decides
        """Speculative decoding with the attached verifier; see `generation.generate`.

        Arguments and their order are those of Transformers. ``assistant_model`` is ignored: the
        speculator is the assistant. Negative prompts count with a ``guidance_scale``; the verifier
        then decodes alone, with a warning, because the draft knows nothing of the second text.
        ``proposal`` replaces the checkpoint's default proposal method.

        Raises:
            SpeculatorError: no verifier is attached in full, or an argument asks for another loop.
        """
        check_unused(synced_gpus, use_model_defaults, custom_generate)
        stated = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "streamer": streamer,
        }
        kwargs |= {name: value for name, value in stated.items() if value is not None}
        if has_guidance(generation_config, kwargs):
            logger.warning("guidance_scale was set: the verifier decodes without the draft")
            return self.verifier.generate(
                inputs,
                generation_config,
                negative_prompt_ids=negative_prompt_ids,
                negative_prompt_attention_mask=negative_prompt_attention_mask,
                **kwargs,
            )
        proposal = proposal or self.config.proposal
        return generate(self, self.verifier, proposal, inputs, generation_config, **kwargs)
