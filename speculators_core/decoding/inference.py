"""The inference engine: two whole models that decode together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, overload

import torch
from jaxtyping import Int
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speculators_core.decoding.acceptance import AcceptanceCounts
from speculators_core.decoding.engine_settings import GlobalConfig, SpeculativeDecodingConfig
from speculators_core.decoding.generation import SpeculativeOutput, generate
from speculators_core.decoding.independent import LanguageModelDraft, check_shared_vocabulary
from speculators_core.decoding.sequences import until_end
from speculators_core.errors import SpeculatorError
from speculators_core.format.checkpoint import as_dtype
from speculators_core.format.proposals import GreedyTokenProposalConfig
from speculators_core.registry import SPECULATION
from speculators_core.settings import Settings
from speculators_core.verifier.reading import load_verifier, read_tokenizer


class SpeculativeConfig(Settings):
    """Two language models and how they decode together."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    main_model_path: str | PreTrainedModel
    """Verifier: a folder, a hub id, or a model with the folder of its tokenizer."""
    draft_model_path: str | PreTrainedModel
    """Draft with the same vocabulary: a folder, a hub id, or a model. With vLLM it may be the
    folder of a trained speculator."""
    max_speculative_tokens: int = Field(5, ge=1)
    """Tokens proposed in one step."""
    max_new_tokens: int = Field(128, ge=1)
    """Most new tokens of each text."""
    temperature: float = Field(0.0, ge=0.0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Share of probability that sampling keeps."""
    top_k: int | None = Field(None, ge=1)
    """Tokens that sampling keeps; all where None."""
    seed: int | None = None
    """Seed that makes a sampled run repeatable."""
    acceptance_threshold: float = Field(1.0, gt=0.0, le=1.0)
    """Greedy decoding accepts a draft token that the verifier gives at least this share of its best
    token's probability. Below 1 the output may differ from the verifier's."""
    use_vllm: bool = False
    """Decode with vLLM, which loads both models from their folders, instead of Transformers."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype in which `from_config` loads both models; as stored where auto."""
    device: str = "cpu"
    """Device on which `from_config` puts both models."""

    @model_validator(mode="after")
    def _fits_the_engine(self) -> Self:
        if not self.use_vllm:
            return self
        self.refuse_idle("acceptance_threshold", because="vLLM accepts exactly")
        self.refuse_idle("device", because="vLLM chooses its device")
        for name in ("main_model_path", "draft_model_path"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}: vLLM loads it from a folder or hub id; pass its name")
        return self

    @classmethod
    def of(
        cls, config: "SpeculativeConfig | GlobalConfig | SpeculativeDecodingConfig"
    ) -> "SpeculativeConfig":
        """The same settings under the documents' other names."""
        if isinstance(config, SpeculativeConfig):
            return config
        if isinstance(config, SpeculativeDecodingConfig):
            config = GlobalConfig(speculative=config)
        asked = config.inference
        return cls(
            **config.speculative.model_dump(exclude={"deepspeed_config_path"}),
            max_new_tokens=asked.max_new_tokens,
            temperature=asked.temperature if asked.do_sample else 0.0,
            top_p=asked.top_p,
        )

    @property
    def names(self) -> tuple[str, str]:
        """Verifier and draft, for messages and for their files."""
        main, draft = (
            path if isinstance(path, str) else path.name_or_path or type(path).__name__
            for path in (self.main_model_path, self.draft_model_path)
        )
        return main, draft


@dataclass(frozen=True)
class Continued:
    """The new tokens of a prompt, the token that ended it included."""

    token_ids: list[int]
    acceptance: AcceptanceCounts


class Backend(Protocol):
    """Runs two models together."""

    def continue_all(
        self, prompts: Sequence[list[int]], config: SpeculativeConfig
    ) -> list[Continued]:
        """The continuation of each prompt, by the sampling options of the config."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class SpeculativeResult:
    """The continuation of each prompt."""

    texts: list[str]
    """New text alone, without special tokens."""
    token_ids: list[list[int]]
    acceptance: list[AcceptanceCounts]


class TransformersBackend:
    """The reference decoder with an independent draft."""

    def __init__(self, main_model: PreTrainedModel, draft_model: PreTrainedModel):
        self._main_model = main_model.eval()
        self._draft = LanguageModelDraft(draft_model)

    def continue_all(
        self, prompts: Sequence[list[int]], config: SpeculativeConfig
    ) -> list[Continued]:
        device = self._main_model.device
        width = max(map(len, prompts))
        stop_ids = self._main_model.generation_config.eos_token_id
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        generator = None
        if config.seed is not None:
            generator = torch.Generator(device).manual_seed(config.seed)
        sampling: dict[str, Any] = {"do_sample": config.temperature > 0}
        if config.temperature > 0:
            sampling |= {
                "temperature": config.temperature,
                "top_p": config.top_p,
                "top_k": config.top_k or 0,
            }
        output = generate(
            self._draft,
            self._main_model,
            GreedyTokenProposalConfig(
                speculative_tokens=config.max_speculative_tokens,
                accept_tolerance=max(0.0, -math.log(config.acceptance_threshold)),
            ),
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=config.max_new_tokens,
            pad_token_id=0,  # cut off below
            generator=generator,
            return_dict_in_generate=True,
            **sampling,
        )
        assert isinstance(output, SpeculativeOutput)
        assert output.acceptance is not None
        rows = output.sequences[:, width:].tolist()
        return [
            Continued(until_end(row, stop_ids)[: config.max_new_tokens], counts)
            for row, counts in zip(rows, output.acceptance, strict=True)
        ]

    def close(self) -> None:
        """The models are the caller's."""


class SpeculativeInferenceEngine:
    """A verifier and an independent draft model, with a tokenizer.

    As a context manager it gives the memory of vLLM back at its end.

    Raises:
        SpeculatorError: the two models do not share a vocabulary, or vLLM does not start.
    """

    def __init__(
        self,
        main_model: PreTrainedModel | None,
        draft_model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        config: SpeculativeConfig | GlobalConfig | SpeculativeDecodingConfig,
    ):
        """With ``use_vllm`` the models are those that the config names; the objects are ignored."""
        self.config = SpeculativeConfig.of(config)
        self.tokenizer = tokenizer
        self._backend: Backend
        if self.config.use_vllm:
            self._backend = SPECULATION.load("vllm")(self.config)
            return
        if main_model is None or draft_model is None:
            raise ValueError("main_model and draft_model are needed without use_vllm")
        main, draft = self.config.names
        check_shared_vocabulary(draft_model.config, draft, main_model.config, main)
        self._backend = TransformersBackend(main_model, draft_model)

    @classmethod
    def from_config(
        cls, config: SpeculativeConfig | GlobalConfig | SpeculativeDecodingConfig
    ) -> "SpeculativeInferenceEngine":
        """Loads both models, or takes those of the config.

        Raises:
            SpeculatorError: one cannot be read, or their tokenizers differ.
        """
        config = SpeculativeConfig.of(config)
        paths = config.names
        main = read_tokenizer(paths[0])
        if config.use_vllm:
            return cls(None, None, main, config)
        if main.get_vocab() != read_tokenizer(paths[1]).get_vocab():
            raise SpeculatorError(
                f"{paths[1]}: its tokenizer is not that of {paths[0]}. Pass a draft with its "
                "verifier's tokenizer."
            )
        dtype = None if config.dtype == "auto" else as_dtype(config.dtype)
        main_model, draft_model = (
            load_verifier(path, dtype).to(config.device) if isinstance(path, str) else path
            for path in (config.main_model_path, config.draft_model_path)
        )
        return cls(main_model, draft_model, main, config)

    @overload
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
    ) -> SpeculativeResult: ...

    @overload
    def generate(
        self,
        prompts: None = None,
        *,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
    ) -> Int[Tensor, "batch total"]: ...

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        input_ids: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Int[Tensor, "batch seq"] | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
    ) -> SpeculativeResult | Int[Tensor, "batch total"]:
        """Continues texts, or token ids.

        ``prompts``, one or several, give a `SpeculativeResult`. ``input_ids`` give the same ids and
        the new ones, padded on the right; those of unequal length are padded on the left, with
        zeros of ``attention_mask``. ``max_new_tokens`` and ``do_sample`` take precedence over the
        config, whose temperature 0 is greedy.

        Raises:
            ValueError: neither prompts nor ids are given or both are, or ``do_sample`` without a
                temperature.
        """
        config = self._with(max_new_tokens, do_sample)
        if (prompts is None) == (input_ids is None):
            raise ValueError("pass either prompts (texts) or input_ids")
        if input_ids is not None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            given = [ids[own.bool()].tolist() for ids, own in zip(input_ids, mask, strict=True)]
            written = [one.token_ids for one in self._backend.continue_all(given, config)]
            new = input_ids.new_full((len(given), max(map(len, written))), self._pad_id)
            for row, ids in zip(new, written, strict=True):
                row[: len(ids)] = torch.tensor(ids)
            return torch.cat([input_ids, new], dim=1)
        texts = [prompts] if isinstance(prompts, str) else list(prompts or ())
        found = self._backend.continue_all(
            [self.tokenizer(text).input_ids for text in texts], config
        )
        new_ids = [one.token_ids for one in found]
        return SpeculativeResult(
            self.tokenizer.batch_decode(new_ids, skip_special_tokens=True),
            new_ids,
            [one.acceptance for one in found],
        )

    def _with(self, max_new_tokens: int | None, do_sample: bool | None) -> SpeculativeConfig:
        config = self.config
        if do_sample and config.temperature == 0:
            raise ValueError(
                "do_sample with temperature 0; set the config's temperature, such as 0.7"
            )
        changed: dict[str, Any] = {}
        if max_new_tokens is not None:
            changed["max_new_tokens"] = max_new_tokens
        if do_sample is False:
            changed["temperature"] = 0.0
        return SpeculativeConfig(**dict(config) | changed) if changed else config

    @property
    def _pad_id(self) -> int:
        tokenizer = self.tokenizer
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return next(one for one in ids if one is not None)

    def close(self) -> None:
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
