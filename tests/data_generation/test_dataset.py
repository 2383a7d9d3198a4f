import pytest
import torch
from torch.utils.data import DataLoader

from speculators_core.data_generation.dataset import GeneratedDataset
from speculators_core.data_generation.stores.disk import DiskStore
from speculators_core.errors import SpeculatorError
from tests.data_generation.making import generated, schema

NUM_EXAMPLES = 23


def stored(folder, **overrides):
    store = DiskStore.create(folder, schema(**overrides), shard_tokens=20)
    examples = [generated(i, 1 + i % 7, store.schema) for i in range(NUM_EXAMPLES)]
    store.write_batch(examples)
    store.close()
    return examples


@pytest.fixture
def states(tmp_path):
    return tmp_path / "states", stored(tmp_path / "states")


def keys(dataset):
    return [example.key for example in dataset.examples()]


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("num_workers", [0, 2, 3])
@pytest.mark.parametrize("shuffle_buffer", [0, 5])
def test_each_example_comes_once_an_epoch(states, num_ranks, num_workers, shuffle_buffer):
    folder, examples = states
    found = []
    for rank in range(num_ranks):
        dataset = GeneratedDataset(
            folder, shuffle_buffer=shuffle_buffer, rank=rank, num_ranks=num_ranks
        )
        loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
        found += [batch.input_ids[0].tolist() for batch in loader]
    assert sorted(found) == sorted(example.input_ids.tolist() for example in examples)


def test_epochs_and_seeds_have_orders_of_their_own_and_repeat(states):
    folder, examples = states
    in_order = [example.key for example in examples]
    assert keys(GeneratedDataset(folder)) == in_order
    orders = set()
    for seed in (0, 1):
        for epoch in (0, 1):
            dataset = GeneratedDataset(folder, shuffle_buffer=8, seed=seed)
            dataset.set_epoch(epoch)
            order = keys(dataset)
            assert sorted(order) == sorted(in_order)
            assert order == keys(dataset)
            orders.add(tuple(order))
    assert len(orders) == 4


def test_a_row_holds_whole_examples_with_what_belongs_to_each_token(states):
    folder, examples = states
    rows = list(GeneratedDataset(folder, row_length=12))
    assert {row.input_ids.shape for row in rows} == {(1, 12)}
    waiting = iter(examples)
    for row in rows:
        documents = row.document_ids[0]
        for number in range(int(documents.max()) + 1):
            own, example = documents == number, next(waiting)
            assert torch.equal(row.input_ids[0, own], example.input_ids)
            assert torch.equal(row.loss_mask[0, own], example.loss_mask)
            assert row.position_ids[0, own].tolist() == list(range(len(example.input_ids)))
            assert torch.equal(
                row.aux_hidden_states[0, own], example.hidden_states[:, :-1].flatten(1)
            )
            assert torch.equal(row.last_hidden_states[0, own], example.hidden_states[:, -1])
        padding = documents == -1
        assert not row.loss_mask[0, padding].any() and not row.aux_hidden_states[0, padding].any()
    assert next(waiting, None) is None


def test_an_example_longer_than_a_row_is_cut(states):
    folder, examples = states
    rows = list(GeneratedDataset(folder, row_length=3))
    seventh = next(e for e in examples if len(e.input_ids) == 7)
    assert any(torch.equal(row.input_ids[0], seventh.input_ids[:3]) for row in rows)


def test_a_draft_reads_its_own_layers_in_its_own_type(states):
    folder, examples = states
    row = next(iter(GeneratedDataset(folder, layer_ids=[2], dtype=torch.bfloat16)))
    assert row.aux_hidden_states.dtype is torch.bfloat16
    assert torch.equal(row.aux_hidden_states[0], examples[0].hidden_states[:, 1].bfloat16())


REFUSED = {
    "no last state": ({"has_last": False}, {}, "without the last hidden state"),
    "layer not stored": (
        {},
        {"layer_ids": [3]},
        r"reads layers \[3\], but the examples hold",
    ),
    "mean alone": ({"reduce": "mean"}, {"layer_ids": [1]}, r"hold layers \[4\] and the mean of"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_training_needs_and_the_store_lacks_is_said(tmp_path, what):
    content, options, words = REFUSED[what]
    stored(tmp_path / "states", **content)
    with pytest.raises(SpeculatorError, match=words):
        GeneratedDataset(tmp_path / "states", **options)


def test_a_mean_of_layers_is_one_aux_state(tmp_path):
    examples = stored(tmp_path / "states", reduce="mean")
    row = next(iter(GeneratedDataset(tmp_path / "states")))
    assert torch.equal(row.aux_hidden_states[0], examples[0].hidden_states[:, 0])


class Queue:
    """A source that is read once, as a queue is."""

    def __init__(self, examples):
        self.schema = schema()
        self.waiting = iter(examples)

    def read(self):
        return self.waiting


def test_a_queue_is_consumed_as_it_comes(states):
    _, examples = states
    queue = Queue(examples)
    rows = iter(GeneratedDataset(queue, row_length=10))
    next(rows)
    assert next(queue.waiting).key == "0/4"  # the first row is full
    next(rows)
    assert next(queue.waiting).key == "0/7"  # 0/6 did not fit


def test_a_source_that_does_not_give_back_is_not_shuffled():
    with pytest.raises(SpeculatorError, match="acknowledges an example as it is read"):
        GeneratedDataset(Queue([]), shuffle_buffer=4)


def test_a_rank_comes_with_the_number_of_ranks(states):
    for place in ({"num_ranks": 4}, {"rank": 1}, {"rank": 4, "num_ranks": 4}):
        with pytest.raises(ValueError, match="rank"):
            GeneratedDataset(states[0], **place)


def test_workers_of_a_loader_do_not_read_a_queue(states):
    with pytest.raises(SpeculatorError, match="num_workers=0"):
        list(DataLoader(GeneratedDataset(Queue([])), batch_size=None, num_workers=1))
