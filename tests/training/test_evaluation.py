"""Figures of acceptance are the reference decoder's, and measuring changes nothing."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.playground import VERIFIER
from speculators_core.data_generation.examples import GeneratedExample
from speculators_core.decoding.acceptance import (
    AcceptanceCounts,
    merge_contexts,
    reached_and_kept,
    worst_cell,
)
from speculators_core.decoding.independent import LanguageModelDraft
from speculators_core.diagnosis.replay import see
from speculators_core.diagnosis.rollout import (
    SurvivalCounts,
    VerifiedText,
    bonus_places,
    roll_out,
    share_drafts,
)
from speculators_core.errors import SpeculatorError
from speculators_core.format.proposals import GreedyTokenProposalConfig, SamplingTokenProposalConfig
from speculators_core.training.evaluation import (
    HeldOut,
    choose_prompts,
    counts_by_context,
    decode_prompts,
    greedy_tokens,
    measure_acceptance,
    measuring,
    name_teacher_forced,
    roll_out_held_out,
    worst_cell_of,
)
from speculators_core.training.settings import EvaluationConfig
from speculators_core.verifier import head as verifier_head
from speculators_core.verifier.head import VerifierHead
from tests.conftest import DRAFTS, make_batch, make_draft, make_verifier
from tests.data_generation.making import schema
from tests.data_generation.processes import processes

PROMPTS = [[5, 9, 7, 3], [10, 4], [3], [8, 11, 6, 3, 5, 5, 4, 9], [4, 4, 10], [7] * 6]
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def terse():
    """A verifier of so few tokens that a draft of random weights is right now and then."""
    return make_verifier(vocab_size=12)


def decode_alone(model, prompt, **settings):
    (counts,) = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        return_dict_in_generate=True,
        **{"max_new_tokens": MAX_TOKENS, **settings},
    ).acceptance
    return counts.accepted


def held_out(verifier, num=5, layer_ids=(0, 1, 2, 3, 4)):
    """Random texts of the verifier's tokens, the first four tokens given."""
    examples = []
    for number in range(num):
        draw = torch.Generator().manual_seed(number)
        ids = torch.randint(3, verifier.config.vocab_size, (20 + number,), generator=draw)
        seen = see(verifier, ids[:4].tolist(), ids[4:].tolist())
        examples.append(
            GeneratedExample(
                key=f"0/{number}",
                input_ids=ids,
                loss_mask=torch.arange(len(ids)) >= 4,
                num_prompt_tokens=len(ids),
                hidden_states=torch.stack([seen.states[i] for i in layer_ids], dim=1),
            )
        )
    content = schema(layer_ids=layer_ids, hidden_size=32, vocab_size=verifier.config.vocab_size)
    return HeldOut(examples, content)


# ---- decoding ----


@pytest.mark.parametrize("name", DRAFTS)
def test_prompts_together_count_as_each_alone(name, terse):
    model = make_draft(name, terse)
    num_tokens = model.config.proposal.speculative_tokens
    accepted = [kept for prompt in PROMPTS for kept in decode_alone(model, prompt)]
    assert sum(accepted) > 5
    expected = AcceptanceCounts(num_tokens, accepted)
    found = decode_prompts(model, PROMPTS, MAX_TOKENS)
    assert found == SurvivalCounts.of(expected)
    assert found.acceptance_length == pytest.approx(expected.acceptance_length)
    assert decode_prompts(model, [], MAX_TOKENS) == SurvivalCounts.none(num_tokens)


def test_the_verifier_as_its_own_draft_is_kept_whole(terse, monkeypatch):
    model = make_draft("eagle3", terse)
    perfect = LanguageModelDraft(terse)
    for name in ("propose", "start_drafting"):
        monkeypatch.setattr(model, name, getattr(perfect, name))
    section = EvaluationConfig(max_tokens=MAX_TOKENS)
    figures = measure_acceptance(model, PROMPTS, held_out(terse), section)
    assert figures["acceptance_length"] == 4.0
    assert all(
        figures[f"{rate}_{k}"] == 1.0 for rate in ("joint", "conditional") for k in (1, 2, 3)
    )
    assert figures["predicted_conditional_1"] == figures["predicted_conditional_2"] == 1.0


def test_decoding_is_greedy_whatever_checkpoint_and_verifier_say(terse):
    verifier = copy.deepcopy(terse)
    model = make_draft("eagle3", verifier)
    expected = decode_prompts(model, PROMPTS, MAX_TOKENS)
    verifier.generation_config.update(
        do_sample=True, temperature=2.0, top_k=3, repetition_penalty=1.8
    )
    speculators = model.config.speculators_config
    for method in (
        SamplingTokenProposalConfig(speculative_tokens=3, temperature=5.0),
        GreedyTokenProposalConfig(speculative_tokens=3, verifier_accept_k=4),
    ):
        changed = speculators.model_copy(
            update={
                "proposal_methods": [method],
                "default_proposal_method": method.proposal_type,
            }
        )
        model.config.speculators_config = changed
        assert type(model.config.proposal) is type(method)
        assert decode_prompts(model, PROMPTS, MAX_TOKENS) == expected


def test_an_end_token_ends_an_answer(terse):
    verifier = copy.deepcopy(terse)
    model = make_draft("eagle3", verifier)
    whole = decode_prompts(model, PROMPTS, MAX_TOKENS)
    ids = torch.tensor([PROMPTS[0]])
    told = terse.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=6, do_sample=False)
    verifier.generation_config.eos_token_id = int(told[0, -1])
    assert 0 < decode_prompts(model, PROMPTS, MAX_TOKENS).num_places < whole.num_places


def test_without_a_verifier_nothing_is_decoded(terse):
    model = make_draft("eagle3", terse)
    model.detach_verifier()
    with pytest.raises(SpeculatorError, match="no verifier is attached in full"):
        decode_prompts(model, PROMPTS, MAX_TOKENS)


# ---- measuring leaves no trace ----


def states_of_chance():
    kind, keys, *rest = np.random.get_state()
    return (kind, keys.tolist(), *rest), torch.get_rng_state().tolist()


def test_python_draws_what_it_would_have_drawn(terse):
    """Apart from the others: the checker of shapes, which runs in tests alone, draws from it."""
    model, before = make_draft("mtp", terse), random.getstate()
    with measuring(model):
        random.random()
        assert not torch.is_grad_enabled()
    assert random.getstate() == before


@pytest.mark.parametrize("fails", [False, True])
def test_measuring_leaves_modes_and_random_numbers_as_they_were(terse, monkeypatch, fails):
    model = make_draft("eagle3", terse).train()
    model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    seen, propose = [], model.propose

    def draw(*arguments):
        torch.rand(3), np.random.rand()
        seen.append((model.layers[0].mlp.training, model.training, torch.is_grad_enabled()))
        if fails:
            raise RuntimeError("no memory")
        return propose(*arguments)

    monkeypatch.setattr(model, "propose", draw)
    before = states_of_chance()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    for measure in (
        lambda: decode_prompts(model, PROMPTS, MAX_TOKENS),
        lambda: roll_out_held_out(model, held_out(terse), 20),
    ):
        seen.clear()
        if fails:
            with pytest.raises(RuntimeError, match="no memory"):
                measure()
        else:
            measure()
        assert set(seen) == {(False, False, False)}
        assert states_of_chance() == before
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert torch.is_grad_enabled() and model.dtype == torch.float32
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])
    assert all(weight.grad is None for weight in model.parameters())


# ---- roll-outs ----


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("layer_ids", [(0, 1, 2, 3, 4), (1, 2, 3, 4)])
def test_stored_states_are_those_that_the_draft_reads(name, layer_ids, terse):
    model = make_draft(name, terse)
    num_tokens = model.config.proposal.speculative_tokens
    stored = held_out(terse, layer_ids=layer_ids)
    expected = SurvivalCounts.none(num_tokens)
    for example in stored.examples:
        ids = example.input_ids.tolist()
        seen = see(terse, ids[:4], ids[4:])
        with torch.no_grad():
            choices = VerifierHead(terse)(seen.states[4]).argmax(-1)
        text = VerifiedText(seen.token_ids, seen.aux_states(model.aux_layer_ids), choices)
        places = bonus_places(example.loss_mask).tolist()
        expected += roll_out(model, text, places, num_tokens)
    found = roll_out_held_out(model, stored, 10_000)
    assert found == expected and found.right[0] > 3


def test_places_are_few_and_the_same_each_time(terse):
    model, stored = make_draft("eagle3", terse), held_out(terse)
    few = roll_out_held_out(model, stored, 30)
    assert 10 < few.num_places <= 30
    assert roll_out_held_out(model, stored, 30) == few
    many = roll_out_held_out(model, stored, 200)
    shares = [roll_out_held_out(model, stored, 200, rank, 3) for rank in range(3)]
    assert shares[0] + shares[1] + shares[2] == many
    assert all(0 < share.num_places < many.num_places for share in shares)


def test_only_examples_with_a_place_are_read_again(terse):
    stored = held_out(terse, num=4)
    num_places = [len(bonus_places(example.loss_mask)) for example in stored.examples]
    used = [bool(share) for share in share_drafts(num_places, 2)]
    assert 0 < sum(used) < 4
    blank = [
        example
        if is_used
        else GeneratedExample(
            example.key,
            example.input_ids,
            example.loss_mask,
            example.num_prompt_tokens,
            torch.full_like(example.hidden_states, torch.nan),
        )
        for example, is_used in zip(stored.examples, used, strict=True)
    ]
    model = make_draft("eagle3", terse)
    found = roll_out_held_out(model, HeldOut(blank, stored.schema), 2)
    assert found == roll_out_held_out(model, stored, 2)


def test_a_store_without_the_drafts_states_is_refused(terse):
    stored = held_out(terse, layer_ids=(1, 2, 4))
    with pytest.raises(SpeculatorError, match=r"reads layers \[1, 2, 3\], but the examples hold"):
        roll_out_held_out(make_draft("eagle3", terse), stored, 5)
    assert roll_out_held_out(make_draft("mtp", terse), stored, 5).num_places == 5


def test_greedy_tokens_are_the_heads_however_few_rows_at_a_time(terse, monkeypatch):
    head, states = VerifierHead(terse), torch.randn(50, 32)
    with torch.no_grad():
        expected = head(states).argmax(-1)
    sizes = []
    head.register_forward_hook(lambda *call: sizes.append(len(call[1][0])))
    assert torch.equal(greedy_tokens(head, states), expected)
    monkeypatch.setattr(verifier_head, "CHUNK_LOGITS", 20 * 12)
    assert torch.equal(greedy_tokens(head, states), expected)
    assert sizes == [50, 20, 20, 10]


# ---- figures ----


def test_figures_are_those_of_both_counts(terse):
    model, stored = make_draft("eagle3", terse), held_out(terse)
    section = EvaluationConfig(max_tokens=MAX_TOKENS, roll_outs=40)
    figures = measure_acceptance(model, PROMPTS, stored, section)
    decoded, rolled = (
        decode_prompts(model, PROMPTS, MAX_TOKENS),
        roll_out_held_out(model, stored, 40),
    )
    for prefix, counts in (("", decoded), ("predicted_", rolled)):
        assert figures[f"{prefix}acceptance_length"] == counts.acceptance_length
        for k in (1, 2, 3):
            assert figures[f"{prefix}joint_{k}"] == counts.joint[k - 1]
            assert figures.get(f"{prefix}conditional_{k}") == counts.conditional[k - 1]
    assert all(type(figure) is float for figure in figures.values())
    shorter = section.model_copy(update={"max_tokens": 5})
    assert measure_acceptance(model, PROMPTS, stored, shorter)["joint_1"] != figures["joint_1"]


def test_figures_by_context_length_are_those_of_the_drafts_there():
    verifier = make_verifier(vocab_size=12, max_position_embeddings=256)
    model, stored = make_draft("eagle3", verifier), held_out(verifier)
    prompts = [*PROMPTS, [5, 9, 7] * 42, [8] * 140]
    section = EvaluationConfig(max_tokens=MAX_TOKENS, roll_outs=40)
    figures = measure_acceptance(model, prompts, stored, section)
    parts = [
        AcceptanceCounts(3, decode_alone(model, prompt)).by_context(len(prompt))
        for prompt in prompts
    ]
    expected = merge_contexts(parts, 3)
    assert list(expected) == ["<128", "128-512"]
    for name, counts in expected.items():
        start = f"context_{name.replace('<', '0-')}"
        assert figures[f"{start}_num_drafts"] == counts.num_drafts
        assert figures[f"{start}_acceptance_length"] == pytest.approx(counts.acceptance_length)
        first = counts.accepted_per_position[0] / counts.num_drafts
        assert figures[f"{start}_conditional_1"] == pytest.approx(first)
    assert figures["predicted_context_0-128_num_drafts"] > 0
    assert not any("512" in name for name in figures if name.startswith("predicted_"))
    read = {name: [c.num_drafts, *c.accepted_per_position] for name, c in expected.items()}
    assert counts_by_context(figures) == read
    logged = {f"eval_{name}": value for name, value in figures.items()}
    assert counts_by_context(logged, "eval_") == read and counts_by_context(logged) == {}
    cells = {name: reached_and_kept(c[0], c[1:]) for name, c in read.items()}
    assert worst_cell_of(figures) == worst_cell(cells) is not None


def test_what_is_not_measured_has_no_figure(terse):
    model, stored = make_draft("eagle3", terse), held_out(terse)
    off = EvaluationConfig(decode=False, roll_outs=10)
    assert all(name.startswith("predicted_") for name in measure_acceptance(model, [], stored, off))
    model.attach_verifier(terse, "train_only")
    assert measure_acceptance(model, [], stored, off)["predicted_acceptance_length"] >= 1.0
    assert measure_acceptance(model, [], stored, EvaluationConfig(decode=False, roll_outs=0)) == {}


def test_a_rank_decodes_its_share_of_the_prompts(terse):
    model, section = make_draft("eagle3", terse), EvaluationConfig(max_tokens=MAX_TOKENS)
    alone = measure_acceptance(model, PROMPTS, held_out(terse), section, rank=1, world=3)
    share = decode_prompts(model, PROMPTS[1::3], MAX_TOKENS)
    assert alone["acceptance_length"] == share.acceptance_length
    assert share != decode_prompts(model, PROMPTS, MAX_TOKENS)


def rank_of_two(rank, folder):
    """One of two processes that evaluate together."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    (folder / f"{rank}.json").write_text(json.dumps(measure_as(rank, 2)))
    torch.distributed.destroy_process_group()


def measure_as(rank, world):
    terse = make_verifier(vocab_size=12)
    section = EvaluationConfig(max_tokens=MAX_TOKENS, roll_outs=40)
    model = make_draft("eagle3", terse)
    return measure_acceptance(model, PROMPTS, held_out(terse), section, rank, world)


def test_two_processes_find_what_one_finds(tmp_path):
    ranks = [processes.Process(target=rank_of_two, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    expected = measure_as(0, 1)
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(expected)


@pytest.mark.parametrize("name", DRAFTS)
def test_metrics_of_every_draft_are_named_teacher_forced(name, verifier):
    model = make_draft(name, verifier)
    with torch.no_grad():
        _, _, metrics = model(make_batch(verifier))
    values = {key: float(value) for key, value in metrics.items()}
    named = name_teacher_forced(values)
    assert list(named.values()) == list(values.values())
    kept = {key for key in named if not key.startswith("teacher_forced_")}
    assert kept == {key for key in values if key.partition("_")[0] == "loss"}
    assert len(named) > len(kept) > 0
    assert {key.removeprefix("teacher_forced_") for key in named} == set(values)


# ---- prompts ----


def text(ids, mask):
    return GeneratedExample(
        "0/0", torch.tensor(ids), torch.tensor(mask).bool(), len(ids), torch.zeros(len(ids), 1, 1)
    )


def chosen(examples, num_prompts=16, max_length=100, **options):
    section = EvaluationConfig(num_prompts=num_prompts, **options)
    return choose_prompts(section, examples, str(VERIFIER), max_length)


def test_a_prompt_is_what_stands_before_the_first_trained_token():
    conversation = text([5, 6, 7, 8, 9, 3, 4], [0, 0, 0, 1, 1, 0, 1])
    assert chosen([conversation]) == [[5, 6, 7]]


@pytest.mark.parametrize("first", [0, 1])
def test_of_plain_text_the_prompt_is_the_first_quarter(first):
    plain = text(range(3, 43), [0] * first + [1] * (40 - first))
    assert chosen([plain]) == [list(range(3, 13))]
    assert chosen([plain], max_length=12) == [list(range(3, 9))]  # half of what there is room for
    assert chosen([text([5, 6], [0, 1])]) == [[5]]


def test_prompts_are_no_duplicates_and_not_too_many():
    examples = [text([5, number % 5 + 3, 9, 9], [0, 0, 1, 1]) for number in range(20)]
    everything = [[5, n + 3] for n in range(5)]
    assert chosen(examples) == everything
    assert chosen(examples, num_prompts=2) == [everything[0], everything[2]]


def test_examples_without_a_prompt_are_left_out():
    untrained = text([5, 6, 7], [0, 0, 0])
    long = text([5] * 60 + [6], [0] * 60 + [1])
    short = text([5, 6, 7], [0, 0, 1])
    assert chosen([untrained, long, short]) == [[5, 6]]
    assert chosen([long], max_length=120) == [[5] * 60]
    with pytest.raises(SpeculatorError, match="none of 2 held-out examples.*evaluation.prompts"):
        chosen([untrained, long])


def test_prompts_of_a_file_go_through_the_chat_template(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(VERIFIER)
    asked = [{"role": "user", "content": "def f("}]
    rows = [
        {"prompt": "import json"},
        {"messages": asked},
        {"prompt": "import json"},
        *({"prompt": f"x = {number}"} for number in range(8)),
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    found = chosen([], prompts=str(file))
    assert found[0] == tokenizer("import json")["input_ids"]
    assert found[1] == tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_dict=False
    )
    assert len(found) == 10
    assert chosen([], prompts=str(file), num_prompts=5) == found[::2]
    with pytest.raises(SpeculatorError, match="expected fewer than 2"):
        chosen([], prompts=str(file), max_length=2)
