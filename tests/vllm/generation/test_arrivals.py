"""Outcomes of requests; ZeroMQ is real, the engine at its other end is a stand-in."""

import threading

import pytest
import torch
import zmq

from speculators_core.data_generation.examples import Failure
from speculators_core.errors import SpeculatorError
from speculators_vllm.generation.arrivals import Arrivals, Inbox
from speculators_vllm.hidden_states import HiddenStates
from speculators_vllm.hidden_states.stream import StreamWriter, frames_of
from tests.vllm.generating import examples_of


def states_of(name, num_tokens=3, layer_ids=(1, 4)):
    return HiddenStates(
        request_id=f"id-{name}",
        name=name,
        layer_ids=layer_ids,
        num_prompt_tokens=1,
        token_ids=torch.arange(num_tokens),
        hidden_states=torch.randn(num_tokens, len(layer_ids), 8),
    )


def batch(num_examples, form=lambda example, states: states):
    arrivals = Arrivals(examples_of(*range(2, 2 + num_examples)), form)
    return arrivals, list(arrivals.examples)


def test_the_first_word_of_a_request_counts_and_others_are_not_heard():
    arrivals, (first, second) = batch(2)
    other, _ = batch(2)
    assert not arrivals.examples.keys() & other.examples.keys()
    arrivals.failed(first, "early")
    for name in (*other.examples, first):
        arrivals.arrived(states_of(name))
        arrivals.failed(name, "late")
    states = states_of(second)
    arrivals.arrived(states)
    arrivals.failed(second, "late")
    assert arrivals.wait(5) == {"0-0": Failure("0-0", "early"), "0-1": states}


def test_what_does_not_come_is_lost_and_each_word_gives_more_time():
    arrivals, names = batch(3)
    threading.Timer(0.2, arrivals.failed, (names[0], "a")).start()
    threading.Timer(0.4, arrivals.failed, (names[1], "b")).start()
    reasons = [one.reason for one in arrivals.wait(0.3).values()]
    assert reasons == ["a", "b", "its hidden states did not arrive within 0.3 s"]


def test_a_fault_ends_the_batch_and_anything_else_one_example():
    def form(example, states):
        if len(example.input_ids) == 2:
            raise MemoryError("none\nleft")
        raise SpeculatorError("other layers")

    arrivals, (first, second, _) = batch(3, form)
    arrivals.arrived(states_of(first))
    assert not arrivals.has_ended
    arrivals.arrived(states_of(second))
    arrivals.end(SpeculatorError("later"))
    assert arrivals.has_ended
    with pytest.raises(SpeculatorError, match="^other layers$"):
        arrivals.wait(5)


def test_an_inbox_passes_on_what_is_whole_and_outlives_what_is_not():
    context = zmq.Context()
    inbox = Inbox("tcp://127.0.0.1:*", max_frame_bytes=5000)
    try:
        arrivals, (first, lost, second) = batch(3)
        inbox.arrivals = arrivals
        huge, sender = context.socket(zmq.PUSH), context.socket(zmq.PUSH)
        for socket in (huge, sender):
            socket.connect(inbox.endpoint)
        huge.send_multipart(frames_of(states_of(first, num_tokens=200)))  # 12 800 bytes
        for frames in ([b"garbage"], [b"{}", b""], frames_of(states_of("of-another"))):
            sender.send_multipart(frames)
        writer = StreamWriter(inbox.endpoint)
        writer.report("id", lost, "out of memory")
        writer.write(states_of(second))
        writer.close()
        found = list(arrivals.wait(0.5).values())
        assert found[0].reason == "its hidden states did not arrive within 0.5 s"
        assert found[1].reason == f"request id ({lost}): out of memory"
        assert len(found[2].token_ids) == 3
    finally:
        inbox.close()
        context.destroy(linger=0)


def test_an_inbox_needs_an_endpoint_of_its_own(tmp_path):
    endpoint = f"ipc://{tmp_path}/states"
    inbox = Inbox(endpoint, 10)
    inbox.close()
    tcp = Inbox("tcp://127.0.0.1:*", 10)
    with pytest.raises(SpeculatorError, match="cannot be bound"):
        Inbox(tcp.endpoint, 10)
    tcp.close()
    Inbox(endpoint, 10).close()
