"""``speculators push``: a speculator's folder to the hub, in one commit."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from pydantic import Field
from rich.table import Table
from rich.text import Text

from speculators_core.console import console, result_alone_on_stdout
from speculators_core.errors import SpeculatorError, first_line
from speculators_core.settings import Settings

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

    from speculators_core.publishing.upload import Upload

HINTS = {
    401: "the hub did not take the token. Set HF_TOKEN to one that may write, or run "
    "`hf auth login`",
    403: "the token may not write there. Use one that may",
    404: "there is no such repository or branch, or the token may not see it",
    409: "another change conflicts with this one. Push again",
    412: "the repository changed meanwhile. Push again",
    429: "the hub asks to wait. Push again later",
}
"""What the hub's refusals mean here, and what to do."""
FAILED = "the hub failed. Push again later; what is there already is not sent twice"
Switch = Parameter(negative=())


class PushConfig(Settings):
    """Where a speculator is pushed, and under whose names."""

    private: Annotated[bool, Switch] = False
    """Of a new repository; an old one must be private already."""
    revision: str | None = Field(None, min_length=1)
    """Branch, made where there is none; the main one where None."""
    message: str | None = Field(None, min_length=1)
    """Of the commit."""
    create_pr: Annotated[bool, Switch] = False
    """Opens a pull request in a repository that is there, instead of a commit."""
    verifier: str | None = None
    """Hub id of the verifier, for the uploaded config and card; the local ones stay as they are."""
    license: str | None = Field(None, min_length=1)
    """Licence that the uploaded card names where the local one names none; without a local card one
    is made of what the checkpoint says."""
    dry_run: Annotated[bool, Switch] = False
    """Looks at the folder and prints what would be sent; needs no token and no network."""
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False
    """Print the report as JSON."""


class PushReport(Settings):
    """What was sent, and what was not."""

    repository: str
    verifier: str
    files: dict[str, int]
    """Sizes in bytes, by name."""
    left_out: tuple[str, ...]
    """Everything else in the folder."""
    removed: tuple[str, ...] = ()
    """Files of an earlier push that the folder has no longer."""
    remarks: tuple[str, ...] = ()
    """What to know of the verifier."""
    is_sent: bool = False
    """False for a dry run, and where the hub had all of it already."""
    commit_url: str | None = None
    pull_request_url: str | None = None

    @property
    def size_bytes(self) -> int:
        return sum(self.files.values())


def run(
    folder: Path,
    repo: str,
    /,
    *,
    settings: Annotated[PushConfig | None, Parameter(name="*")] = None,
) -> None:
    """Pushes a speculator to the hub, after its checkpoint and its card were looked at.

    Parameters
    ----------
    folder
        Folder of the speculator.
    repo
        Hub id that it gets: owner/name.
    """
    settings = settings or PushConfig()
    if settings.as_json:
        with result_alone_on_stdout():
            report = push(folder, repo, settings)
        print(report.model_dump_json(indent=2))
    else:
        print_report(push(folder, repo, settings), settings.dry_run)


def push(folder: Path, repo: str, settings: PushConfig | None = None) -> PushReport:
    """Looks at a speculator, then sends the checkpoint's own files in one commit.

    On the hub, files of an earlier push that the folder has no longer go with the same commit; what
    else is there stays.

    Raises:
        SpeculatorError: the folder is not fit to be pushed, there is no token, or the hub refuses;
            nothing has changed on the hub then, but that repository or branch may be new.
    """
    from huggingface_hub import HfApi, get_token

    from speculators_core.publishing.upload import look_at

    settings = settings or PushConfig()
    upload = look_at(folder, repo, settings.verifier, settings.license)
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
        raise SpeculatorError("no token of the hub. Set HF_TOKEN, or run `hf auth login`.")
    report = report.model_copy(update={"remarks": _compare_verifier(upload)})
    with _one_line(repo):
        api = HfApi(token=token, library_name="speculators-vllm")
        before = _open_repository(api, repo, settings)
        return report.model_copy(update=_commit(api, upload, before, settings))


def _compare_verifier(upload: "Upload") -> tuple[str, ...]:
    """What to know where the verifier on the hub could not be read.

    Raises:
        SpeculatorError: it is another one than the speculator was made for.
    """
    from speculators_core.verifier.fit import check_verifier
    from speculators_core.verifier.reading import read_verifier_config

    try:
        verifier = read_verifier_config(upload.verifier)
    except SpeculatorError as error:
        return (f"the verifier was not compared: {error}",)
    check_verifier(upload.config, verifier, upload.verifier)
    return ()


def _open_repository(api: "HfApi", repo: str, settings: PushConfig) -> "ModelInfo":
    """The repository and its branch as they are before the push; made where they are missing.

    Raises:
        SpeculatorError: it is public, and shall be private.
    """
    branch = settings.revision
    if not settings.create_pr:
        # None leaves it to the owner's own rule, which may be stricter than public.
        api.create_repo(repo, private=settings.private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(repo, branch=branch, exist_ok=True)
    found = api.model_info(repo, revision=branch)
    if settings.private and not found.private:
        raise SpeculatorError(
            f"{repo} is there already, and public; --private is for a new one. Make it private on "
            "the hub, or name another."
        )
    return found


def _commit(
    api: "HfApi", upload: "Upload", before: "ModelInfo", settings: PushConfig
) -> dict[str, Any]:
    """Sends the files; what a report says of it."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    there = [file.rfilename for file in before.siblings or ()]
    removed = tuple(name for name in there if upload.replaces(name))
    kind = upload.config.speculators_model_type
    commit = api.create_commit(
        upload.repository,
        [CommitOperationAdd(name, content) for name, content in upload.files.items()]
        + [CommitOperationDelete(name) for name in removed],
        commit_message=settings.message or f"{kind} speculator for {upload.verifier}",
        revision=settings.revision,
        create_pr=settings.create_pr,
        parent_commit=before.sha,
    )
    return {
        "removed": removed,
        "is_sent": commit.oid != before.sha,
        "commit_url": str(commit.commit_url),
        "pull_request_url": commit.pr_url,
    }


@contextmanager
def _one_line(repo: str) -> Iterator[None]:
    """The hub's and the network's errors as one line that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

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


def _explain(error: Any) -> str:
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
