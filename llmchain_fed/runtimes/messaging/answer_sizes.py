"""Answer sizes: how many bytes an answer may have, from what was asked.

Knows operations and sizes. Knows nothing of how answers travel.
"""

from __future__ import annotations

from llmchain_fed.federated.runtime import Operation

_SMALL = 16 * 2**20  # bytes: counts, losses and samples as JSON
_STATE = 64 * 2**20  # bytes a participant's own state may have beyond what was said of it


class AnswerSizes:
    """Remembers what was said of the size of answers.

    A training whose updates nobody described, and a participant's own state, may have twice what was sent to it and
    some more; everything else is JSON.
    """

    def __init__(self) -> None:
        self._said: dict[str, int] = {}

    def expect(self, num_bytes: int, op: Operation = "train") -> None:
        """Says how large an answer to `op` may be from now on."""
        self._said[op] = num_bytes

    def most(self, op: str, payload: int) -> int:
        """bytes: what no sensible answer to `op` exceeds, for which so many bytes of `payload` were sent."""
        if op == "train":  # what is not an update is JSON: a loss, a curve
            return max(self._said[op], _SMALL) if op in self._said else 2 * payload + _SMALL
        if op == "personal_state":
            return max(self._said.get(op, 0), 2 * payload) + _STATE
        return _SMALL
