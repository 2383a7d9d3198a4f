import pytest

from speculators_core.data_generation.lengths import LIMITS, Lengths


def test_lengths_are_counted_at_their_limits():
    lengths = Lengths.of([512, 513, 1024, 1025, 4097])
    assert LIMITS == (512, 1024, 2048, 4096)
    assert lengths.num_longer == (4, 2, 1, 1)
    assert (lengths.num_examples, lengths.longest, lengths.mean) == (5, 4097, 7171 / 5)


def test_parts_add_up_to_the_whole():
    lengths = [3, 700, 5000, 2049, 511, 1024]
    for at in range(len(lengths) + 1):
        assert Lengths.of(lengths[:at]) + Lengths.of(lengths[at:]) == Lengths.of(lengths)


@pytest.mark.parametrize(
    ("lengths", "text"),
    [
        ([160], "none longer than 512 tokens"),
        ([600, 600, 600, 5], "75% longer than 512 tokens, none than 1,024"),
        ([5] * 4999 + [513], "under 0.1% longer than 512 tokens, none than 1,024"),
        (
            [5000, 5, 5],
            "33.3% longer than 512 tokens, 33.3% than 1,024, 33.3% than 2,048, 33.3% than 4,096",
        ),
        ([], "none longer than 512 tokens"),
    ],
)
def test_share_of_longer_ones_in_words(lengths, text):
    assert Lengths.of(lengths).describe_longer() == text
