"""Hidden states from vLLM, by files or ZeroMQ.

Every public name can be imported from here; its module is loaded when the name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names for type checkers and editors; a test compares both lists
    from speculators_vllm.hidden_states.connector import drain as drain
    from speculators_vllm.hidden_states.files import HiddenStates as HiddenStates
    from speculators_vllm.hidden_states.files import read_hidden_states as read_hidden_states
    from speculators_vllm.hidden_states.settings import EngineArguments as EngineArguments
    from speculators_vllm.hidden_states.settings import FileSink as FileSink
    from speculators_vllm.hidden_states.settings import RequestOptions as RequestOptions
    from speculators_vllm.hidden_states.settings import StreamSink as StreamSink
    from speculators_vllm.hidden_states.settings import engine_arguments as engine_arguments
    from speculators_vllm.hidden_states.stream import HiddenStateReceiver as HiddenStateReceiver
    from speculators_vllm.hidden_states.stream import Undelivered as Undelivered

CONNECTOR_MODULE = "speculators_vllm.hidden_states.connector"
"""The module in which vLLM finds the connector."""

_NAMES = {
    "connector": "drain",
    "files": "HiddenStates read_hidden_states",
    "settings": "EngineArguments FileSink RequestOptions StreamSink engine_arguments",
    "stream": "HiddenStateReceiver Undelivered",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
