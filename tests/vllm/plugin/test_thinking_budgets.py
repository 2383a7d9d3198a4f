"""A budget of thinking tokens holds at each drafted place as it does without drafts."""

import random
from types import SimpleNamespace

import pytest
import torch

from speculators_vllm.plugin import thinking_budgets

VOCAB_SIZE, START, END = 8, [6], [7, 5]


@pytest.fixture
def holder_class(monkeypatch):
    """vLLM's class, with our methods where there are drafts."""
    pytest.importorskip("vllm")
    from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder as Theirs

    theirs = [getattr(Theirs, name) for name in ("update_state", "_apply_forcing_to_logits")]
    originals = [getattr(method, "__wrapped__", method) for method in theirs]

    class Holder(Theirs):
        update_state = thinking_budgets.updating(originals[0])
        _apply_forcing_to_logits = thinking_budgets.applying(originals[1])

    return Holder


def start(holder_class, prompts, budgets, num_drafts):
    config = SimpleNamespace(reasoning_start_token_ids=START, reasoning_end_token_ids=END)
    holder = holder_class(config, len(prompts), num_drafts, torch.device("cpu"), False)
    outputs = [[] for _ in prompts]
    added = [
        (index, SimpleNamespace(thinking_token_budget=budget), prompt, outputs[index])
        for index, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True))
    ]
    holder.sync_batch(SimpleNamespace(added=added, removed=[], moved=[]))
    return holder, outputs


def next_token(prompt, output):
    """What a verifier would say: any function of the text."""
    return random.Random(str((prompt, output))).randrange(VOCAB_SIZE)


def choose(holder, texts, after_drafts, drafts):
    logits = torch.nn.functional.one_hot(torch.tensor(texts), VOCAB_SIZE).float()
    return holder.apply_to_logits(logits, after_drafts, drafts).argmax(-1).tolist()


def without_drafts(holder_class, prompts, budgets, length):
    holder, outputs = start(holder_class, prompts, budgets, 0)
    for _ in range(length):
        holder.update_state(outputs, None)
        said = [next_token(*text) for text in zip(prompts, outputs, strict=True)]
        for output, token in zip(outputs, choose(holder, said, False, None), strict=True):
            output.append(token)
    return outputs


def with_drafts(holder_class, prompts, budgets, length, draft):
    """As vLLM's V1 runner verifies: places after drafts first, then the drafted ones."""
    holder, outputs = start(holder_class, prompts, budgets, 3)
    while min(map(len, outputs)) < length:
        texts = list(zip(prompts, outputs, strict=True))
        drafts = [draft(prompt, output) for prompt, output in texts]
        holder.update_state(outputs, drafts)
        after = [next_token(p, o + d) for (p, o), d in zip(texts, drafts, strict=True)]
        bonus = choose(holder, after, any(drafts), drafts)
        said = [
            next_token(prompt, output + drafted[:place])
            for (prompt, output), drafted in zip(texts, drafts, strict=True)
            for place in range(len(drafted))
        ]
        verified = choose(holder, said, False, drafts) if said else []
        for output, drafted, last in zip(outputs, drafts, bonus, strict=True):
            own, verified = verified[: len(drafted)], verified[len(drafted) :]
            agree = [ours == theirs for ours, theirs in zip(drafted, own, strict=True)]
            kept = [*agree, False].index(False)
            output += drafted[:kept] + [own[kept] if kept < len(drafted) else last]
    return outputs


@pytest.mark.parametrize("quality", [0.0, 0.7, 1.0])
def test_texts_do_not_depend_on_the_drafts(holder_class, quality):
    chance = random.Random(3)
    prompts = [[chance.randrange(VOCAB_SIZE) for _ in range(5)] for _ in range(40)]
    prompts[:20] = [[*prompt, *START] for prompt in prompts[:20]]  # the prompt begins to think
    budgets = [None if n % 7 == 6 else n % 6 for n in range(40)]

    def draft(prompt, output):
        drafted = []
        for _ in range(chance.randrange(4)):
            is_good = chance.random() < quality
            token = next_token(prompt, output + drafted)
            drafted.append(token if is_good else chance.choice([*START, *END, 1]))
        return drafted

    expected = without_drafts(holder_class, prompts, budgets, 30)
    found = with_drafts(holder_class, prompts, budgets, 30, draft)
    assert [text[:30] for text in found] == expected
    assert sum(text[at : at + 2] == END for text in expected for at in range(29)) > 20
