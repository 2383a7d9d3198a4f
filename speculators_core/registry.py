"""Names to classes, those of other packages too."""

import difflib
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from speculators_core.errors import SpeculatorError


class Registry:
    """Looks up a name in a table, then among the entry points of a group; loads on first use."""

    def __init__(self, kind: str, group: str, table: Mapping[str, str] | None = None):
        self.kind = kind
        self.group = group
        self._table = {
            name: EntryPoint(name=name, value=value, group=group)
            for name, value in (table or {}).items()
        }
        self._found: dict[str, EntryPoint] | None = None
        self._added: dict[str, Any] = {}

    def add(self, name: str, value: Any) -> None:
        """Knows an object by this name in this process; a package has an entry point instead.

        A later object of the name replaces an earlier one, as when a notebook's cell runs again.

        Raises:
            SpeculatorError: the name is built in, or an installed package has it.
        """
        if name in self._known:
            raise SpeculatorError(
                f"{self.kind} {name!r} is {self.path(name)}. Register under another name."
            )
        self._added[name] = value

    @property
    def added(self) -> dict[str, Any]:
        """What this process added, by name."""
        return dict(self._added)

    @property
    def _known(self) -> dict[str, EntryPoint]:
        if self._found is None:
            self._found = {point.name: point for point in entry_points(group=self.group)}
        return self._found | self._table

    def names(self) -> list[str]:
        return sorted(self._known.keys() | self._added.keys())

    def reload(self) -> None:
        """Looks again for packages that were installed since the last look."""
        self._found = None

    def path(self, name: str) -> str:
        """``module:object`` of that name."""
        if name in self._added:
            return f"{self._added[name].__module__}:{self._added[name].__qualname__}"
        return self._known[name].value

    def load(self, name: object) -> Any:
        """The object of that name.

        Raises:
            SpeculatorError: the name is unknown, or its package cannot be imported.
        """
        if isinstance(name, str) and name in self._added:
            return self._added[name]
        point = self._known.get(name) if isinstance(name, str) else None
        if point is None:
            raise SpeculatorError(
                f"unknown {self.kind} {name!r}; known: {', '.join(self.names()) or 'none'}."
                f"{did_you_mean(str(name), self.names())}"
            )
        try:
            return point.load()
        except ImportError as error:
            raise SpeculatorError(
                f"{self.kind} {name!r} ({point.value}) could not be imported: {error}"
            ) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` if a known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f" Did you mean {close[0]!r}?" if close else ""


MODELS = Registry(
    "speculators_model_type",
    "speculators.models",
    {
        "eagle3": "speculators_core.models.eagle3:Eagle3DraftModel",
        "peagle": "speculators_core.models.peagle:PEagleDraftModel",
        "dflash": "speculators_core.models.dflash:DFlashDraftModel",
        "mtp": "speculators_core.models.mtp:MTPDraftModel",
    },
)
CONFIGS = Registry("speculators_model_type", "speculators.configs")
"""Config classes that a process registers without their model."""
PROPOSALS = Registry(
    "proposal_type",
    "speculators.proposals",
    {
        "greedy": "speculators_core.format.proposals:GreedyTokenProposalConfig",
        "sampling": "speculators_core.format.proposals:SamplingTokenProposalConfig",
    },
)
ENGINES = Registry(
    "engine",
    "speculators.engines",
    {"transformers": "speculators_core.data_generation.engines.transformers:TransformersPipeline"},
)
ANSWERERS = Registry(
    "engine",
    "speculators.answerers",
    {
        "openai": "speculators_core.data_generation.answers.openai_endpoint:OpenAIEndpoint",
        "transformers": "speculators_core.data_generation.answers.local_model:LocalModel",
    },
)
SPECULATION = Registry(
    "engine",
    "speculators.speculation",
    {"vllm": "speculators_vllm.generation.speculation:VLLMSpeculation"},
)
"""Engines that decode with a verifier and a draft, beside Transformers."""
COMMANDS = Registry("command", "speculators.commands")
