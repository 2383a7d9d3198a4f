"""What the tests of served speculators share."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.acceptance.engines import Draft
from speculators_core.batch import Batch
from speculators_core.decoding.prompts import TokenizedPrompt
from speculators_core.models.speculator import SpeculatorModel
from tests.conftest import pack_texts

EAGER = {"enforce_eager": True, "max_model_len": 512}
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
"""A verifier's shape that vLLM's CPU attention takes."""


def run(engine, speculator, speculative_tokens, prompts, decoding):
    with engine.loaded(Draft("speculator", str(speculator), speculative_tokens)) as runner:
        return runner.run(prompts, decoding, lambda: None)


def as_prompts(ids):
    return [TokenizedPrompt(category="all", token_ids=list(tokens)) for tokens in ids]


def fit(
    model: SpeculatorModel,
    verifier: PreTrainedModel,
    change: Callable[[Batch], Batch] = lambda batch: batch,
) -> None:
    """A few hundred steps on the verifier's own text, so that some proposals are kept.

    ``change`` is done to every batch: what the draft is trained on differs from what it is served.
    """
    starts = torch.arange(3, 35)[:, None]
    texts = verifier.generate(
        starts,
        attention_mask=torch.ones_like(starts),
        max_new_tokens=48,
        do_sample=False,
        pad_token_id=0,
    )
    rows = [{"input_ids": text} for text in texts]
    batches = [
        change(pack_texts(verifier, rows[first : first + 8], None, model.aux_layer_ids))
        for first in range(0, 32, 8)
    ]
    is_mtp = model.config.speculators_model_type == "mtp"
    # To say what the text says, though the verifier is hardly sure of it, is all that counts here.
    objective, _ = model.get_trainer_kwargs(targets="text") if is_mtp else ({}, {})
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr=3e-3)
    for step in range(200):
        optimizer.zero_grad()
        model(batches[step % len(batches)], **objective)[1].backward()
        optimizer.step()


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer whose words are the numbers of the tokens, with a chat template."""
    ids = {"<unk>": 0, "</s>": 1} | {str(i): i for i in range(2, vocab_size)}
    words = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}4 {{ m.content }} 5 {% endfor %}"
    tokenizer.save_pretrained(folder)


@contextmanager
def server(log: Path, *arguments: str) -> Iterator[str]:
    """The address of ``vllm serve`` with these arguments in float32, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", *arguments),
        *("--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)),
    ]
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_up(process, url, log)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_up(process: subprocess.Popen, url: str, log: Path, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        with suppress(OSError):
            urllib.request.urlopen(f"{url}/health")
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])
