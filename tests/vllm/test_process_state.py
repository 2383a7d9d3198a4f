"""Importing, registering the plug-in, decoding and training leave the process as it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import make_draft, make_verifier
from tests.training.making import plan_of, write_given

USE = """
import importlib, pkgutil, sys
import torch, vllm.engine.arg_utils

OPTIONAL = {"speculators_core.training.zero"}  # DeepSpeed

def use():
    for face in ("speculators_core", "speculators_vllm.hidden_states"):
        module = importlib.import_module(face)
        for name in module.__all__:
            getattr(module, name)
    for package in ("speculators_core", "speculators_vllm", "benchmarks"):
        found = importlib.import_module(package)
        for module in pkgutil.walk_packages(found.__path__, f"{package}."):
            if not module.name.endswith("__main__") and module.name not in OPTIONAL:
                importlib.import_module(module.name)
    from speculators_vllm.plugin.register import register
    register()
"""
LIST = "use(); print(*(m for m in sys.modules if m.partition('.')[0] not in OURS))"
OURS = "OURS = ('speculators_core', 'speculators_vllm', 'benchmarks', '__main__')\n"
STATE = """
import locale, logging, multiprocessing, os, random, signal, warnings
import datasets, numpy, transformers, yaml

def state():
    loggers = [logging.root, *logging.Logger.manager.loggerDict.values()]
    return {
        "environment": dict(os.environ),
        "loggers": {
            logger.name: (logger.level, logger.propagate, logger.disabled, list(logger.handlers))
            for logger in loggers
            if isinstance(logger, logging.Logger)
            and (logger.level or logger.handlers or logger.disabled or not logger.propagate)
        },
        "warnings": list(warnings.filters),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "hooks": (sys.excepthook, sys.displayhook, sys.meta_path[:], sys.path_hooks[:]),
        "path": sys.path[:],
        "start method": multiprocessing.get_start_method(allow_none=True),
        "folder": os.getcwd(),
        "random states": (
            random.getstate(),
            torch.get_rng_state().tolist(),
            [part if isinstance(part, str | int | float) else part.tolist()
             for part in numpy.random.get_state()],
        ),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch": (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.multiprocessing.get_sharing_strategy(),
        ),
        "yaml": (
            dict(yaml.SafeLoader.yaml_constructors),
            dict(yaml.SafeLoader.yaml_implicit_resolvers),
        ),
        "transformers": (
            transformers.logging.get_verbosity(),
            transformers.logging.is_progress_bar_enabled(),
            list(transformers.models.auto.configuration_auto.CONFIG_MAPPING._extra_content),
            {
                (kind.__name__, name): id(value)
                for kind in (
                    transformers.PreTrainedModel,
                    transformers.PretrainedConfig,
                    transformers.GenerationMixin,
                    transformers.Trainer,
                    transformers.AutoConfig,
                    transformers.AutoModelForCausalLM,
                )
                for name, value in vars(kind).items()
                if callable(value) or isinstance(value, classmethod | property | staticmethod)
            },
            dict(transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS),
            {
                key: id(value)
                for key, value in transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.items()
            },
        ),
        "datasets": (datasets.logging.get_verbosity(), datasets.is_caching_enabled()),
        "locale": locale.setlocale(locale.LC_ALL),
        "recursion": sys.getrecursionlimit(),
    }

def compare(before, after, listed=()):
    changed = {
        name: [one for one in parts(after[name]) if one not in parts(before[name])]
        for name in before
        if before[name] != after[name] and name not in listed
    }
    assert not changed, str(changed)[:2000]

def parts(value):
    return list(value.items()) if isinstance(value, dict) else [value]
"""
IMPORT_OTHERS = """
for name in sys.argv[1:]:  # what others change when they are imported is theirs
    try:
        importlib.import_module(name)
    except Exception:
        continue
"""
COMPARE = "before = state(); use(); compare(before, state())"
WORK = """
import json, tempfile
from pathlib import Path

def work(folder):
    import torch
    from speculators_core.models.eagle3 import Eagle3DraftModel
    from speculators_core.models.speculator import SpeculatorModel
    from speculators_core.settings import load_yaml
    from speculators_core.training.settings import TrainingPlan
    from speculators_core.training.train import train
    from speculators_core.verifier.reading import load_verifier

    verifier = load_verifier(f"{folder}/verifier")
    draft = SpeculatorModel.from_pretrained(f"{folder}/eagle3", verifier=verifier)
    ids = torch.arange(3, 11)[None]
    text = draft.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                          do_sample=False, pad_token_id=0)
    with tempfile.TemporaryDirectory() as output:
        plan = json.loads(Path(folder, "plan.json").read_text())
        plan["run"]["output"] = f"{output}/run"
        train(TrainingPlan.model_validate(plan))
        log = [json.loads(line) for line in Path(output, "run", "training_log.jsonl").open()]
    return {
        "yaml": str(load_yaml("[2001-01-02, yes, 1e3, 0o17, ~, 12:30:00, 0x1f]")),
        "text": text.tolist(),
        "losses": [line.get(key) for line in log for key in ("loss", "eval_loss", "grad_norm")],
    }
"""


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_importing_and_registering_leave_the_process_as_it_was():
    modules = run(USE + OURS + LIST).splitlines()[-1].split()
    run(USE + IMPORT_OTHERS + STATE + COMPARE, *modules)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    folder = write_given(tmp_path_factory.mktemp("process"))
    make_draft("eagle3", make_verifier()).save_pretrained(folder / "eagle3")
    plan = plan_of(folder, folder / "run", evaluation={"decode": False, "every": 1})
    (folder / "plan.json").write_text(plan.model_dump_json())
    return folder


ENDED = {
    "random states": "training starts from its seed, and checkpoints hold the states",
    "start method": "Python settles on its default where a data loader asks for it",
}
"""What decoding and training change of the process, with the reason."""


@pytest.mark.slow
def test_work_gives_the_same_whatever_was_imported_and_leaves_the_process_as_it_was(given):
    show = "print(json.dumps(work(sys.argv[-1])))"
    alone = run(f"import sys{WORK}{show}", str(given))
    measured = f"{USE}{OURS}{WORK}{STATE}use()\nbefore = state()\n{show}\n"
    measured += f"compare(before, state(), {list(ENDED)})"
    imported = run(measured, str(given))
    first, second = (json.loads(out.splitlines()[-1]) for out in (alone, imported))
    assert first == second and first["losses"] and "datetime.date(2001" in first["yaml"]
