"""What is refused before anything starts, and what each option does."""

import json
import shutil
import subprocess
import weakref
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoTokenizer

from benchmarks.acceptance.report import report_k
from speculators_core.cli import main
from speculators_core.commands.train import run as run_command
from speculators_core.data_generation.stores.disk import DiskStore
from speculators_core.diagnosis.acceptance_report import (
    AcceptanceReport,
    DraftReport,
    RequestRecord,
)
from speculators_core.errors import SpeculatorError
from speculators_core.models.speculator import SpeculatorModel
from speculators_core.registry import COMMANDS
from speculators_core.training.evaluation import named_prompts
from speculators_core.training.finish import measure
from speculators_core.training.job import Job, training_arguments
from speculators_core.training.rows.opening import generation_of, open_source
from speculators_core.training.settings import TrainingPlan, read_training_plan
from speculators_core.training.states.run_folder import claim
from speculators_core.training.train import train
from tests.conftest import make_draft, make_verifier
from tests.training.making import log_of, plan_of, sections_of, weights_of


def refused(given, tmp_path, **changes):
    with pytest.raises(SpeculatorError) as caught:
        train(TrainingPlan.read(sections_of(given, tmp_path / "run", **changes), "test"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    return str(caught.value)


# ---- bad input ----


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": {"algorithm": "eagle4"}}, "unknown speculators_model_type 'eagle4'.*eagle3"),
        ({"model": {"recipe": {"num_layer": 2}}}, "model.recipe.*num_layer"),
        ({"model": {"objective": {"num_steps": 2}}}, "model.objective.*num_steps"),
        ({"model": {"objective": {"ttt_steps": 0}}}, "ttt_steps"),
        (
            {"model": {"recipe": {"aux_layer_ids": [0, 1]}}},
            r"reads layers \[0, 1\].*\[1, 2, 3, 4\]",
        ),
        ({"data": {"store": "nowhere"}}, "nowhere holds no store.json"),
        ({"data": {"store": None}}, "one of store, queue, online, texts must be set, found none"),
        ({"data": {"texts": "a.yaml"}}, "found store, texts"),
        ({"run": {"max_steps": 0}}, "max_steps"),
        ({"optimizer": {"schedule": "step"}}, "schedule"),
        ({"optimizer": {"schedule": "linear", "final_share": 0.1}}, "final_share is for schedule"),
        ({"evaluation": {"decode": False, "patience": 2}}, "patience 2 has no effect: .*decode"),
        ({"evaluation": {"decode": False, "num_prompts": 2}}, "num_prompts 2 has no effect"),
        ({"evaluation": {"decode": False, "max_tokens": 9}}, "max_tokens 9 has no effect"),
        ({"evaluation": {"decode": False, "prompts": "p"}}, "prompts p has no effect"),
        ({"data": {"eval_examples": 0}}, "roll_outs 12 has no effect: data.eval_examples is 0"),
        ({"data": {"queue_size": 7}}, "queue_size 7 has no effect: data.store has no queue"),
        ({"data": {"store": None, "texts": "t", "num_workers": 1}}, "num_workers 1 has no effect"),
        ({"run": {"epochs": 2.0}}, "epochs 2.0 has no effect: run.max_steps is set"),
        ({"model": {"start_from": "other"}}, "one of algorithm .* and start_from"),
        ({"model": {"draft_vocab_size": 5000}}, "draft_vocab_size is 5000; expected"),
        ({"model": {"verifier": "nowhere"}}, "nowhere"),
        ({"run": {"fsdp": True}}, "run.fsdp shards over several processes, found one"),
    ],
)
def test_a_fault_is_one_line_and_nothing_is_written(given, tmp_path, changes, message):
    import re

    assert re.search(message, refused(given, tmp_path, **changes))


def test_data_of_another_verifier_are_refused(given, tmp_path):
    make_verifier(hidden_size=64).save_pretrained(tmp_path / "wide")
    message = refused(given, tmp_path, model={"verifier": str(tmp_path / "wide")})
    assert "its width is 32, not 64" in message
    torch.manual_seed(3)
    other = make_verifier()
    other.lm_head.weight.data += 0.1
    other.save_pretrained(tmp_path / "other")
    message = refused(given, tmp_path, model={"verifier": str(tmp_path / "other")})
    assert "its config.json or weights differ" in message


def test_an_empty_store_is_refused(given, tmp_path):
    schema = DiskStore.open(given / "states").schema
    DiskStore.create(tmp_path / "empty", schema).close()
    assert "holds no examples" in refused(given, tmp_path, data={"store": str(tmp_path / "empty")})


def test_an_unknown_key_of_the_file_is_refused(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"modle": {}}))
    with pytest.raises(SystemExit) as left:
        main(["train", "--config", str(file)])
    assert left.value.code == 2
    assert "unknown section 'modle'" in capsys.readouterr().err


# ---- options ----


def test_dashes_are_underscores_in_the_file(given, tmp_path):
    sections = sections_of(given, tmp_path / "run")
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(sections, default_flow_style=False))
    plan = read_training_plan(file)
    dashed = {
        name: {key.replace("_", "-"): value for key, value in options.items()}
        for name, options in sections.items()
    }
    dashed["model"]["objective"] = {"ttt-steps": 2}
    file.write_text(yaml.safe_dump(dashed))
    assert read_training_plan(file) == plan


def test_flags_win_over_the_file(given, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(sections_of(given, tmp_path / "run")))
    above = read_training_plan(file).optimizer.model_copy(update={"learning_rate": 0.5})
    given_flag = type(above).model_validate({"learning_rate": 0.5})
    plan = read_training_plan(file, {"optimizer": given_flag, "run": None})
    assert plan.optimizer.learning_rate == 0.5
    assert plan.run.max_steps == 8


def test_one_flag_wins_over_the_file_and_of_a_mapping_key_by_key(given, tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    recipe = {"num_layers": 1, "norm_output": False}
    file.write_text(yaml.safe_dump(sections_of(given, tmp_path, model={"recipe": recipe})))
    read = []
    monkeypatch.setattr("speculators_core.training.train.rehearse", lambda plan: read.append(plan))
    for flags in (
        ["--model.recipe.num_layers", "2", "--model.recipe.aux_layer_ids", "[1, 2, 3]"],
        ["--model.recipe", '{"num_layers": 2, "aux_layer_ids": [1, 2, 3]}'],
    ):
        flags += ["--data.row-length", "32", "--run.max-steps", "5"]
        with pytest.raises(SystemExit):
            main(["train", "--config", str(file), *flags, "--dry-run"])
    for plan in read:
        assert plan.model.recipe == {
            "num_layers": 2,
            "norm_output": False,
            "aux_layer_ids": [1, 2, 3],
        }
        assert plan.model.objective == {"ttt_steps": 2}
        assert (plan.data.row_length, plan.run.max_steps) == (32, 5)
    assert len(read) == 2


def test_a_plan_in_full_has_no_idle_options(given, tmp_path):
    plan = short(given, tmp_path / "run")
    assert TrainingPlan.model_validate(plan.model_dump()) == plan


@pytest.fixture(scope="module")
def plain(given, tmp_path_factory):
    """The weights of a short run, to compare others with."""
    folder = tmp_path_factory.mktemp("plain")
    return weights_of(train(short(given, folder / "run")).speculator)


def short(given, output, **changes):
    quiet = {"evaluation": {"decode": False, "roll_outs": 0}, "run": {"max_steps": 4}}
    merged = {name: quiet.get(name, {}) | changes.get(name, {}) for name in quiet | changes}
    return plan_of(given, output, **merged)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"name": "adamw"}},
        {"optimizer": {"learning_rate": 1e-4}},
        {"optimizer": {"weight_decay": 0.0, "learning_rate": 0.1}},
        {"optimizer": {"schedule": "linear"}},
        {"optimizer": {"schedule": "constant"}},
        {"optimizer": {"warmup_share": 0.9}},
        {"optimizer": {"final_share": 0.9}},
        {"optimizer": {"max_grad_norm": 1e-3}},
        {"optimizer": {"rows_per_step": 2}},
        {"data": {"row_length": 32}},
        {"data": {"eval_examples": 0}},
        {"data": {"limit": 3}},
        {"run": {"seed": 1}},
        {"run": {"dtype": "bfloat16"}},
        {"run": {"max_steps": 2}},
        {"model": {"objective": {"ttt_steps": 1}}},
        {"model": {"recipe": {"norm_output": False}}},
    ],
    ids=str,
)
def test_each_option_of_learning_changes_the_weights(given, tmp_path, plain, changes):
    if "weight_decay" in str(changes):  # against the same rate with decay
        rate = {"optimizer": {"learning_rate": 0.1}}
        plain = weights_of(train(short(given, tmp_path / "with", **rate)).speculator)
    found = weights_of(train(short(given, tmp_path / "run", **changes)).speculator)
    assert any(not torch.equal(found[name], plain[name]) for name in plain)


def test_options_that_do_not_decide_leave_the_weights(given, tmp_path, plain):
    run = {"log_every": 2, "keep": 1, "save_every": 1, "license": "mit", "max_steps": 4}
    found = weights_of(train(short(given, tmp_path / "run", run=run)).speculator)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]
    assert len([line for line in log_of(tmp_path / "run") if "loss" in line]) == 4
    assert "license: mit" in (tmp_path / "run" / "speculator" / "README.md").read_text()


def test_gradient_checkpointing_computes_again_and_changes_nothing(given, tmp_path, plain):
    calls = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: calls.append(type(module).__name__)
    )
    found = weights_of(train(short(given, tmp_path / "plain")).speculator)
    num_plain = calls.count("LlamaMLP")
    calls.clear()
    run = {"gradient_checkpointing": True, "max_steps": 4}
    again = weights_of(train(short(given, tmp_path / "run", run=run)).speculator)
    hook.remove()
    assert calls.count("LlamaMLP") > num_plain
    assert all(torch.equal(again[name], found[name]) for name in found)


@pytest.mark.slow
def test_compiled_layers_compute_the_same(given, tmp_path, plain):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = {"compile": True, "max_steps": 4}
    found = weights_of(train(short(given, tmp_path / "run", run=run)).speculator)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert all(torch.allclose(found[n].float(), plain[n].float(), atol=1e-2) for n in plain)


def test_workers_read_the_same_rows(given, tmp_path, plain):
    data = {"num_workers": 1}
    found = weights_of(train(short(given, tmp_path / "run", data=data)).speculator)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_epochs_decide_the_steps(given, tmp_path):
    with Job.open(plan_of(given, tmp_path, run={"max_steps": None, "epochs": 2.0})) as job:
        assert job.num_steps == 2 * len(job.rows)
    halved = {"run": {"max_steps": None, "epochs": 1.0}, "optimizer": {"rows_per_step": 2}}
    with Job.open(plan_of(given, tmp_path, **halved)) as job:
        assert job.num_steps == -(-len(job.rows) // 2)


def test_saved_dtype_and_verifier_name_are_written(given, tmp_path):
    plan = short(
        given,
        tmp_path / "run",
        run={"saved_dtype": "float32"},
        model={"verifier_name": "org/verifier"},
    )
    speculator = train(plan).speculator
    config = json.loads((speculator / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == "org/verifier"
    assert config["dtype"] == "float32"
    assert all(w.dtype == torch.float32 for w in weights_of(speculator).values())


def test_a_reduced_vocabulary_has_the_frequent_and_the_special_tokens(given, tmp_path):
    plan = short(given, tmp_path / "run", model={"draft_vocab_size": 40})
    draft = SpeculatorModel.from_pretrained(train(plan).speculator)
    assert draft.config.draft_vocab_size == 40 and int(draft.t2d.sum()) == 40


def test_a_draft_goes_on_learning(given, tmp_path):
    first = train(short(given, tmp_path / "first")).speculator
    going_on = {"algorithm": None, "start_from": str(first), "recipe": {}}
    none = {"optimizer": {"learning_rate": 1e-12}, "model": going_on}
    again = weights_of(train(short(given, tmp_path / "again", **none)).speculator)
    before = weights_of(first)
    assert all(torch.allclose(again[n].float(), before[n].float(), atol=1e-2) for n in before)


def test_a_draft_is_shaped_by_a_config(given, tmp_path):
    recipe = {"norm_output": False, "num_layers": 2}
    first = train(short(given, tmp_path / "first", model={"recipe": recipe})).speculator
    shaped = {"recipe": {}, "draft_config": str(first / "config.json")}
    draft = SpeculatorModel.from_pretrained(
        train(short(given, tmp_path / "again", model=shaped)).speculator
    )
    assert not draft.config.norm_output and len(draft.layers) == 2
    message = refused(given, tmp_path, model={**shaped, "algorithm": "mtp", "objective": {}})
    assert "config of a eagle3 draft; expected mtp" in message


def test_patience_ends_a_run_early(given, tmp_path):
    plan = plan_of(
        given,
        tmp_path / "run",
        optimizer={"learning_rate": 1e-12},
        evaluation={"every": 1, "patience": 2},
        run={"max_steps": 30},
    )
    steps = train(plan).steps
    (tmp_path / "run" / "report.json").unlink()
    assert train(plan).steps == steps < 30


def test_the_best_state_becomes_the_speculator(given, tmp_path, monkeypatch):
    lengths = iter([1.5, 3.0, 2.0])
    monkeypatch.setattr(
        "speculators_core.training.job.measure_acceptance",
        lambda *_: {"acceptance_length": next(lengths)},
    )
    plan = plan_of(
        given, tmp_path / "run", evaluation={"every": 1}, run={"max_steps": 3, "keep": 1}
    )
    report = train(plan)
    assert report.best_step == 2 and report.figures["acceptance_length"] == 3.0
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-3"]
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    from safetensors.torch import load_file

    best = load_file(tmp_path / "run" / "checkpoint-2" / "weights.safetensors")
    found = weights_of(report.speculator)
    assert torch.equal(found["fc.weight"], best["fc.weight"].to(torch.bfloat16))


def test_evaluation_options_have_effects(given, tmp_path):
    plan = plan_of(given, tmp_path / "run", evaluation={"decode": False, "every": 3})
    train(plan)
    lines = [line for line in log_of(tmp_path / "run") if "eval_loss" in line]
    assert [line["step"] for line in lines] == [3, 6, 8]
    assert not any("eval_acceptance_length" in line for line in lines)
    assert "eval_predicted_acceptance_length" in lines[0]


def test_a_tracker_that_is_missing_is_said_before_anything_starts(given, tmp_path, monkeypatch):
    monkeypatch.setattr("speculators_core.training.job.find_spec", lambda name: None)
    message = refused(given, tmp_path, run={"trackers": ["wandb"]})
    assert "wandb is not installed" in message


def test_trackers_get_the_figures(given, tmp_path):
    arguments = training_arguments(short(given, tmp_path, run={"trackers": ["tensorboard"]}), 3)
    assert arguments.report_to == ["tensorboard"]


def test_prompts_that_are_missing_are_said_before_anything_is_loaded(given, tmp_path, monkeypatch):
    monkeypatch.delattr("speculators_core.training.job.load_verifier")
    message = refused(given, tmp_path, data={"eval_examples": 0}, evaluation={"roll_outs": 0})
    assert "evaluation.decode has no prompts" in message
    monkeypatch.delattr("speculators_core.training.rows.opening.TextExamples")
    for source in ({}, {"store": None, "texts": str(given / "data.yaml")}):
        prompts = {"prompts": "nowhere.jsonl"}
        assert "nowhere.jsonl" in refused(given, tmp_path, data=source, evaluation=prompts)


def test_a_dry_run_looks_at_the_folder(given, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(sections_of(given, tmp_path)))
    with pytest.raises(SpeculatorError, match="holds notes.txt and not a run"):
        run_command(config=file, dry_run=True)


def test_a_folder_that_another_process_has_is_refused_before_data_are_opened(
    given, tmp_path, monkeypatch
):
    monkeypatch.delattr("speculators_core.training.job.open_source")
    plan = plan_of(given, tmp_path / "run")
    with claim(plan), pytest.raises(SpeculatorError, match="another run is writing there"):
        train(plan)


def test_tokens_count_without_padding_and_memory_is_given_back(given, tmp_path):
    with Job.open(plan_of(given, tmp_path)) as job:
        trainer = job.trainer = job.make_trainer()
        batches = [job.rows[0], job.rows[1]]
        _, trained = trainer.get_batch_samples(iter(batches), 2, torch.device("cpu"))
        assert trained == sum(int(batch["loss_mask"].sum()) for batch in batches)
        lengths = job.source.lengths[[number for row in job.rows.rows[:2] for number in row]]
        assert trainer.state.num_input_tokens_seen == lengths.sum() < 2 * 64
        held = [weakref.ref(x) for x in (trainer.optimizer, job.draft, job.draft.verifier)]
        del trainer
        job.release()
        assert [reference() for reference in held] == [None] * 3


def test_each_process_loads_the_verifier_of_its_texts_on_its_own_device(
    given, tmp_path, monkeypatch
):
    monkeypatch.setattr("speculators_core.training.rows.opening.TextExamples", lambda plan: plan)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    data = {"store": None, "texts": str(given / "data.yaml")}
    plan = plan_of(given, tmp_path, data=data)
    opened = open_source(plan, generation_of(plan), ExitStack())
    assert opened.engine.device == "cuda:1"


@pytest.mark.parametrize("evaluation", [{}, {"decode": False}], ids=["whole", "head alone"])
@pytest.mark.parametrize("is_fresh", [True, False], ids=["fresh", "started from"])
def test_code_of_the_verifier_is_trusted_by_every_reader(
    given, tmp_path, monkeypatch, verifier, evaluation, is_fresh
):
    model = {"trust_remote_code": True}
    if is_fresh:
        model |= {"draft_vocab_size": 40}
    else:
        make_draft("eagle3", verifier).save_pretrained(tmp_path / "draft")
        model |= {"algorithm": None, "start_from": str(tmp_path / "draft"), "recipe": {}}
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w5 w6 w7"}')
    prompts = {} if evaluation else {"prompts": str(tmp_path / "prompts.jsonl")}
    trusted = []

    def watched(read):
        def reading(*args, trust_remote_code=None, **kwargs):
            trusted.append(trust_remote_code)
            return read(*args, trust_remote_code=trust_remote_code, **kwargs)

        return reading

    for auto in (AutoConfig, AutoTokenizer):
        monkeypatch.setattr(auto, "from_pretrained", watched(auto.from_pretrained))
    with Job.open(plan_of(given, tmp_path, model=model, evaluation={**evaluation, **prompts})):
        pass
    assert trusted and all(trusted)


def test_prompts_that_were_decoded_are_measured_by_category(given, tmp_path, monkeypatch):
    rows = [{"prompt": f"w{n}", "category": "ab"[n % 2]} for n in range(6)]
    (tmp_path / "all.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    section = {"prompts": str(tmp_path / "all.jsonl"), "num_prompts": 3}
    plan = plan_of(given, tmp_path / "run", evaluation=section)
    (tmp_path / "run").mkdir()
    record = RequestRecord(
        category="a", num_prompt_tokens=1, output_ids=[1, 2], accepted=[1], seconds=1.0
    )

    def measured(*arguments):
        """What `speculators acceptance` leaves."""
        output = Path(arguments[arguments.index("--output") + 1])
        report = AcceptanceReport(
            settings={},
            verifier="v",
            verifier_sha256=None,
            environment={},
            prompts_sha256="0",
            baseline_tokens_per_s=[],
            baseline_requests=[],
            drafts=[
                DraftReport(
                    name="d",
                    kind="speculator",
                    sha256=None,
                    by_k=[report_k(3, [[record] * 3], [], greedy=True)],
                )
            ],
        )
        output.mkdir()
        (output / "report.json").write_text(report.model_dump_json())
        asked.append(Path(arguments[arguments.index("--prompts") + 1]).read_text().splitlines())
        return subprocess.CompletedProcess(arguments, 0, "", "")

    asked = []
    monkeypatch.setattr("speculators_core.training.finish._command", measured)
    monkeypatch.setattr(COMMANDS, "names", lambda: ["acceptance"])
    found = measure(tmp_path / "run" / "speculator", plan, named_prompts(plan.evaluation))
    assert [[json.loads(line) for line in lines] for lines in asked] == [
        [rows[0], rows[2], rows[4]]
    ]
    assert "--prompts prompts.jsonl" in found.command and str(tmp_path) not in found.command
