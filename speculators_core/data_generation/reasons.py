"""Counts of the reasons why rows were left out."""

import re
from collections.abc import Mapping

MOST_SHOWN = 3


def count_reasons(reasons: Mapping[str, int]) -> dict[str, int]:
    """Rows by reason, the most frequent first.

    Reasons that differ in numbers alone, such as lengths, count as one, in the words of the first.
    """
    wordings: dict[str, str] = {}
    counts: dict[str, int] = {}
    for reason, number in reasons.items():
        wording = wordings.setdefault(re.sub(r"\d+", "0", reason), reason)
        counts[wording] = counts.get(wording, 0) + number
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def describe_reasons(counts: Mapping[str, int]) -> str:
    """For example ``412 rows: longer than max_length; 1 row: no answer to learn``."""
    lines = [f"{n} row{'s' * (n != 1)}: {reason.rstrip('.')}" for reason, n in counts.items()]
    rest = sum(list(counts.values())[MOST_SHOWN:])
    return "; ".join(lines[:MOST_SHOWN] + ([f"{rest} rows: other reasons"] if rest else []))
