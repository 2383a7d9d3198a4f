"""Serves drafts one after another, in a process of its own."""

import json
import sys
from pathlib import Path

from speculators_vllm import offline


def main(job: str, result: str) -> None:
    """``job``: prompts, and speculative settings by name. ``result``: a JSON line for each."""
    offline.prepare()
    from vllm import SamplingParams  # after OpenMP

    from benchmarks import playground

    asked = json.loads(Path(job).read_text())
    parameters = SamplingParams(temperature=0.0, max_tokens=asked["max_tokens"], ignore_eos=True)
    with Path(result).open("w") as file:
        for name, settings in asked["settings"].items():
            answer: dict = {"name": name}
            try:
                with offline.loaded(
                    model=str(playground.VERIFIER),
                    dtype="float32",
                    enforce_eager=True,
                    max_model_len=256,
                    max_num_seqs=1,
                    num_gpu_blocks_override=64,
                    speculative_config=settings,
                ) as llm:
                    done = offline.continue_all(llm, asked["prompts"], parameters)
                answer["token_ids"] = [one.token_ids for one in done]
                answer["accepted"] = [one.accepted for one in done]
            except Exception as error:  # the test reports it by name
                answer["error"] = str(error)
            print(json.dumps(answer), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
