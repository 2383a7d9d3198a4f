import json
import threading
import time

import pytest
import torch
import zmq

from speculators_core.errors import SpeculatorError
from speculators_vllm.hidden_states import HiddenStateReceiver, Undelivered
from speculators_vllm.hidden_states.outbox import Failure, Outbox, PendingStates
from speculators_vllm.hidden_states.stream import StreamWriter, frames_of
from tests.vllm.hidden_states.records import assert_same, record


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_received_is_what_was_sent(dtype):
    sent = [record(n, name=f"r{n}", dtype=dtype) for n in (2, 7, 3)]
    with HiddenStateReceiver("tcp://127.0.0.1:*", timeout_s=10) as receiver:
        outbox = Outbox(StreamWriter(receiver.endpoint), capacity_bytes=10**6)
        for states in sent:
            outbox.put(PendingStates(states, lambda: None))
        outbox.put(Failure("id-x", "x", "out of memory"))
        for states in sent:
            assert_same(receiver.receive(), states)
        with pytest.raises(SpeculatorError, match=r"id-x \(x\): out of memory"):
            receiver.receive()
        outbox.close(5)
    ended = outbox.take_ended()
    assert ended == {"id-r2": None, "id-r7": None, "id-r3": None, "id-x": "out of memory"}


def test_garbage_is_refused_and_the_next_message_is_received():
    good = [bytes(frame) for frame in frames_of(record())]
    header = json.loads(good[0])

    def changed(**values):
        return [json.dumps(header | values).encode(), *good[1:]]

    garbage = [
        [b""],
        [b"\xff\xfe", b"x"],
        [b"[]", *good[1:]],
        [b"{" * 70_000, *good[1:]],
        changed(format="other"),
        changed(pickle="x"),
        changed(dtype="object"),
        changed(num_tokens=4),
        changed(num_tokens=-1),
        changed(num_tokens=0, num_prompt_tokens=0),
        changed(layer_ids=[1, 2, 3]),
        changed(num_prompt_tokens=4),
        [good[0], good[1]],
        [*good, b""],
        [good[0], good[2], good[1]],
    ]
    with HiddenStateReceiver("tcp://127.0.0.1:*", timeout_s=10) as receiver:
        context = zmq.Context()
        sender = context.socket(zmq.PUSH)
        sender.connect(receiver.endpoint)
        for frames in garbage:
            sender.send_multipart(frames)
            with pytest.raises(SpeculatorError, match="was refused") as refusal:
                receiver.receive()
            assert "\n" not in str(refusal.value)
        sender.send_multipart(good)
        assert receiver.receive().name == "a"
        context.destroy(linger=0)
        with pytest.raises(SpeculatorError, match="within 0.01 s"):
            receiver.receive(timeout_s=0.01)
        with pytest.raises(SpeculatorError, match="cannot be bound"):
            HiddenStateReceiver(receiver.endpoint)


def test_a_receiver_that_is_slow_makes_the_sender_wait_and_loses_nothing(tmp_path):
    messages, num_written = 40, []
    with HiddenStateReceiver(f"ipc://{tmp_path}/states", timeout_s=20, max_waiting=1) as receiver:
        writer = StreamWriter(receiver.endpoint)

        def write():
            for number in range(messages):
                writer.write(record(num_tokens=20_000, name=f"r{number}"))  # 1.4 MB
                num_written.append(number)

        thread = threading.Thread(target=write)
        thread.start()
        time.sleep(1)
        assert len(num_written) < 10
        names = [receiver.receive().name for _ in range(messages)]
        assert names == [f"r{number}" for number in range(messages)]
        thread.join()
    writer.close()


def test_a_writer_that_is_stopped_gives_its_message_up(tmp_path):
    writer = StreamWriter(f"ipc://{tmp_path}/nobody")
    threading.Timer(0.2, writer.stop).start()
    with pytest.raises(SpeculatorError, match="shut down before ipc://.*/nobody took the states"):
        writer.write(record())
    writer.close()


def test_a_writer_that_sent_nothing_has_nothing_to_close():
    StreamWriter("tcp://127.0.0.1:1").close()


def test_a_reported_failure_names_the_request_and_iteration_continues():
    with HiddenStateReceiver("tcp://127.0.0.1:*", timeout_s=10) as receiver:
        writer = StreamWriter(receiver.endpoint)
        writer.report("id-x", "x", "out of memory")
        writer.write(record())
        with pytest.raises(Undelivered) as error:
            next(receiver)
        assert error.value.name == "x"
        assert next(receiver).name == "a"
        writer.close()
