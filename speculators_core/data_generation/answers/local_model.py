"""Transformers in this process answers conversations."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

import torch

from speculators_core.data_generation.answers.dialogues import Answer, Dialogue
from speculators_core.data_generation.answers.settings import AnswersConfig, OfflineConfig
from speculators_core.data_generation.engines.transformers import BATCH_SIZE, continue_texts
from speculators_core.data_generation.texts.conversations import find_stop_ids
from speculators_core.errors import SpeculatorError, first_line
from speculators_core.texts.chat import TemplateRefused, render_chat
from speculators_core.verifier.reading import load_verifier, read_tokenizer
from speculators_core.verifier.sizes import LONGEST, read_size

USED = ("dtype", "batch_size", "verbose")
"""Options of the engine in this process that Transformers has too."""


class LocalModel:
    """Answers one turn of a batch of conversations, then the next turn, prompts of like lengths
    beside one another."""

    def __init__(self, config: AnswersConfig) -> None:
        """Raises:
        SpeculatorError: no verifier is named, it cannot be loaded, or an option is for vLLM alone.
        """
        if config.verifier is None:
            raise SpeculatorError("Engine transformers needs --verifier, a folder or hub id.")
        if config.endpoint.base_url is not None:
            raise SpeculatorError(
                "--base-url is for engine openai; engine transformers runs in this process. Leave "
                "it out, or choose the other engine."
            )
        for name, default in OfflineConfig():
            if name not in USED and getattr(config.offline, name) != default:
                raise SpeculatorError(
                    f"{name} is {getattr(config.offline, name)!r}, which engine transformers does "
                    "not use. Leave it out, or choose engine vllm."
                )
        self._sampling, self._size = config.sampling, config.offline.batch_size
        self._tokenizer = read_tokenizer(config.verifier)
        if self._tokenizer.chat_template is None:
            raise SpeculatorError(
                f"{config.verifier} has no chat template, which answers need. Add a "
                "chat_template.jinja to its folder, or choose a chat model."
            )
        named = config.offline.dtype
        dtype = None if named == "auto" else getattr(torch, named)
        model = load_verifier(config.verifier, dtype)
        self._model = model.to("cuda") if torch.cuda.is_available() else model
        self._ends = sorted(find_stop_ids(config.verifier, self._tokenizer))
        text_config = self._model.config.get_text_config()
        self._positions = read_size(text_config, "max_position_embeddings") or LONGEST

    def answer(self, dialogues: Iterator[Dialogue]) -> Iterator[Dialogue]:
        taken: deque[Dialogue] = deque()
        while True:
            taken.extend(islice(dialogues, self._size - len(taken)))
            if not taken:
                return
            self._ask([dialogue for dialogue in taken if dialogue.is_open])
            while taken and not taken[0].is_open:
                yield taken.popleft()

    def _ask(self, dialogues: Sequence[Dialogue]) -> None:
        prompts = []
        for dialogue in dialogues:
            try:
                prompts.append((dialogue, self._encode(dialogue)))
            except (TemplateRefused, ValueError) as error:
                dialogue.fail(first_line(error))
        prompts.sort(key=lambda asked: -len(asked[1]))
        for first in range(0, len(prompts), BATCH_SIZE):
            self._continue(prompts[first : first + BATCH_SIZE])

    def _encode(self, dialogue: Dialogue) -> torch.Tensor:
        """Raises:
        ValueError: the template refuses the messages, or the verifier has no positions left.
        """
        text = render_chat(
            self._tokenizer,
            dialogue.messages,
            tools=dialogue.tools or None,
            options=dialogue.options_of_template(self._sampling.template_options),
        )
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not 1 <= len(ids) < self._positions:
            raise ValueError(
                f"{len(ids)} tokens, expected 1 to {self._positions - 1}: the verifier's positions"
            )
        return torch.tensor(ids, dtype=torch.int64)

    def _continue(self, asked: Sequence[tuple[Dialogue, torch.Tensor]]) -> None:
        sampling = self._sampling
        room = self._positions - max(len(prompt) for _, prompt in asked)
        with torch.no_grad():
            written = continue_texts(
                self._model,
                [prompt for _, prompt in asked],
                self._ends,
                min(sampling.max_tokens, room),
                sampling.temperature,
                sampling.top_p,
                sampling.top_k or 0,
                seed=asked[0][0].seed,
            )
        for (dialogue, prompt), own in zip(asked, written, strict=True):
            ids = own.tolist()
            dialogue.take(
                Answer(
                    content=self._tokenizer.decode(ids, skip_special_tokens=True),
                    is_cut=ids[-1] not in self._ends,
                    num_tokens=len(ids),
                    prompt_ids=tuple(prompt.tolist()),
                    token_ids=tuple(ids),
                )
            )

    def close(self) -> None:
        """Releases the verifier's memory."""
        del self._model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
