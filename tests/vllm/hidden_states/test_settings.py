import json

import pytest

from speculators_core.errors import SpeculatorError
from speculators_vllm.hidden_states import (
    FileSink,
    RequestOptions,
    StreamSink,
    engine_arguments,
)
from speculators_vllm.hidden_states.settings import name_for, path_for, read_request, read_sink


def test_engine_arguments_name_the_layers(verifier_folder):
    sink = StreamSink(endpoint="tcp://127.0.0.1:5555")

    def layer_ids(*given, **options):
        arguments = engine_arguments(verifier_folder, given, sink, **options)
        config = arguments["speculative_config"]["draft_model_config"]["hf_config"]
        extra = json.loads(json.dumps(arguments["kv_transfer_config"]))
        assert read_sink(extra["kv_connector_extra_config"]) == sink
        return config["eagle_aux_hidden_state_layer_ids"]

    assert layer_ids(0, 2) == [0, 2, 4]
    assert layer_ids(2, 4) == [2, 4]
    assert layer_ids() == [4]
    assert layer_ids(0, 2, with_last=False) == [0, 2]
    for wrong in ((5,), (-1,), (True,), (2, 1), (1, 1)):
        with pytest.raises(SpeculatorError, match=r"ascending ids of 0\.\.4\. Correct layer_ids"):
            layer_ids(*wrong)
    with pytest.raises(SpeculatorError, match=r"ascending ids of 0\.\.4\. Correct layer_ids"):
        layer_ids(with_last=False)


def test_a_sink_is_checked():
    for wrong in (
        {},
        {"kind": "stream", "endpoint": "udp://x"},
        {"kind": "files", "folder": "/x", "endpoint": "tcp://x"},
        {"kind": "files", "folder": "/x", "max_in_flight_bytes": 0},
    ):
        with pytest.raises(SpeculatorError, match="kv_connector_extra_config"):
            read_sink(wrong)
    assert FileSink(folder="here").folder.is_absolute()


@pytest.mark.parametrize("name", ["a/../b", "..", "/a", "a/", "a//b", ".a", "a\n", "a b", ""])
def test_a_name_stays_in_the_folder(name):
    with pytest.raises(SpeculatorError, match="name: "):
        RequestOptions.read({"name": name}, "here")


def test_a_hostile_request_id_makes_a_safe_name(tmp_path):
    for request_id in ("../../x", "a/b", "..", "x" * 300, "a\0b", "é"):
        assert path_for(tmp_path, name_for(request_id)).parent == tmp_path
    assert name_for("cmpl-1-ab") == "cmpl-1-ab"
    assert name_for("a/b") != name_for("a_b")


def test_requests_that_end_outside_of_the_engine_are_refused():
    from vllm import SamplingParams

    sink = FileSink(folder="x")
    with pytest.raises(SpeculatorError, match="use `stop_token_ids`"):
        read_request(SamplingParams(stop=["x"]), sink)
    with pytest.raises(SpeculatorError, match="n is 2, but hidden states need n=1"):
        read_request(SamplingParams(n=2), sink)
    with pytest.raises(SpeculatorError, match="found 'all', expected an object"):
        read_request(SamplingParams(extra_args={"kv_transfer_params": "all"}), sink)
    assert (
        read_request(SamplingParams(stop=["x"], n=2), FileSink(folder="x", by_default="none"))
        is None
    )


def test_options_of_a_request_win_over_the_sinks():
    from vllm import SamplingParams

    def asked(by_default, **options):
        extra = {"kv_transfer_params": options} if options else None
        request = SamplingParams(extra_args=extra)
        found = read_request(request, FileSink(folder="x", by_default=by_default))
        return None if found is None else (found.extent, found.name)

    assert asked("prompt") == ("prompt", None)
    assert asked("none") is None
    assert asked("none", hidden_states="all", name="a/b") == ("all", "a/b")
    assert asked("all", hidden_states="none") is None
    assert asked("all", name="a") == ("all", "a")
