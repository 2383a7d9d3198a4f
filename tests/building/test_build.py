"""From a verifier and prompts to a speculator, in one call that resumes."""

import json
import shutil
from pathlib import Path

import pytest

from speculators_core.building import build as building
from speculators_core.building.build import NAMES, BuildReport, build, print_report
from speculators_core.building.rehearsal import rehearse
from speculators_core.data_generation.answers import local_model
from speculators_core.errors import SpeculatorError
from speculators_core.models.speculator import SpeculatorModel
from tests.building.making import NUM_PROMPTS, TEMPLATE, plan_of, write_given, write_template


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return write_given(tmp_path_factory.mktemp("building"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(given, tmp_path):
    shutil.copytree(given, tmp_path / "given")
    return tmp_path / "given"


def done_before(report: BuildReport) -> list[str]:
    return [stage.name for stage in report.stages if stage.was_done]


def stage_folder(folder: Path, name: str) -> Path:
    (found,) = (folder / "build").glob(f"*-{name}-*")
    return found


@pytest.fixture(scope="module")
def built(given, tmp_path_factory):
    """A whole build with measured prompts, and its report."""
    folder = tmp_path_factory.mktemp("built") / "given"
    shutil.copytree(given, folder)
    evaluation = {"max_tokens": 4, "roll_outs": 0, "num_prompts": 2, "decode": True}
    return folder, build(plan_of(folder, evaluation=evaluation))


def test_a_build_ends_with_a_measured_speculator_and_its_card(built):
    folder, report = built
    assert [stage.name for stage in report.stages] == list(NAMES)
    assert done_before(report) == []
    speculator = SpeculatorModel.from_pretrained(report.speculator)
    assert speculator.config.speculators_model_type == "eagle3"
    assert set(report.categories) == {"even", "odd"}
    card = (report.speculator / "README.md").read_text()
    assert "even" in card and "odd" in card


def test_answers_are_the_token_ids_that_the_verifier_wrote(built):
    folder, report = built
    rows = (stage_folder(folder, "answers") / "answers.jsonl").read_text().splitlines()
    assert len(rows) == NUM_PROMPTS - 2  # one of each category is measured
    for row in map(json.loads, rows):
        written = [i for i, own in zip(row["input_ids"], row["loss_mask"], strict=True) if own]
        assert row["loss_mask"] == [0] * 10 + [1] * len(written)
        assert row["input_ids"][0] == 4 and row["input_ids"][9] == 5
        # An answer that is cut after 6 tokens has no end of turn.
        assert len(written) == 6 or written[-1] == 1


def test_measured_prompts_are_not_trained_on(built):
    folder, _ = built
    path = stage_folder(folder, "prompts")
    train, measured = (
        {json.loads(line)["messages"][0]["content"] for line in (path / name).open()}
        for name in ("train.jsonl", "measured.jsonl")
    )
    assert len(measured) == 2 and len(train) == NUM_PROMPTS - 2 and not train & measured


@pytest.mark.parametrize("name", NAMES)
def test_a_build_that_dies_at_the_end_of_a_stage_resumes_there(folder, monkeypatch, name):
    write = building.StageFolder.write

    def dying(self, record):
        if self.name == name:
            raise KeyboardInterrupt
        write(self, record)

    monkeypatch.setattr(building.StageFolder, "write", dying)
    with pytest.raises(KeyboardInterrupt, match=f"{name}.*kept. Run the same command again"):
        build(plan_of(folder))
    monkeypatch.setattr(building.StageFolder, "write", write)
    if name != "prompts":  # the answers are there, so no verifier loads to answer
        monkeypatch.setattr(local_model, "load_verifier", None)
    report = build(plan_of(folder))
    assert done_before(report) == list(NAMES[: NAMES.index(name)])
    assert done_before(build(plan_of(folder))) == list(NAMES)


@pytest.mark.parametrize(
    ("changes", "kept"),
    {
        "another learning rate": ({"optimizer": {"learning_rate": 2e-3}}, NAMES[:3]),
        "other layers": ({"model": {"recipe": {"aux_layer_ids": [1, 2, 4]}}}, NAMES[:2]),
        "longer answers": (
            {"answers": {"engine": "transformers", "sampling": {"max_tokens": 5}}},
            NAMES[:1],
        ),
        "what decides nothing": ({"run": {"license": "mit"}}, NAMES),
    }.values(),
)
def test_a_changed_plan_runs_its_stage_and_those_after_it(folder, changes, kept):
    plan = plan_of(folder)
    build(plan)
    for section, options in changes.items():
        merged = getattr(plan, section).model_dump(exclude_unset=True) | options
        changes = changes | {section: merged}
    assert done_before(build(plan_of(folder, **changes))) == list(kept)
    assert done_before(build(plan)) == list(NAMES)  # nothing of the first build was overwritten


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("prompts", "train.jsonl"),
        ("answers", "answers.jsonl"),
        ("training", "speculator/config.json"),
    ],
)
def test_a_folder_that_was_edited_is_refused_and_stays(folder, name, file):
    build(plan_of(folder))
    path = stage_folder(folder, name) / file
    edited = path.read_text() + " "
    path.write_text(edited)
    with pytest.raises(SpeculatorError, match=f"{file} was changed after stage {name}"):
        build(plan_of(folder))
    assert path.read_text() == edited
    path.unlink()
    with pytest.raises(SpeculatorError, match=f"{file} is missing"):
        build(plan_of(folder))


TALKER = TEMPLATE.replace("{% if add_generation_prompt %}5 {% endif %}", "")


@pytest.mark.parametrize(
    ("template", "message"),
    {
        "no generation prompt": (TALKER, "would have to write '5' itself"),
        "refuses users": ("{{ raise_exception('no users') }}", "refuses a question.*no users"),
    }.values(),
)
def test_a_template_that_cannot_ask_is_refused_before_anything_is_written(
    folder, template, message
):
    write_template(folder, template)
    with pytest.raises(SpeculatorError, match=message):
        build(plan_of(folder))
    assert not (folder / "build").exists()


def test_a_template_whose_answers_follow_directly_needs_no_generation_prompt(folder):
    write_template(folder, "{% for m in messages %}{{ m.content }} {% endfor %}")
    building.Build(plan_of(folder))


def test_a_verifier_without_a_template_or_without_an_end_is_refused(folder):
    (folder / "verifier" / "chat_template.jinja").unlink()
    with pytest.raises(SpeculatorError, match="no chat template.*Add the template"):
        build(plan_of(folder))
    write_template(folder, TEMPLATE)
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        path = folder / "verifier" / name
        content = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in content.items() if "eos" not in k}))
    with pytest.raises(SpeculatorError, match="no token ends an answer.*Add one of them"):
        build(plan_of(folder))


def test_a_template_that_writes_the_date_is_warned_of(folder, caplog):
    write_template(folder, "{{ strftime_now('%d') }} " + TEMPLATE)
    building.Build(plan_of(folder))
    assert "writes today's date" in caplog.text
    caplog.clear()
    write_template(folder, TEMPLATE)
    building.Build(plan_of(folder))
    assert "date" not in caplog.text


def test_a_disk_that_is_too_small_for_the_states_is_found_before_they_are_made(folder, monkeypatch):
    monkeypatch.setattr(building, "free_disk_bytes", lambda _: 1000)
    with pytest.raises(SpeculatorError, match="stage 3 of 4, states.*GiB are free. Make room"):
        build(plan_of(folder))
    monkeypatch.undo()
    assert done_before(build(plan_of(folder))) == list(NAMES[:2])


def test_a_disk_that_fills_up_in_a_stage_loses_nothing(folder, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(building, "generate_data", full)
    with pytest.raises(SpeculatorError, match="stage 3 of 4.*kept: make room on the disk and run"):
        build(plan_of(folder))
    monkeypatch.undo()
    assert done_before(build(plan_of(folder))) == list(NAMES[:2])


def test_categories_without_gain_are_named(capsys):
    report = BuildReport(
        speculator=Path("built"), stages=(), categories={"code": 2.0, "talk": 1.09}
    )
    print_report(report)
    assert "no gain (tau below 1.1): talk." in capsys.readouterr().out


def test_a_dry_run_states_the_costs_and_writes_nothing(folder, capsys):
    prompts, answers, states, training = rehearse(plan_of(folder))
    assert not (folder / "build").exists()
    assert {stage.state for stage in (prompts, answers, states, training)} == {"to do"}
    assert prompts.num_tokens == 10 * NUM_PROMPTS
    # At most 6 tokens an answer, beside 10 of its prompt; four states of width 32 in bfloat16.
    assert NUM_PROMPTS <= answers.num_tokens <= 6 * NUM_PROMPTS
    assert states.num_tokens == prompts.num_tokens + answers.num_tokens
    assert states.disk_bytes == states.num_tokens * 4 * 32 * 2
    assert training.num_tokens == 2 * 48  # two rows
    assert all(stage.seconds > 0 for stage in (answers, states, training))
    assert "most of it" in capsys.readouterr().out


def test_a_dry_run_of_a_build_that_is_done_measures_nothing(built, monkeypatch):
    folder, _ = built
    monkeypatch.setattr(local_model, "load_verifier", None)
    evaluation = {"max_tokens": 4, "roll_outs": 0, "num_prompts": 2, "decode": True}
    stages = rehearse(plan_of(folder, evaluation=evaluation))
    assert [stage.state for stage in stages] == ["done"] * 4
