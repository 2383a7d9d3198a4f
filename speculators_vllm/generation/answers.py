"""vLLM in this process answers conversations.

vLLM is imported inside of functions: `offline.prepare` comes first, and an error in the options
must not wait for the import.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import TYPE_CHECKING

from speculators_core.data_generation.answers.dialogues import Answer, Call, Dialogue
from speculators_core.data_generation.answers.settings import AnswersConfig
from speculators_core.data_generation.texts.messages import Message
from speculators_core.errors import SpeculatorError, first_line
from speculators_vllm import offline

if TYPE_CHECKING:
    from vllm import CompletionOutput
    from vllm.entrypoints.chat_utils import ChatCompletionMessageParam
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.engine.protocol import FunctionCall
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.parser.abstract_parser import Parser
    from vllm.tokenizers import TokenizerLike

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
            raise SpeculatorError("Engine vllm needs --verifier, a folder or hub id.")
        if config.endpoint.base_url is not None:
            raise SpeculatorError(
                "--base-url is for engine openai; engine vllm runs in this process. Leave it out, "
                "or choose the other engine."
            )
        self._sampling, self._config = config.sampling, config.offline
        offline.prepare()
        arguments = offline.check_names("--engine-args", config.offline.engine_args, DECIDED)
        self._find_parser()  # a wrong name is found before vLLM starts
        arguments = {**offline.default_arguments(), **arguments}
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
        """For text models alone: the processor of another may have one, or vLLM."""
        config = self._llm.model_config
        if not config.is_multimodal_model and getattr(self._tokenizer, "chat_template", 1) is None:
            raise SpeculatorError(
                f"{config.model} has no chat template, which answers need. Add a "
                "chat_template.jinja to its folder, or choose a chat model."
            )

    def _find_parser(
        self, is_harmony: bool = False, tokenizer: "TokenizerLike | None" = None
    ) -> "type[Parser] | None":
        """vLLM's class that separates reasoning, answer and tool calls; None where none is named.

        Raises:
            SpeculatorError: vLLM has no parser of that name, or none for this tokenizer.
        """
        from vllm.parser import ParserManager

        try:
            return ParserManager.get_parser(
                tool_parser_name=self._config.tool_call_parser,
                reasoning_parser_name=self._config.reasoning_parser,
                enable_auto_tools=True,
                is_harmony=is_harmony,
                tokenizer=tokenizer,
            )
        except (TypeError, ValueError) as error:
            raise SpeculatorError(
                f"--reasoning-parser, --tool-call-parser: {first_line(error)}"
            ) from error

    def _ask(self, dialogues: Sequence[Dialogue]) -> None:
        """Raises:
        SpeculatorError: vLLM stopped.
        """
        from vllm import RequestOutput

        asked = [(one, reader) for one in dialogues if (reader := self._enqueue(one)) is not None]
        try:
            outputs = self._llm.wait_for_completion(RequestOutput, use_tqdm=False)
        except Exception as error:  # of the engine, of any kind
            raise SpeculatorError(
                f"vLLM stopped: {first_line(error).rstrip('.')}. Run the command with --resume."
            ) from error
        for (dialogue, reader), output in zip(asked, outputs, strict=True):
            try:
                answer = reader.read(output.outputs[0])
            except Exception as error:  # of a parser, on what it was not written for
                dialogue.fail(first_line(error))
            else:
                dialogue.take(answer)

    def _enqueue(self, dialogue: Dialogue) -> "_Reader | None":
        """The reader of the answer; None where the dialogue is too long, or the template refuses
        it, which ends it."""
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
            messages: list[ChatCompletionMessageParam] = [
                _with_vllm_keys(message) for message in dialogue.messages
            ]
            self._llm.enqueue_chat(
                messages,
                parameters,
                use_tqdm=False,
                tools=dialogue.tools or None,
                chat_template_kwargs=sampling.template_options or None,
            )
        except Exception as error:  # of the template, or of vLLM's checks
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
            [*request.tools] if request.tools else None,
            chat_template_kwargs=self._sampling.template_options,
            model_config=self._llm.model_config,
        )
        return _Reader(parser, parser.adjust_request(request))


class _Reader:
    """Reads an answer as vLLM's server does; all of it is content without a parser."""

    def __init__(
        self,
        parser: "Parser | None" = None,
        request: "ChatCompletionRequest | ResponsesRequest | None" = None,
    ) -> None:
        self._parser, self._request = parser, request

    @property
    def skips_special_tokens(self) -> bool:
        """False where the parser needs them."""
        return self._request is None or bool(self._request.skip_special_tokens)

    def read(self, output: "CompletionOutput") -> Answer:
        """Raises:
        ValueError: vLLM stopped before the end of the answer.
        """
        if output.finish_reason not in ("stop", "length"):
            raise ValueError(f"vLLM stopped early, finish_reason is {output.finish_reason}")
        reasoning: str | None = None
        content: str | None = output.text
        calls: list[FunctionCall] | None = None
        if self._parser is not None and self._request is not None:
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


def _with_vllm_keys(message: Message) -> Message:
    """The message with its reasoning also under vLLM's key."""
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else message | {"reasoning": reasoning}
