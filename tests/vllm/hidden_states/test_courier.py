import time

import pytest
import torch

from speculators_core.errors import SpeculatorError
from speculators_vllm.hidden_states import FileSink, StreamSink, read_hidden_states
from speculators_vllm.hidden_states.courier import Courier, Save
from speculators_vllm.hidden_states.files import read_file

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parts", [1, 2])
def test_states_are_gathered_from_scattered_blocks(device, parts, tmp_path, monkeypatch):
    """``parts`` blocks of the cache are one of the scheduler's; two blocks are a chunk."""
    cache = torch.randn(14, 2, 4, 8, device=device)  # [blocks, layers, block, hidden]
    monkeypatch.setattr("speculators_vllm.hidden_states.courier.CHUNK_BYTES", 2 * cache[0].nbytes)
    courier = Courier(cache, 4 * parts, (1, 4), FileSink(folder=tmp_path))
    num_tokens = 4 * parts * 3 - 1
    save = Save("id", "a", list(range(num_tokens)), 2, [5, 1, 3])
    copied = courier.step([save], is_idle=False)
    while not copied:
        copied = courier.step([], is_idle=True)
    courier.close()
    assert copied == {"id"} and not courier.copying
    in_cache = [b * parts + part for b in (5, 1, 3) for part in range(parts)]
    expected = torch.cat([cache[b].transpose(0, 1) for b in in_cache])[:num_tokens].cpu()
    assert torch.equal(read_file(tmp_path / "a.safetensors").hidden_states, expected)


def test_a_copy_that_fails_is_reported_and_frees_its_blocks(tmp_path):
    courier = Courier(torch.zeros(4, 2, 4, 8), 4, (1, 4), FileSink(folder=tmp_path))
    bad, good = (Save(name, name, [1] * n, 1, [1]) for name, n in (("b", 9), ("g", 4)))
    assert courier.step([bad, good], is_idle=False) == {"b", "g"}
    courier.close()
    assert list(courier.outbox.take_ended()) == ["b", "g"]
    assert (tmp_path / "g.safetensors").exists()
    with pytest.raises(SpeculatorError, match="must match"):
        read_hidden_states({"name": "b", "hidden_states_path": str(tmp_path / "b.safetensors")})


def test_what_waits_at_shutdown_is_still_sent(tmp_path):
    sink = FileSink(folder=tmp_path, max_in_flight_bytes=1)
    courier = Courier(torch.zeros(4, 2, 4, 8), 4, (1, 4), sink)
    courier.outbox.has_room = lambda size_bytes: False
    assert not courier.step([Save(f"{i}", f"{i}", [1], 1, [i]) for i in range(4)], is_idle=False)
    del courier.outbox.has_room
    courier.close()
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def saves_of(*num_tokens):
    return [Save(f"{i}", f"{i}", [1] * n, 1, [i]) for i, n in enumerate(num_tokens)]


def test_blocks_are_kept_while_the_outbox_has_no_room(tmp_path):
    """Two of three saves fit; an endpoint at which nobody listens takes none of them."""
    endpoint = f"ipc://{tmp_path}/nobody"
    cache = torch.zeros(4, 2, 4, 8)
    size_bytes = 4 * (2 * 8 * 4 + 8)
    sink = StreamSink(endpoint=endpoint, max_in_flight_bytes=2 * size_bytes, linger_s=0)
    courier = Courier(cache, 4, (1, 4), sink)
    assert courier.step(saves_of(4, 4, 4), is_idle=False) == {"0", "1"}
    assert courier.step([], is_idle=False) == set()
    assert [save.name for save in courier.waiting] == ["2"]
    assert courier.outbox.in_flight_bytes == 2 * size_bytes
    started = time.monotonic()
    assert courier.step([], is_idle=True) == set()  # waits, but only a moment
    assert time.monotonic() - started < 1
    courier.close()


def test_a_save_beyond_the_bound_goes_alone(tmp_path):
    sink = FileSink(folder=tmp_path, max_in_flight_bytes=1)
    courier = Courier(torch.zeros(4, 2, 4, 8), 4, (1, 4), sink)
    done = courier.step(saves_of(4, 3), is_idle=False)
    while len(done) < 2:
        done |= courier.step([], is_idle=True)
    courier.close()
    assert courier.outbox.take_ended() == {"0": None, "1": None}


def test_what_nobody_takes_is_lost_at_shutdown_in_time_and_named(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    sink = StreamSink(endpoint=f"ipc://{tmp_path}/nobody", max_in_flight_bytes=1, linger_s=0.2)
    courier = Courier(torch.zeros(4, 2, 4, 8), 4, (1, 4), sink)
    courier.step(saves_of(4, 4), is_idle=False)
    started = time.monotonic()
    courier.close()
    assert time.monotonic() - started < 3
    assert "hidden states of request 0 were lost: the engine shut down before" in caplog.text
    assert "hidden states of request 1 were lost at shutdown" in caplog.text
