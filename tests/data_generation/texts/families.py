"""Tokenizers and chat templates that behave as those of well-known families do."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from speculators_core.data_generation.texts.conversations import ChatTemplate

TEMPLATES = Path(__file__).parents[2] / "data" / "chat_templates"
TEXTS = [
    "system user assistant model tool functions analysis final commentary think hello world",
    "Be brief. What is the weather in Paris? It is sunny there! Thank you, you are welcome.",
    '{"name": "weather", "arguments": {"city": "Paris"}, "parameters": {}}\n\n  \n .,:;()[]<>|/_',
]


@dataclass(frozen=True)
class Family:
    """Special tokens of a family; the last stop token is the tokenizer's own."""

    stops: tuple[str, ...]
    others: tuple[str, ...]
    bos: str | None = None


FAMILIES = {
    "qwen3": Family(("<|endoftext|>", "<|im_end|>"), ("<|im_start|>",)),
    "llama3": Family(
        ("<|end_of_text|>", "<|eot_id|>"),
        ("<|start_header_id|>", "<|end_header_id|>"),
        "<|begin_of_text|>",
    ),
    "gemma": Family(("<end_of_turn>", "<eos>"), ("<start_of_turn>",), "<bos>"),
    "mistral": Family(
        ("</s>",),
        (
            "[INST]",
            "[/INST]",
            "[TOOL_CALLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
        ),
        "<s>",
    ),
    "gpt_oss": Family(
        ("<|call|>", "<|return|>"), ("<|start|>", "<|end|>", "<|channel|>", "<|message|>")
    ),
    "glm": Family(
        ("<|user|>", "<|observation|>", "<|endoftext|>"),
        ("<|assistant|>", "<|system|>", "[gMASK]", "<sop>"),
    ),
    "phi3": Family(("<|end|>", "<|endoftext|>"), ("<|user|>", "<|assistant|>", "<|system|>")),
    "deepseek_r1": Family(("<|end|>",), ("<|User|>", "<|Assistant|>")),
}


@cache
def make_tokenizer(family: str, kind: str = "bytes") -> PreTrainedTokenizerFast:
    """``kind`` is `bytes` as Qwen's and Llama 3's, or `sentencepiece` as Mistral's and Gemma's."""
    tokens = FAMILIES[family]
    special = [*tokens.stops, *tokens.others, "<unk>"] + ([tokens.bos] if tokens.bos else [])
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = [chr(code) for code in range(33, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 2, trainer)
    if tokens.bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens.bos} $A",
            special_tokens=[(tokens.bos, backend.token_to_id(tokens.bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens.bos,
        eos_token=tokens.stops[-1],
        chat_template=(TEMPLATES / f"{family}.jinja").read_text(),
    )


def make_chat(family: str, kind: str = "bytes", **options) -> ChatTemplate:
    tokenizer = make_tokenizer(family, kind)
    stops = tokenizer.convert_tokens_to_ids(list(FAMILIES[family].stops))
    return ChatTemplate(tokenizer, frozenset(stops), options=options)


def learned_texts(tokenizer, sequence) -> list[str]:
    """What the runs of learned tokens say, in their order."""
    runs, ids = [], sequence.input_ids
    for place, learned in enumerate(sequence.loss_mask):
        if learned and (place == 0 or not sequence.loss_mask[place - 1]):
            runs.append([])
        if learned:
            runs[-1].append(ids[place])
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]
