"""Model-card facts beyond the speculator's folder."""

from pathlib import Path

import yaml
from pydantic import Field

from speculators_core.data_generation.answers.answer_file import beside
from speculators_core.data_generation.lengths import Lengths
from speculators_core.data_generation.settings import DatasetConfig
from speculators_core.data_generation.stores.disk import MANIFEST, DiskStore
from speculators_core.data_generation.stores.inspection import summarize
from speculators_core.decoding.acceptance import reached_and_kept
from speculators_core.errors import SpeculatorError
from speculators_core.settings import Settings, load_yaml


class DataFacts(Settings):
    """The data that the draft was trained on."""

    datasets: tuple[DatasetConfig, ...] = Field(min_length=1)
    num_examples: int | None = Field(None, ge=0)
    num_tokens: int | None = Field(None, ge=0)
    """Tokens of all examples, prompts included."""
    num_trained: int | None = Field(None, ge=0)
    """Tokens that the draft was trained to propose."""
    answers_are_own: bool | None = None
    """Whether the verifier wrote the answers; None where that was not recorded."""

    @classmethod
    def of_store(cls, folder: Path) -> "DataFacts":
        """The facts that a store records.

        Raises:
            SpeculatorError: there is no store, a shard is damaged, or its data sets are not
                recorded.
        """
        made_from = DiskStore.open(folder).manifest.made_from.get("data")
        entries = made_from.get("datasets") if isinstance(made_from, dict) else None
        if not isinstance(entries, list) or not entries:
            raise SpeculatorError(
                f"{folder / MANIFEST} states no data sets in made_from.data.datasets; expected "
                "those of the run that wrote it. Use a store of `speculators generate-data`."
            )
        where = f"{folder / MANIFEST}: data.datasets"
        datasets = tuple(DatasetConfig.read(entry, where) for entry in entries)
        found = summarize(folder)
        wrote_all = 0 < found.num_trained <= found.num_written
        were_regenerated = all(_was_regenerated(dataset, found.verifier) for dataset in datasets)
        return cls(
            datasets=datasets,
            num_examples=found.num_examples,
            num_tokens=found.num_tokens,
            num_trained=found.num_trained,
            answers_are_own=wrote_all or were_regenerated,
        )


def _was_regenerated(dataset: DatasetConfig, verifier: str) -> bool:
    """Whether ``speculators regenerate`` wrote the file, with this verifier."""
    try:
        stated = load_yaml(beside(Path(dataset.path), "yaml").read_text(encoding="utf-8"))
        return bool(stated["options"]["answers"]["verifier"] == verifier)
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return False


class TrainingFacts(Settings):
    """How the draft was trained."""

    num_steps: int = Field(ge=0)
    best_step: int | None = Field(None, ge=0)
    """Step whose weights the draft has; the last one where None."""
    num_tokens: int = Field(ge=0)
    """Tokens trained on up to these weights, counted once per pass, without padding."""
    optimizer: str
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    row_length: int = Field(ge=1)
    """Tokens per packed row; longer examples are truncated to it."""
    lengths: Lengths | None = None
    """Lengths of the examples that were trained on, before truncation."""
    schedule: str | None = None
    """Schedule of the learning rate."""
    started_from: str | None = None
    """Speculator whose training was continued; None for a fresh draft."""
    chosen: tuple[str, ...] = ()
    """Sizes and tokens of the draft that neither its recipe nor its verifier states."""
    seconds: float | None = Field(None, ge=0)
    hardware: str | None = None

    @property
    def learnt(self) -> "LearntLengths | None":
        """Lengths of the examples as the draft saw them; None where they are not known."""
        if self.lengths is None:
            return None
        longest = min(self.lengths.longest, self.row_length)
        return LearntLengths(longest=longest, mean=min(round(self.lengths.mean), longest))


class LearntLengths(Settings):
    """Lengths of the examples that a draft was trained on, in tokens."""

    longest: int = Field(ge=1)
    """Longest example, after truncation to a row."""
    mean: int = Field(ge=0)
    """Mean over the examples."""

    def __str__(self) -> str:
        return f"at most {self.longest:,} tokens ({self.mean:,} on average)"


class CategoryAcceptance(Settings):
    """Acceptance over the prompts of one category."""

    category: str
    acceptance_length: float = Field(ge=1)
    """Tokens emitted per verifier step, the bonus token included."""
    num_prompts: int = Field(ge=1)


class ContextAcceptance(Settings):
    """Acceptance of the drafts in one range of context lengths."""

    context: str
    """Tokens before the draft, a name in `CONTEXT_BUCKETS`."""
    num_drafts: int = Field(ge=1)
    accepted_per_position: tuple[int, ...]
    """Drafts whose positions 1 to k were all kept, for each k."""

    @property
    def acceptance_length(self) -> float:
        return 1.0 + sum(self.accepted_per_position) / self.num_drafts

    @property
    def reached_and_kept(self) -> list[tuple[int, int]]:
        """For each position, the drafts that reached it and those kept there."""
        return reached_and_kept(self.num_drafts, self.accepted_per_position)


class Measurement(Settings):
    """Acceptance by category, with the command that repeats the measurement."""

    rows: tuple[CategoryAcceptance, ...] = Field(min_length=1)
    contexts: tuple[ContextAcceptance, ...] = ()
    """Figures by context length; empty where that was not counted."""
    longest_context: int | None = Field(None, ge=0)
    """Tokens of the longest prompt with its output."""
    command: str = Field(min_length=1)
    """The exact command."""
    versions: dict[str, str]
    """Packages and hardware (`provenance.environment`)."""
    speculative_tokens: int = Field(ge=1)
    """Tokens per proposal (K)."""
    temperature: float = Field(0.0, ge=0)


class CardFacts(Settings):
    """All facts of a card, which reports absent ones as unknown."""

    license: str | None = None
    """Licence by the hub's name: `apache-2.0`."""
    languages: tuple[str, ...] = ()
    """Languages of the data: ISO 639 codes, and `code` for programs."""
    data: DataFacts | None = None
    training: TrainingFacts | None = None
    measured: Measurement | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of the packages that trained it (`provenance.versions`)."""
