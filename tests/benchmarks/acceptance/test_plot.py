"""The plot names what is seen, and no label covers another."""

import random

import pytest
from matplotlib.image import imread

from benchmarks.acceptance import plot
from benchmarks.acceptance.plot import DARK, DPI, INCHES, LIGHT, write_plot
from benchmarks.acceptance.report import report_k
from speculators_core.diagnosis.acceptance_report import AcceptanceReport, DraftReport
from tests.benchmarks.acceptance.test_statistics import record

K = 4


def make_entry(rate, rate_when_long, outputs, has_baseline=True, count=24):
    """A draft that keeps tokens at one rate below 128 tokens of context, at another beyond."""
    draw = random.Random(0)

    def kept(rate):
        return next((k for k in range(K) if draw.random() > rate), K)

    run = [
        record(
            [kept(rate_when_long if length > 128 else rate) for _ in range(10)],
            output_ids=outputs[number % len(outputs)],
            seconds=1.0 - 0.2 * rate,
            num_prompt_tokens=length,
        )
        for number, length in enumerate([20, 300] * (count // 2))
    ]
    alone = [one.model_copy(update={"accepted": [], "seconds": 1.0}) for one in run]
    return report_k(K, [run], [alone] if has_baseline else [], greedy=True), alone


def drawn_texts(tmp_path, monkeypatch, entries, alone, is_dark=False):
    """All texts of the figure, with their boxes."""
    figures = []
    monkeypatch.setattr(
        plot.Figure, "savefig", lambda self, *a, **k: figures.append(self), raising=True
    )
    write_plot(make_report(entries, alone), entries, tmp_path / "plot.png", is_dark)
    (figure,) = figures
    return figure, [text for axes in figure.axes for text in axes.texts]


def make_report(entries, alone):
    drafts = [
        DraftReport(name=name, kind="speculator", sha256=None, by_k=[entry])
        for name, entry in entries
    ]
    return AcceptanceReport(
        settings={"temperature": 0.0},
        verifier="some/verifier",
        verifier_sha256=None,
        environment={},
        prompts_sha256="",
        baseline_tokens_per_s=[1.0] if alone else [],
        baseline_requests=alone,
        drafts=drafts,
    )


def make_entries():
    found = {}
    for name, rates in {
        "steady": (0.8, 0.8),
        "short-sighted": (0.7, 0.2),
        "weak": (0.3, 0.3),
    }.items():
        found[name], alone = make_entry(*rates, [list(range(40))])
    return list(found.items()), alone


def test_titles_say_what_is_seen_and_each_line_has_its_name(tmp_path, monkeypatch):
    entries, alone = make_entries()
    figure, texts = drawn_texts(tmp_path, monkeypatch, entries, alone)
    told = " ".join(" ".join(text.get_text() for text in texts).split())
    assert "steady: 1.2 times as fast" in told and " none" in told
    assert "steady keeps" in told and ", weak 0.4" in told
    assert "short-sighted loses" in told and "in long contexts" in told
    assert "tau" in told and "95 %" in told
    for name, _ in entries:
        assert sum(name in text.get_text() for text in texts) >= 3
    assert not any(axes.get_legend() for axes in figure.axes)
    speed, kept, contexts = figure.axes
    assert len(kept.collections) == len(entries)  # bands
    assert [label.get_text() for label in contexts.get_xticklabels()] == ["<128", "128-512"]


def test_no_label_covers_another_or_leaves_the_picture(tmp_path, monkeypatch):
    entries, alone = make_entries()
    figure, _ = drawn_texts(tmp_path, monkeypatch, entries, alone)
    frame = figure.bbox
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        for number, box in enumerate(boxes):
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1, axes.texts[number]
            assert not any(box.overlaps(other) for other in boxes[:number]), axes.texts[number]


def test_repeated_text_is_left_out_and_that_is_said(tmp_path, monkeypatch):
    looping, other = [1, 2] * 20, list(range(40))
    entry, alone = make_entry(0.8, 0.8, [looping, looping, other, other])
    entries = [("draft", entry)]
    figure, _ = drawn_texts(tmp_path, monkeypatch, entries, alone)
    (note,) = figure.texts
    assert "12 outputs that do not" in note.get_text()
    (line, *_) = figure.axes[1].lines
    assert list(line.get_ydata()) == entry.without_loops.joint_rates != entry.pooled.joint_rates


@pytest.mark.parametrize("what", ["no baseline", "uncounted", "by server"])
def test_what_is_not_known_is_not_drawn(tmp_path, monkeypatch, what):
    entry, alone = make_entry(0.5, 0.5, [list(range(40))], has_baseline=what != "no baseline")
    if what != "no baseline":
        requests = [one.model_copy(update={"accepted": []}) for one in entry.requests]
        empty = report_k(K, [requests], [alone], greedy=True)
        if what == "by server":
            empty = empty.model_copy(update={"counted": "by server", "pooled": entry.pooled})
        entry = empty
    else:
        alone = []
    figure, texts = drawn_texts(tmp_path, monkeypatch, [("draft", entry)], alone)
    told = " ".join(text.get_text() for text in texts)
    assert ("not measured" in told) == (what == "no baseline")
    assert ("Tokens kept" in told) == (what == "uncounted")
    assert bool(figure.axes[1].collections) == (what == "no baseline")


def test_both_files_are_sharp_and_differ_in_their_background(tmp_path):
    entries, alone = make_entries()
    for theme, is_dark in ((LIGHT, False), (DARK, True)):
        write_plot(make_report(entries, alone), entries, tmp_path / "plot.png", is_dark)
        image = imread(tmp_path / "plot.png")
        assert image.shape[:2] == (INCHES[1] * DPI, INCHES[0] * DPI)
        corner = "#" + "".join(f"{round(255 * float(c)):02x}" for c in image[2, 2, :3])
        assert corner == theme.background
