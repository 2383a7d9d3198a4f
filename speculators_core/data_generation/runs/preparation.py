"""Preparation of a run before its first worker starts."""

import shlex
from pathlib import Path

import yaml
from pydantic import JsonValue

from speculators_core.console import console
from speculators_core.data_generation.engines.pipeline import schema_of
from speculators_core.data_generation.settings import GenerationPlan
from speculators_core.data_generation.stores.disk import SHARDS, DiskStore, Manifest, check_same
from speculators_core.errors import SpeculatorError, first_line
from speculators_core.files import Roots, in_full, make_folder, write_text
from speculators_core.provenance import sample_weights, this_command, versions, without_secrets

CONFIG = "config.yaml"
COMMAND = "command.txt"
JOURNAL = "journal.json"
"""Manifest of the run that a queue's journals belong to."""


def placed(plan: GenerationPlan, *more: Path) -> GenerationPlan:
    """The plan with absolute local paths and the folders below which data may name files.

    By default those are the current directory, the store and ``more``.

    Raises:
        SpeculatorError: a path is not usable, or the store's shards lie outside the store.
    """
    run, sync = plan.run, plan.sync
    if run.log_file is not None:
        run = run.model_copy(update={"log_file": in_full(run.log_file)})
    if sync.path is not None:
        sync = sync.model_copy(update={"path": in_full(sync.path)})
    own = () if sync.path is None else (sync.path,)
    if not run.allowed_roots:
        folders = dict.fromkeys(folder.resolve() for folder in (Path.cwd(), *more, *own))
        run = run.model_copy(update={"allowed_roots": tuple(folders)})
    for folder in own:
        Roots(run.allowed_roots).with_own(folder).check(folder / SHARDS)
    return plan.model_copy(update={"run": run, "sync": sync})


def prepare(plan: GenerationPlan) -> DiskStore | None:
    """Makes the folder of a run, or checks that the run in it can be resumed.

    With ``run.repair``, shards that have to be generated again are removed. A custom scheduler
    calls this once, then `generate_data_worker` for each worker.

    Raises:
        SpeculatorError: the folder holds something else, or a run with other options.
    """
    folder = plan.sync.path
    if folder is None:
        return None
    manifest = Manifest(content=schema_of(plan), made_from=decides_bytes(plan), versions=versions())
    is_going_on = plan.run.resume or plan.run.repair
    store = None
    if plan.sync.kind == "disk":
        store = DiskStore.create(
            folder,
            manifest.content,
            made_from=manifest.made_from,
            versions=manifest.versions,
            resume=is_going_on,
            compression=plan.sync.compression,
            shard_tokens=plan.sync.shard_tokens,
        )
        _look_at_shards(store, plan.run.repair)
    else:
        _open_journal(folder, manifest, is_going_on)
    _write_provenance(folder, plan)
    return store


def _look_at_shards(store: DiskStore, repair: bool) -> None:
    store.clean()
    if repair:
        wrong = store.find_damage()
        wrong |= store.find_set_aside(leave_out=wrong)
        for path, what in wrong.items():
            console.print(f"generating {path.name} again: {what}", markup=False)
            path.unlink()
    for _ in store.headers():
        pass  # reading the headers finds truncated shards


def _open_journal(folder: Path, manifest: Manifest, is_going_on: bool) -> None:
    path = folder / JOURNAL
    if not path.exists():
        try:
            make_folder(folder)
            write_text(path, manifest.model_dump_json(indent=2))
        except OSError as error:
            raise SpeculatorError(
                f"sync.path: {path} cannot be written: {first_line(error)}; expected a writable "
                "folder. Choose another one."
            ) from error
        return
    if not is_going_on:
        raise SpeculatorError(
            f"sync.path: {folder} holds the journal of a run, expected a new folder. Pass "
            "--run.resume to resume that run, or choose another folder."
        )
    check_same(folder, Manifest.read_file(path), manifest)


def decides_bytes(plan: GenerationPlan) -> dict[str, JsonValue]:
    """Options that determine the examples, and a hash of a local verifier's weights."""
    content = plan.model_dump(mode="json")
    left_out = ("device", "device_map", "base_url", "api_key")
    return {
        "data": content["data"],
        "engine": {name: v for name, v in content["engine"].items() if name not in left_out},
        "sync": {name: content["sync"][name] for name in ("shard_tokens", "dtype", "compression")},
        "run": {name: content["run"][name] for name in ("limit", "seed")},
        "weights": sample_weights(plan.data.verifier),
    }


def _write_provenance(folder: Path, plan: GenerationPlan) -> None:
    """Writes the configuration and the command that repeat this run."""
    text = yaml.safe_dump(plan.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    write_text(folder / CONFIG, text)
    write_text(folder / COMMAND, f"{shlex.join(without_secrets(this_command()))}\n")
