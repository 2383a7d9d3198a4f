"""vLLM in this process answers conversations."""

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice

from speculators_core.data_generation.answers.dialogues import Dialogue
from speculators_core.data_generation.answers.settings import AnswersConfig
from speculators_core.errors import SpeculatorError
from speculators_vllm import offline

AHEAD = 4
"""Conversations taken ahead per open one, so that a long one delays few others."""
DECIDED = ("model", "dtype", "trust_remote_code", "reasoning_parser")
"""vLLM's arguments that `regenerate` decides, or has options for."""


class VLLMAnswerer:
    """Answers one turn of a batch of conversations, then the next turn.

    Greedy answers are the verifier's up to rounding: vLLM's values depend a little on what else is
    in a batch.
    """

    def __init__(self, config: AnswersConfig) -> None:
        """Raises:
        SpeculatorError: there is no vLLM or no verifier, vLLM does not start with these options, or
            the verifier has no chat template.
        """
        if config.verifier is None:
            raise SpeculatorError(
                "--verifier is not set; engine vllm needs --verifier, a folder or hub id. Pass it."
            )
        if config.endpoint.base_url is not None:
            raise SpeculatorError(
                "--base-url is for engine openai; engine vllm runs in this process. Leave it out, "
                "or choose the other engine."
            )
        self._batch_size = config.offline.batch_size
        offline.prepare(config.offline.verbose)
        arguments = offline.check_names("--engine-args", config.offline.engine_args, DECIDED)
        with offline.quiet():
            # vLLM: after `prepare`, and after errors that need not wait for it.
            from speculators_vllm.generation.chat import Chat, find_parser

        find_parser(config.offline)  # a wrong name is found before vLLM starts
        arguments = {**offline.default_arguments(), **arguments}
        with ExitStack() as stack:
            llm = stack.enter_context(
                offline.loaded(model=config.verifier, dtype=config.offline.dtype, **arguments)
            )
            self._chat = Chat(llm, config)
            self._stack = stack.pop_all()

    def answer(self, dialogues: Iterator[Dialogue]) -> Iterator[Dialogue]:
        size = self._batch_size
        taken: deque[Dialogue] = deque()
        while True:
            room = size - sum(dialogue.is_open for dialogue in taken)
            taken.extend(islice(dialogues, min(room, AHEAD * size - len(taken))))
            if not taken:
                return
            self._chat.ask([dialogue for dialogue in taken if dialogue.is_open])
            while taken and not taken[0].is_open:
                yield taken.popleft()

    def close(self) -> None:
        self._stack.close()
