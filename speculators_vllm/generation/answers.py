"""vLLM in this process answers conversations, many at one time."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

from speculators_core.data_generation.answers.answerer import AnswersConfig
from speculators_core.data_generation.answers.dialogues import Answer, Call, Dialogue
from speculators_core.errors import SpeculatorError, first_line
from speculators_vllm import offline

AHEAD = 4
"""Conversations that are taken for each one that is answered: a long one holds few others up."""
DECIDED = ("model", "dtype", "trust_remote_code", "reasoning_parser")
"""vLLM's arguments for which `regenerate` has options of its own, or leaves no choice."""


class VLLMAnswerer:
    """Answers the next turn of as many conversations as there is room for, then the one after.

    Greedy answers are the verifier's own up to rounding: vLLM's values depend a little on what else
    is in a batch.
    """

    def __init__(self, config: AnswersConfig) -> None:
        """Raises:
        SpeculatorError: there is no vLLM or no verifier, vLLM does not start with these options, or
            the verifier has no chat template.
        """
        if config.verifier is None:
            raise SpeculatorError("engine vllm needs --verifier, a folder or hub id.")
        if config.endpoint.base_url is not None:
            raise SpeculatorError("--base-url is for engine openai; vllm is an engine of our own.")
        self._sampling, self._config = config.sampling, config.offline
        offline.prepare()
        arguments = offline.check_names("--engine-args", config.offline.engine_args, DECIDED)
        self._find_parser()  # a wrong name is found before vLLM starts
        arguments = offline.default_arguments() | arguments
        with ExitStack() as stack:
            self._llm = stack.enter_context(
                offline.loaded(model=config.verifier, dtype=config.offline.dtype, **arguments)
            )
            self._tokenizer = self._llm.get_tokenizer()
            self._check_template()
            model_type = self._llm.model_config.hf_config.model_type
            self._make_parser = self._find_parser(
                is_harmony=model_type == "gpt_oss", tokenizer=self._tokenizer
            )
            self._stack = stack.pop_all()

    def answer(self, dialogues: Iterator[Dialogue]) -> Iterator[Dialogue]:
        size = self._config.batch_size
        taken: deque[Dialogue] = deque()
        while True:
            room = size - sum(dialogue.is_open for dialogue in taken)
            taken.extend(islice(dialogues, min(room, AHEAD * size - len(taken))))
            if not taken:
                return
            self._ask([dialogue for dialogue in taken if dialogue.is_open])
            while taken and not taken[0].is_open:
                yield taken.popleft()

    def close(self) -> None:
        self._stack.close()

    def _check_template(self) -> None:
        """Of a text model: the processor of another may have one, or vLLM."""
        config = self._llm.model_config
        if not config.is_multimodal_model and getattr(self._tokenizer, "chat_template", 1) is None:
            raise SpeculatorError(f"{config.model} has no chat template; its answers need one.")

    def _find_parser(self, **of: Any) -> Any:
        """vLLM's class for telling thoughts, answer and tool calls apart; None without names.

        Raises:
            SpeculatorError: it has none of that name, or none for this tokenizer.
        """
        from vllm.parser import ParserManager

        try:
            return ParserManager.get_parser(
                tool_parser_name=self._config.tool_call_parser,
                reasoning_parser_name=self._config.reasoning_parser,
                enable_auto_tools=True,
                **of,
            )
        except (TypeError, ValueError) as error:
            raise SpeculatorError(
                f"--reasoning-parser, --tool-call-parser: {first_line(error)}"
            ) from error

    def _ask(self, dialogues: Sequence[Dialogue]) -> None:
        """Raises:
        SpeculatorError: vLLM stopped.
        """
        asked = [(one, reader) for one in dialogues if (reader := self._enqueue(one)) is not None]
        try:
            outputs = self._llm.wait_for_completion(use_tqdm=False)
        except Exception as error:  # of the engine, of any kind
            raise SpeculatorError(f"vLLM stopped: {first_line(error)}") from error
        for (dialogue, reader), output in zip(asked, outputs, strict=True):
            try:
                answer = reader.read(output.outputs[0])
            except Exception as error:  # of a parser, on what it was not written for
                dialogue.fail(first_line(error))
            else:
                dialogue.take(answer)

    def _enqueue(self, dialogue: Dialogue) -> "_Reader | None":
        """What reads the answer; None where the template refuses the dialogue, or it is too long,
        which ends it."""
        from vllm import SamplingParams

        sampling = self._sampling
        try:
            reader = self._reader(dialogue)
            parameters = SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k or 0,
                max_tokens=sampling.max_tokens,
                seed=dialogue.seed,
                skip_special_tokens=reader.skips_special_tokens,
            )
            self._llm.enqueue_chat(
                [_named(message) for message in dialogue.messages],
                parameters,
                use_tqdm=False,
                tools=dialogue.tools or None,
                chat_template_kwargs=sampling.template_options or None,
            )
        except Exception as error:  # of the template, of vLLM's own checks
            dialogue.fail(first_line(error))
            return None
        return reader

    def _reader(self, dialogue: Dialogue) -> "_Reader":
        if self._make_parser is None:
            return _Reader()
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        tools = {"tools": dialogue.tools, "tool_choice": "auto"} if dialogue.tools else {}
        request = ChatCompletionRequest(messages=dialogue.messages, **tools)
        parser = self._make_parser(
            self._tokenizer,
            request.tools,
            chat_template_kwargs=self._sampling.template_options,
            model_config=self._llm.model_config,
        )
        return _Reader(parser, parser.adjust_request(request))


class _Reader:
    """Reads an answer as vLLM's server does."""

    def __init__(self, parser: Any = None, request: Any = None) -> None:
        self._parser, self._request = parser, request

    @property
    def skips_special_tokens(self) -> bool:
        """Some parsers go by them."""
        return self._request is None or self._request.skip_special_tokens

    def read(self, output: Any) -> Answer:
        """Raises:
        ValueError: vLLM ended it before its end.
        """
        if output.finish_reason not in ("stop", "length"):
            raise ValueError(f"vLLM ended it: {output.finish_reason}")
        reasoning, content, calls = None, output.text, None
        if self._parser is not None:
            reasoning, content, calls = self._parser.parse(
                output.text,
                self._request,
                enable_auto_tools=True,
                model_output_token_ids=output.token_ids,
            )
        return Answer(
            content=content or "",
            reasoning=reasoning or "",
            calls=tuple(Call(call.name, call.arguments, call.id) for call in calls or ()),
            is_cut=output.finish_reason == "length",
            num_tokens=len(output.token_ids),
        )


def _named(message: dict[str, Any]) -> dict[str, Any]:
    """With thoughts under vLLM's name for them."""
    thoughts = message.get("reasoning_content")
    return message if thoughts is None else message | {"reasoning": thoughts}
