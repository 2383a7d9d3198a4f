"""The playground's verifier: a deep and narrow Qwen3.

A step of a deep verifier is long even where each layer is cheap, so speculation pays on a CPU.
Training it deep from the start would spend most of the time on layers that have nothing to do yet:
a quarter of the layers learns first, then the stack is repeated and trained further (one-shot
depthwise stacking, arXiv:2405.15319). A last stage teaches it to leave loops.
"""

import random
from pathlib import Path

import torch
from datasets import Dataset
from pydantic import BaseModel, ConfigDict
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    default_data_collator,
)

from benchmarks.playground.corpus import SourceFile, conversation, functions
from benchmarks.playground.loops import unlearn_loops
from benchmarks.playground.training import training_arguments
from speculators_core.training.optimizers import MuonAdamW

ROW_LENGTH = 1024
NUM_LAYERS = 32
GROWTH = 4
SEED = 0


class Stage(BaseModel):
    """A stretch of training at one depth."""

    model_config = ConfigDict(frozen=True)
    num_layers: int
    num_epochs: float
    learning_rate: float


STAGES = (
    Stage(num_layers=NUM_LAYERS // GROWTH, num_epochs=2.5, learning_rate=5e-3),
    Stage(num_layers=NUM_LAYERS, num_epochs=1.5, learning_rate=3e-3),
)


def verifier_config(tokenizer: PreTrainedTokenizerBase, num_layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


def documents(files: list[SourceFile], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of every file and of every function's conversation, shuffled once."""
    texts = [file.text for file in files]
    chats = [conversation(function) for file in files for function in functions(file)]
    end = [tokenizer.pad_token_id]
    ids = [document + end for document in tokenizer(texts)["input_ids"]]
    ids += [d + end for d in tokenizer.apply_chat_template(chats, return_dict=False)]
    random.Random(SEED).shuffle(ids)
    return ids


def rows(documents: list[list[int]]) -> Dataset:
    """Documents end to end, cut into rows of equal length; the remainder is dropped."""
    stream = [token for document in documents for token in document]
    starts = range(0, len(stream) - ROW_LENGTH + 1, ROW_LENGTH)
    return Dataset.from_dict(
        {"input_ids": [stream[start : start + ROW_LENGTH] for start in starts]}
    )


def grow(shallow: Qwen3ForCausalLM, deep: Qwen3ForCausalLM) -> None:
    """Fills ``deep`` with ``shallow``: the stack of layers repeated, all else copied."""
    depth = len(shallow.model.layers)
    for index, layer in enumerate(deep.model.layers):
        layer.load_state_dict(shallow.model.layers[index % depth].state_dict())
    deep.model.embed_tokens.load_state_dict(shallow.model.embed_tokens.state_dict())
    deep.model.norm.load_state_dict(shallow.model.norm.state_dict())


def train_verifier(
    train: list[SourceFile],
    held_out: list[SourceFile],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    work: Path,
) -> list[dict]:
    """Trains, saves bf16 weights and the tokenizer to ``directory`` and returns the log."""
    train_documents = documents(train, tokenizer)
    train_rows = rows(train_documents)
    eval_rows = rows(documents(held_out, tokenizer)).select(range(64))
    model: Qwen3ForCausalLM | None = None
    history: list[dict] = []
    for stage in STAGES:
        torch.manual_seed(SEED)
        grown = Qwen3ForCausalLM(verifier_config(tokenizer, stage.num_layers))
        if model is not None:
            grow(model, grown)
        model = grown
        trainer = Trainer(
            model,
            training_arguments(
                work / f"verifier-{stage.num_layers}",
                SEED,
                min_lr_rate=0.05,
                num_train_epochs=stage.num_epochs,
                warmup_steps=50,
                per_device_train_batch_size=4,
                eval_strategy="steps",
                eval_steps=200,
                logging_steps=50,
            ),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            data_collator=_language_modelling,
            optimizers=(MuonAdamW(model, stage.learning_rate), None),
        )
        trainer.train()
        history += [{"layers": stage.num_layers, **entry} for entry in trainer.state.log_history]
    assert model is not None
    history += [
        {"stage": "loops", **entry} for entry in unlearn_loops(model, train_documents, work, SEED)
    ]
    model.eval()
    history.append({"eval_loss": trainer.evaluate()["eval_loss"]})
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to("cpu", torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return history


def _language_modelling(rows: list[dict]) -> dict[str, torch.Tensor]:
    batch = default_data_collator([{"input_ids": row["input_ids"]} for row in rows])
    return {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
