"""A running vLLM server, for data generation.

Its answers state where the hidden states are: in a file that both can read, or in a message to an
endpoint that this process binds.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel, Field

from speculators_core.data_generation.examples import Example
from speculators_core.data_generation.settings import EngineConfig
from speculators_core.errors import SpeculatorError, first_line
from speculators_core.files import Roots
from speculators_core.http import Access, BlockingClient, Refused, VLLMModels
from speculators_vllm.generation.arrivals import Arrivals, Inbox
from speculators_vllm.generation.requests import OptionsOf, RequestOptions, Running
from speculators_vllm.hidden_states import read_hidden_states
from speculators_vllm.hidden_states.settings import ENDPOINT

CONCURRENCY = 64
"""Requests at one time without `engine.batch_size`."""
ANSWER_WITHIN_S = 600.0


class _Place(BaseModel):
    """Where the states of a request are, or the error that prevented them."""

    error: str | None = None
    hidden_states_path: Path | None = None
    hidden_states_endpoint: str | None = Field(None, pattern=ENDPOINT)


class _Choice(BaseModel):
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    kv_transfer_params: _Place | None = None


class Server:
    """Runs requests on one model of a server, and receives their states."""

    def __init__(
        self, engine: EngineConfig, allowed_roots: tuple[Path, ...], max_frame_bytes: int
    ) -> None:
        """Raises:
        SpeculatorError: the server cannot be reached, requires a key, or is not vLLM; or the plan
            has options that the server decides.
        """
        assert engine.base_url is not None
        self.url = engine.base_url.rstrip("/").removesuffix("/v1")
        for name, stated in (("vllm", engine.vllm), ("device", engine.device)):
            if stated:
                raise SpeculatorError(
                    f"engine.{name}: the server at {self.url} decides it, so it must not be set. "
                    "Leave it out."
                )
        self._roots = Roots(allowed_roots)
        self._max_frame_bytes = max_frame_bytes
        self._concurrency = engine.batch_size or CONCURRENCY
        self._inbox: Inbox | None = None
        self._lock = threading.Lock()
        self._client = BlockingClient(
            Access(
                url=self.url,
                api_key=engine.api_key,
                timeout_s=ANSWER_WITHIN_S,
                connections=self._concurrency,
                key_option="engine.api_key",
                timeout_option=None,
            )
        )
        try:
            self._model = self._client.ask(VLLMModels, "/v1/models").base
        except BaseException:
            self._client.close()
            raise

    def run(self, arrivals: Arrivals, options_of: OptionsOf) -> Running:
        """Raises:
        SpeculatorError: the server does not answer, or does not hand out states.
        """
        if self._inbox is not None:
            self._inbox.arrivals = arrivals

        def complete(name: str) -> int:
            """The prompt's tokens: a server does not say how many of them it has run."""
            try:
                if not arrivals.has_ended:
                    example = arrivals.examples[name]
                    self._complete(arrivals, name, example, options_of(name, example))
            except SpeculatorError as error:
                arrivals.end(error)
            return len(arrivals.examples[name].input_ids)

        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="ask") as threads:
            yield from threads.map(complete, arrivals.examples)
        return arrivals.wait()

    def _complete(
        self, arrivals: Arrivals, name: str, example: Example, options: RequestOptions
    ) -> None:
        room = self._model.max_model_len - len(example.input_ids)
        body = {
            "model": self._model.id,
            "prompt": example.input_ids.tolist(),
            **options.sampling,
            "max_tokens": max(1, min(options.sampling["max_tokens"], room)),
            "kv_transfer_params": options.kv_transfer_params,
        }
        try:
            answer = self._client.ask(_Completion, "/v1/completions", body)
        except Refused as error:
            if not error.is_request_at_fault:
                raise
            arrivals.failed(name, str(error))
            return
        place = answer.kv_transfer_params or _Place()
        if place.error is not None:
            arrivals.failed(name, place.error)
        elif answer.choices[0].finish_reason not in ("stop", "length"):
            reason = answer.choices[0].finish_reason
            arrivals.failed(name, f"{self.url} stopped early, finish_reason is {reason}")
        elif place.hidden_states_path is not None:
            self._take_file(arrivals, name, place.hidden_states_path)
        elif place.hidden_states_endpoint is not None:
            self._listen(arrivals, place.hidden_states_endpoint)
        else:
            raise SpeculatorError(
                f"{self.url} hands out no hidden states. Start it with the --speculative-config "
                "and --kv-transfer-config of speculators_vllm.hidden_states.engine_arguments."
            )

    def _take_file(self, arrivals: Arrivals, name: str, stated: Path) -> None:
        """Reads the file and removes it."""
        path = self._roots.check(stated)
        if path.name != f"{name}.safetensors":
            raise SpeculatorError(
                f"{self.url} reports {stated} for the request {name}, expected a file of that "
                "name. Use a server of this package's connector."
            )
        try:
            states = read_hidden_states({"name": name, "hidden_states_path": path})
            path.unlink()
        except OSError as error:
            raise SpeculatorError(
                f"{path} cannot be removed: {first_line(error)}. Give this process the right to "
                "write in the server's folder."
            ) from error
        except SpeculatorError as error:
            arrivals.failed(name, str(error))
            return
        arrivals.arrived(states)

    def _listen(self, arrivals: Arrivals, endpoint: str) -> None:
        """Binds the server's endpoint, until which states wait in the server."""
        with self._lock:
            if self._inbox is None:
                kind, _, address = endpoint.partition("://")
                if kind == "ipc":  # binding replaces the file
                    self._roots.check(address)
                self._inbox = Inbox(endpoint, self._max_frame_bytes)
                self._inbox.arrivals = arrivals
            elif self._inbox.endpoint != endpoint:
                raise SpeculatorError(
                    f"{self.url} sends states to {endpoint} and to {self._inbox.endpoint}, "
                    "expected one endpoint. Use an address with one engine."
                )

    def close(self) -> None:
        self._client.close()
        if self._inbox is not None:
            self._inbox.close()
