"""Importing the packages and registering the plug-in change nothing of the process."""

import subprocess
import sys

import pytest

USE = """
import importlib, sys
import torch, vllm.engine.arg_utils

def use():
    for face in ("speculators_core", "speculators_vllm.hidden_states"):
        module = importlib.import_module(face)
        for name in module.__all__:
            getattr(module, name)
    from speculators_vllm.plugin.register import register
    register()
"""
LIST = "use(); print(*(m for m in sys.modules if not m.startswith(('speculators', '__main__'))))"
COMPARE = """
import logging, multiprocessing, os, random, signal, warnings
import datasets, transformers, yaml

for name in sys.argv[1:]:  # what others change when they are imported is theirs
    try:
        importlib.import_module(name)
    except Exception:
        continue

def state():
    loggers = [logging.root, *logging.Logger.manager.loggerDict.values()]
    return {
        "environment": dict(os.environ),
        "loggers": {
            logger.name: (logger.level, logger.propagate, logger.disabled, list(logger.handlers))
            for logger in loggers
            if isinstance(logger, logging.Logger)
            and (logger.level or logger.handlers or not logger.name.startswith("speculators"))
        },
        "warnings": list(warnings.filters),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "hooks": (sys.excepthook, sys.displayhook, sys.meta_path[:], sys.path_hooks[:]),
        "path": sys.path[:],
        "start method": multiprocessing.get_start_method(allow_none=True),
        "folder": os.getcwd(),
        "random states": (random.getstate(), torch.get_rng_state().tolist()),
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
        ),
        "datasets": (datasets.logging.get_verbosity(), datasets.is_caching_enabled()),
    }

before = state()
use()
after = state()
changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
assert not changed, changed
"""


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_importing_and_registering_leave_the_process_as_it_was():
    modules = run(USE + LIST).splitlines()[-1].split()
    run(USE + COMPARE, *modules)
