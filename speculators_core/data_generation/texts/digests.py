"""Set of token sequences, stored as 16-byte digests."""

import hashlib
from array import array
from collections.abc import Sequence

DIGEST_BYTES = 16
_NONE = bytes(DIGEST_BYTES)


class Digests:
    """A set of digests in one open-addressed table, at most two thirds full.

    A Python set would take three times the memory.
    """

    def __init__(self) -> None:
        self._num_slots = 1024
        self._table = bytearray(self._num_slots * DIGEST_BYTES)
        self._num_held = 0

    def __len__(self) -> int:
        return self._num_held

    def add(self, token_ids: Sequence[int]) -> bool:
        """Adds these ids and returns whether they are new."""
        digest = hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=DIGEST_BYTES).digest()
        is_new = self._place(digest)
        if is_new:
            self._num_held += 1
            if 3 * self._num_held > 2 * self._num_slots:
                self._grow()
        return is_new

    def _place(self, digest: bytes) -> bool:
        slot = int.from_bytes(digest[:8], "little") % self._num_slots
        while True:
            start = slot * DIGEST_BYTES
            held = self._table[start : start + DIGEST_BYTES]
            if held == digest:
                return False
            if held == _NONE:
                self._table[start : start + DIGEST_BYTES] = digest
                return True
            slot = (slot + 1) % self._num_slots

    def _grow(self) -> None:
        before = self._table
        self._num_slots *= 2
        self._table = bytearray(self._num_slots * DIGEST_BYTES)
        for start in range(0, len(before), DIGEST_BYTES):
            if (digest := bytes(before[start : start + DIGEST_BYTES])) != _NONE:
                self._place(digest)
