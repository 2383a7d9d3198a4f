"""A logits processor of a user."""

from vllm.v1.sample.logits_processor import LogitsProcessor


class Shifted(LogitsProcessor):
    """Raises one token for all requests."""

    def __init__(self, vllm_config, device, is_pin_memory) -> None:
        pass

    def apply(self, logits):
        logits[:, 320] += 3.0
        return logits

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update) -> None:
        pass
