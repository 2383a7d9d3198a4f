import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks import playground
from speculators_core import cli
from speculators_core.cli import main, run_function


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


EAGLE3 = ("--model", str(playground.EAGLE3))
BY_REFERENCE = ("acceptance", "--engine", "transformers")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "/nowhere"), "/nowhere: no such folder"),
        (("--model", str(playground.EAGLE3), "/nowhere"), "/nowhere: no such folder"),
        (("--model", str(playground.VERIFIER)), "no verifier is named. Pass --verifier"),
        (("--model", "prompt-lookup"), "no verifier is named. Pass --verifier"),
        ((*EAGLE3, "--verifier", "/nowhere"), "/nowhere: no such folder"),
        (("--prompts", "nowhere.jsonl"), "nowhere.jsonl: not a readable file of rows"),
        (("--model", "assisted", "--concurrency", "2"), "one request at a time"),
        (("--temperature", "-1"), "temperature"),
        (("--concurrency", "0"), "concurrency"),
    ],
)
def test_bad_argument_is_one_line_and_exit_code_2(capsys, arguments, message):
    assert message in refused(capsys, *BY_REFERENCE, *arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompts"),
        ("\n\n", "holds no prompts"),
        ("{nonsense", "line 1"),
        ('{"category": "x"}', "either a non-empty 'prompt' or non-empty 'messages'"),
        ('{"prompt": ""}', "either a non-empty 'prompt'"),
        ('{"prompt": "' + "word " * 5000 + '"}', "expected fewer than 2048"),
    ],
)
def test_bad_prompts_are_named(capsys, tmp_path, text, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    assert message in refused(capsys, *BY_REFERENCE, *EAGLE3, "--prompts", str(file))


def test_unknown_flag_is_refused(capsys):
    assert "--modle" in refused(capsys, "acceptance", "--modle", "x")


def test_a_value_behind_a_switch_is_explained(capsys):
    error = refused(capsys, "acceptance", "--ignore-eos", "false")
    assert "unexpected 'false' after --ignore-eos, which takes no value" in error
    assert "--no-ignore-eos turns it off" in error


def test_k_below_one_is_refused(capsys):
    assert "--k: Input should be greater than or equal to 1" in refused(
        capsys, "acceptance", "--k", "0"
    )


def test_prompt_longer_than_a_given_max_model_len_is_refused(capsys):
    line = refused(capsys, "acceptance", *EAGLE3, "--engine-args", '{"max_model_len": 9}')
    assert "expected fewer than 9" in line


def test_folder_that_holds_no_model_is_refused(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    line = refused(capsys, *BY_REFERENCE, "--model", str(tmp_path))
    assert "not a speculator" in line


def test_folder_that_cannot_be_written_is_refused_first(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refused(capsys, *BY_REFERENCE, "--output", str(tmp_path / "file"))


def test_version_is_that_of_the_distribution(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == version("speculators-vllm")


def test_both_programs_are_this_command_line():
    project = Path(__file__).parents[1] / "pyproject.toml"
    scripts = tomllib.loads(project.read_text())["project"]["scripts"]
    assert scripts == dict.fromkeys(
        ("speculators", "speculators-vllm"), "speculators_core.cli:main"
    )


def test_an_unknown_command_is_named_though_an_installed_one_is_broken(capsys, monkeypatch):
    paths = {"broken": "no_such_module:run", "check": "speculators_vllm.commands.check:run"}
    monkeypatch.setattr(cli.COMMANDS, "names", lambda: list(paths))
    monkeypatch.setattr(cli.COMMANDS, "path", paths.__getitem__)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["chek"])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith('error: Unknown command "chek". Did you mean ')
    assert told.endswith("'check'? Available commands: broken, check.\n")


def test_a_fault_of_ours_is_no_verdict(capsys):
    """Commands leave with 1 for `not fit`; Python would leave with 1 for any exception."""

    def fail() -> None:
        raise RuntimeError("broken")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["fail"])
        with pytest.raises(SystemExit) as stopped:
            run_function(fail)
    assert stopped.value.code == 3
    assert "RuntimeError: broken" in capsys.readouterr().err
