"""The model card of a speculator.

It is the folder's ``README.md``, which the hub reads as people do. What is unknown when a card is
written is a placeholder in it, which is filled in when the folder is uploaded to the hub
(`complete`). The last line is a hash of the text above it: a card that somebody has edited is never
overwritten.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import ModelCard, ModelCardData
from pydantic import ValidationError

from speculators_core.data_generation.settings import DatasetConfig
from speculators_core.decoding.acceptance import worst_cell
from speculators_core.errors import SpeculatorError, first_line
from speculators_core.files import write_text
from speculators_core.format import checkpoint
from speculators_core.format.checkpoint import is_hub_id
from speculators_core.format.config import SpeculatorModelConfig
from speculators_core.publishing.card_facts import (
    CardFacts,
    DataFacts,
    LearntLengths,
    Measurement,
    TrainingFacts,
)

CARD = "README.md"
LEARNT = "trained_lengths"
"""Key of the front matter with the lengths of the examples that the draft was trained on."""
REPOSITORY = "<this repository>"
"""Placeholder for the hub id of a speculator that is not on the hub yet."""

VERIFIER = "<verifier>"
"""Placeholder for a verifier without a hub id: a card names no folder of a machine."""

UNKNOWN_LICENSE = "Unknown: none is stated. Ask the publisher before you use this speculator."

SEAL = "<!-- written by speculators-vllm, sha256 "
DATA_FILES = (".jsonl", ".json", ".parquet", ".csv", ".arrow", ".txt")


class Algorithm(NamedTuple):
    """An algorithm for a reader who does not know it."""

    title: str
    paper: str
    idea: str
    stock: dict[str, str | bool] | None
    """Speculative config for vLLM without the plug-in; None if it cannot serve the algorithm."""


ALGORITHMS = {
    "eagle3": Algorithm(
        "EAGLE-3",
        "2503.01840",
        "it reads states from between the verifier's layers and drafts one token at a time",
        {"method": "eagle3"},
    ),
    "peagle": Algorithm(
        "P-EAGLE",
        "2602.01469",
        "it has the network of EAGLE-3 and drafts all its tokens in one pass",
        {"method": "eagle3", "parallel_drafting": True},
    ),
    "dflash": Algorithm(
        "DFlash",
        "2602.06036",
        "it reads states from between the verifier's layers and fills a block of masks in one pass",
        {"method": "dflash"},
    ),
    "mtp": Algorithm(
        "MTP (FastMTP)",
        "2509.18362",
        "it is one more layer of the same kind as the verifier's and drafts one token at a time",
        None,
    ),
}


def write_card(folder: Path, facts: CardFacts) -> bool:
    """Writes the card of the speculator in a folder, unless somebody wrote or edited it.

    Returns whether it was written.

    Raises:
        SpeculatorError: the folder holds no speculator.
    """
    if (folder / CARD).exists() and not is_ours(read_text(folder / CARD)):
        return False
    text = make_card(folder, facts)
    write_text(folder / CARD, text)
    return True


def make_card(folder: Path, facts: CardFacts) -> str:
    """The card's text.

    Raises:
        SpeculatorError: the folder holds no speculator.
    """
    if not folder.is_dir():  # it would be mistaken for a hub id
        raise SpeculatorError(
            f"{folder}: no such folder; expected one that holds a speculator. Correct the path."
        )
    config = SpeculatorModelConfig.from_pretrained(folder)
    tensors = checkpoint.stored_tensors(folder).values()
    name = config.verifier.name_or_path
    public = name if name is not None and is_hub_id(name, folder) else None
    sources = facts.data.datasets if facts.data else ()
    learnt = facts.training.learnt if facts.training else None
    data = ModelCardData(
        base_model=public,
        # The hub has four relations; like an adapter, a draft is useless without its base.
        base_model_relation="adapter" if public else None,
        datasets=list(dict.fromkeys(d.path for d in sources if _is_on_hub(d))) or None,
        language=list(facts.languages) or None,
        library_name="speculators",
        license=facts.license,
        pipeline_tag="text-generation",
        tags=["speculative-decoding", "speculators", config.speculators_model_type, "vllm"],
    )
    if learnt is not None:
        data[LEARNT] = learnt.model_dump()
    verifier = public or VERIFIER
    sections = (
        _what_it_is(config, verifier, sum(math.prod(tensor.shape) for tensor in tensors)),
        _acceptance(facts.measured, verifier),
        _use(config, verifier),
        _data(facts.data),
        _training(facts.training),
        _limits(facts, config, verifier),
        f"## Licence\n\n{_license_line(facts.license)}",
        f"## Versions\n\n{_pairs(facts.versions) or 'Not recorded'}.",
    )
    return _sealed(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n\n")


def complete(text: str, repository: str, verifier: str, license: str | None = None) -> str:
    """A card with its placeholders filled in; one without placeholders is returned unchanged.

    ``license`` is used where the card states none.

    Raises:
        SpeculatorError: the card's front matter cannot be read.
    """
    card = parse(text)
    body, data = card.text.replace(REPOSITORY, repository), card.data
    if VERIFIER in body:
        body = body.replace(VERIFIER, verifier)
        if data.get("base_model") is None:
            data["base_model"], data["base_model_relation"] = verifier, "adapter"
    if license is not None and license_of(card) is None:
        data["license"], body = license, body.replace(UNKNOWN_LICENSE, _license_line(license))
    elif body == card.text:
        return text
    completed = f"---\n{data.to_yaml()}\n---\n{_without_seal(body) if is_ours(text) else body}"
    return _sealed(completed) if is_ours(text) else completed


def parse(text: str, where: str | Path = CARD) -> ModelCard:
    """A card's front matter (`.data`) and body (`.text`).

    Raises:
        SpeculatorError: the front matter is not valid YAML, or the hub would refuse it.
    """
    try:
        return ModelCard(text)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        cause = " ".join(str(error).split())
        raise SpeculatorError(
            f"{where}: its front matter cannot be read: {cause}; expected YAML between two lines "
            "of `---`. Correct it."
        ) from error


def read_text(path: Path) -> str:
    """Raises:
    SpeculatorError: it cannot be read, or is not text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SpeculatorError(
            f"{path} cannot be read: {first_line(error)}; expected UTF-8 text. Correct the file."
        ) from error


def learnt_lengths(folder: Path) -> LearntLengths | None:
    """The lengths of examples that the card in a speculator's folder states; None without them."""
    if not (folder / CARD).is_file():
        return None
    try:
        return LearntLengths.model_validate(parse(read_text(folder / CARD)).data.get(LEARNT))
    except (SpeculatorError, ValidationError):  # another writer's card, or an edited one
        return None


def license_of(card: ModelCard) -> str | None:
    """The licence that a card's front matter states."""
    named = card.data.get("license")
    return None if named in (None, "", "unknown") else str(named)


def is_ours(text: str) -> bool:
    """Whether a card was written here and has not been edited since."""
    content = _without_seal(text)
    return content != text and text == _sealed(content)


# ---- sections ----


def _what_it_is(config: SpeculatorModelConfig, verifier: str, num_parameters: int) -> str:
    known = ALGORITHMS.get(config.speculators_model_type)
    title, about = config.speculators_model_type, ""
    if known is not None:
        title = known.title
        about = f" ([arXiv:{known.paper}](https://arxiv.org/abs/{known.paper})): {known.idea}"
    lossy = ""
    if config.proposal.lossy_options:
        lossy = " Its default proposal method is lossy: tokens that differ are accepted too."
    vocabulary, layer_ids = config.vocabulary, config.stated_layer_ids
    sizes = f"{vocabulary.size:,} of the verifier's {vocabulary.verifier_size:,}"
    architectures = ", ".join(config.verifier.architectures)
    dtype = str(checkpoint.as_dtype(config.dtype)).removeprefix("torch.")
    facts = _bullets(
        f"Algorithm: {title}{about}",
        f"Verifier: `{verifier}`" + (f" ({architectures})" if architectures else ""),
        f"Tokens per proposal: {config.proposal.speculative_tokens}",
        f"Parameters: {num_parameters:,}, stored as {dtype}",
        None if vocabulary.is_whole else f"Vocabulary: {sizes} tokens",
        f"Layers of the verifier that it reads: {' '.join(map(str, layer_ids))}"
        if layer_ids
        else None,
    )
    return (
        f"# {title} speculator for {verifier}\n\n"
        "A speculator is a small draft model for speculative decoding: it proposes several tokens, "
        "and the verifier, the model whose output is wanted, checks them in one pass. The output "
        f"is the verifier's, and takes less time.{lossy}\n\n{facts}"
    )


def _acceptance(measured: Measurement | None, verifier: str) -> str:
    title = "## Acceptance length\n\n"
    if measured is None:
        command = f"python -m benchmarks.acceptance --model {REPOSITORY} --verifier {verifier}"
        return f"{title}Not measured; `{command}` measures it."
    rows = [
        (row.category.replace("|", r"\|"), f"{row.acceptance_length:.2f}", str(row.num_prompts))
        for row in measured.rows
    ]
    drawn = f"at temperature {measured.temperature:g}" if measured.temperature else "greedy"
    return (
        f"{title}{_worst(measured)}Tokens emitted per verifier step, the bonus token included; "
        f"{measured.speculative_tokens} tokens per proposal, {drawn}.\n\n"
        f"{_table(('category', 'acceptance length', 'prompts'), rows)}\n\n"
        f"{_by_context(measured)}"
        f"Measured by\n\n{_code(measured.command)}\n\nwith {_pairs(measured.versions)}."
    )


def _worst(measured: Measurement) -> str:
    cell = worst_cell({part.context: part.reached_and_kept for part in measured.contexts})
    return f"Worst at {cell}.\n\n" if cell else ""


def _by_context(measured: Measurement) -> str:
    if not measured.contexts:
        return ""
    rows = []
    for part in measured.contexts:
        rates = [kept / reached for reached, kept in part.reached_and_kept if reached]
        conditional = " ".join(f"{rate:.2f}" for rate in rates)
        rows.append(
            (part.context, f"{part.acceptance_length:.2f}", f"{part.num_drafts:,}", conditional)
        )
    columns = ("tokens before the draft", "acceptance length", "drafts", "kept by position")
    return (
        f"{_table(columns, rows)}\n\nA rate by position is over the drafts whose earlier tokens "
        "were all kept.\n\n"
    )


def _use(config: SpeculatorModelConfig, verifier: str) -> str:
    known = ALGORITHMS.get(config.speculators_model_type)
    if known is None or known.stock is None:
        stock = "vLLM without the plug-in does not serve this algorithm."
    else:
        num_tokens = config.proposal.speculative_tokens
        settings = {**known.stock, "num_speculative_tokens": num_tokens}
        stock = f"vLLM without the plug-in:\n\n{_serve(verifier, settings)}"
    load = (
        "from speculators_core import SpeculatorModel\n\n"
        f'name, verifier = "{REPOSITORY}", "{verifier}"\n'
        "speculator = SpeculatorModel.from_pretrained(name, verifier=verifier)\n"
        "output = speculator.generate(input_ids, max_new_tokens=64)"
    )
    return (
        "## Use\n\nvLLM with the plug-in `speculators-vllm`, which reads all other settings from "
        f"the checkpoint:\n\n{_serve(verifier, {})}\n\n{stock}\n\n"
        f"Transformers:\n\n{_code(load, 'python')}"
    )


def _serve(verifier: str, settings: Mapping[str, str | bool | int]) -> str:
    config = json.dumps({"model": REPOSITORY, **settings})
    return _code(f"vllm serve {verifier} --speculative-config '{config}'")


def _data(data: DataFacts | None) -> str:
    if data is None:
        return "## Data\n\nNot recorded."
    answers = {
        True: "The verifier wrote the answers.",
        False: "The answers come from the data; there is no record that the verifier wrote them.",
        None: "Whether the verifier wrote the answers is not recorded.",
    }
    counts = {"examples": data.num_examples, "tokens": data.num_tokens}
    counts["of them trained on"] = data.num_trained
    counted = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count is not None)
    return (
        f"## Data\n\n{_bullets(*map(_dataset, data.datasets))}\n\n"
        f"{counted}{'. ' if counted else ''}{answers[data.answers_are_own]}"
    )


def _training(run: TrainingFacts | None) -> str:
    if run is None:
        return "## Training\n\nNot recorded."
    schedule = f", {run.schedule} schedule" if run.schedule else ""
    best = "" if run.best_step is None else f"; the weights are those of step {run.best_step:,}"
    return "## Training\n\n" + _bullets(
        f"Continued from: `{_public_name(run.started_from)}`" if run.started_from else None,
        f"Steps: {run.num_steps:,}{best}",
        f"Tokens: {run.num_tokens:,} without padding, packed in rows of {run.row_length:,}",
        _lengths(run),
        f"Optimizer: {run.optimizer}, learning rate {run.learning_rate:g}{schedule}",
        f"Time: {run.seconds / 3600:.2f} hours" if run.seconds is not None else None,
        f"Hardware: {run.hardware}" if run.hardware else None,
        f"Chosen, since the verifier does not state it: {', '.join(run.chosen)}"
        if run.chosen
        else None,
    )


def _lengths(run: TrainingFacts) -> str | None:
    if run.lengths is None:
        return None
    is_cut = run.lengths.longest > run.row_length
    cut = f", cut to {run.row_length:,}" if is_cut else ""
    return (
        f"Length of examples: {run.lengths.mean:,.0f} tokens on average, at most "
        f"{run.lengths.longest:,}{cut}; {run.lengths.describe_longer()}"
    )


def _limits(facts: CardFacts, config: SpeculatorModelConfig, verifier: str) -> str:
    run, measured = facts.training, facts.measured
    languages = ", ".join(facts.languages)
    return "## Limits\n\n" + _bullets(
        f"It was made for `{verifier}`. With other weights, such as those of a fine-tune, fewer of "
        "its tokens are accepted; with a model of another shape it does not run.",
        _reach(run.learnt if run else None, config, measured),
        (f"Languages of the data: {languages}." if languages else "Languages are not recorded.")
        + " In other languages and domains fewer of its tokens are accepted.",
        "The acceptance lengths above are greedy; they are shorter when tokens are sampled."
        if measured and not measured.temperature
        else None,
        "The speed-up depends on hardware, batch size, engine and prompts.",
        "Errors and biases of the answers are the verifier's.",
    )


def _reach(
    learnt: LearntLengths | None, config: SpeculatorModelConfig, measured: Measurement | None
) -> str:
    """How far its training reaches, and where it can be used beyond, or was."""
    if learnt is None:
        return "The length of the examples that it was trained on is not recorded."
    allowed = getattr(config.transformer_layer_config, "max_position_embeddings", 0)
    used = measured.longest_context or 0 if measured else 0
    beyond = [
        f"its config allows texts of up to {allowed:,}" if allowed > learnt.longest else "",
        f"it was measured in texts of up to {used:,}" if used > learnt.longest else "",
    ]
    told = " and ".join(filter(None, beyond))
    return (
        f"It was trained on examples of {learnt}. In longer texts fewer of its tokens may be "
        f"accepted: measure it at the lengths that you serve."
        + (f" {told[0].upper()}{told[1:]}." if told else "")
    )


def _license_line(license: str | None) -> str:
    if license is None:
        return UNKNOWN_LICENSE
    return f"`{license}`, for these weights. The verifier and the data have their own licences."


# ---- pieces ----


def _sealed(content: str) -> str:
    return f"{content}{SEAL}{hashlib.sha256(content.encode()).hexdigest()} -->\n"


def _without_seal(text: str) -> str:
    head, found, last = text.rpartition(SEAL)
    return head if found and last.count("\n") <= 1 else text


def _is_on_hub(dataset: DatasetConfig) -> bool:
    is_file = Path(dataset.path).suffix in DATA_FILES
    return "/" in dataset.path and not is_file and is_hub_id(dataset.path)


def _dataset(dataset: DatasetConfig) -> str:
    """A line on a data set; a local one is named without its folders, which are private."""
    url = f"https://huggingface.co/datasets/{dataset.path}"
    is_public = _is_on_hub(dataset)
    parts = (
        f"[{dataset.path}]({url})" if is_public else f"`{Path(dataset.path).name}` (local data)",
        f"configuration `{dataset.name}`" if dataset.name else "",
        f"split `{dataset.split}`" if is_public else "",
        f"at most {dataset.limit:,} rows" if dataset.limit else "",
    )
    return ", ".join(part for part in parts if part)


def _public_name(name: str) -> str:
    """A hub id, or the name of a folder without the path to it."""
    return name if is_hub_id(name) else Path(name).name


def _bullets(*lines: str | None) -> str:
    return "\n".join(f"- {line}" for line in lines if line)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _code(text: str, language: str = "") -> str:
    return f"```{language}\n{text}\n```"


def _pairs(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in versions.items())
