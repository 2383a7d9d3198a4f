"""Outcomes of a batch's requests, and their receiver.

Engines report a request in two places: in its answer, and with its states, which arrive apart.
"""

import logging
import threading
import uuid
from collections.abc import Callable, Sequence

from speculators_core.data_generation.examples import Example, Failure, GeneratedExample
from speculators_core.errors import SpeculatorError, first_line
from speculators_vllm.hidden_states import HiddenStateReceiver, HiddenStates, Undelivered

logger = logging.getLogger(__name__)

SILENCE_S = 60.0
"""When no outcome has come for so long, the missing ones count as lost."""
POLL_S = 0.05

Outcome = GeneratedExample | Failure


class Arrivals:
    """Outcomes by the name of a request; any thread may report one, and the first report counts."""

    def __init__(
        self, examples: Sequence[Example], form: Callable[[Example, HiddenStates], Outcome]
    ) -> None:
        """``form`` makes the outcome of states, in the thread that reports them.

        A SpeculatorError of it ends the batch.
        """
        batch = uuid.uuid4().hex
        self.examples = {f"{batch}-{number}": one for number, one in enumerate(examples)}
        self._form = form
        self._outcomes: dict[str, Outcome] = {}
        self._fault: SpeculatorError | None = None
        self._changed = threading.Condition()

    def arrived(self, states: HiddenStates) -> None:
        example = self.examples.get(states.name)
        if example is None or states.name in self._outcomes:
            logger.warning("ignored hidden states that were not requested: %s", states.name)
            return
        try:
            self._record(states.name, self._form(example, states))
        except SpeculatorError as error:
            self.end(error)
        except Exception as error:  # memory, or the head: it is this example's alone
            self.failed(states.name, first_line(error))

    def failed(self, name: str, reason: str) -> None:
        example = self.examples.get(name)
        if example is not None:
            self._record(name, Failure(example.key, reason))

    def _record(self, name: str, outcome: Outcome) -> None:
        with self._changed:
            self._outcomes.setdefault(name, outcome)
            self._changed.notify_all()

    def end(self, fault: SpeculatorError) -> None:
        """Ends the batch with this error; the first one counts."""
        with self._changed:
            self._fault = self._fault or fault
            self._changed.notify_all()

    @property
    def has_ended(self) -> bool:
        return self._fault is not None

    def wait(self, silence_s: float = SILENCE_S) -> dict[str, Outcome]:
        """The outcome of each example, by its key.

        Raises:
            SpeculatorError: the batch ended.
        """
        with self._changed:
            while self._fault is None and len(self._outcomes) < len(self.examples):
                if not self._changed.wait(silence_s):
                    break
            if self._fault is not None:
                raise self._fault
            lost = f"its hidden states did not arrive within {silence_s} s"
            return {
                example.key: self._outcomes.get(name) or Failure(example.key, lost)
                for name, example in self.examples.items()
            }


class Inbox:
    """Receives states in a thread while the model runs, and passes them to the current batch."""

    def __init__(self, endpoint: str, max_frame_bytes: int) -> None:
        """Raises:
        SpeculatorError: the endpoint cannot be bound.
        """
        self.arrivals: Arrivals | None = None
        self._receiver = HiddenStateReceiver(endpoint, max_frame_bytes=max_frame_bytes)
        self._closing = threading.Event()
        self.endpoint = self._receiver.endpoint
        self._thread = threading.Thread(target=self._run, name="inbox", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing.is_set():
            if self._receiver.has_message(POLL_S):
                self._pass_on()
        self._receiver.close()

    def _pass_on(self) -> None:
        arrivals = self.arrivals
        try:
            states = self._receiver.receive()
        except Undelivered as error:
            if arrivals is not None:
                arrivals.failed(error.name, str(error))
        except SpeculatorError as error:
            logger.warning("%s", error)
        else:
            if arrivals is not None:
                arrivals.arrived(states)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
