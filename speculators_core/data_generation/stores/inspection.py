"""Contents of a store, for people to read."""

from collections import Counter
from pathlib import Path

from rich.table import Table
from rich.text import Text

from speculators_core.console import console
from speculators_core.data_generation.lengths import Lengths
from speculators_core.data_generation.stores.disk import DiskStore
from speculators_core.errors import SpeculatorError
from speculators_core.settings import Settings
from speculators_core.verifier.reading import read_tokenizer


class StoreSummary(Settings):
    """The numbers of a store."""

    folder: str
    verifier: str
    is_complete: bool
    """Whether the run that wrote it has ended."""
    num_examples: int
    num_tokens: int
    num_trained: int
    num_written: int
    """Tokens that the verifier wrote."""
    lengths: Lengths
    num_shards: int
    size_bytes: int
    token_bytes: int
    layer_ids: list[int]
    fields: dict[str, str]
    """Types and shapes of a token's tensors."""
    set_aside: dict[str, str]
    damaged: dict[str, str]


def summarize(folder: Path, verify: bool = False) -> StoreSummary:
    """The numbers of a store; with ``verify`` every byte is read.

    Raises:
        SpeculatorError: there is no store, or without ``verify`` a shard is damaged.
    """
    store = DiskStore.open(folder)
    damaged = store.find_damage() if verify else {}
    totals: Counter[str] = Counter()
    lengths = Lengths()
    set_aside: dict[str, str] = {}
    for _, header in store.headers(leave_out=damaged):
        set_aside |= {aside.key: aside.reason for aside in header.set_aside}
        lengths += Lengths.of(entry.num_tokens for entry in header.entries)
        for entry in header.entries:
            totals["examples"] += 1
            totals["tokens"] += entry.num_tokens
            totals["prompt"] += entry.num_prompt_tokens
            totals["trained"] += entry.num_trained
    return StoreSummary(
        folder=str(folder),
        verifier=store.schema.verifier,
        is_complete=store.is_complete,
        num_examples=totals["examples"],
        num_tokens=totals["tokens"],
        num_trained=totals["trained"],
        num_written=totals["tokens"] - totals["prompt"],
        lengths=lengths,
        num_shards=len(store.shard_paths()),
        size_bytes=store.size_bytes,
        token_bytes=store.schema.token_bytes,
        layer_ids=list(store.schema.layer_ids),
        fields={
            name: f"{str(spec.dtype).removeprefix('torch.')} {list(spec.tail)}"
            for name, spec in store.schema.fields.items()
        },
        set_aside=set_aside,
        damaged={path.name: what for path, what in damaged.items()},
    )


def print_summary(summary: StoreSummary) -> None:
    """The numbers as a table, then what is set aside or damaged."""
    table = Table(title=Text(summary.folder), show_header=False)
    trained, lengths = summary.num_trained / max(summary.num_tokens, 1), summary.lengths
    lines: dict[str, object] = {
        "verifier": summary.verifier,
        "complete": "yes" if summary.is_complete else "no; resume with --run.resume",
        "examples": summary.num_examples,
        "tokens": summary.num_tokens,
        "length of examples": f"mean {lengths.mean:.0f}, longest {lengths.longest}; "
        f"{lengths.describe_longer()}",
        "tokens to learn": f"{summary.num_trained} ({trained:.1%})",
        "tokens the verifier wrote": summary.num_written,
        "layers": " ".join(map(str, summary.layer_ids)),
        "shards": summary.num_shards,
        "bytes": f"{summary.size_bytes} ({summary.token_bytes} a token)",
        **{f"field {name}": kind for name, kind in summary.fields.items()},
        "set aside": len(summary.set_aside),
    }
    for name, value in lines.items():
        table.add_row(name, Text(str(value)))
    console.print(table)
    for key, reason in list(summary.set_aside.items())[:10]:
        console.print(f"set aside {key}: {reason}", highlight=False, markup=False)
    for what in summary.damaged.values():
        console.print(what, style="red", highlight=False, markup=False)


def print_example(folder: Path, number: int, max_shown_tokens: int) -> None:
    """An example as text, with the tokens to train on in green.

    Raises:
        SpeculatorError: the store has no example of that number.
    """
    store = DiskStore.open(folder)
    if number >= len(store):
        raise SpeculatorError(
            f"--example is {number}; expected 0 to {len(store) - 1}, the examples of {folder}. "
            "Choose one of them."
        )
    example = store[number]
    try:
        tokenizer = read_tokenizer(store.schema.verifier)
    except SpeculatorError:
        tokenizer = None  # the store may have been moved without its verifier
    console.print(
        f"example {number}, key {example.key}: {len(example.input_ids)} tokens; "
        "those in green are trained on",
        highlight=False,
        markup=False,
    )
    ids = example.input_ids[:max_shown_tokens].tolist()
    mask = example.loss_mask[:max_shown_tokens].tolist()
    text = Text()
    for piece, is_trained in _stretches(ids, mask):
        shown = tokenizer.decode(piece) if tokenizer is not None else f"{piece} "
        text.append(shown, style="green" if is_trained else "dim")
    if len(example.input_ids) > len(ids):
        text.append(f" ... {len(example.input_ids) - len(ids)} more tokens", style="italic")
    console.print(text)


def _stretches(ids: list[int], mask: list[bool]) -> list[tuple[list[int], bool]]:
    """Tokens in stretches of one kind: [5 6 7], [0 1 1] -> ([5], False) ([6 7], True)."""
    stretches: list[tuple[list[int], bool]] = []
    for token, is_trained in zip(ids, mask, strict=True):
        if stretches and stretches[-1][1] == is_trained:
            stretches[-1][0].append(token)
        else:
            stretches.append(([token], is_trained))
    return stretches
