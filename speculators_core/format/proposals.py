"""Proposal methods: how a speculator proposes its tokens."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, model_validator

from speculators_core.errors import UnreadFormatError
from speculators_core.registry import PROPOSALS


class ReloadableBaseModel(BaseModel):
    """A model whose schema can be made again once the registry of proposals has grown."""

    @classmethod
    def reload_schema(cls) -> None:
        """Finds proposals of packages that were installed since the last look."""
        PROPOSALS.reload()
        cls.model_rebuild(force=True)


class TokenProposalConfig(ReloadableBaseModel):
    """A proposal method; ``proposal_type`` picks the class when one is read."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    proposal_type: str
    speculative_tokens: int = Field(5, ge=1)
    """Tokens that the speculator proposes in one step (K)."""

    @classmethod
    def register(cls, name: str) -> Callable[[type[Self]], type[Self]]:
        """Decorator: makes a class of this process known by its ``proposal_type``.

        A package has an entry point in the group ``speculators.proposals`` instead.

        Raises:
            SpeculatorError: the name is taken.
        """

        def add(found: type[Self]) -> type[Self]:
            PROPOSALS.add(name, found)
            return found

        return add

    @property
    def lossy_options(self) -> dict[str, int | float]:
        """Options that are on and let the output differ from what the verifier alone would give."""
        return {}

    @model_validator(mode="wrap")
    @classmethod
    def _pick_class(
        cls, data: Any, handler: ModelWrapValidatorHandler["TokenProposalConfig"]
    ) -> "TokenProposalConfig":
        if cls is TokenProposalConfig and isinstance(data, dict):
            kind = data.get("proposal_type")
            if isinstance(kind, str) and kind not in PROPOSALS.names():
                raise UnreadFormatError(
                    f"unknown proposal_type {kind!r}; known: {', '.join(PROPOSALS.names())}."
                )
            return PROPOSALS.load(kind).model_validate(data)
        return handler(data)


class GreedyTokenProposalConfig(TokenProposalConfig):
    """The speculator proposes its most probable token at each position."""

    proposal_type: Literal["greedy"] = "greedy"
    verifier_accept_k: int = Field(1, ge=1)
    """A token is kept when it is among the verifier's k best. Above 1 the output is lossy."""
    accept_tolerance: float = Field(0.0, ge=0.0)
    """A token is kept within this distance of the verifier's best logit. Above 0 is lossy."""

    @property
    def lossy_options(self) -> dict[str, int | float]:
        options: dict[str, int | float] = {}
        if self.verifier_accept_k > 1:
            options["verifier_accept_k"] = self.verifier_accept_k
        if self.accept_tolerance > 0.0:
            options["accept_tolerance"] = self.accept_tolerance
        return options


class SamplingTokenProposalConfig(TokenProposalConfig):
    """The speculator draws its tokens from its own distribution."""

    proposal_type: Literal["sampling"] = "sampling"
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
