import pytest

from benchmarks.acceptance.statistics import (
    bootstrap_interval,
    bootstrap_intervals,
    by_context,
    macro_acceptance_length,
    repeated_share,
    runs_without_loops,
    speed_up_interval,
    summarize,
    tokens_per_second,
    without_loops,
)
from speculators_core.diagnosis.acceptance_report import RequestRecord, Timing


def record(accepted, category="a", output_ids=(), seconds=1.0, num_prompt_tokens=1):
    return RequestRecord(
        category=category,
        num_prompt_tokens=num_prompt_tokens,
        output_ids=list(output_ids),
        accepted=accepted,
        seconds=seconds,
    )


def test_figures_of_a_hand_counted_case():
    summary = summarize([record([0, 3, 1]), record([2])], speculative_tokens=3)
    assert summary.num_drafts == 4
    assert summary.accepted_per_position == [3, 2, 1]
    assert summary.acceptance_length == 1 + 6 / 4
    assert summary.joint_rates == [0.75, 0.5, 0.25]
    assert summary.conditional_rates == [0.75, pytest.approx(2 / 3), 0.5]
    assert summary.histogram == [0.25, 0.25, 0.25, 0.25]
    assert summary.acceptance_length == 1 + sum(summary.joint_rates)


def test_nothing_kept_has_no_conditional_rate_beyond():
    summary = summarize([record([0, 0])], 2)
    assert summary.conditional_rates == [0.0, None]
    assert summary.acceptance_length == 1.0


def test_macro_weighs_categories_alike_and_pooled_does_not():
    records = [record([3] * 9, "many"), record([0], "few")]
    assert macro_acceptance_length(records) == (4.0 + 1.0) / 2
    assert summarize(records, 3).acceptance_length == 1 + 27 / 10


def test_interval_holds_the_estimate_and_shrinks_for_equal_prompts():
    low, high = bootstrap_interval([[record([k % 4]) for k in range(40)]])
    assert low < 2.5 < high
    assert bootstrap_interval([[record([2])] * 10]) == (3.0, 3.0)


def test_repeated_runs_of_a_prompt_are_no_further_prompts():
    run = [record([k % 4]) for k in range(20)]
    assert bootstrap_interval([run] * 5) == bootstrap_interval([run])


def test_intervals_of_each_position_hold_its_rate():
    run = [record([k % 4, (k // 4) % 4]) for k in range(40)]
    tau, *joint = bootstrap_intervals([run], 3)
    assert tau == bootstrap_interval([run])
    for (low, high), rate in zip(joint, summarize(run, 3).joint_rates, strict=True):
        assert rate - 0.25 < low < rate < high < rate + 0.25


def test_speed_up_is_resampled_by_prompt_with_its_baseline():
    alone = [record([], output_ids=range(10), seconds=1.0 + k % 3) for k in range(30)]
    ours = [one.model_copy(update={"seconds": one.seconds / 2}) for one in alone]
    assert speed_up_interval([ours], [alone]) == (pytest.approx(2.0), pytest.approx(2.0))
    uneven = [one.model_copy(update={"seconds": 1.0}) for one in alone]
    low, high = speed_up_interval([uneven, ours, ours], [alone])
    assert low <= 2.0 <= high
    low, high = speed_up_interval([uneven], [alone])
    assert low < 2.0 < high and high - low < 0.7
    assert speed_up_interval([ours], []) is None
    timing = Timing(start_s=0.0, first_token_s=0.1)
    served = [one.model_copy(update={"timing": timing}) for one in ours]
    assert speed_up_interval([served], [alone]) is None


def test_loops_are_counted():
    assert repeated_share([record([], output_ids=range(40))]) == 0.0
    assert repeated_share([record([], output_ids=[1, 2] * 20)]) == pytest.approx(31 / 33)


def test_looping_outputs_are_set_apart():
    looping, other = record([3], output_ids=[1, 2] * 20), record([0], output_ids=range(40))
    assert without_loops([looping, other]) == [other]


def test_a_prompt_that_loops_in_one_run_keeps_its_other_runs():
    looping, other = record([3], output_ids=[1, 2] * 20), record([0], output_ids=range(40))
    emptied = looping.model_copy(update={"accepted": []})
    assert runs_without_loops([[looping, other, looping], [looping, looping, other]]) == [
        [other, emptied],
        [emptied, other],
    ]
    assert runs_without_loops([[looping]]) == []


def test_rate_is_all_tokens_over_all_seconds():
    records = [record([], output_ids=range(10)), record([], output_ids=range(30), seconds=3.0)]
    assert tokens_per_second(records) == 10.0


def test_drafts_of_several_requests_are_counted_by_context():
    records = [
        record([3, 0], num_prompt_tokens=120),  # 121 and 125 tokens before them
        record([2, 1], num_prompt_tokens=126),  # 127 and 130
        record([0], num_prompt_tokens=2047),
        record([]),
    ]
    found = by_context(records, 3)
    counts = {name: [r.accepted for r in group] for name, group in found.items()}
    assert counts == {"<128": [[3, 0], [2]], "128-512": [[1]], "2k-8k": [[0]]}
    assert summarize(found["<128"], 3).accepted_per_position == [2, 2, 1]


def test_drafts_of_unknown_order_have_no_context():
    records = [record([1]), record([1]).model_copy(update={"is_in_order": False})]
    assert by_context(records, 1) == {}
