"""What every speculator shares: loading, saving, its verifier, and the door to `generate`."""

from abc import abstractmethod
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from speculators_core.batch import Batch
from speculators_core.decoding.drafter import Chooser, Confirmed, Proposal
from speculators_core.decoding.generation import generate
from speculators_core.errors import SpeculatorError
from speculators_core.format import checkpoint
from speculators_core.format.checkpoint import locate_verifier
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.format.proposals import TokenProposalConfig
from speculators_core.models.parts.attention import DraftCache
from speculators_core.models.parts.losses import VerifierLogits
from speculators_core.registry import MODELS
from speculators_core.settings import Settings
from speculators_core.verifier.fit import check_verifier
from speculators_core.verifier.head import VerifierHead
from speculators_core.verifier.proof import check_head
from speculators_core.verifier.reading import load_verifier, read_verifier_head, verifier_config_of

AttachmentMode = Literal["detached", "full", "train_only"]


class SpeculatorModel(PreTrainedModel):
    """A draft model, with or without its verifier.

    The verifier is held beside the model, not in it: ``parameters``, ``state_dict``, ``to`` and
    ``save_pretrained`` know the draft alone.
    """

    config_class: ClassVar[type[SpeculatorModelConfig]] = SpeculatorModelConfig
    recipe_class: ClassVar[type[Settings]]
    """Options of `from_training_args`."""
    objective_class: ClassVar[type[Settings]]
    """Options of `get_trainer_kwargs`."""
    main_input_name = "input_ids"
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(
        self,
        config: SpeculatorModelConfig,
        verifier: str | PathLike | PreTrainedModel | None = None,
        verifier_attachment_mode: AttachmentMode | None = None,
    ):
        super().__init__(config)
        # In a list, so that PyTorch takes neither for a part of the draft.
        self._attached: list[Any] = []
        self.unset: set[str] = set()
        """Tensors that hold no trained value yet: neither loaded nor taken from a verifier."""
        self._requested = (verifier, _mode(verifier, verifier_attachment_mode))

    def post_init(self) -> None:
        """To be called at the end of an algorithm's ``__init__``."""
        super().post_init()
        verifier, mode = self._requested
        del self._requested
        if mode != "detached":
            self.attach_verifier(self.resolve_verifier(verifier), mode)

    def enable_input_require_grads(self) -> None:
        """Nothing: layers recompute without reentrance, which asks no gradient of embeddings."""

    def get_input_embeddings(self) -> Any:
        """The draft's embeddings; None where it reads its verifier's."""
        return None

    def get_output_embeddings(self) -> Any:
        """The draft's head; None where it reads its verifier's."""
        return None

    # ---- the verifier ----

    @property
    def verifier(self) -> PreTrainedModel:
        """The verifier attached in full.

        Raises:
            SpeculatorError: there is none.
        """
        if self._attached and isinstance(self._attached[0], PreTrainedModel):
            return self._attached[0]
        raise SpeculatorError(
            "no verifier is attached in full. Call attach_verifier(verifier, mode='full') first."
        )

    @property
    def verifier_head(self) -> VerifierHead:
        """The attached verifier's final norm and head.

        Raises:
            SpeculatorError: no verifier is attached.
        """
        if not self._attached:
            raise SpeculatorError("no verifier is attached. Call attach_verifier(verifier) first.")
        return self._attached[-1]

    @property
    def is_attached(self) -> bool:
        return bool(self._attached)

    def verifier_logits(self, batch: Batch) -> VerifierLogits:
        """What the verifier says to each row of a batch, made when it is asked for."""
        head, states = self.verifier_head, batch.last_hidden_states[0]

        def logits(rows: Int[Tensor, "rows"]) -> Float[Tensor, "rows vocab"]:
            return head(states[rows])

        return logits

    def embed_as_verifier(
        self, token_ids: Int[Tensor, "*tokens"]
    ) -> Float[Tensor, "*tokens hidden"]:
        """The verifier's own embeddings, for drafts that have none."""
        table = self.verifier_head.embed_tokens.weight.detach()
        embedded = nn.functional.embedding(token_ids.to(table.device), table)
        return embedded.to(self.device, self.dtype)

    @property
    def head_weight(self) -> Float[Tensor, "draft_vocab hidden"]:
        """The head's weight: the draft's own, or its verifier's for drafts that have none."""
        own = self.get_output_embeddings()
        weight = self.verifier_head.lm_head.weight.detach() if own is None else own.weight
        return weight.to(self.device, self.dtype)

    @property
    def draft_token_ids(self) -> Int[Tensor, "draft_vocab"] | None:
        """Verifier ids of the draft's tokens; None where the vocabulary is the verifier's."""
        return None

    def resolve_verifier(
        self, verifier: str | PathLike | PreTrainedModel | None = None
    ) -> str | PreTrainedModel:
        """The verifier that is meant: the argument, or the one that the config names.

        Raises:
            SpeculatorError: neither names one.
        """
        if isinstance(verifier, PreTrainedModel):
            return verifier
        if verifier is not None:
            return str(verifier)
        if self.config.verifier.name_or_path is None:
            raise SpeculatorError("the config names no verifier. Pass verifier=<hub id or folder>.")
        return locate_verifier(self.config.verifier.name_or_path, beside=self.config.name_or_path)

    def attach_verifier(
        self,
        verifier: str | PathLike | PreTrainedModel | None = None,
        mode: Literal["full", "train_only"] = "full",
        trust_remote_code: bool = False,
    ) -> None:
        """Brings the verifier to the draft: all of it, or only its norm, head and embeddings.

        Raises:
            SpeculatorError: it cannot be read, or it is not the one that the draft was made for.
        """
        if mode not in ("full", "train_only"):
            raise ValueError(f"mode must be 'full' or 'train_only', found {mode!r}")
        resolved = self.resolve_verifier(verifier)
        check_verifier(self.config, verifier_config_of(resolved, trust_remote_code))
        if mode == "full" and not isinstance(resolved, PreTrainedModel):
            resolved = load_verifier(resolved, self.dtype, trust_remote_code).to(self.device)
        if isinstance(resolved, PreTrainedModel):
            check_head(resolved)
            whole = [resolved.eval()] if mode == "full" else []
            self._attached = [*whole, VerifierHead(resolved)]
        else:
            head = read_verifier_head(resolved, self.dtype, trust_remote_code)
            self._attached = [head.to(self.device).eval()]
        self.fill_unset()

    def move_verifier(self, device: torch.device) -> None:
        """Moves the attached verifier, or its head."""
        for module in self._attached:
            module.to(device)

    def share_verifier(self, other: "SpeculatorModel") -> None:
        """Attaches what is attached to another draft for the same verifier."""
        self._attached = list(other._attached)
        self.unset = set()

    def detach_verifier(self) -> None:
        """Lets go of the verifier, and of its memory where nobody else holds it."""
        self._attached = []

    # ---- disk ----

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike,
        *,
        verifier: str | PathLike | PreTrainedModel | None = None,
        verifier_attachment_mode: AttachmentMode | None = None,
        config: SpeculatorModelConfig | None = None,
        cache_dir: str | PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        state_dict: Mapping[str, Tensor] | None = None,
        dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
    ) -> "SpeculatorModel":
        """Loads a speculator of whatever algorithm its config names.

        With ``verifier`` given it is attached in full unless the mode says otherwise. ``dtype`` is
        that of the config unless given. Names and shapes are checked before any tensor is read.
        ``trust_remote_code`` is for the verifier's code; a speculator brings none.

        Raises:
            SpeculatorError: the folder, its config, its tensors or the verifier is at fault.
        """
        folder = checkpoint.fetch(
            pretrained_model_name_or_path,
            files=checkpoint.ALL_FILES if state_dict is None else [checkpoint.CONFIG],
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            revision=revision,
        )
        if config is None:
            config = SpeculatorModelConfig.from_pretrained(folder)
        config.name_or_path = str(folder)
        model_class = cls.registered_model_class_from_config(config)
        if not issubclass(model_class, cls):
            raise SpeculatorError(
                f"{folder} holds a {config.speculators_model_type} speculator; load it with "
                f"{model_class.__name__} or SpeculatorModel."
            )
        mode = _mode(verifier, verifier_attachment_mode)
        if state_dict is None:
            stored = model_class.stored_tensors(folder, config)
            found = set(stored)
        else:
            shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
            model_class.check_shapes(shapes, config, "state_dict")
            found = set(state_dict)
        model = model_class(config)
        missing = set(model.state_dict()) - found
        source = None
        if missing & set(model.from_verifier) or mode != "detached":
            source = model.resolve_verifier(verifier)
            check_verifier(config, verifier_config_of(source, trust_remote_code))
        tensors = dict(
            checkpoint.read_tensors(stored, list(stored)) if state_dict is None else state_dict
        )
        model.to(_dtype(dtype, config))
        model.load_state_dict(tensors, strict=False)
        model.unset = missing
        model.check_tensors(tensors)
        if mode != "detached":
            model.attach_verifier(source, mode, trust_remote_code)
        elif source is not None:
            model.attach_verifier(source, "train_only", trust_remote_code)
            model.detach_verifier()
        model.fill_unset()
        return model.eval()

    @classmethod
    def stored_tensors(
        cls, folder: Path, config: SpeculatorModelConfig
    ) -> dict[str, checkpoint.StoredTensor]:
        """The checkpoint's tensors, once names and shapes are what the config asks for.

        Raises:
            SpeculatorError: a file or a tensor is missing, too much, or of another shape.
        """
        stored = checkpoint.stored_tensors(folder)
        cls.check_shapes({name: tensor.shape for name, tensor in stored.items()}, config, folder)
        return stored

    @classmethod
    def check_shapes(
        cls,
        found: Mapping[str, tuple[int, ...]],
        config: SpeculatorModelConfig,
        where: str | Path,
    ) -> None:
        """Raises SpeculatorError unless these tensors are what the config asks for."""
        with torch.device("meta"):
            model = cls.registered_model_class_from_config(config)(config)
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        checkpoint.check_shapes(found, wanted, where, model.optional)

    @classmethod
    def check_checkpoint(cls, folder: Path, config: SpeculatorModelConfig) -> None:
        """Reads every tensor once and keeps none.

        Raises:
            SpeculatorError: a file or a tensor is missing, of another shape, or not finite; or
                tensors contradict each other.
        """
        stored = cls.stored_tensors(folder, config)
        kept = {
            name: tensor
            for name, tensor in checkpoint.read_tensors(stored, list(stored))
            if not tensor.is_floating_point()
        }
        cls.registered_model_class_from_config(config).check_tensors(kept)

    @property
    def from_verifier(self) -> tuple[str, ...]:
        """Tensors that a checkpoint may leave out, because the verifier has them."""
        return ()

    @property
    def optional(self) -> tuple[str, ...]:
        """All tensors that a checkpoint may leave out."""
        return self.from_verifier

    @staticmethod
    def check_tensors(tensors: Mapping[str, Tensor]) -> None:
        """Rules over the values of loaded tensors; an algorithm adds its own.

        Raises:
            SpeculatorError: tensors contradict each other.
        """

    def fill_unset(self) -> None:
        """Gives every tensor in ``unset`` its value, where what it comes from is at hand."""

    def save_pretrained(
        self,
        save_directory: str | PathLike,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: str | int = "5GB",
        **kwargs: Any,
    ) -> None:
        """Writes the checkpoint; files replace older ones when all are whole.

        A verifier that was named relative to the folder it was read from stays reachable.
        Other arguments of Transformers' method are refused: they have no effect here.
        """
        ignored = {"is_main_process", "save_function", "safe_serialization"}
        if unknown := [key for key in kwargs if key not in ignored]:
            raise ValueError(f"save_pretrained of a speculator takes no {', '.join(unknown)}")
        tensors = dict(self.state_dict() if state_dict is None else state_dict)
        self.config.dtype = self.dtype
        written = self.config.to_dict()
        self._keep_verifier_reachable(written, Path(save_directory))
        checkpoint.write_checkpoint(save_directory, written, tensors, max_shard_size)

    def _keep_verifier_reachable(self, written: dict[str, Any], target: Path) -> None:
        name, origin = self.config.verifier.name_or_path, self.config.name_or_path
        if name is None or Path(name).is_absolute() or not origin:
            return
        located = Path(locate_verifier(name, beside=origin))
        if located.is_dir() and (target / name).resolve() != located.resolve():
            written["speculators_config"]["verifier"]["name_or_path"] = str(located)

    # ---- registry and training ----

    @classmethod
    def registered_model_class_from_config(
        cls, config: SpeculatorModelConfig
    ) -> type["SpeculatorModel"]:
        return MODELS.load(config.speculators_model_type)

    @staticmethod
    def verify_training_compatible(model: Any) -> None:
        """Raises SpeculatorError unless the model is a speculator that can be trained now."""
        if not isinstance(model, SpeculatorModel):
            raise SpeculatorError(
                f"{type(model).__name__} is not a speculator; expected one of "
                f"{', '.join(MODELS.names())}."
            )
        if not any(weight.requires_grad for weight in model.parameters()):
            raise SpeculatorError(f"{type(model).__name__} has no weight that requires a gradient.")
        _ = model.verifier_head
        assert not model.unset

    @classmethod
    def from_training_args(
        cls,
        verifier_config: PretrainedConfig,
        t2d: Bool[Tensor, "vocab"] | None = None,
        d2t: Int[Tensor, "draft_vocab"] | None = None,
        *,
        verifier: str | PathLike | PreTrainedModel | None = None,
        name_or_path: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """A fresh draft shaped after its verifier; ``kwargs`` are fields of its `recipe_class`.

        With ``verifier`` (a model, a folder or a hub id) embeddings and head are its copies.
        ``name_or_path`` is what the checkpoint will call the verifier.

        Raises:
            SpeculatorError: a field is unknown or out of bounds, or the maps contradict each other.
        """
        recipe = cls.recipe_class.read(kwargs, "from_training_args")
        vocab_size = verifier_config.get_text_config().vocab_size
        draft_vocab_size = vocab_size if d2t is None else len(d2t)
        model = cls(cls.fresh_config(verifier_config, recipe, draft_vocab_size, name_or_path))
        model.start_fresh(t2d, d2t)
        if verifier is not None:
            model.attach_verifier(
                verifier, "full" if isinstance(verifier, nn.Module) else "train_only"
            )
        return model

    @classmethod
    @abstractmethod
    def fresh_config(
        cls,
        verifier_config: PretrainedConfig,
        recipe: Any,
        draft_vocab_size: int,
        name_or_path: str | None,
    ) -> Any:
        """The config of a fresh draft; ``recipe`` is of the algorithm's `recipe_class`."""

    @abstractmethod
    def start_fresh(self, t2d: Tensor | None, d2t: Tensor | None) -> None:
        """Takes the vocabulary maps, and marks as unset what the verifier will give."""

    @classmethod
    def get_trainer_kwargs(cls, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What ``forward`` takes beside the batch, in training and in evaluation.

        ``kwargs`` are fields of the algorithm's `objective_class`.

        Raises:
            SpeculatorError: a field is unknown or out of bounds.
        """
        objective = cls.objective_class.read(kwargs, "get_trainer_kwargs")
        return {"objective": objective}, {"objective": objective}

    # ---- decoding ----

    def start_drafting(self) -> Any:
        """The state that `propose` carries on, of a new batch: keys and values of what it read."""
        return DraftCache()

    @abstractmethod
    def propose(
        self, state: Any, confirmed: Confirmed, num_tokens: int, choose: Chooser
    ) -> Proposal:
        """The next tokens as the draft sees them, in the verifier's vocabulary."""

    @property
    def aux_layer_ids(self) -> list[int]:
        """Layers of the verifier that the draft reads; see the config's."""
        return self.config.aux_layer_ids

    def generate(
        self,
        inputs: Int[Tensor, "batch seq"] | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        proposal: TokenProposalConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """Speculative decoding with the attached verifier; see `generation.generate`.

        ``proposal`` replaces the checkpoint's default proposal method.

        Raises:
            SpeculatorError: no verifier is attached in full.
        """
        proposal = proposal or self.config.proposal
        return generate(self, self.verifier, proposal, inputs, generation_config, **kwargs)


def _mode(verifier: Any, mode: AttachmentMode | None) -> AttachmentMode:
    return mode or ("detached" if verifier is None else "full")


def _dtype(dtype: str | torch.dtype, config: SpeculatorModelConfig) -> torch.dtype:
    return checkpoint.as_dtype(config.dtype if dtype == "auto" else dtype)
