import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import playground
from speculators_core.cli import run_function
from speculators_core.commands.push import run
from speculators_core.errors import SpeculatorError
from speculators_core.format import checkpoint
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.provenance import hash_weights
from speculators_core.publishing.card import CARD, UNKNOWN_LICENSE, parse, write_card
from speculators_core.publishing.card_facts import CardFacts
from speculators_core.publishing.push import push
from speculators_core.publishing.settings import PushConfig
from tests.conftest import DRAFTS, make_draft, make_verifier
from tests.hub import TOKEN, Hub, connected, environment

REPO = "me/draft"
VERIFIER = "them/verifier"


@pytest.fixture
def hub():
    with Hub().serving() as hub:
        yield hub


@pytest.fixture(autouse=True)
def patch(hub, tmp_path):
    with connected(hub, tmp_path / "home") as patch:
        yield patch


@pytest.fixture(scope="module")
def verifier_files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("verifier")
    make_verifier().save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(hub, verifier, verifier_files, tmp_path) -> Path:
    """A speculator that is fit to be pushed; its verifier is on the hub."""
    hub.create(VERIFIER, verifier_files)
    return save(tmp_path / "draft", verifier)


def save(folder: Path, verifier, name="eagle3", license="mit", **kwargs) -> Path:
    model = make_draft(name, verifier, **{"name_or_path": VERIFIER} | kwargs)
    model.save_pretrained(folder)
    write_card(folder, CardFacts(license=license))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(hub: Hub, message: str, folder: Path, repo: str = REPO, **settings) -> None:
    """Nothing was asked of the hub, and the error is one line."""
    with pytest.raises(SpeculatorError, match=message) as error:
        push(folder, repo, PushConfig(**settings))
    assert "\n" not in str(error.value)
    assert hub.requests == []


# ---- what arrives ----


@pytest.mark.parametrize("name", DRAFTS)
def test_what_is_pushed_loads_from_the_hub_as_it_was(hub, folder, verifier, tmp_path, name):
    folder = save(tmp_path / name, verifier, name)
    report = push(folder, REPO)
    assert report.is_sent and report.remarks == () and report.left_out == ()
    assert len(hub.uploads) == 1  # the weights went as a large file
    ours = SpeculatorModel.from_pretrained(folder, verifier=verifier)
    theirs = SpeculatorModel.from_pretrained(REPO, verifier_attachment_mode="full")
    assert theirs.config.to_dict() == ours.config.to_dict()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[key], tensor), key
    prompt = torch.tensor([[5, 9, 17]])
    drawn = [model.generate(prompt, max_new_tokens=12, do_sample=False) for model in (ours, theirs)]
    assert torch.equal(*drawn)


def test_python_of_the_pushed_card_runs(hub, folder):
    push(folder, REPO)
    code = hub.files(REPO)[CARD].decode().split("```python\n")[1].split("```")[0]
    assert f'"{REPO}"' in code
    scope = {"input_ids": torch.tensor([[5, 9, 17]])}
    exec(code, scope)
    assert scope["output"].shape == (1, 3 + 64)


def test_second_push_sends_nothing_and_says_so(hub, folder, capsys):
    first = push(folder, REPO)
    before = list(hub.repositories[REPO].branches["main"])
    second = push(folder, REPO)
    assert first.is_sent and not second.is_sent
    assert hub.repositories[REPO].branches["main"] == before
    assert len(hub.asked("/commit/")) == 1 and len(hub.uploads) == 1
    printed(folder, REPO)
    assert "nothing was pushed" in capsys.readouterr().out


def printed(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["push", *map(str, arguments)])
        with pytest.raises(SystemExit, match="0"):
            run_function(run)


def test_push_is_one_commit(hub, folder):
    report = push(folder, REPO)
    commits = hub.repositories[REPO].branches["main"]
    assert [commit.message for commit in commits[1:]] == [f"eagle3 speculator for {VERIFIER}"]
    assert report.commit_url == f"{hub.url}/{REPO}/commit/{commits[-1].oid}"


def test_only_the_checkpoints_own_files_go(hub, folder):
    own = {CARD, "config.json", "model.safetensors"}
    records = {"config.yaml", "run.json", "training_log.jsonl", "certificate.html", "LICENSE"}
    for name in records:
        (folder / name).write_text("x: 1\n")
    others = ["optimizer.safetensors", ".secret", "notes.md", "trainer_state.json", "rng.pt"]
    for name in others:
        (folder / name).write_bytes(b"x")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "model.safetensors").write_bytes(b"x")
    report = push(folder, REPO)
    assert set(hub.files(REPO)) == own | records == set(report.files)
    assert report.left_out == tuple(sorted([*others, "checkpoint-10/"]))


def test_sharded_weights_go_with_their_index_alone(hub, folder, verifier):
    model = SpeculatorModel.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="30KB")
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"of an older run")
    report = push(folder, REPO)
    shards = set(checkpoint.read_weight_map(folder).values())
    assert len(shards) > 1 and checkpoint.INDEX in report.files
    assert {name for name in report.files if name.endswith(".safetensors")} == shards
    loaded = SpeculatorModel.from_pretrained(REPO)
    assert torch.equal(loaded.state_dict()["fc.weight"], model.state_dict()["fc.weight"])


def test_files_of_an_earlier_push_go_with_the_commit_that_replaces_them(hub, folder):
    """Readers take the index first: one that stayed would name weights of the earlier push."""
    model = SpeculatorModel.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="30KB")
    (folder / "certificate.json").write_text("{}")
    push(folder, REPO)
    earlier = set(hub.files(REPO))
    somebody = {"NOTES.md": b"mine", "LICENSE": b"mine", "tokenizer.json": b"{}"}
    hub.create(REPO, {**hub.files(REPO), **somebody})
    model.fc.weight.data += 1
    model.save_pretrained(folder)
    (folder / "certificate.json").unlink()
    report = push(folder, REPO)
    kept = {CARD, "config.json"}
    assert set(report.removed) == earlier - kept
    assert len(hub.repositories[REPO].branches["main"]) == 2
    assert set(hub.files(REPO)) == {*kept, "model.safetensors", *somebody}
    loaded = SpeculatorModel.from_pretrained(REPO)
    assert torch.equal(loaded.state_dict()["fc.weight"], model.state_dict()["fc.weight"])


# ---- names ----


def test_verifier_of_this_machine_is_refused(hub, tmp_path):
    local = tmp_path / "local"
    shutil.copytree(playground.EAGLE3, local / "eagle3")
    shutil.copytree(playground.VERIFIER, local / "verifier")
    write_card(local / "eagle3", CardFacts(license="mit"))
    refused(hub, r"'\.\./verifier', a folder of this machine.*--verifier", local / "eagle3")


def test_given_verifier_is_written_into_what_goes_up_alone(hub, tmp_path):
    folder = tmp_path / "eagle3"
    shutil.copytree(playground.EAGLE3, folder)
    write_card(folder, CardFacts(license="mit"))
    hub.create(VERIFIER, {p.name: p.read_bytes() for p in playground.VERIFIER.iterdir()})
    before = content(folder)
    report = push(folder, REPO, PushConfig(verifier=VERIFIER))
    assert content(folder) == before
    assert report.verifier == VERIFIER and report.remarks == ()
    sent = hub.files(REPO)
    config, local = json.loads(sent["config.json"]), json.loads(before["config.json"])
    assert config["speculators_config"]["verifier"].pop("name_or_path") == VERIFIER
    assert local["speculators_config"]["verifier"].pop("name_or_path") == "../verifier"
    assert config == local
    assert parse(sent[CARD].decode()).data.base_model == VERIFIER
    for name in ("model.safetensors", "training_log.jsonl"):
        assert sent[name] == before[name]
    assert not push(folder, REPO, PushConfig(verifier=VERIFIER)).is_sent


def test_verifier_that_no_config_names_must_be_given(hub, folder):
    config = json.loads((folder / "config.json").read_text())
    config["speculators_config"]["verifier"]["name_or_path"] = None
    (folder / "config.json").write_text(json.dumps(config))
    refused(hub, "names no verifier; expected a hub id .*Pass --verifier", folder)
    push(folder, REPO, PushConfig(verifier=VERIFIER))
    assert SpeculatorModel.from_pretrained(REPO).config.verifier.name_or_path == VERIFIER


@pytest.mark.parametrize("name", ["../verifier", "/data/verifier", "a/b/c", "a--b/c", ""])
def test_given_verifier_must_be_a_hub_id(hub, folder, name):
    refused(hub, "is not a hub id", folder, verifier=name)


def test_another_verifier_is_refused_before_anything_is_made(hub, folder, tmp_path):
    make_verifier(num_hidden_layers=5).save_pretrained(tmp_path / "deeper")
    hub.create("them/deeper", content(tmp_path / "deeper"))
    with pytest.raises(SpeculatorError, match="them/deeper: number of layers 5"):
        push(folder, REPO, PushConfig(verifier="them/deeper"))
    assert REPO not in hub.repositories


def test_verifier_that_the_hub_does_not_have_is_remarked(hub, folder):
    del hub.repositories[VERIFIER]
    report = push(folder, REPO)
    assert report.is_sent
    (remark,) = report.remarks
    assert remark.startswith("the verifier was not compared: them/verifier") and "\n" not in remark


@pytest.mark.parametrize(
    "name", ["draft", "me/a/b", "me/-draft", "me/dr aft", "", "me/a" + "b" * 96]
)
def test_repository_must_have_an_owner_and_a_name(hub, folder, name):
    refused(hub, "expected owner/name", folder, name)


# ---- the card ----


def test_licence_must_be_named(hub, folder):
    write_card(folder, CardFacts())
    refused(hub, "names no licence", folder)
    (folder / CARD).write_text("---\nlicense: unknown\n---\n# Mine\n")
    refused(hub, "names no licence", folder)
    (folder / CARD).unlink()
    refused(hub, r"holds no README\.md", folder)


def test_given_licence_fills_the_gap_of_what_goes_up_alone(hub, folder):
    write_card(folder, CardFacts())
    before = (folder / CARD).read_text()
    push(folder, REPO, PushConfig(license="apache-2.0"))
    assert (folder / CARD).read_text() == before
    sent = hub.files(REPO)[CARD].decode()
    assert parse(sent).data.license == "apache-2.0" and UNKNOWN_LICENSE not in sent


def test_folder_without_card_gets_one_with_the_given_licence(hub, folder):
    (folder / CARD).unlink()
    push(folder, REPO, PushConfig(license="mit"))
    sent = parse(hub.files(REPO)[CARD].decode())
    assert (sent.data.license, sent.data.base_model) == ("mit", VERIFIER)
    assert not (folder / CARD).exists()


def test_licence_that_contradicts_the_card_is_refused(hub, folder):
    refused(hub, "names the licence 'mit', --license 'apache-2.0'", folder, license="apache-2.0")


def test_edited_card_goes_up_byte_for_byte(hub, folder):
    text = b"---\n# mine\nlicense: mit\n---\r\nno gaps\n"
    (folder / CARD).write_bytes(text)
    push(folder, REPO)
    assert hub.files(REPO)[CARD] == text


def test_front_matter_that_the_hub_does_not_take_is_one_line(hub, folder):
    (folder / CARD).write_text("---\nlicense: mine\n---\n# Mine\n")
    with pytest.raises(SpeculatorError, match="Invalid metadata.*license.*apache-2.0") as error:
        push(folder, REPO)
    assert "\n" not in str(error.value)
    assert len(hub.repositories[REPO].branches["main"]) == 1


# ---- what is not fit to be pushed ----


def test_damaged_checkpoint_is_refused(hub, folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refused(hub, "truncated", folder)


def test_weights_that_are_not_finite_are_refused(hub, folder):
    model = SpeculatorModel.from_pretrained(folder, verifier_attachment_mode="detached")
    model.fc.weight.data[0, 0] = float("nan")
    model.save_pretrained(folder)
    refused(hub, "fc.weight holds a NaN", folder)


def test_folder_must_hold_a_speculator(hub, folder, verifier_folder, tmp_path):
    refused(hub, "no such folder", tmp_path / "nowhere")
    refused(hub, "not a speculator", verifier_folder)
    shutil.move(folder, tmp_path / "run" / "speculator")
    refused(hub, "folder of a run; .*Push the one in it: .*run/speculator", tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("certificate.json", {"speculator_sha256": "0" * 64}),
        ("report.json", {"drafts": [{"sha256": "0" * 64}, {"sha256": None}]}),
    ],
)
def test_record_of_other_weights_is_refused(hub, folder, name, record):
    (folder / name).write_text(json.dumps(record))
    refused(hub, f"{name} is of other weights", folder)
    told = json.dumps(record).replace("0" * 64, str(hash_weights(folder)))
    (folder / name).write_text(told)
    assert name in push(folder, REPO).files


@pytest.mark.parametrize("secret", ["hf_" + "a1B2" * 9, "sk-" + "x" * 30])
@pytest.mark.parametrize("name", ["run.json", "config.yaml", CARD])
def test_access_token_in_a_file_is_refused(hub, folder, secret, name):
    with (folder / name).open("a") as file:
        file.write(f"\ntoken: {secret}\n")
    refused(hub, rf"{name}, line \d+: .* looks like an access token", folder)


@pytest.mark.parametrize("name", ["run.json", "model.safetensors", CARD])
def test_link_out_of_the_folder_is_refused(hub, folder, tmp_path, name):
    if (folder / name).exists():
        shutil.move(folder / name, tmp_path / name)
    else:
        (tmp_path / name).write_text("{}")
    (folder / name).symlink_to(tmp_path / name)
    refused(hub, f"{name} is a link to", folder)


def test_without_token_nothing_is_asked(hub, folder, patch):
    patch.delenv("HF_TOKEN")
    refused(hub, "no token of the hub; expected .*Set HF_TOKEN", folder)


def test_token_of_a_login_is_taken(hub, folder, patch, tmp_path):
    patch.delenv("HF_TOKEN")
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "token").write_text(TOKEN)
    assert push(folder, REPO).is_sent


# ---- where it goes ----


def test_private_repository_is_made_private(hub, folder):
    push(folder, REPO, PushConfig(private=True))
    assert hub.repositories[REPO].private
    push(folder, "me/other")
    assert not hub.repositories["me/other"].private


def test_public_repository_is_not_taken_for_a_private_one(hub, folder):
    hub.create(REPO)
    with pytest.raises(SpeculatorError, match="already exists and is public"):
        push(folder, REPO, PushConfig(private=True))
    assert hub.files(REPO) == {}


def test_branch_is_made_and_main_stays(hub, folder):
    report = push(folder, REPO, PushConfig(revision="v2"))
    assert report.is_sent and hub.files(REPO) == {}
    assert set(hub.files(REPO, "v2")) == set(report.files)
    assert not push(folder, REPO, PushConfig(revision="v2")).is_sent
    loaded = SpeculatorModel.from_pretrained(REPO, revision="v2")
    assert loaded.config.verifier.name_or_path == VERIFIER


def test_pull_request_goes_to_a_repository_of_others(hub, folder):
    hub.create("them/draft")
    report = push(folder, "them/draft", PushConfig(create_pr=True))
    assert report.pull_request_url == f"{hub.url}/them/draft/discussions/1"
    assert hub.files("them/draft") == {}
    assert set(hub.files("them/draft", "refs/pr/1")) == set(report.files)
    assert not hub.asked("repos/create")


def test_pull_request_needs_a_repository(hub, folder):
    with pytest.raises(SpeculatorError, match=r"me/draft: there is no such repository.*\(404"):
        push(folder, REPO, PushConfig(create_pr=True))


def test_commit_has_the_given_message(hub, folder):
    push(folder, REPO, PushConfig(message="First"))
    assert hub.repositories[REPO].branches["main"][-1].message == "First"


def test_dry_run_tells_files_and_sizes_and_asks_nothing(hub, folder, patch, capsys):
    patch.delenv("HF_TOKEN")
    (folder / "optimizer.safetensors").write_bytes(b"x")
    report = push(folder, REPO, PushConfig(dry_run=True))
    assert not report.is_sent
    assert report.files["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    printed(folder, REPO, "--dry-run")
    told = capsys.readouterr().out
    assert f"would push 3 files, {report.size_bytes / 1e6:.2f} MB to {REPO}" in told
    assert "left out: optimizer.safetensors" in told and "config.json" in told
    assert hub.requests == []


def test_dry_run_tells_the_sizes_that_are_sent(hub, folder):
    settings = PushConfig(verifier="them/other", license="mit")
    told = push(folder, REPO, settings.model_copy(update={"dry_run": True})).files
    push(folder, REPO, settings)
    assert told == {name: len(sent) for name, sent in hub.files(REPO).items()}


def test_json_is_alone_on_stdout(hub, folder, capfd):
    printed(folder, REPO, "--json", "--private")
    report = json.loads(capfd.readouterr().out)
    assert report["is_sent"] and report["repository"] == REPO
    assert hub.repositories[REPO].private


# ---- what the hub refuses ----


@pytest.mark.parametrize(
    ("asked", "status", "told"),
    [
        ("repos/create", 401, r"did not take the token. Set HF_TOKEN .* \(401: Nope\)"),
        ("repos/create", 403, r"may not write there.* \(403: Nope\)"),
        ("repos/create", 429, r"asks to wait.* \(429: Nope\)"),
        ("repos/create", 503, r"the hub failed. Push again later.* \(503: Nope\)"),
        ("GET /api/models/me/draft", 404, r"no such repository or branch.* \(404: Nope\)"),
        ("GET /api/models/me/draft", 500, r"the hub failed.* \(500: Nope\)"),
        ("validate-yaml", 502, r"the hub failed.* \(502: Nope\)"),
        ("/preupload/", 403, r"may not write there.* \(403: Nope\)"),
        ("/objects/batch", 403, r"may not write there.* \(403: Nope\)"),
        ("PUT /lfs/", 403, r"may not write there.* \(403: Nope\)"),
        ("/preupload/", 503, r"the hub failed.* \(503: Nope\)"),
        ("/commit/", 401, r"did not take the token.* \(401: Nope\)"),
        ("/commit/", 409, r"conflicts with this one. Push again \(409: Nope\)"),
        ("/commit/", 413, r"the hub refused it \(413: Nope\)"),
        ("/commit/", 500, r"the hub failed.* \(500: Nope\)"),
    ],
)
def test_refusal_of_the_hub_is_one_line(hub, folder, patch, asked, status, told):
    patch.setattr("time.sleep", lambda seconds: None)  # between the client's own tries
    hub.refuse(asked, status, "Nope")
    with pytest.raises(SpeculatorError, match=f"^{REPO}: .*{told}") as error:
        push(folder, REPO)
    assert "\n" not in str(error.value)
    if REPO in hub.repositories:
        assert hub.files(REPO) == {}


def test_refused_push_goes_through_when_it_is_tried_again(hub, folder, patch):
    hub.refuse("/commit/", 500)
    with pytest.raises(SpeculatorError):
        push(folder, REPO)
    hub.allow_all()
    assert push(folder, REPO).is_sent
    assert len(hub.uploads) == 1  # what had arrived was not sent again


def test_token_of_somebody_else_is_told(hub, folder, patch):
    patch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(SpeculatorError, match="did not take the token"):
        push(folder, REPO)
    patch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(SpeculatorError, match="may not write there.*rights to write to them/draft"):
        push(folder, "them/draft")


def test_change_of_others_meanwhile_is_not_overwritten(hub, folder):
    hub.create(REPO)

    def somebody_commits() -> None:
        repository = hub.repositories[REPO]
        repository.add("main", "theirs", dict(repository.branches["main"][-1].files))

    hub.before("/preupload/", somebody_commits)
    with pytest.raises(SpeculatorError, match=r"changed meanwhile. Push again \(412"):
        push(folder, REPO)
    assert hub.repositories[REPO].branches["main"][-1].message == "theirs"


def test_network_that_is_down_is_one_line(hub, folder, patch):
    patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SpeculatorError, match="me/draft: the hub cannot be reached") as error:
        push(folder, REPO)
    assert "\n" not in str(error.value)


def test_offline_mode_is_told(hub, folder, patch):
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SpeculatorError, match="offline mode is enabled"):
        push(folder, REPO)


def test_refused_command_is_one_line_and_exit_code_2(hub, folder, capsys, patch):
    patch.setattr("sys.argv", ["push", str(folder), "them/draft"])
    with pytest.raises(SystemExit, match="2"):
        run_function(run)
    assert (
        capsys.readouterr()
        .err.strip()
        .splitlines()[-1]
        .startswith("error: them/draft: the token may not write there.")
    )


def test_command_in_a_process_of_its_own(hub, folder, tmp_path):
    """With the client as it starts: endpoint, token and cache from the environment."""
    code = (
        "from speculators_core import cli; from speculators_core.commands import push; "
        "cli.run_function(push.run)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), REPO, "--message", "First"],
        env={**os.environ, **environment(hub, tmp_path / "other")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "pushed 3 files" in done.stdout and f"{hub.url}/{REPO}/commit/" in done.stdout
    assert hub.repositories[REPO].branches["main"][-1].message == "First"
