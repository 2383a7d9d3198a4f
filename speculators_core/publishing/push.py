"""A push of a speculator's folder to the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import ModelInfo
from rich.table import Table
from rich.text import Text

from speculators_core.console import console
from speculators_core.errors import SpeculatorError, first_line
from speculators_core.publishing.settings import PushConfig
from speculators_core.publishing.upload import Upload, plan_upload
from speculators_core.settings import Settings
from speculators_core.verifier.pair import Pair
from speculators_core.verifier.reading import read_verifier_config

HINTS = {
    401: "the hub did not take the token. Set HF_TOKEN to one that may write, or run "
    "`hf auth login`",
    403: "the token may not write there. Use one that may",
    404: "there is no such repository or branch, or the token may not see it",
    409: "another change conflicts with this one. Push again",
    412: "the repository changed meanwhile. Push again",
    429: "the hub asks to wait. Push again later",
}
"""Meaning and remedy of the hub's refusals."""
FAILED = "the hub failed. Push again later; what is there already is not sent twice"


class PushReport(Settings):
    """Files that were sent, left out and removed."""

    repository: str
    verifier: str
    files: dict[str, int]
    """Sizes in bytes, by name."""
    left_out: tuple[str, ...]
    """Everything else in the folder."""
    removed: tuple[str, ...] = ()
    """Files of an earlier push that are no longer in the folder."""
    remarks: tuple[str, ...] = ()
    """Remarks on the verifier."""
    is_sent: bool = False
    """False for a dry run, and if the hub had all of it already."""
    commit_url: str | None = None
    pull_request_url: str | None = None

    @property
    def size_bytes(self) -> int:
        return sum(self.files.values())


def push(folder: Path, repo: str, settings: PushConfig | None = None) -> PushReport:
    """Checks a speculator, then sends the files of its checkpoint in one commit.

    Files of an earlier push that are no longer in the folder are removed from the hub in the same
    commit; other files there stay.

    Raises:
        SpeculatorError: the folder is not fit to be pushed, there is no token, or the hub refuses.
            Then nothing has changed on the hub, except that repository or branch may be new.
    """
    settings = settings or PushConfig()
    upload = plan_upload(folder, repo, settings.verifier, settings.license)
    report = PushReport(
        repository=repo,
        verifier=upload.verifier,
        files=upload.sizes,
        left_out=upload.left_out,
    )
    if settings.dry_run:
        return report
    token = get_token()
    if token is None:
        raise SpeculatorError(
            f"no token of the hub; expected one that may write to {repo}. Set HF_TOKEN, or run "
            "`hf auth login`."
        )
    report = report.model_copy(update={"remarks": _compare_verifier(upload)})
    with _one_line(repo):
        api = HfApi(token=token, library_name="speculators-vllm")
        before = _open_repository(api, repo, settings)
        return _commit(api, upload, before, settings, report)


def _compare_verifier(upload: Upload) -> tuple[str, ...]:
    """A remark if the verifier on the hub could not be read.

    Raises:
        SpeculatorError: it is not the verifier that the speculator was made for.
    """
    try:
        config = read_verifier_config(upload.verifier)
    except SpeculatorError as error:
        return (f"the verifier was not compared: {error}",)
    Pair.join(upload.speculator, upload.verifier, config, has_weights=False)
    return ()


def _open_repository(api: HfApi, repo: str, settings: PushConfig) -> ModelInfo:
    """The repository and its branch before the push; created if missing.

    Raises:
        SpeculatorError: it is public and should be private.
    """
    branch = settings.revision
    if not settings.create_pr:
        # None leaves it to the owner's rule, which may be stricter than public.
        api.create_repo(repo, private=settings.private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(repo, branch=branch, exist_ok=True)
    found = api.model_info(repo, revision=branch)
    if settings.private and not found.private:
        raise SpeculatorError(
            f"{repo} already exists and is public; --private is for a new repository. Make it "
            "private on the hub, or choose another name."
        )
    return found


def _commit(
    api: HfApi, upload: Upload, before: ModelInfo, settings: PushConfig, report: PushReport
) -> PushReport:
    """Sends the files, and returns the report with what came of it."""
    there = [file.rfilename for file in before.siblings or ()]
    removed = tuple(name for name in there if upload.replaces(name))
    kind = upload.speculator.config.speculators_model_type
    commit = api.create_commit(
        upload.repository,
        [CommitOperationAdd(name, content) for name, content in upload.files.items()]
        + [CommitOperationDelete(name) for name in removed],
        commit_message=settings.message or f"{kind} speculator for {upload.verifier}",
        revision=settings.revision,
        create_pr=settings.create_pr,
        parent_commit=before.sha,
    )
    return report.model_copy(
        update={
            "removed": removed,
            "is_sent": commit.oid != before.sha,
            "commit_url": str(commit.commit_url),
            "pull_request_url": commit.pr_url,
        }
    )


@contextmanager
def _one_line(repo: str) -> Iterator[None]:
    """Turns errors of the hub and the network into one line with a remedy."""
    try:
        yield
    except SpeculatorError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # A failed upload of weights hides its reason behind a RuntimeError.
        reason = error.__cause__ if isinstance(error, RuntimeError) else error
        if isinstance(reason, HfHubHTTPError):
            told = _explain(reason)
        elif isinstance(reason, HTTPError | OfflineModeIsEnabled):
            told = f"the hub cannot be reached ({first_line(reason)}). Look at the network"
        else:
            told = " ".join(str(error).split()).rstrip(".")
        raise SpeculatorError(f"{repo}: {told}.") from error


def _explain(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = " ".join((error.server_message or "").split()).rstrip(".")
    hint = FAILED if status >= 500 else HINTS.get(status, "the hub refused it")
    return f"{hint} ({status}{': ' if said else ''}{said})"


def print_report(report: PushReport, is_dry: bool = False) -> None:
    table = Table(title=Text(report.repository), title_justify="left")
    table.add_column("file")
    table.add_column("size", justify="right")
    for name, size in report.files.items():
        table.add_row(Text(name), _size(size))
    console.print(table)
    for what, names in (("left out", report.left_out), ("removed there", report.removed)):
        if names:
            _print(f"{what}: {', '.join(names)}")
    for remark in report.remarks:
        _print(remark)
    sent = f"{len(report.files)} files, {_size(report.size_bytes)}"
    if is_dry:
        _print(f"would push {sent} to {report.repository}, verifier {report.verifier}")
    elif report.is_sent:
        _print(f"pushed {sent}: {report.pull_request_url or report.commit_url}")
    else:
        _print(f"{report.repository} has all of it already: nothing was pushed")


def _print(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _size(size_bytes: int) -> str:
    return f"{size_bytes} B" if size_bytes < 10_000 else f"{size_bytes / 1e6:.2f} MB"
