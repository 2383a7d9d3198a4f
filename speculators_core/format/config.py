"""A speculator's configuration, checked key by key.

The classes are Transformers configs, because people load them as such; their values are checked by
pydantic, from the annotations of the class. Names that only the disk knows stand in
``checkpoint.py``.
"""

import copy
import logging
import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import field, fields
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from huggingface_hub.errors import StrictDataclassError
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializeAsAny,
    field_validator,
    model_validator,
)
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from speculators_core.errors import (
    SpeculatorError,
    UnreadFormatError,
    UnsupportedError,
    first_line,
)
from speculators_core.files import read_json
from speculators_core.format import checkpoint
from speculators_core.format.documented import TRAINING_KEYS, PydanticFace, config_class_of
from speculators_core.format.foreign import unread_speculator
from speculators_core.format.proposals import (
    GreedyTokenProposalConfig,
    ReloadableBaseModel,
    TokenProposalConfig,
)
from speculators_core.format.readings import OtherReading
from speculators_core.format.rope import whole_heads, with_whole_heads
from speculators_core.format.schema import checked_fields, own_fields
from speculators_core.format.spellings import (
    in_the_formats_words,
    layers_in_the_formats_words,
)
from speculators_core.format.vocabulary import Vocabulary
from speculators_core.registry import CONFIGS, MODELS, PROPOSALS, did_you_mean

logger = logging.getLogger(__name__)

UNSET = "UNSET"

LARGEST = {
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "num_attention_heads": 2**20,
    "num_key_value_heads": 2**20,
    "head_dim": 2**20,
    "vocab_size": 2**24,
    "num_hidden_layers": 2**10,
    "max_position_embeddings": 2**27,
}
"""Sizes of a layer that can be meant; with larger ones building the network never ends."""


def reload_schemas() -> None:
    """Finds algorithms and proposals of packages that were installed since the last look."""
    MODELS.reload()
    PROPOSALS.reload()


def reload_and_populate_models() -> None:
    """`reload_schemas`, then imports every algorithm, so that a broken one is named now."""
    reload_schemas()
    for name in MODELS.names():
        MODELS.load(name)


def reload_and_populate_configs() -> None:
    """`reload_schemas`, then imports every algorithm's config, so that a broken one is named."""
    reload_schemas()
    for name in {*MODELS.names(), *CONFIGS.names()}:
        config_class_of(name)


class VerifierConfig(BaseModel):
    """The verifier that a speculator was trained for."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name_or_path: str | None
    """Hub id, or a folder; a relative folder is meant from the speculator's own."""
    architectures: list[str] = Field(default_factory=list)
    """``architectures`` of the verifier's config."""

    @field_validator("name_or_path")
    @classmethod
    def _can_be_a_path(cls, name: str | None) -> str | None:
        longest = max(map(len, (name or "").split("/")))
        if longest > 255:
            raise ValueError(
                f"a name of {longest} characters is neither a hub id nor a folder, which have at "
                "most 255"
            )
        return name

    @classmethod
    def from_config(cls, config: PretrainedConfig, name_or_path: str | None = UNSET) -> Self:
        """Takes the name from ``config`` unless one is given."""
        if name_or_path == UNSET:
            name_or_path = config.name_or_path or None
        return cls(name_or_path=name_or_path, architectures=config.architectures or [])

    @classmethod
    def from_pretrained(cls, name_or_path: str | PathLike, **kwargs: Any) -> Self:
        """Reads a verifier's config; ``kwargs`` as for ``AutoConfig.from_pretrained``."""
        config = AutoConfig.from_pretrained(name_or_path, **kwargs)
        return cls.from_config(config, str(name_or_path))


class SpeculatorsConfig(ReloadableBaseModel):
    """How the speculator is used: its algorithm, its proposal methods and its verifier."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    algorithm: str
    proposal_methods: list[SerializeAsAny[TokenProposalConfig]] = Field(min_length=1)
    default_proposal_method: str
    """``proposal_type`` of the method that is used where none is asked for."""
    verifier: VerifierConfig

    @model_validator(mode="after")
    def check_default_proposal_method(self) -> Self:
        """Raises ValueError unless the default is one of the methods."""
        known = [method.proposal_type for method in self.proposal_methods]
        if self.default_proposal_method not in known:
            raise ValueError(
                f"default_proposal_method {self.default_proposal_method!r} is not the "
                f"proposal_type of a proposal method; expected one of {', '.join(known)}"
            )
        return self

    @property
    def default_proposal(self) -> TokenProposalConfig:
        return next(
            method
            for method in self.proposal_methods
            if method.proposal_type == self.default_proposal_method
        )


def _read_layer_config(value: object) -> PretrainedConfig:
    """A decoder's config from its dict: the Transformers class that ``model_type`` names.

    Keys that the class does not know stay, as readers add keys; one that is nearly a size which
    is missing is taken for a misspelling.
    """
    if isinstance(value, PretrainedConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    kind = value.get("model_type", "qwen3")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type {kind!r} is not in Transformers, expected one such as qwen3")
    config_class = CONFIG_MAPPING[kind]
    value = _with_whole_heads(layers_in_the_formats_words(value, config_class))
    for key in value:
        hint = did_you_mean(key, LARGEST.keys() - value.keys())
        if key not in _layer_keys(config_class) and hint:
            raise ValueError(f"unknown key {key!r}.{hint}")
    try:
        config = config_class(**{key: item for key, item in value.items() if key != "model_type"})
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{kind}: {type(error).__name__}: {first_line(error)}") from error
    # Qwen's classes drop the window without use_sliding_window; readers go by layer_types.
    if "sliding_attention" in (value.get("layer_types") or ()):
        config.sliding_window = value.get("sliding_window")
    _check_buildable(config)
    return config


def _with_whole_heads(layer_config: checkpoint.RawConfig) -> checkpoint.RawConfig:
    """Without rotary keys that no draft's network follows, whatever a verifier's does."""
    kept, left_out = with_whole_heads(layer_config)
    if left_out:
        logger.warning(
            "rope of the draft: %s left out, since a draft rotates whole heads, as it was trained",
            ", ".join(f"{key} {value}" for key, value in left_out.items()),
        )
    return kept


def _layer_keys(config_class: type[PretrainedConfig]) -> set[str]:
    """Keys of a layer's config that the class or one of the usual ones has, or that vLLM reads."""
    classes = (config_class, LlamaConfig, Qwen3Config)
    return {f.name for one in classes for f in fields(one)} | checkpoint.LAYER_KEYS


def _check_buildable(config: PretrainedConfig) -> None:
    """Raises ValueError for values of the right type with which no layer can be built."""
    for key, largest in LARGEST.items():
        size = getattr(config, key, None)
        if size is not None and not 1 <= size <= largest:
            raise ValueError(f"{key} must be 1 to {largest}, found {size!r}")
    if (activation := getattr(config, "hidden_act", "silu")) not in ACT2FN:
        raise ValueError(
            f"hidden_act {activation!r} is not in Transformers, expected one such as silu"
        )
    norm_eps = getattr(config, "rms_norm_eps", 0.0)
    if not 0.0 <= norm_eps < math.inf:
        raise ValueError(f"rms_norm_eps must be a finite number of at least 0, found {norm_eps!r}")
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in rope:
        return
    kind, theta = rope.get("rope_type", "default"), rope["rope_theta"]
    if not isinstance(kind, str) or kind not in {"default", *ROPE_INIT_FUNCTIONS}:
        raise ValueError(
            f"rope_parameters: rope_type {kind!r} is not in Transformers, expected one of "
            f"{', '.join(sorted({'default', *ROPE_INIT_FUNCTIONS}))}"
        )
    if not isinstance(theta, int | float) or not 0 < theta < 2**63:
        raise ValueError(f"rope_parameters: rope_theta must be above 0, found {theta!r}")
    try:
        if kind != "default":
            ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"rope_parameters: {kind} cannot be computed "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _write_layer_config(config: PretrainedConfig) -> checkpoint.RawConfig:
    """Every key a reader without class defaults needs, and nothing of this session."""
    session = ("transformers_version", "_attn_implementation", "dtype")
    written, _ = with_whole_heads(config.to_diff_dict())
    return {key: value for key, value in written.items() if key not in session}


def complete_layer_config(value: Any) -> checkpoint.RawConfig:
    """A decoder's config with every key, for readers that have no class defaults.

    Raises:
        SpeculatorError: a key or a value is at fault.
    """
    try:
        complete = _write_layer_config(_read_layer_config(value))
        followed, _ = with_whole_heads(value)
        return {**followed, **complete}
    except (TypeError, ValueError) as error:
        raise SpeculatorError(f"transformer_layer_config: {first_line(error)}") from error


LayerConfig = Annotated[
    Any, BeforeValidator(_read_layer_config), PlainSerializer(_write_layer_config)
]
"""A Transformers config, or its dict. Not annotated as such: pydantic would look inside."""


class SpeculatorModelConfig(PydanticFace):
    """Base of every speculator's configuration; each algorithm adds its keys in its own file.

    Keys are checked when they are set, too.

    Raises:
        SpeculatorError: a key is unknown, or a value is out of its bounds.
    """

    model_type: ClassVar[str] = "speculator_model"
    has_no_defaults_at_init: ClassVar[bool] = True
    layer_ids_key: ClassVar[str | None] = None
    """Key of the aux layer ids; None where they follow from the verifier."""
    objective_keys: ClassVar[Mapping[str, str]] = {}
    """Keys that other releases write, with the options of the loss that they state."""
    architectures: list[str] | None = None

    speculators_model_type: str
    transformer_layer_config: LayerConfig = field(default_factory=Qwen3Config)
    speculators_config: SpeculatorsConfig | None = None
    tie_word_embeddings: Literal[False] = False

    def __post_init__(self, **kwargs: Any) -> None:
        own = own_fields(type(self))
        self.unread_keys: checkpoint.RawConfig = {}
        """Keys of the file that have no effect here; `to_dict` writes them back."""
        self.unread_keys |= _taken(kwargs, self.training_keys)
        self.guesses: tuple[str, ...] = ()
        """Values of a fresh draft that neither the recipe nor the verifier states; not stored."""
        for key in [key for key in kwargs if key not in checkpoint.COMMON_KEYS]:
            raise SpeculatorError(
                f"unknown key {key!r} for a {self.speculators_model_type} speculator."
                f"{did_you_mean(key, own)} Expected one of {', '.join(own)}. Correct or remove it."
            )
        if self.speculators_config is None:
            self.speculators_config = SpeculatorsConfig(
                algorithm=self.speculators_model_type,
                proposal_methods=[GreedyTokenProposalConfig()],
                default_proposal_method="greedy",
                verifier=VerifierConfig(name_or_path=None),
            )
        checked = checked_fields(type(self), self.own_values())
        for name, value in checked.items():
            setattr(self, name, value)
        if self.architectures is None and self.speculators_model_type in MODELS.names():
            self.architectures = [MODELS.load(self.speculators_model_type).__name__]
        checkpoint.as_dtype(kwargs.get("torch_dtype", self.dtype))
        super().__post_init__(**kwargs)
        if self.speculators_config.algorithm != self.speculators_model_type:
            raise SpeculatorError(
                f"speculators_config.algorithm {self.speculators_config.algorithm!r} contradicts "
                f"speculators_model_type {self.speculators_model_type!r}; expected the same name. "
                "Correct one of the two."
            )
        self.check()
        self._is_checked = True

    @property
    def training_keys(self) -> Mapping[str, int | float]:
        """Options of the loss that can be keys of this config, with the values that they have where
        they are not."""
        return TRAINING_KEYS.get(self.__dict__.get("speculators_model_type", ""), {})

    def __getattr__(self, name: str) -> Any:
        if name in self.training_keys:
            return self.unread_keys.get(name, self.training_keys[name])
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        if name in self.training_keys:
            self.unread_keys[name] = value
            return
        if "_is_checked" in self.__dict__ and name in own_fields(type(self)):
            value = checked_fields(type(self), self.own_values() | {name: value})[name]
        super().__setattr__(name, value)

    @property
    def unknown_keys(self) -> list[str]:
        """Unread keys that no release of the public library and no reader of vLLM knows.

        Each with the key that was probably meant: ``norm_befor_fc (Did you mean ...?)``.
        """
        known = own_fields(type(self))
        hints = {path: did_you_mean(path, known).strip() for path in _paths(self.unread_keys)}
        unknown = [
            f"{path} ({hint})" if hint else path
            for path, hint in hints.items()
            if path not in checkpoint.KEPT_KEYS
        ]
        layer_config = self.transformer_layer_config
        of_layer = _layer_keys(type(layer_config))
        for key in vars(layer_config).keys() - of_layer:
            if not key.startswith("_") and (hint := did_you_mean(key, of_layer)):
                unknown.append(f"transformer_layer_config.{key} ({hint.strip()})")
        return unknown

    def warn_of_unread_keys(self) -> None:
        """Logs one warning that lists the unknown keys."""
        if unknown := self.unknown_keys:
            logger.warning(
                "the config of this %s speculator has keys without effect, which are kept when it "
                "is saved: %s",
                self.speculators_model_type,
                ", ".join(unknown),
            )

    @classmethod
    def normalize(cls, read: dict[str, Any]) -> None:
        """Puts the format's form in place of others that readers take in the same way."""
        tied = read.pop("tie_word_embeddings", None)
        if tied is True:
            logger.warning(
                "tie_word_embeddings true was taken for false: a draft's embeddings and head are "
                "two tensors, or the verifier's"
            )
        elif tied is not None:
            read["tie_word_embeddings"] = tied

    def stated_objective(self) -> dict[str, Any]:
        """Options of the training loss that the file states; they have no effect on decoding."""
        names = self.objective_keys
        return {names[key]: self.unread_keys[key] for key in names if key in self.unread_keys}

    def check(self) -> None:
        """Rules over several keys; an algorithm adds its own.

        Raises:
            SpeculatorError: the keys contradict each other.
        """

    def settle(self, verifier: PretrainedConfig) -> None:
        """Takes from the verifier's text config what the checkpoint leaves to it."""

    # What kind of draft it is: an algorithm overrides what differs from these defaults.

    @property
    def aux_layer_ids(self) -> list[int]:
        """Verifier layers whose states the draft reads, ascending; id n is after the last layer.

        Raises:
            SpeculatorError: the verifier's depth decides, and it is not known yet.
        """
        return []

    @property
    def stated_layer_ids(self) -> list[int] | None:
        """`aux_layer_ids`, or None where the checkpoint leaves them to each reader's default."""
        return self.aux_layer_ids

    @property
    def norm_options(self) -> dict[str, bool]:
        """Keys that switch a norm, with their values; readers differ where one is not written."""
        return {}

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens that the draft can propose, of those that its verifier knows."""
        size = self.transformer_layer_config.vocab_size
        return Vocabulary(size, size)

    @staticmethod
    def validate_transformer_config(value: object) -> PretrainedConfig:
        """The config of the draft's layers from its dict.

        Raises:
            SpeculatorError: a key or a value is at fault.
        """
        try:
            return _read_layer_config(value)
        except ValueError as error:
            raise SpeculatorError(f"transformer_layer_config: {first_line(error)}") from error

    @staticmethod
    def serialize_transformer_config(value: PretrainedConfig) -> checkpoint.RawConfig:
        """The dict of the draft's layers, as it is written."""
        return _write_layer_config(value)

    @property
    def target_vocab_size(self) -> int:
        """Size of the verifier's vocabulary."""
        return self.vocabulary.verifier_size

    @property
    def verifier_hidden_size(self) -> int:
        """Width of the verifier's states."""
        return self.transformer_layer_config.hidden_size

    def other_readings(self, verifier: PretrainedConfig) -> Iterator[OtherReading]:
        """What diagnosis tries: other ways in which the same weights may have been trained.

        ``verifier`` is the verifier's text config. An algorithm adds its own.
        """
        own = getattr(self.transformer_layer_config, "rope_parameters", None)
        theirs = getattr(verifier, "rope_parameters", None)
        if not isinstance(own, Mapping) or "rope_theta" not in own:
            return
        others = []
        # One rope for each kind of layer: none of them is certainly the draft's.
        if isinstance(theirs, Mapping) and not any(
            isinstance(value, Mapping) for value in theirs.values()
        ):
            others.append((whole_heads(theirs), "the verifier's"))
        if own.get("rope_type", "default") != "default":
            plain = {"rope_type": "default", "rope_theta": own["rope_theta"]}
            others.append((plain, "without scaling"))
        for rope, whose in others:
            if rope == whole_heads(own) or "rope_theta" not in rope:
                continue
            layer_config = copy.deepcopy(self.transformer_layer_config)
            layer_config.rope_parameters = rope
            yield OtherReading(
                "rope",
                f"rope_parameters {rope}, {whose}, instead of {own}",
                {"transformer_layer_config": layer_config},
            )

    @property
    def proposal(self) -> TokenProposalConfig:
        """The proposal method that is used where none is asked for."""
        assert self.speculators_config is not None
        return self.speculators_config.default_proposal

    @property
    def verifier_depth(self) -> int | None:
        """The verifier's number of layers, where the checkpoint states it."""
        return getattr(self.transformer_layer_config, "verifier_num_hidden_layers", None)

    @property
    def verifier(self) -> VerifierConfig:
        assert self.speculators_config is not None
        return self.speculators_config.verifier

    @classmethod
    def from_dict(cls, config_dict: checkpoint.RawConfig, **kwargs: Any) -> Any:
        """The config of the class that ``speculators_model_type`` names.

        ``kwargs`` replace keys of the dict; with ``return_unused_kwargs`` those that are not a key
        come back beside the config, as in Transformers. Keys of the dict that no reader here knows
        are kept (`unread_keys`).

        Raises:
            SpeculatorError: ``speculators_model_type`` is missing or unknown, a value is invalid,
                or one of ``kwargs`` is not a key.
            UnreadFormatError: the config is a draft's in its authors' own format.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        config_dict = {**config_dict, **_taken(kwargs, ["speculators_model_type"])}
        name = str(config_dict.get("_name_or_path") or "<draft>")
        if (what_it_is := unread_speculator(config_dict, name)) is not None:
            raise UnreadFormatError(what_it_is)
        if "speculators_model_type" not in config_dict:
            raise UnsupportedError(
                "speculators_model_type is missing, so this is not a speculator's config; expected "
                f"one of {', '.join(MODELS.names())}. Pass a speculator, or set the key.",
                cause="invalid config",
            )
        kind = config_dict["speculators_model_type"]
        target = config_class_of(kind)
        if not issubclass(target, cls):
            raise SpeculatorError(
                f"speculators_model_type is {kind!r}, which {cls.__name__} cannot hold. "
                f"Load the config with {target.__name__}."
            )
        common = (common.name for common in fields(PretrainedConfig))
        known = {*own_fields(target), *common, *checkpoint.COMMON_KEYS}
        overrides = _taken(kwargs, {*known, *TRAINING_KEYS.get(kind, ())})
        if kwargs and not return_unused:
            key = next(iter(kwargs))
            raise SpeculatorError(
                f"{key!r} has no effect on the config of a speculator of type {kind!r}."
                f"{did_you_mean(key, own_fields(target))} Leave it out."
            )
        written = in_the_formats_words(checkpoint.without_foreign_keys(config_dict), target)
        read, unread = _split_unread(written, known)
        target.normalize(read)
        config = target(**{**read, **overrides})
        config.unread_keys = {**unread, **config.unread_keys}
        config.warn_of_unread_keys()
        return (config, kwargs) if return_unused else config

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike,
        cache_dir: str | PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        **kwargs: Any,
    ) -> Any:
        """Reads a speculator's config from a folder, its file or the hub.

        Raises:
            SpeculatorError: there is no config, or it does not describe a speculator.
        """
        name = Path(pretrained_model_name_or_path)
        if name.is_file():
            name, raw = name.parent, read_json(name)
        else:
            hub = checkpoint.HubOptions(
                cache_dir, force_download, local_files_only, token, revision
            )
            raw = checkpoint.fetch_config(pretrained_model_name_or_path, hub)
        loaded = cls.of_folder(name, raw, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.name_or_path = str(name)
        return loaded

    @classmethod
    def of_folder(cls, folder: Path, raw: checkpoint.RawConfig, **kwargs: Any) -> Any:
        """`from_dict` of what ``config.json`` in this folder holds.

        Raises:
            SpeculatorError: as `from_dict`, with the file's name and the cause.
        """
        if (what_it_is := unread_speculator(raw, str(folder))) is not None:
            raise UnreadFormatError(f"{folder}: {what_it_is}")
        layer_config = raw.get("transformer_layer_config")
        if isinstance(layer_config, dict) and "model_type" not in layer_config:
            kind = checkpoint.layer_type(folder)
            layer_config = {"model_type": kind, **layer_config} if kind else layer_config
            raw = {**raw, "transformer_layer_config": layer_config}
        try:
            return cls.from_dict(raw, **kwargs)
        except SpeculatorError as error:
            raise error.within(folder / checkpoint.CONFIG, "invalid config") from error

    @property
    def located_verifier(self) -> str | None:
        """The verifier's name; a folder that is relative to the speculator's as a full path.

        None where the config names none: not at all, with an empty name, or with its own folder.
        """
        name, folder = self.verifier.name_or_path, self.name_or_path or None
        if not name:
            return None
        located = checkpoint.locate_verifier(name, beside=folder)
        is_itself = folder is not None and Path(located).resolve() == Path(folder).resolve()
        return None if is_itself else located

    def to_dict(self) -> checkpoint.RawConfig:
        """The format on disk: all of our keys, and no ``model_type``."""
        dtype = str(self.dtype).removeprefix("torch.") if self.dtype is not None else None
        return {
            **_merged(self.unread_keys, self.model_dump(mode="json")),
            "architectures": self.architectures,
            "dtype": dtype,
            "speculators_version": _own_version(),
            "transformers_version": version("transformers"),
        }

    def to_diff_dict(self) -> checkpoint.RawConfig:
        """Same as `to_dict`: readers have other defaults than ours, so every key is written."""
        return self.to_dict()

    def save_pretrained(
        self,
        save_directory: str | PathLike,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes ``config.json``, replacing an older one in one step.

        With ``push_to_hub`` it is sent to ``repo_id``, the folder's name where None; ``kwargs`` are
        then those of Transformers' method ``push_to_hub``.
        """
        checkpoint.write_config(save_directory, self.to_dict())
        if push_to_hub:
            self.push_to_hub(repo_id or Path(save_directory).name, **kwargs)


def _taken(options: checkpoint.RawConfig, names: Container[str]) -> checkpoint.RawConfig:
    """These options, removed from the dict."""
    return {key: options.pop(key) for key in list(options) if key in names}


def _split_unread(
    config_dict: Mapping[str, Any], known: Container[str]
) -> tuple[checkpoint.RawConfig, checkpoint.RawConfig]:
    """The keys that a config is made of, and all others, each where it stands in the file."""
    read, unread = _divided(config_dict, known)
    inner = read.get("speculators_config")
    if not isinstance(inner, dict):
        return read, unread
    own, others = _divided(inner, SpeculatorsConfig.model_fields)
    if isinstance(verifier := own.get("verifier"), dict):
        own["verifier"], unread_there = _divided(verifier, VerifierConfig.model_fields)
        if unread_there:
            others["verifier"] = unread_there
    if isinstance(methods := own.get("proposal_methods"), list):
        divided = [_divided(method, _keys_of(method)) for method in methods]
        own["proposal_methods"] = [method for method, _ in divided]
        if any(unread_there for _, unread_there in divided):
            others["proposal_methods"] = [unread_there for _, unread_there in divided]
    read["speculators_config"] = own
    return read, {**unread, "speculators_config": others} if others else unread


def _divided(value: Any, known: Container[str]) -> tuple[Any, checkpoint.RawConfig]:
    """A mapping's items with a known key, and the others; another value stays as is."""
    if not isinstance(value, Mapping):
        return value, {}
    return (
        {key: item for key, item in value.items() if key in known},
        {key: item for key, item in value.items() if key not in known},
    )


def _keys_of(method: object) -> Container[str]:
    """The keys of a proposal method's class; an unknown class has every key that stands there."""
    if not isinstance(method, Mapping):
        return ()
    kind = method.get("proposal_type")
    return PROPOSALS.load(kind).model_fields if kind in PROPOSALS.names() else list(method)


def _merged(below: object, above: object) -> Any:
    """``above``, with what ``below`` has beside it."""
    if isinstance(below, Mapping) and isinstance(above, Mapping):
        both = {key: _merged(below[key], above[key]) for key in above if key in below}
        return {**below, **above, **both}
    if isinstance(below, list) and isinstance(above, list) and len(below) == len(above):
        return [_merged(*pair) for pair in zip(below, above, strict=True)]
    return above


def _paths(unread: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """``speculators_config.verifier.hidden_size`` and the like, of keys that are not read."""
    for key, value in unread.items():
        if f"{above}{key}" == "speculators_config" or above.endswith("speculators_config."):
            inner = value if isinstance(value, list) else [value]
            if all(isinstance(item, Mapping) for item in inner):
                for item in inner:
                    yield from _paths(item, f"{above}{key}.")
                continue
        yield f"{above}{key}"


def _own_version() -> str:
    try:
        return version("speculators-vllm")
    except PackageNotFoundError:
        return "0.0.0"
