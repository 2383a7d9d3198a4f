"""Runs engines one after another, each in a process of its own that may die or hang."""

import asyncio
import json
import multiprocessing
import os
import signal
import sys
import traceback
from pathlib import Path

from speculators_vllm import offline

TIMEOUT_S = 100
PATIENCE_S = 20


def main(job: str, result: str) -> None:
    """``job``: requests and an engine's arguments by name. ``result``: a JSON line for each."""
    offline.prepare()
    import vllm  # noqa: F401  # once, before the forks; after OpenMP

    jobs = json.loads(Path(job).read_text())
    with Path(result).open("w") as file:
        for name, asked in jobs.items():
            print(json.dumps({"name": name, **run_apart(asked)}), file=file, flush=True)


def run_apart(asked: dict) -> dict:
    """What `answer` gives in a child, or how the child ended."""
    context = multiprocessing.get_context("fork")
    reading, writing = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(asked, writing))
    child.start()
    writing.close()
    try:
        if not reading.poll(TIMEOUT_S):
            return {"dead": f"no answer in {TIMEOUT_S} s"}
        return reading.recv()
    except EOFError:
        child.join()
        return {"dead": f"the process ended with {child.exitcode}"}
    finally:
        if child.is_alive():
            os.killpg(child.pid, signal.SIGKILL)
        child.join()


def _child(asked: dict, writing) -> None:
    os.setsid()
    try:
        answered = answer(asked)
    except BaseException:
        answered = {"dead": traceback.format_exc()}
    writing.send(answered)
    writing.close()
    os._exit(0)  # whatever threads and processes the engine has left


def answer(asked: dict) -> dict:
    """Texts of all requests; or the refusal at the start, or at the requests."""
    os.environ.update(asked.get("environment", {}))
    if asked.get("is_server"):
        return asyncio.run(answer_as_server(asked))
    try:
        llm = offline._start(arguments_of(asked))
    except Exception as error:
        return {"refused": str(error)}
    with_plain = [*asked["requests"], {"token_ids": asked["requests"][0]["token_ids"]}]
    prompts, parameters, adapters = zip(*map(request_of, with_plain), strict=True)
    try:
        if llm.model_config.runner_type == "pooling":
            llm.embed(list(prompts), use_tqdm=False)
            return {"texts": []}
        done = llm.generate(
            list(prompts), list(parameters), lora_request=list(adapters), use_tqdm=False
        )
    except Exception as error:
        if _still_answers(llm, prompts[-1], parameters[-1]):
            return {"refused": f"request: {error}"}
        return {"dead": "".join(traceback.format_exception(error))}
    return {
        "texts": [[list(one.token_ids) for one in output.outputs] for output in done],
        "logprobs": [_logprobs(output) for output in done],
        "accepted": [offline.accepted_of(output.outputs[0]) for output in done],
    }


def _logprobs(output) -> list:
    """Most likely tokens of each place, and of the prompt's, where they were asked for."""
    found = []
    for places in (output.outputs[0].logprobs, output.prompt_logprobs):
        found.append([[*place] for place in places or [] if place])
    return found


def _still_answers(llm, prompt, parameters) -> bool:
    """A dead engine in one's own process may keep the next request for ever."""
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(PATIENCE_S)
    try:
        return bool(llm.generate([prompt], [parameters], use_tqdm=False))
    except Exception:
        return False
    finally:
        signal.alarm(0)


def _give_up(*_) -> None:
    raise TimeoutError


async def answer_as_server(asked: dict) -> dict:
    """As `answer`, of the engine of `vllm serve`, with all requests at one time."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    os.environ["VLLM_CPU_KVCACHE_SPACE"] = offline.CPU_KV_CACHE_GIB
    try:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments_of(asked)))
    except Exception as error:
        return {"refused": str(error)}

    async def one(number: int, request: dict) -> list[list[int]]:
        prompt, parameters, adapter = request_of(request)
        async for output in engine.generate(prompt, parameters, str(number), lora_request=adapter):
            last = output
        return [list(completion.token_ids) for completion in last.outputs]

    requests = [*asked["requests"], {"token_ids": asked["requests"][0]["token_ids"]}]
    return {"texts": await asyncio.gather(*(one(n, r) for n, r in enumerate(requests)))}


def arguments_of(asked: dict) -> dict:
    arguments = dict(asked["arguments"])
    if arguments.get("speculative_config") and not asked.get("is_server"):
        arguments["per_request_spec_decode_metrics"] = "detailed"
    return arguments


def request_of(asked: dict):
    """Prompt, parameters and adapter for vLLM."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    keys = {"temperature": 0.0, "max_tokens": 32, "ignore_eos": True, **asked.get("parameters", {})}
    if "structured_outputs" in keys:
        keys["structured_outputs"] = StructuredOutputsParams(**keys["structured_outputs"])
    if "logit_bias" in keys:  # JSON has no keys that are numbers
        keys["logit_bias"] = {int(token): bias for token, bias in keys["logit_bias"].items()}
    if asked.get("by_embeddings"):
        prompt = {"prompt_embeds": embeddings_of(asked["token_ids"])}
    else:
        prompt = {"prompt_token_ids": asked["token_ids"]}
    path = asked.get("adapter")
    return prompt, SamplingParams(**keys), path and LoRARequest(path, asked["adapter_id"], path)


def embeddings_of(token_ids: list[int]):
    from safetensors.torch import load_file

    from benchmarks import playground

    weights = load_file(Path(playground.VERIFIER) / "model.safetensors")
    return weights["model.embed_tokens.weight"][token_ids].float()


if __name__ == "__main__":
    main(*sys.argv[1:])
