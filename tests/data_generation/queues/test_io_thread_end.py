import time

from speculators_core.data_generation.queues import io_thread
from speculators_core.data_generation.queues.io_thread import IoThread


def test_a_library_that_does_not_let_go_holds_nobody_up(monkeypatch, caplog):
    monkeypatch.setattr(io_thread, "CLOSING_S", 0.2)
    monkeypatch.setattr(IoThread, "_destroy", lambda self: time.sleep(3))
    thread = IoThread(heartbeat_s=1.0)
    thread.start(lambda: None, lambda: None)
    start = time.monotonic()
    thread.stop()
    assert time.monotonic() - start < 2
    assert "did not close a socket" in caplog.text
