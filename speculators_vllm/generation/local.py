"""A vLLM engine in this process, for data generation."""

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from pydantic import JsonValue
from vllm import RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.core_client import EngineCoreClient, SyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError

from speculators_core.data_generation.examples import Example
from speculators_core.errors import SpeculatorError, first_line
from speculators_vllm import offline
from speculators_vllm.generation.arrivals import Arrivals, Inbox
from speculators_vllm.generation.requests import OptionsOf, RequestOptions, Running
from speculators_vllm.hidden_states import EngineArguments, drain

ALLOW_LONG = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
"""Lets vLLM start with more positions than the verifier's."""
DEATH_POLL_S = 0.5


class Engine:
    """A vLLM engine in this process, or in a child with ``VLLM_ENABLE_V1_MULTIPROCESSING=1``.

    A process can have one engine that hands out states.
    """

    def __init__(
        self,
        arguments: Mapping[str, JsonValue],
        sink_arguments: Callable[[str], EngineArguments],
        max_frame_bytes: int,
        allows_long: bool,
    ) -> None:
        """Raises:
        SpeculatorError: vLLM does not start with these arguments.
        """
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="speculators-"))
            # Received while the model runs: vLLM pauses when too much waits.
            self._inbox = Inbox(f"ipc://{folder}/states", max_frame_bytes)
            stack.callback(self._inbox.close)
            both = {**arguments, **sink_arguments(self._inbox.endpoint)}
            with offline.environment(ALLOW_LONG if allows_long else {}):
                self._llm = stack.enter_context(offline.loaded(**both))
            stack.enter_context(_ending_waits_on_death(self._llm.llm_engine.engine_core))
            self._stack = stack.pop_all()

    def run(self, arrivals: Arrivals, options_of: OptionsOf) -> Running:
        """Raises:
        SpeculatorError: the engine stopped.
        """
        self._inbox.arrivals = arrivals
        try:
            for name, example in arrivals.examples.items():
                self._add(arrivals, name, example, options_of(name, example))
            yield from self._step(arrivals)
            drain(self._llm)
        except SpeculatorError:
            raise
        except Exception as error:  # whatever it was, its requests are lost
            raise SpeculatorError(
                f"vLLM stopped: {offline.in_one_line(error).rstrip('.')}. Set run.resume and run "
                "the plan again."
            ) from error
        return arrivals.wait()

    def _add(
        self, arrivals: Arrivals, name: str, example: Example, options: RequestOptions
    ) -> None:
        try:
            self._llm.llm_engine.add_request(
                name,
                {"prompt_token_ids": example.input_ids.tolist()},
                SamplingParams(
                    **options.sampling,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                    extra_args={"kv_transfer_params": options.kv_transfer_params},
                ),
            )
        except ValueError as error:  # too long for this engine, or refused by vLLM otherwise
            arrivals.failed(name, first_line(error))

    def _step(self, arrivals: Arrivals) -> Iterator[int]:
        """Steps until all requests are answered; vLLM does not report those that are aborted."""
        unanswered = set(arrivals.examples)
        for step in offline.steps_of(self._llm):
            yield step.num_read + step.num_written
            for output in step.ended:
                if not isinstance(output, RequestOutput):
                    continue
                answer = output.kv_transfer_params or {}
                if "error" in answer:
                    arrivals.failed(output.request_id, answer["error"])
                elif "hidden_states_endpoint" in answer:
                    unanswered.discard(output.request_id)
        for name in unanswered:
            arrivals.failed(name, "vLLM aborted the request")

    def close(self) -> None:
        self._stack.close()


@contextmanager
def _ending_waits_on_death(client: EngineCoreClient) -> Iterator[None]:
    """Ends the wait for an engine whose process was killed.

    vLLM 0.32 notices and shuts the engine down, but its synchronous client keeps waiting.
    """
    closing = threading.Event()

    def watch(client: SyncMPClient) -> None:
        while not closing.wait(DEATH_POLL_S):
            if client.resources.engine_dead:
                client.outputs_queue.put(EngineDeadError())
                return

    if isinstance(client, SyncMPClient):
        threading.Thread(target=watch, args=[client], name="engine-watch", daemon=True).start()
    try:
        yield
    finally:
        closing.set()
