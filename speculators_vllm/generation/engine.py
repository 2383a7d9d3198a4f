"""Data generation on vLLM, here or on a server.

A request has a name, by which its states are found when they arrive, apart from its answer:

    run -> requests -> vLLM --> answers --> the outcome of each example
                             |                    ^
                             +--> states, formed as they arrive
"""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
from pydantic import JsonValue

from speculators_core.data_generation.engines.pipeline import (
    InferencePipeline,
    Steps,
    finish,
    seed_of,
)
from speculators_core.data_generation.examples import Example, Failure, Schema
from speculators_core.data_generation.settings import GenerationPlan
from speculators_core.errors import SpeculatorError
from speculators_core.verifier.head import VerifierHead
from speculators_core.verifier.reading import read_verifier_head
from speculators_vllm import offline
from speculators_vllm.generation.arrivals import Arrivals, Outcome
from speculators_vllm.generation.requests import OptionsOf, RequestOptions, Running
from speculators_vllm.generation.server import Server
from speculators_vllm.hidden_states import (
    EngineArguments,
    HiddenStates,
    StreamSink,
    engine_arguments,
)

DECIDED = (
    "model",
    "speculative_config",
    "spec_model",
    "spec_method",
    "spec_tokens",
    "kv_transfer_config",
    "dtype",
    "seed",
    "max_model_len",
    "device_ids",
    "skip_tokenizer_init",
    "trust_remote_code",
)
"""vLLM's arguments that a plan decides, or has options for."""
LARGEST_DTYPE = torch.float32
HEADER_ROOM = 2**16


class Runner(Protocol):
    """Runs a batch of requests on a vLLM engine, wherever it is."""

    def run(self, arrivals: Arrivals, options_of: OptionsOf) -> Running: ...
    def close(self) -> None: ...


class VLLMPipeline(InferencePipeline):
    """The verifier on vLLM, which takes all examples at one time and batches them itself."""

    def __init__(self, plan: GenerationPlan, schema: Schema) -> None:
        super().__init__(plan, schema)
        if plan.data.model is not None:
            raise SpeculatorError(
                "data.verifier is a loaded model, expected a folder or hub id with engine vllm. "
                "Pass its name, or choose engine transformers."
            )
        if schema.logits != "none":
            self.head.eval()  # read here, so that an error is found before vLLM starts
        max_frame_bytes = HEADER_ROOM + self._max_tokens * len(self.captured_ids) * (
            schema.hidden_size * LARGEST_DTYPE.itemsize
        )
        self._runner: Runner
        if plan.engine.base_url is None:
            # A prompt may fill all positions: the token after it is sampled and never run.
            allows_long = plan.data.states.tokens == "prompt"
            arguments = self._arguments()
            with offline.quiet():
                from speculators_vllm.generation.local import Engine  # vLLM: not for a server

            self._runner = Engine(arguments, self._sink_arguments, max_frame_bytes, allows_long)
        else:
            self._runner = Server(plan.engine, plan.run.allowed_roots, max_frame_bytes)

    @property
    def _max_tokens(self) -> int:
        """Tokens of an example at most, those that the verifier writes included."""
        writes = self.plan.data.states.tokens == "all"
        return self.plan.engine.max_length + (self.plan.engine.max_new_tokens if writes else 1)

    def _arguments(self) -> dict[str, JsonValue]:
        """Arguments of `vllm.LLM` without those that name the sink.

        Raises:
            SpeculatorError: vLLM has no such argument or device, or the plan decides the argument.
        """
        offline.prepare(self.plan.run.verbose)
        engine, data = self.plan.engine, self.plan.data
        given = offline.check_names("engine.vllm", engine.vllm, DECIDED)
        return {
            "model": data.verifier,
            "trust_remote_code": data.trust_remote_code,
            "skip_tokenizer_init": True,
            "dtype": engine.dtype,
            "max_model_len": self._max_tokens,
            "seed": self.plan.run.seed % 2**32,
            **_device_arguments(engine.device),
            **offline.default_arguments(),
            **given,
        }

    def _sink_arguments(self, endpoint: str) -> EngineArguments:
        sink = StreamSink(endpoint=endpoint, by_default="none")
        return engine_arguments(self.verifier_config, self.captured_ids, sink, with_last=False)

    @cached_property
    def head(self) -> VerifierHead:
        """On the GPU where there is one: on a CPU logits take longer than the verifier."""
        dtype = self.plan.engine.dtype
        head = read_verifier_head(
            self.plan.data.verifier,
            None if dtype == "auto" else getattr(torch, dtype),
            self.plan.data.trust_remote_code,
        )
        return head.to(self.plan.engine.device or ("cuda" if offline.has_gpu() else "cpu"))

    def run(self, examples: Sequence[Example]) -> list[Outcome]:
        return finish(self.steps(examples))

    def steps(self, examples: Sequence[Example]) -> Steps:
        faults = {example.key: self.fault(example) for example in examples}
        sound = [example for example in examples if faults[example.key] is None]
        outcomes = {key: Failure(key, fault) for key, fault in faults.items() if fault is not None}
        arrivals = Arrivals(sound, self._form_states)
        done = (yield from self._runner.run(arrivals, self._options_of)) if sound else {}
        return [done.get(example.key) or outcomes[example.key] for example in examples]

    def _options_of(self, name: str, example: Example) -> RequestOptions:
        engine, writes = self.plan.engine, self.goes_on(example)
        samples = writes and engine.temperature > 0
        return RequestOptions(
            {
                "max_tokens": engine.max_new_tokens if writes else 1,
                "temperature": engine.temperature if samples else 0.0,
                "top_p": engine.top_p if samples else 1.0,
                "seed": seed_of(self.plan.run.seed, example.key) if samples else None,
                # Without these a server takes the verifier's generation_config.json.
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "ignore_eos": True,  # of the tokenizer; these are of the verifier
                "stop_token_ids": self.end_ids,
            },
            {"hidden_states": "all" if writes else "prompt", "name": name},
        )

    def _form_states(self, example: Example, states: HiddenStates) -> Outcome:
        """Raises SpeculatorError where the states do not belong to this plan's verifier."""
        engine, tensor = self.plan.engine, states.hidden_states
        dtype = str(tensor.dtype).removeprefix("torch.")
        expected_dtype = dtype if engine.dtype == "auto" else engine.dtype
        found = (states.layer_ids, tensor.shape[-1], dtype)
        expected = (self.captured_ids, self.schema.hidden_size, expected_dtype)
        if found != expected:
            settings = self._sink_arguments("tcp://unused")["speculative_config"]
            raise SpeculatorError(
                f"{engine.base_url} hands out states of layers {list(found[0])}, width {found[1]}, "
                f"{found[2]}; expected layers {list(expected[0])}, width {expected[1]}, "
                f"{expected[2]}. Start it with --speculative-config '{json.dumps(settings)}'."
            )
        return self.form(example, states.token_ids, states.hidden_states)

    def close(self) -> None:
        self._runner.close()
        self.__dict__.pop("head", None)


def _device_arguments(device: str | None) -> dict[str, JsonValue]:
    """Raises SpeculatorError where this vLLM does not run on the device."""
    if device is None:
        return {}
    kind, _, index = device.partition(":")
    here = "cuda" if offline.has_gpu() else "cpu"
    if kind != here or not (index.isdigit() or not index):
        raise SpeculatorError(
            f"engine.device {device}: vLLM runs on {here} here, which is expected. Set it to "
            f"{here}, or leave it out."
        )
    return {"device_ids": [int(index)]} if index and kind == "cuda" else {}
