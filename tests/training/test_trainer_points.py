import ast
import inspect
from pathlib import Path

import pytest
import transformers
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

import speculators_core.training
from speculators_core.errors import SpeculatorError
from speculators_core.training import trainer_points
from speculators_core.training.trainer_points import POINTS, TESTED, check_trainer

CODE = Path(speculators_core.training.__file__).parent
OWNERS = (
    Trainer,
    TrainingArguments,
    TrainerState,
    TrainerControl,
    TrainerCallback,
    CallbackHandler,
)
IN_COMMON_USE = {
    "accelerator",
    "args",
    "callback_handler",
    "control",
    "lr_scheduler",
    "optimizer",
    "state",
}
"""Attributes that the docstring of Trainer does not name, though most subclasses use them."""


@pytest.fixture(autouse=True)
def warns_anew():
    trainer_points._warn_of_untested_version.cache_clear()
    yield
    trainer_points._warn_of_untested_version.cache_clear()


def attributes_in(tree: ast.AST) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def names_used_by_training() -> set[str]:
    """Attributes that the code reads or writes, and methods that it defines."""
    used: set[str] = set()
    for file in CODE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        methods = (node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        used |= attributes_in(tree) | set(methods)
    return used


def test_code_uses_no_private_point_that_is_not_listed():
    private: set[str] = set()
    for owner in OWNERS:
        names = {*dir(owner), *attributes_in(ast.parse(inspect.getsource(owner)))}
        private |= {name for name in names if name.startswith("_") and not name.startswith("__")}
    listed = {point.name for point in POINTS}
    assert (names_used_by_training() & private) <= listed
    assert listed <= names_used_by_training()


def test_code_uses_no_undocumented_attribute_of_trainer_that_is_not_listed():
    written = of_self(inspect.getsource(Trainer), ast.Store)
    undocumented = {name for name in written if name not in (Trainer.__doc__ or "")}
    own = of_self((CODE / "trainer.py").read_text(), ast.expr_context)
    assert (own & undocumented) - IN_COMMON_USE <= {point.name for point in POINTS}


def of_self(source: str, context: type[ast.expr_context]) -> set[str]:
    """Attributes of ``self`` in this context: read, written or either."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        and isinstance(node.ctx, context)
    }


def test_installed_version_has_all_points(caplog):
    found = tuple(map(int, transformers.__version__.split(".")[:2]))
    check_trainer(is_sharded=found >= (5, 19))
    assert bool(caplog.text) == (not TESTED[0] <= found <= TESTED[1])


@pytest.mark.parametrize("version", ["5.15.2", "5.99.0.dev0", "6.0.0"])
def test_untested_version_is_warned_of_once(monkeypatch, caplog, version):
    monkeypatch.setattr(transformers, "__version__", version)
    check_trainer(is_sharded=False)
    check_trainer(is_sharded=False)
    (record,) = caplog.records
    assert "tested with transformers 5.16 to" in record.message and version in record.message


def test_method_that_is_missing_is_named(monkeypatch):
    monkeypatch.delattr(Trainer, "_get_grad_norm")
    with pytest.raises(SpeculatorError, match=r"Trainer\._get_grad_norm does not exist.*Install"):
        check_trainer(is_sharded=False)


def test_method_with_other_parameters_is_named(monkeypatch):
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, model: None)
    with pytest.raises(SpeculatorError, match="parameters self, model; expected self, model, tri"):
        check_trainer(is_sharded=False)


def test_attribute_is_missing_where_no_method_mentions_it():
    point = trainer_points.Point(Trainer, "_nothing", "a test")
    assert trainer_points._fault_of(point) == "Trainer._nothing does not exist"


def test_point_for_shards_is_needed_for_them_alone(monkeypatch):
    """Transformers 5.18 lacks it, and trains a draft that is not sharded."""
    mentions = trainer_points._mentions
    monkeypatch.setattr(
        trainer_points,
        "_mentions",
        lambda owner, name: "distributed" not in name and mentions(owner, name),
    )
    check_trainer(is_sharded=False)
    with pytest.raises(SpeculatorError, match=r"is_distributed.*Install transformers 5\.19 to"):
        check_trainer(is_sharded=True)
