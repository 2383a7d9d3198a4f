"""A verifier's answers in place of a data set's."""

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

from pydantic import JsonValue
from pydantic.main import IncEx

from speculators_core.console import console
from speculators_core.data_generation.answers.answer_file import AnswerFile, beside
from speculators_core.data_generation.answers.answerer import Answerer
from speculators_core.data_generation.answers.dialogues import Dialogue, Tally
from speculators_core.data_generation.answers.settings import RegenerateConfig
from speculators_core.data_generation.reasons import count_reasons, describe_reasons
from speculators_core.data_generation.runs.progress import metered
from speculators_core.data_generation.settings import (
    DataGenConfig,
    DatasetConfig,
    StatesConfig,
)
from speculators_core.data_generation.texts.rows import Row, RowKind, RowParts
from speculators_core.data_generation.texts.sources import FIRST_ROWS, Source, open_sources, rows_of
from speculators_core.data_generation.texts.spans import SkipReason
from speculators_core.errors import SpeculatorError
from speculators_core.files import Roots, in_full
from speculators_core.registry import ANSWERERS
from speculators_core.settings import Settings
from speculators_core.texts.messages import (
    MalformedRow,
    Message,
    Tool,
    read_messages,
    read_template_options,
    read_tools,
)

RUN_ALONE: Mapping[str, IncEx | bool] = {
    "answers": {
        "endpoint": {"base_url", "concurrency", "retries", "timeout_s"},
        "offline": {"batch_size", "verbose"},
    },
    "output": True,
    "resume": True,
    "max_failures": True,
    "allowed_roots": True,
}
"""Options that do not decide an answer."""


class RegenerateReport(Settings):
    """Totals of a run."""

    num_conversations: int
    """Conversations that were kept."""
    num_answers: int
    num_tokens: int
    num_of_earlier_runs: int
    """Conversations that earlier runs had kept or set aside."""
    seconds: float
    num_in_output: int
    """Conversations in the output, those of earlier runs included."""
    set_aside: dict[str, int]
    """Conversations that the output lacks, by reason, those of earlier runs included."""


def regenerate(data: DatasetConfig, settings: RegenerateConfig) -> RegenerateReport:
    """Has the verifier answer the conversations of a data set, in their order.

    Nothing heavy starts before options, data and output have been checked, or if nothing is left to
    answer.

    Raises:
        SpeculatorError: options, data, output or verifier are at fault, the server is gone, or more
            conversations than ``max_failures`` could not be answered.
    """
    roots = Roots(settings.allowed_roots or (Path.cwd(),), "--allowed-roots")
    path = in_full(settings.output)
    make_answerer: type[Answerer] = ANSWERERS.load(settings.answers.engine_name)
    source = _open(data, settings, roots)
    options, as_tokens = _options(data, settings), settings.answers.token_ids
    with AnswerFile(path, *options, settings.resume, as_tokens) as file:
        meter = AnswerMeter(source.num_rows, len(file.done))
        dialogues = _dialogues(source, file.done, settings, meter.tally)
        try:
            with metered(meter, beside(path, "log"), "regenerate") as show:
                first = next(dialogues, None)
                if first is None:  # an engine would load for nothing
                    return _report(meter, file)
                with closing(make_answerer(settings.answers)) as answerer:
                    for dialogue in answerer.answer(itertools.chain([first], dialogues)):
                        if as_tokens and dialogue.fault is None and not dialogue.token_rows:
                            dialogue.fail("the engine reports no token ids")
                        file.keep(dialogue)
                        show(dialogue)
                        _check_failures(meter, settings.max_failures)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(
                f"stopped: {meter.rows} conversations are done, in {path}. Run the same command "
                "with --resume to continue."
            ) from stop
        return _report(meter, file)


def _report(meter: "AnswerMeter", file: AnswerFile) -> RegenerateReport:
    return RegenerateReport(
        num_conversations=meter.num_kept,
        num_answers=meter.num_answers,
        num_tokens=meter.num_tokens,
        num_of_earlier_runs=meter.num_of_earlier_runs,
        seconds=meter.elapsed_s,
        num_in_output=file.num_kept,
        set_aside=count_reasons(file.reasons),
    )


def _open(data: DatasetConfig, settings: RegenerateConfig, roots: Roots) -> Source:
    asked = DataGenConfig(
        verifier=settings.answers.verifier or "any",
        datasets=(data,),
        states=StatesConfig(tokens="all"),  # prompts without completions will do
    )
    [source] = open_sources(asked, roots)
    if source.parts.kind in (RowKind.TOKENS, RowKind.TEXT):
        raise SpeculatorError(
            f"{source.describe()}. Expected conversations or prompts: "
            "name the column with --columns.messages or --columns.prompt."
        )
    return source


def _options(
    data: DatasetConfig, settings: RegenerateConfig
) -> tuple[dict[str, JsonValue], dict[str, JsonValue]]:
    """Options that decide the answers, and the others; API keys are in neither."""
    columns = data.model_dump(mode="json", exclude={"limit", "streaming"})
    return (
        {"data": columns, **settings.model_dump(mode="json", exclude=RUN_ALONE)},
        {
            "data": data.model_dump(mode="json", include={"limit", "streaming"}),
            **settings.model_dump(mode="json", include=RUN_ALONE),
        },
    )


def _dialogues(
    source: Source, done: set[str], settings: RegenerateConfig, tally: Tally
) -> Iterator[Dialogue]:
    """Dialogues of the rows that are not done, in their order.

    Raises:
        SpeculatorError: there are no rows, or none of the first can be read.
    """
    seed, keeps_cut = settings.answers.sampling.seed, settings.cut == "keep"
    unreadable: list[Dialogue] = []
    """Rows at the start; they are not set aside if none of the first can be read."""
    is_readable, number = bool(done), -1
    for number, row in enumerate(rows_of(source)):
        key = f"{source.number}/{number}"
        if key in done:
            continue
        try:
            turns, tools, template_options = read_turns(row, source.parts)
        except MalformedRow as error:
            unreadable.append(Dialogue.malformed(key, f"{SkipReason.MALFORMED}: {error}"))
            if not is_readable and len(unreadable) < FIRST_ROWS:
                continue
        else:
            is_readable = True
            dialogue = Dialogue(key, turns, tools, seed, keeps_cut, tally, template_options)
            unreadable.append(dialogue)
        if not is_readable:
            break
        yield from unreadable
        unreadable = []
    if number < 0:
        raise SpeculatorError(
            f"{source.name} holds no rows, expected at least 1. Correct --split or --limit."
        )
    if unreadable:
        raise SpeculatorError(
            f"{source.describe()}. None of the first {len(unreadable)} rows can be read; the "
            f"first: {unreadable[0].fault}. Name the column with --columns.messages or "
            "--columns.prompt."
        )


def read_turns(
    row: Row, parts: RowParts
) -> tuple[list[Message], list[Tool] | None, dict[str, JsonValue]]:
    """Messages, tools and the chat template's variables.

    A prompt is a user's turn, a completion the turn to replace.

    Raises:
        MalformedRow: there are none.
    """
    main = row[parts.main]
    try:
        tools = read_tools(row[parts.tools]) if parts.tools else None
        stated = row[parts.template_options] if parts.template_options else None
        template_options = read_template_options(stated)
        if isinstance(main, str) and main and parts.kind is not RowKind.CONVERSATION:
            return [{"role": "user", "content": main}], tools, template_options
        turns = read_messages(main)
        if parts.completion and isinstance(completion := row[parts.completion], list):
            turns += read_messages(completion)
    except RecursionError as error:
        raise MalformedRow("nested too deeply") from error
    return turns, tools, template_options


class AnswerMeter:
    """Counts since the start of the run."""

    def __init__(self, total_rows: int | None, num_of_earlier_runs: int) -> None:
        self.total_rows = total_rows
        self.rows = num_of_earlier_runs
        self.num_of_earlier_runs = num_of_earlier_runs
        self.tally = Tally()
        self.num_failed = 0
        self.last_failure = ""
        self.num_kept = 0
        self.num_answers = 0
        self.num_tokens = 0
        self._started = time.monotonic()

    def add(self, dialogue: Dialogue) -> None:
        self.rows += 1
        self.num_tokens += dialogue.num_tokens
        if dialogue.fault is None:
            self.num_kept += 1
            self.num_answers += dialogue.num_answers
        elif dialogue.has_failed:
            self.num_failed += 1
            self.last_failure = f"{dialogue.key}: {dialogue.fault}"

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def line(self) -> str:
        """For example ``120 conversations, 260 answers, 81234 tokens, 2400 tokens/s``."""
        tally = self.tally  # of conversations that have not ended, too
        num_tokens = tally.num_tokens + tally.num_under_way
        rate = num_tokens / max(self.elapsed_s, 1e-9)
        num_aside = self.rows - self.num_of_earlier_runs - self.num_kept
        aside = f", {num_aside} set aside" if num_aside else ""
        return (
            f"{self.num_kept} conversations, {tally.num_answers} answers, "
            f"{num_tokens} tokens, {rate:.0f} tokens/s{aside}"
        )


def _check_failures(meter: AnswerMeter, max_failures: int) -> None:
    if meter.num_failed > max_failures:
        raise SpeculatorError(
            f"{meter.num_failed} conversations could not be answered, more than --max-failures "
            f"({max_failures}); the last, {meter.last_failure}. Correct their cause and pass "
            "--resume, or raise --max-failures."
        )


def print_report(report: RegenerateReport, output: Path) -> None:
    """The last line states how many conversations were set aside, and why."""
    if report.num_conversations:
        earlier = report.num_of_earlier_runs
        console.print(
            f"wrote {output}: {report.num_conversations} conversations, "
            f"{report.num_answers} answers, {report.num_tokens} tokens in {report.seconds:.1f} s"
            + (f"; {earlier} are of earlier runs" if earlier else ""),
            markup=False,
        )
    elif report.num_in_output:
        console.print(f"{output}: nothing was added to {report.num_in_output} conversations")
    if report.set_aside:
        what = "set aside" if report.num_in_output else f"{output} is empty; all were set aside"
        console.print(f"{what}: {describe_reasons(report.set_aside)}", markup=False)
