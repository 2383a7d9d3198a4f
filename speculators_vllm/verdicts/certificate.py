"""A losslessness certificate: record, verdict, tables and page."""

import io
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, JsonValue, computed_field
from rich.console import Console
from rich.table import Table

from speculators_core.decoding.acceptance import AcceptanceCounts
from speculators_core.files import make_folder, write_text
from speculators_vllm.verdicts.chi_square import LawTest, combine
from speculators_vllm.verdicts.reference import first_difference, pool
from speculators_vllm.verdicts.verifiers import VerifierDifference

PAGE_WIDTH = 110
TINY = 1e-100
SHOWN_FAULTS = 8

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="UTF-8"><title>losslessness certificate</title>
<style>
{stylesheet}
body {{ color: {foreground}; background-color: {background}; margin: 2em; }}
pre {{ font-family: Menlo, Consolas, 'DejaVu Sans Mono', monospace; }}
</style></head><body><pre><code>{code}</code></pre></body></html>
"""
Kind = Literal["with speculation", "without"]


class FlagSet(BaseModel):
    """vLLM's arguments for a test, the number of requests at one time, and what they ask for."""

    engine_args: dict[str, JsonValue]
    concurrency: int
    thinking_token_budget: int | None = None
    """Budget of each request; None where it has none."""

    @property
    def name(self) -> str:
        named = [f"{key}={value}" for key, value in self.engine_args.items()]
        if self.concurrency > 1:
            named.append(f"concurrency={self.concurrency}")
        if self.thinking_token_budget is not None:
            named.append(f"thinking_token_budget={self.thinking_token_budget}")
        return ", ".join(named) or "plain"


class Divergence(BaseModel):
    """Where a greedy output with speculation first differs from the verifier's."""

    prompt: int
    position: int
    """Position in the output, from 0."""
    verifier_token: int | None
    """Token of the verifier; None where its output had ended."""
    speculated_token: int | None
    gap: float | None
    """Verifier's best logit over the speculated token's, scored by the verifier alone."""
    largest_later_gap: float | None
    """The same gap of the worst token after it, each scored after the tokens before it, so that
    the rest of the output is examined too."""

    def is_near_tie(self, bound: float) -> bool:
        gaps = (self.gap, self.largest_later_gap)
        return all(gap is not None and gap <= bound for gap in gaps)


class GreedyTest(BaseModel):
    """Greedy outputs with speculation beside those without, under the same flags."""

    dtype: str
    flags: FlagSet
    near_tie_bound: float | None
    """Largest gap of a near tie; None where outputs must be equal."""
    alone: list[list[int]]
    """Outputs without speculation, one a prompt."""
    speculated: list[list[int]]
    accepted: list[list[int]]
    """Accepted tokens of each draft, one list a prompt."""
    num_near_ties: int
    """Positions of the outputs without speculation whose two best logits are within the bound."""
    divergences: list[Divergence]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.alone))

    @property
    def lossy(self) -> list[Divergence]:
        bound = self.near_tie_bound
        return [d for d in self.divergences if bound is None or not d.is_near_tie(bound)]

    @property
    def faults(self) -> list[str]:
        where = f"greedy, {self.dtype}, {self.flags.name}"
        if not any(map(len, self.accepted)):
            return [f"{where}: nothing was drafted, so nothing was tested"]
        return [f"{where}: {self._describe(divergence)}" for divergence in self.lossy]

    def _describe(self, divergence: Divergence) -> str:
        gap, later = divergence.gap, divergence.largest_later_gap
        figures = f"gap {_figure(gap)}, largest after it {_figure(later)}"
        if self.near_tie_bound is not None:
            figures += f", bound {self.near_tie_bound:g}"
        return (
            f"prompt {divergence.prompt + 1} differs at token {divergence.position + 1}: "
            f"verifier {divergence.verifier_token}, speculated {divergence.speculated_token} "
            f"({figures})"
        )


class SampledTest(BaseModel):
    """Continuations drawn at temperature 1 beside the verifier's law."""

    dtype: str
    flags: FlagSet
    drawn: Kind
    num_tokens: int
    """Tokens of each draw; the first comes from the prefill and is not tested."""
    significance: float
    """Bound on the p-value; a smaller one is a fault."""
    prompts: list[LawTest]

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated property
    @property
    def p_value(self) -> float:
        return combine([prompt.p_value for prompt in self.prompts])

    @property
    def degrees(self) -> int:
        return sum(prompt.degrees for prompt in self.prompts)

    @property
    def faults(self) -> list[str]:
        where = f"sampled {self.drawn}, {self.dtype}, {self.flags.name}"
        if self.degrees == 0:
            return [f"{where}: no prefix was drawn often enough to test; raise --draws"]
        if self.p_value >= self.significance:
            return []
        fault = f"{where}: p {_chance(self.p_value)}, bound {self.significance:.2g}"
        if self.drawn == "without":
            fault += "; the verifier alone does not follow its law, so the test proves nothing"
        return [fault]


class Certificate(BaseModel):
    """All counts of a certificate; `verdict` and p-values are computed from them."""

    settings: dict[str, JsonValue]
    speculator: str
    speculator_sha256: str | None
    verifier: str
    verifier_sha256: str | None
    speculative_config: dict[str, JsonValue]
    """Speculative config given to vLLM: the user's keys over the checkpoint's."""
    speculative_tokens: int
    environment: dict[str, str]
    prompts_sha256: str
    num_prompts: int
    greedy: list[GreedyTest]
    sampled: list[SampledTest]
    reference_accepted: list[list[int]] | None
    """Tokens that the reference decoder accepted of each draft of the first float32 test, one list
    a prompt; None without such a test."""
    verifiers: VerifierDifference | None
    """The verifier alone in Transformers and in vLLM, in float32; None without such a test."""
    seconds: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def faults(self) -> list[str]:
        greedy = [fault for test in self.greedy for fault in test.faults]
        greedy += [] if self.acceptance_fault is None else [self.acceptance_fault]
        return greedy + [fault for test in self.sampled for fault in test.faults]

    @property
    def served(self) -> tuple[AcceptanceCounts, AcceptanceCounts] | None:
        """Counts of the reference decoder, and of vLLM, on the same prompts in float32."""
        if self.reference_accepted is None:
            return None
        num_tokens = self.speculative_tokens
        test = next(test for test in self.greedy if test.dtype == "float32")
        return pool(self.reference_accepted, num_tokens), pool(test.accepted, num_tokens)

    @property
    def acceptance_fault(self) -> str | None:
        """None too where the two engines compute the verifier differently: so are the drafts."""
        if self.verifiers is not None and not self.verifiers.is_equal:
            return None
        if self.served is None or (place := first_difference(*self.served)) is None:
            return None
        accepted = [side.accepted_per_position[place - 1] for side in self.served]
        return (
            f"acceptance: at position {place} the reference decoder accepts {accepted[0]} tokens "
            f"and vLLM {accepted[1]}; run speculators check to see where they begin to differ"
        )

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Literal["certified", "not certified"]:
        return "not certified" if self.faults else "certified"


def print_certificate(certificate: Certificate, console: Console) -> None:
    """Subject, greedy outputs, divergences, sampled outputs, and the verdict."""
    console.print(_subject(certificate))
    console.print(_greedy_table(certificate))
    if certificate.served is not None:
        console.print(_served_table(*certificate.served))
    if certificate.verifiers is not None and not certificate.verifiers.is_equal:
        note = f"{certificate.verifiers}. Accepted tokens are not compared."
        console.print(f"note: {note}", markup=False, highlight=False)
    divergences = _divergence_table(certificate)
    if divergences.row_count:
        console.print(divergences)
    console.print(_sampled_table(certificate))
    console.print(
        "greedy: float32 outputs must be equal, token for token. In other dtypes an output may "
        "differ at a near tie: every token from there on lies within the bound of the best logit "
        "that the verifier alone gives; those of a lossy output do not. close: positions whose two "
        "best logits are within the bound.\nsampled: tokens after the first, at temperature 1, "
        "against the verifier's exact law; a p below the bound is a fault. rare: tokens of which "
        "too few are expected for a chi-square.",
        markup=False,
        highlight=False,
    )
    console.print(f"took {certificate.seconds:.0f} s")
    faults = certificate.faults
    for fault in faults[:SHOWN_FAULTS]:
        console.print(f"fault: {fault}", style="red", markup=False, highlight=False)
    if len(faults) > SHOWN_FAULTS:
        console.print(f"and {len(faults) - SHOWN_FAULTS} more")
    style = "bold red" if faults else "bold green"
    console.print(f"verdict: {certificate.verdict}", style=style)


def _subject(certificate: Certificate) -> Table:
    table = Table(title="losslessness certificate", title_justify="left", show_header=False)
    rows = {
        "speculator": f"{certificate.speculator}\nsha256 {certificate.speculator_sha256}",
        "verifier": f"{certificate.verifier}\nsha256 {certificate.verifier_sha256}",
        "speculation": ", ".join(
            f"{key}={value}"
            for key, value in certificate.speculative_config.items()
            if key != "model"
        ),
        "prompts": f"{certificate.num_prompts}, sha256 {certificate.prompts_sha256}",
        "environment": ", ".join(f"{k} {v}" for k, v in certificate.environment.items()),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _greedy_table(certificate: Certificate) -> Table:
    table = _table(
        "greedy",
        "dtype",
        "identical",
        "tokens",
        "drafts",
        "accepted",
        "near ties",
        "lossy",
        "close",
    )
    table.add_column("flags")
    for test in certificate.greedy:
        num_drafts = sum(map(len, test.accepted))
        differ, lossy = len(test.divergences), len(test.lossy)
        table.add_row(
            test.dtype,
            f"{len(test.alone) - differ} of {len(test.alone)}",
            str(test.num_tokens),
            str(num_drafts),
            str(sum(map(sum, test.accepted))),
            f"{differ - lossy} of {differ}" if differ else "-",
            f"{lossy} of {differ}" if differ else "-",
            f"{test.num_near_ties / test.num_tokens:.1%}",
            test.flags.name,
        )
    return table


def _served_table(reference: AcceptanceCounts, served: AcceptanceCounts) -> Table:
    positions = map(str, range(1, reference.speculative_tokens + 1))
    table = _table("accepted by position, float32", "", "tau", "drafts", *positions)
    for name, side in (("reference decoder", reference), ("vLLM", served)):
        accepted = map(str, side.accepted_per_position)
        table.add_row(name, f"{side.acceptance_length:.3f}", str(side.num_drafts), *accepted)
    return table


def _divergence_table(certificate: Certificate) -> Table:
    columns = ("dtype", "prompt", "token", "verifier", "speculated", "gap", "later gap", "bound")
    table = _table("divergences", *columns)
    table.add_column("flags")
    for test in certificate.greedy:
        for found in test.divergences:
            table.add_row(
                test.dtype,
                str(found.prompt + 1),
                str(found.position + 1),
                str(found.verifier_token),
                str(found.speculated_token),
                _figure(found.gap),
                _figure(found.largest_later_gap),
                "equal" if test.near_tie_bound is None else f"{test.near_tie_bound:g}",
                test.flags.name,
            )
    return table


def _sampled_table(certificate: Certificate) -> Table:
    columns = ("dtype", "drawn", "prompt", "draws", "prefixes", "chi-square", "degrees", "rare")
    table = _table("sampled, temperature 1", *columns, "p", "bound")
    for test in certificate.sampled:
        for law in test.prompts:
            table.add_row(
                test.dtype,
                test.drawn,
                str(law.prompt + 1),
                f"{law.num_draws} x {test.num_tokens}",
                str(len(law.prefixes)),
                f"{law.chi_square:.1f}",
                str(law.degrees),
                f"{law.num_rare} of {law.expected_rare:.1f}",
                _chance(law.p_value),
                "",
            )
        total = f"{sum(law.num_draws for law in test.prompts)} x {test.num_tokens}"
        figures = ("", "", str(test.degrees), "", _chance(test.p_value))
        bound = f"{test.significance:.2g}"
        table.add_row(test.dtype, test.drawn, "all", total, *figures, bound, end_section=True)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _chance(p_value: float) -> str:
    return f"{p_value:.2g}" if p_value > TINY else f"< {TINY:g}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def write_certificate(certificate: Certificate, folder: Path) -> list[Path]:
    """``certificate.json`` and ``certificate.html``; each replaces an older one when whole."""
    page = Console(record=True, file=io.StringIO(), width=PAGE_WIDTH)
    print_certificate(certificate, page)
    texts = {
        "certificate.json": certificate.model_dump_json(indent=1) + "\n",
        "certificate.html": page.export_html(code_format=PAGE),
    }
    make_folder(folder)
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]
