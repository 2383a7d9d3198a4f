"""One turn of many conversations on a vLLM engine."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm import LLM, CompletionOutput, RequestOutput, SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager
from vllm.parser.abstract_parser import Parser

from speculators_core.data_generation.answers.dialogues import Answer, Call, Dialogue, Tally
from speculators_core.data_generation.answers.settings import AnswersConfig, OfflineConfig
from speculators_core.errors import SpeculatorError, first_line
from speculators_core.texts.messages import Message
from speculators_vllm import offline

if TYPE_CHECKING:
    from vllm.entrypoints.chat_utils import ChatCompletionMessageParam
    from vllm.entrypoints.openai.engine.protocol import FunctionCall
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.tokenizers import TokenizerLike


def find_parser(
    config: OfflineConfig, is_harmony: bool = False, tokenizer: "TokenizerLike | None" = None
) -> type[Parser] | None:
    """vLLM's class that separates reasoning, answer and tool calls; None where none is named.

    Raises:
        SpeculatorError: vLLM has no parser of that name, or none for this tokenizer.
    """
    try:
        return ParserManager.get_parser(
            tool_parser_name=config.tool_call_parser,
            reasoning_parser_name=config.reasoning_parser,
            enable_auto_tools=True,
            is_harmony=is_harmony,
            tokenizer=tokenizer,
        )
    except (TypeError, ValueError) as error:
        raise SpeculatorError(
            f"--reasoning-parser, --tool-call-parser: {first_line(error).rstrip('.')}; expected "
            "names of vLLM's parsers that suit the verifier. Choose others, or leave them out."
        ) from error


class Chat:
    """Asks the engine for the next answer of each dialogue."""

    def __init__(self, llm: LLM, config: AnswersConfig) -> None:
        """Raises:
        SpeculatorError: the verifier has no chat template, or no parser of the chosen name.
        """
        self.sampling = config.sampling
        self.tokenizer = llm.get_tokenizer()
        self._llm = llm
        self.check_template()
        model_type = llm.model_config.hf_config.model_type
        self._make_parser = find_parser(
            config.offline, is_harmony=model_type == "gpt_oss", tokenizer=self.tokenizer
        )

    def check_template(self) -> None:
        """For text models alone: the processor of another may have one, or vLLM."""
        config = self._llm.model_config
        if not config.is_multimodal_model and getattr(self.tokenizer, "chat_template", 1) is None:
            raise SpeculatorError(
                f"{config.model} has no chat template, which answers need. Add a "
                "chat_template.jinja to its folder, or choose a chat model."
            )

    def ask(self, dialogues: Sequence[Dialogue]) -> None:
        """Raises:
        SpeculatorError: vLLM stopped.
        """
        asked = [(one, reader) for one in dialogues if (reader := self._enqueue(one)) is not None]
        try:
            outputs = self._run(dialogues[0].tally) if dialogues else []
        except Exception as error:  # of the engine, of any kind
            raise SpeculatorError(
                f"vLLM stopped: {first_line(error).rstrip('.')}. Run the command with --resume."
            ) from error
        for (dialogue, reader), output in zip(asked, outputs, strict=True):
            try:
                answer = reader.read(output.outputs[0], output.prompt_token_ids or ())
            except Exception as error:  # of a parser, on what it was not written for
                dialogue.fail(first_line(error))
            else:
                dialogue.take(answer)

    def _run(self, tally: Tally) -> list[RequestOutput]:
        """The outputs in the order of their requests; tokens are counted as they come."""
        outputs: list[RequestOutput] = []
        try:
            for step in offline.steps_of(self._llm):
                tally.num_under_way += step.num_written
                outputs += (output for output in step.ended if isinstance(output, RequestOutput))
        finally:
            tally.num_under_way = 0  # counted with their answers from here on
        return sorted(outputs, key=lambda output: int(output.request_id))

    def _enqueue(self, dialogue: Dialogue) -> "AnswerReader | None":
        """Queues the next answer and returns its reader.

        None where the template or vLLM refuses the dialogue, which ends it.
        """
        sampling = self.sampling
        try:
            reader = self.reader(dialogue)
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
                chat_template_kwargs=dialogue.options_of_template(sampling.template_options),
            )
        except Exception as error:  # of the template, or of vLLM's checks
            dialogue.fail(first_line(error))
            return None
        return reader

    def reader(self, dialogue: Dialogue) -> "AnswerReader":
        if self._make_parser is None:
            return AnswerReader()
        tools = {"tools": dialogue.tools, "tool_choice": "auto"} if dialogue.tools else {}
        request = ChatCompletionRequest(messages=dialogue.messages, **tools)
        parser = self._make_parser(
            self.tokenizer,
            [*request.tools] if request.tools else None,
            chat_template_kwargs=dialogue.options_of_template(self.sampling.template_options) or {},
            model_config=self._llm.model_config,
        )
        return AnswerReader(parser, parser.adjust_request(request))


class AnswerReader:
    """Reads an answer as vLLM's server does; all of it is content without a parser."""

    def __init__(
        self,
        parser: Parser | None = None,
        request: "ChatCompletionRequest | ResponsesRequest | None" = None,
    ) -> None:
        self._parser, self._request = parser, request

    @property
    def skips_special_tokens(self) -> bool:
        """False where the parser needs them."""
        return self._request is None or bool(self._request.skip_special_tokens)

    def read(self, output: CompletionOutput, prompt_ids: Sequence[int] = ()) -> Answer:
        """The answer to a prompt of these tokens.

        Raises:
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
            prompt_ids=tuple(prompt_ids),
            token_ids=tuple(output.token_ids),
        )


def _with_vllm_keys(message: Message) -> Message:
    """The message with its reasoning also under vLLM's key."""
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else message | {"reasoning": reasoning}
