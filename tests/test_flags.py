"""Flags beside a file, as a command of its own prints what they set."""

import json
from typing import Annotated

import pytest
from cyclopts import Parameter
from pydantic import Field

from speculators_core.cli import run_function
from speculators_core.flags import JsonOptions, Several, flags_of, optional
from speculators_core.settings import Settings


class InnerConfig(Settings):
    """Inside a section."""

    last: bool = True
    """Whether the last."""
    ids: Annotated[tuple[int, ...] | None, Several] = None
    """Numbers."""


class ModelConfig(Settings):
    """The model."""

    verifier: str = Field(min_length=1)
    """Name of the verifier."""
    recipe: JsonOptions = Field(default_factory=dict)
    """Shape."""
    inner: InnerConfig = Field(default_factory=InnerConfig)


class RunConfig(Settings):
    """The run."""

    workers: int = Field(1, ge=1)
    """Number of workers."""
    check: bool = True
    """Check the result."""


class Plan(Settings):
    model: ModelConfig
    run: RunConfig = Field(default_factory=RunConfig)


PlanFlags = flags_of(Plan)


def command(*, flags: Annotated[PlanFlags | None, Parameter(name="*")] = None) -> None:
    """Prints what was set."""
    print(json.dumps(None if flags is None else flags.stated()))


@pytest.fixture
def call(capsys, monkeypatch):
    """Exit code, standard output and errors of the command with these words."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["command", *words])
        with pytest.raises(SystemExit) as end:
            run_function(command)
        return end.value.code or 0, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("words", "stated"),
    [
        ("", None),
        ("--run.workers 2", {"run": {"workers": 2}}),
        ("--run.no-check", {"run": {"check": False}}),
        ("--no-run.check", {"run": {"check": False}}),
        ("--no_run.check", {"run": {"check": False}}),
        ("--model.inner.no_last", {"model": {"inner": {"last": False}}}),
        ("--no-model.inner.last", {"model": {"inner": {"last": False}}}),
        ("--model.inner.ids 3 4", {"model": {"inner": {"ids": [3, 4]}}}),
        ("--model.inner.ids", {"model": {"inner": {"ids": []}}}),
        ("--model.recipe.mask-token-id 3", {"model": {"recipe": {"mask_token_id": 3}}}),
        ("--model.recipe.mask_token_id 3", {"model": {"recipe": {"mask_token_id": 3}}}),
        ("--model.recipe.is-a true --model.recipe.b word",
         {"model": {"recipe": {"is_a": True, "b": "word"}}}),
        ("--model.recipe.a-b.c-d [1,2]", {"model": {"recipe": {"a_b": {"c_d": [1, 2]}}}}),
        ('--model.recipe {"a-b":"3"}', {"model": {"recipe": {"a_b": "3"}}}),
    ],
)  # fmt: skip
def test_flags_set_what_they_say(call, words, stated):
    code, out, _ = call(*words.split())
    assert code == 0
    assert json.loads(out) == stated


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--run.workers 0", "--run.workers: Input should be greater than or equal to 1"),
        ("--run.wokers 2", "Unknown option: --run.wokers. Did you mean --run.workers?"),
        ("--no-run.chek", "Unknown option: --run.no-chek. Did you mean --run.no-check?"),
        ("--run.check false", "unexpected 'false' after --run.check, which takes no value: "
         "--run.check turns it on, --run.no-check turns it off."),
        ("word", "unexpected 'word'; see --help."),
        ("--model.recipe 3", "--model.recipe: Input should be a valid dictionary"),
        ("--model.inner.ids 1 x", "--model.inner.ids: Input should be a valid integer"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_flag(call, words, complaint):
    code, _, err = call(*words.split())
    assert code == 2
    assert complaint in err and err.count("\n") == 1


def test_help_has_a_group_for_each_section_and_marks_what_is_required(call):
    _, out, _ = call("--help")
    text = " ".join(out.replace("│", " ").split())
    model, run = text.index("─ Model ─"), text.index("─ Run ─")
    assert "The model. --model.verifier STR Name of the verifier. Required, here or in" in text
    assert model < text.index("--model.recipe JSON") < run < text.index("--run.workers INT")
    assert "--run.check --run.no-check" in text
    assert text.count("Required") == 1


def test_an_option_may_be_left_out_of_the_flags():
    flags = optional(ModelConfig, leave_out=("verifier",))
    assert list(flags.model_fields) == ["recipe", "inner"]
    assert flags().stated() == {}
