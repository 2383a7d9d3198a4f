"""Speculative decoding with two whole models."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.playground import VERIFIER
from speculators_core import SpeculativeConfig, SpeculativeInferenceEngine

main_model_name = str(VERIFIER)
draft_model_name = str(VERIFIER)  # in practice a smaller model with the same vocabulary

tokenizer = AutoTokenizer.from_pretrained(main_model_name)
device = "cuda" if torch.cuda.is_available() else "cpu"
main_model = AutoModelForCausalLM.from_pretrained(main_model_name).to(device)
draft_model = AutoModelForCausalLM.from_pretrained(draft_model_name).to(device)

inference_engine = SpeculativeInferenceEngine(
    main_model=main_model,
    draft_model=draft_model,
    tokenizer=tokenizer,
    config=SpeculativeConfig(
        main_model_path=main_model_name,
        draft_model_path=draft_model_name,
        max_speculative_tokens=5,
        temperature=0.7,
        top_p=0.9,
    ),
)
input_ids = tokenizer.encode("import os\n\n\ndef ", return_tensors="pt").to(device)
generated_ids = inference_engine.generate(input_ids=input_ids, max_new_tokens=24, do_sample=True)
print(tokenizer.decode(generated_ids[0], skip_special_tokens=True))
