"""Whatever is asked of vLLM, and however little room it has, speculation changes no answer.

Each engine is started once and asked everything; the tests then compare what it said with what an
engine without speculation said. All in float32: in a narrower type near ties may fall either way.
"""

import asyncio
import json
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmarks import playground
from speculators_core.decoding.prompts import read_prompts, tokenize
from speculators_vllm import offline
from tests.vllm.serving import server

pytestmark = pytest.mark.vllm

MAX_MODEL_LEN = 256
BLOCK_SIZE = 32
COMMON = {
    "model": str(playground.VERIFIER),
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": MAX_MODEL_LEN,
    "block_size": BLOCK_SIZE,
    "disable_log_stats": False,
}
ROOM = {
    "ample": {"num_gpu_blocks_override": 400},
    "chunked, no prefix cache": {
        "num_gpu_blocks_override": 400,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 32,
    },
    "few blocks, no prefix cache": {
        "num_gpu_blocks_override": 12,
        "enable_prefix_caching": False,
    },
    "few blocks, chunked": {"num_gpu_blocks_override": 12, "max_num_batched_tokens": 64},
}
"""What an engine is given; a request of full length fills 8 blocks."""
ENGINES = [
    *((name, "ample") for name in playground.SPECULATORS),
    ("eagle3", "chunked, no prefix cache"),
    ("mtp", "few blocks, no prefix cache"),
    *((name, "few blocks, chunked") for name in ("eagle3", "dflash")),  # in steps, and at once
]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["file", "folder"]}, "open": {"type": "boolean"}},
    "required": ["kind", "open"],
    "additionalProperties": False,
}
TIGHT_SCHEMA = {"enum": ["file", "folder"]}
"""One without blanks, of which the verifier likes to write many."""
GRAMMAR = 'root ::= ("read" | "write") " " [a-z]+ ";"'


@dataclass(frozen=True)
class Request:
    """A prompt, and what is asked of it; ``options`` are of `SamplingParams`."""

    token_ids: list[int]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """One continuation, with all that vLLM says of it."""

    token_ids: list[int]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[dict[int, float]] | None
    prompt_logprobs: list[dict[int, float] | None] | None
    accepted: list[int]
    """Tokens kept of each draft; empty without speculation."""
    num_cached: int
    """Tokens of the prompt that were not computed again."""


Answers = dict[str, list[Answer]]


def parameters(options: dict[str, Any]):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    structured = options.get("structured_outputs")
    changed = {"structured_outputs": StructuredOutputsParams(**structured)} if structured else {}
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 32, **options, **changed})


def ask(llm, requests: dict[str, Request]) -> Answers:
    """All of them at one time."""
    outputs = llm.generate(
        [{"prompt_token_ids": request.token_ids} for request in requests.values()],
        [parameters(request.options) for request in requests.values()],
        use_tqdm=False,
    )
    return {
        name: [_answer(output, done) for done in output.outputs]
        for name, output in zip(requests, outputs, strict=True)
    }


def _answer(output, done) -> Answer:
    metrics = getattr(done, "spec_decode_metrics", None)
    return Answer(
        list(done.token_ids),
        done.text,
        done.finish_reason,
        done.stop_reason,
        _plain(done.logprobs),
        _plain(output.prompt_logprobs),
        list(metrics.per_step_accepted) if metrics else [],
        output.num_cached_tokens or 0,
    )


def _plain(rows):
    if rows is None:
        return None
    return [row and {token: entry.logprob for token, entry in row.items()} for row in rows]


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(playground.VERIFIER)


@cache
def prompts() -> list[list[int]]:
    """Of unequal length, the shortest of one token, the longest of 200."""
    found = tokenize(read_prompts(playground.PROMPTS), tokenizer(), 2048)
    longest = sorted((prompt.token_ids for prompt in found), key=len)[-24:]
    return [ids[: 1 + 9 * place] for place, ids in enumerate(longest)]


def plain_requests() -> dict[str, Request]:
    lengths = (4, 24, 13, 7, 18, 1, 30)
    requests = {
        f"prompt of {len(ids)}": Request(ids, {"max_tokens": lengths[place % len(lengths)]})
        for place, ids in enumerate(prompts())
    }
    long = (prompts()[-1] * 2)[:MAX_MODEL_LEN]
    return requests | {
        "prefix of another prompt": Request(prompts()[-1][:150]),
        "one token asked for": Request(prompts()[8], {"max_tokens": 1}),
        "up to the last position": Request(long[: MAX_MODEL_LEN - 20], {"max_tokens": 90}),
        "one position left": Request(long[: MAX_MODEL_LEN - 1], {"max_tokens": 90}),
        "two positions left": Request(long[: MAX_MODEL_LEN - 2], {"max_tokens": 90}),
        "eos ignored": Request(prompts()[3], {"ignore_eos": True, "max_tokens": 60}),
        "eos and its text": Request(prompts()[5], {"skip_special_tokens": False, "max_tokens": 60}),
    }


STOP_PLACES = range(8, 16)


def special_requests(plain: Answers) -> dict[str, Request]:
    """Those that stop, forbid or prefer something that is in the answer without them."""
    ids = prompts()[10]
    text_ids = plain["long"][0].token_ids
    pieces = [tokenizer().decode([token]) for token in text_ids]

    def long(**options) -> Request:
        return Request(ids, {"max_tokens": 40, **options})

    stops = {
        f"stop string over tokens {place} and {place + 1}": long(
            stop=[pieces[place] + pieces[place + 1][:1]], include_stop_str_in_output=place % 2 == 0
        )
        for place in STOP_PLACES
    }
    seen = list(dict.fromkeys(text_ids))
    words = [word for word in plain["long"][0].text.split() if word.isalpha()]
    return stops | {
        "several stop strings": long(stop=["never said", pieces[9] + pieces[10], pieces[20]]),
        "stop tokens": long(stop_token_ids=[seen[7], seen[5], 2047]),
        "stop token that is first": long(stop_token_ids=[seen[0]]),
        "stop tokens, but not before 20": long(stop_token_ids=seen[3:9], min_tokens=20),
        "stop string, but not before 20": long(stop=[pieces[4]], min_tokens=20),
        "logprobs": long(logprobs=5),
        "logprob of the token alone": long(logprobs=0),
        "logprobs of the prompt": long(prompt_logprobs=3),
        "logprobs of both": long(logprobs=2, prompt_logprobs=2, max_tokens=9),
        "repetition penalty": long(repetition_penalty=1.3),
        "presence penalty": long(presence_penalty=1.5),
        "frequency penalty": long(frequency_penalty=0.9),
        "all penalties": long(
            repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=-0.3, logprobs=3
        ),
        "bad words": long(bad_words=sorted(set(words))[:3]),
        "allowed tokens": long(allowed_token_ids=sorted(seen[:12]) + list(range(300, 340))),
        "json schema": long(
            structured_outputs={"json": SCHEMA, "disable_any_whitespace": True}, max_tokens=60
        ),
        "regex": long(structured_outputs={"regex": r"[a-c]{3}-\d{2}( if| or){2}"}),
        "choice": long(structured_outputs={"choice": ["return None", "raise ValueError"]}),
        "grammar": long(structured_outputs={"grammar": GRAMMAR}),
        "regex and stop string": long(structured_outputs={"regex": r"(ab)*c"}, stop=["bab"]),
    }


SEEDED = {"temperature": 1.0, "max_tokens": 24}
ONE_CHOICE = {"temperature": 1.0, "max_tokens": 40, "top_k": 1}
"""Sampled, and yet the verifier's greedy text: vLLM refuses ``n`` beside a temperature of 0."""


def seeded_requests() -> dict[str, Request]:
    ids = prompts()[12]
    return {
        "seed 1": Request(ids, {**SEEDED, "seed": 1}),
        "seed 1 again": Request(ids, {**SEEDED, "seed": 1}),
        "seed 2": Request(ids, {**SEEDED, "seed": 2}),
        "narrow": Request(ids, {**SEEDED, "seed": 3, "top_p": 0.8, "top_k": 20}),
        "two of seed 1": Request(ids, {**SEEDED, "seed": 1, "n": 2}),
        "two of one choice": Request(prompts()[10], {**ONE_CHOICE, "top_p": 0.5, "n": 2}),
        "two of one choice, seed 4": Request(
            prompts()[10], {**ONE_CHOICE, "top_p": 0.5, "n": 2, "seed": 4}
        ),
        "greedy beside": Request(prompts()[10], {"max_tokens": 40}),
    }


@dataclass(frozen=True)
class Session:
    """What one engine answered."""

    answers: Answers
    again: Answers
    """To the plain requests, asked a second time where prefixes are cached."""
    preemptions: int
    refusals: dict[str, str]
    seeded: Answers | str
    """Or what stopped the engine."""
    seeded_later: Answers | str
    top_k_alone: Answers | str


REFUSED = {
    "min_p": {"min_p": 0.4, "temperature": 1.0},
    "logit_bias": {"logit_bias": {10: 5.0}},
}


def hold_session(llm, special: Callable[[Answers], dict[str, Request]]) -> Session:
    # Alone: beside a request at its last position vLLM drafts for nobody.
    answers = ask(llm, {"long": Request(prompts()[10], {"max_tokens": 40})})
    plain = plain_requests()
    answers |= ask(llm, plain)
    refusals = {name: _refusal(llm, options) for name, options in REFUSED.items()}
    again = ask(llm, plain) if llm.llm_engine.vllm_config.cache_config.enable_prefix_caching else {}
    answers |= ask(llm, special(answers))
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    return Session(
        answers,
        again,
        metrics["vllm:num_preemptions"].value,
        refusals,
        _ask_or_fail(llm, seeded_requests()),
        _ask_or_fail(llm, dict(reversed(seeded_requests().items()))),
        _ask_or_fail(llm, {"top-k alone": Request(prompts()[10], ONE_CHOICE)}),
    )


def _ask_or_fail(llm, requests: dict[str, Request]) -> Answers | str:
    """The answers; what was raised where the engine fell."""
    try:
        return ask(llm, requests)
    except Exception as error:  # whatever it is, the greedy answers are worth comparing
        return repr(error)


def _refusal(llm, options: dict[str, Any]) -> str:
    """What vLLM says to a request beside a good one; empty where it takes it."""
    from vllm.exceptions import VLLMValidationError

    good = Request(prompts()[4])
    try:
        ask(llm, {"good": good, "bad": Request(prompts()[4], options)})
    except VLLMValidationError as error:
        return str(error)
    return ""


@cache
def reference() -> Session:
    with offline.loaded(**COMMON, **ROOM["ample"]) as llm:
        return hold_session(llm, special_requests)


@cache
def session(speculator: str, room: str) -> Session:
    settings = {"model": str(playground.SPECULATORS[speculator])}
    special = special_requests(reference().answers)
    with offline.loaded(**COMMON, **ROOM[room], speculative_config=settings) as llm:
        return hold_session(llm, lambda answers: special)


def assert_same(found: Answers, expected: Answers) -> None:
    assert found.keys() == expected.keys()
    for name, answers in found.items():
        for ours, theirs in zip(answers, expected[name], strict=True):
            assert ours.token_ids == theirs.token_ids, name
            assert ours.text == theirs.text, name
            assert ours.finish_reason == theirs.finish_reason, name
            assert ours.stop_reason == theirs.stop_reason, name
            assert_close(ours.logprobs, theirs.logprobs, name)
            assert_close(ours.prompt_logprobs, theirs.prompt_logprobs, name)


def assert_close(ours, theirs, name: str) -> None:
    assert (ours is None) == (theirs is None), name
    for mine, other in zip(ours or [], theirs or [], strict=True):
        assert (mine is None) == (other is None), name
        assert mine is None or mine == pytest.approx(other, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize(("speculator", "room"), ENGINES)
def test_every_answer_is_the_verifiers_own(speculator, room):
    expected = reference().answers
    found = session(speculator, room)
    assert_same(found.answers, expected)
    assert_same(found.again, {name: expected[name] for name in found.again})
    accepted = sum(sum(answer.accepted) for (answer, *_) in found.answers.values())
    assert accepted > 200, "speculation did nothing"


def test_the_requests_do_what_their_names_say():
    answers = {name: first for name, (first, *_) in reference().answers.items()}
    long = answers["long"]
    assert len(answers["one token asked for"].token_ids) == 1
    assert len(answers["up to the last position"].token_ids) == 20
    assert len(answers["one position left"].token_ids) == 1
    stopped = {name: answer for name, answer in answers.items() if name.startswith("stop ")}
    for name in ("stop token that is first", "stop tokens", "several stop strings"):
        assert answers[name].finish_reason == "stop", name
    for name in ("stop tokens, but not before 20", "stop string, but not before 20"):
        assert len(answers[name].token_ids) >= 20, name
    for answer in stopped.values():
        assert len(answer.token_ids) <= len(long.token_ids)
    for name in ("repetition penalty", "presence penalty", "frequency penalty", "bad words"):
        assert answers[name].text != long.text, name
    assert json.loads(answers["json schema"].text)["kind"] in ("file", "folder")
    assert answers["choice"].text in ("return None", "raise ValueError")


@pytest.mark.slow
@pytest.mark.parametrize("speculator", playground.SPECULATORS)
def test_stop_strings_end_among_accepted_tokens(speculator):
    """What was drafted and kept beyond a stop is not in the answer, which was compared above."""
    answers = session(speculator, "ample").answers
    accepted, place = set(), 1
    for kept in answers["long"][0].accepted:
        accepted |= set(range(place, place + kept))
        place += kept + 1  # the verifier's own token comes after them
    assert any({place, place + 1} <= accepted for place in STOP_PLACES)
    for place in STOP_PLACES:
        assert answers[f"stop string over tokens {place} and {place + 1}"][0].text


@pytest.mark.slow
@pytest.mark.parametrize(("speculator", "room"), ENGINES)
def test_the_engines_room_was_used_up(speculator, room):
    found = session(speculator, room)
    asked = found.again or found.answers
    cached = [answer.num_cached for answers in asked.values() for answer in answers]
    if "few blocks" in room:
        assert found.preemptions > 0
    if "no prefix cache" in room:
        assert not any(cached)
    elif room == "ample":
        assert sum(map(bool, cached)) > 10
        assert found.preemptions == 0


@pytest.mark.slow
@pytest.mark.parametrize("speculator", playground.SPECULATORS)
def test_a_seed_gives_its_answer_again(speculator):
    """The same seed, the same answer, whatever runs beside it.

    With and without speculation a seed gives different answers of the same distribution: random
    numbers are drawn for the draft's tokens too. For that reason it is kept only while the engine
    has room: a request that was preempted, or whose draft was cut, draws another number of them.
    """
    found = session(speculator, "ample")
    assert isinstance(found.seeded, dict), found.seeded
    assert isinstance(found.seeded_later, dict), found.seeded_later
    tokens = {name: [a.token_ids for a in answers] for name, answers in found.seeded.items()}
    assert tokens["seed 1"] == tokens["seed 1 again"] != tokens["seed 2"]
    first, second = tokens["two of seed 1"]
    assert first != second
    later = {name: [a.token_ids for a in answers] for name, answers in found.seeded_later.items()}
    assert later == tokens


@pytest.mark.slow
@pytest.mark.parametrize(("speculator", "room"), ENGINES)
def test_greedy_requests_do_not_suffer_from_sampled_ones_beside_them(speculator, room):
    greedy = reference().answers["long"][0].token_ids
    answers = session(speculator, room).seeded
    assert isinstance(answers, dict), answers
    assert [answer.token_ids for answer in answers["greedy beside"]] == [greedy]
    for name in ("two of one choice", "two of one choice, seed 4"):
        assert [answer.token_ids for answer in answers[name]] == [greedy, greedy], name


@pytest.mark.slow
@pytest.mark.parametrize("speculator", ["mtp", "eagle3"])
def test_top_k_alone_leaves_the_engine_alive(speculator):
    found = session(speculator, "ample").top_k_alone
    assert isinstance(found, dict), found
    assert found["top-k alone"][0].token_ids == reference().answers["long"][0].token_ids


@pytest.mark.slow
@pytest.mark.parametrize("speculator", playground.SPECULATORS)
def test_what_vllm_cannot_do_with_speculation_is_refused_by_name(speculator):
    """The next request is answered as ever: `again` is asked after the refusals."""
    for name, message in session(speculator, "ample").refusals.items():
        assert "not yet supported with speculative decoding" in message, name
        assert name in message and "\n" not in message
    assert not any(reference().refusals.values())


# ---- over HTTP ----

BOTH_SIDES = {"stop", "logprobs", "max_tokens", "temperature", "presence_penalty"}
BOTH_SIDES |= {"frequency_penalty"}
"""Options that OpenAI's client knows; vLLM takes the others in the same body."""
OVER_HTTP = (
    *(f"prompt of {length}" for length in range(1, 172, 9)),
    "up to the last position",
    "one token asked for",
    "stop string over tokens 8 and 9",
    "several stop strings",
    "stop tokens",
    "logprobs",
    "repetition penalty",
    "all penalties",
    "bad words",
    "allowed tokens",
    "choice",
)


@pytest.mark.slow
def test_thirty_two_requests_at_once_are_answered_as_each_alone(tmp_path):
    """`vllm serve` with nothing but the speculator's folder; a bad request fails alone."""
    expected = reference().answers
    requests = plain_requests() | special_requests(expected)
    chosen = {name: requests[name] for name in OVER_HTTP}
    arguments = [
        *(COMMON["model"], "--max-model-len", str(MAX_MODEL_LEN)),
        *("--speculative-config", json.dumps({"model": str(playground.SPECULATORS["mtp"])})),
        *("--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", "400"),
    ]
    with server(tmp_path / "log", *arguments) as url:
        answers, schema, pair, refused, metrics = asyncio.run(_ask_over_http(url, chosen))
    for name, answer in answers.items():
        theirs = expected[name][0]
        assert answer.choices[0].text == theirs.text, name
        assert answer.choices[0].finish_reason == theirs.finish_reason, name
        if theirs.logprobs is not None:
            own = [row[token] for row, token in zip(theirs.logprobs, theirs.token_ids, strict=True)]
            assert answer.choices[0].logprobs.token_logprobs == pytest.approx(own, abs=1e-4)
    assert json.loads(schema.choices[0].text) in ("file", "folder")
    assert len(pair.choices) == 2
    assert len(answers) + 2 >= 32
    assert refused == [400, 400, 400]
    assert metrics["vllm:spec_decode_num_accepted_tokens_total"] > 100


async def _ask_over_http(url: str, requests: dict[str, Request]):
    from openai import APIStatusError, AsyncOpenAI

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        model = str(playground.VERIFIER)

        async def complete(token_ids: list[int], **options: Any):
            body = {"max_tokens": 32, "temperature": 0.0, **options}
            extra = {key: body.pop(key) for key in list(body) if key not in BOTH_SIDES}
            return await client.completions.create(
                model=model, prompt=token_ids, extra_body=extra, timeout=240, **body
            )

        async def status(**options: Any) -> int:
            try:
                await complete([5, 6, 7], **options)
            except APIStatusError as error:
                return error.status_code
            return 200

        form = {"type": "json_schema", "json_schema": {"name": "entry", "schema": TIGHT_SCHEMA}}
        answers = await asyncio.gather(
            *(complete(request.token_ids, **request.options) for request in requests.values()),
            complete([5, 6, 7], max_tokens=60, response_format=form),
            complete([5, 6, 7], n=2, seed=3, temperature=1.0),
            status(temperature=-1.0),
            status(logit_bias={"5": 3.0}),
            status(max_tokens=100_000),
        )
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        rows = [row.rsplit(" ", 1) for row in reply.read().decode().splitlines()]
    metrics = {row[0].split("{")[0]: float(row[1]) for row in rows if not row[0].startswith("#")}
    named = dict(zip(requests, answers, strict=False))
    schema, pair, *refused = answers[len(requests) :]
    return named, schema, pair, refused, metrics
