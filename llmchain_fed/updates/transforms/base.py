"""UpdateTransform: what happens to an update at its participant, between "trained" and "sent".

Knows named tensors and counts. Knows nothing of training, of messages or of what the hub does with the outcome.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from llmchain_fed.updates.serialization import TensorInfo

RESIDUAL = "residual"
"""the name of what a codec carries, and of no other transform"""


@dataclass(frozen=True)
class Origin:
    """Whose update it is, and what it is a difference to."""

    participant: str
    number: int
    """the round's, 0 for the first"""
    examples: int
    """that the participant trained on: what the hub may weigh its update by"""
    tokens: int
    start: Mapping[str, Tensor] = field(repr=False)
    """where the participant started: the shared tensors' global values"""


class UpdateTransform(ABC):
    """Delta → delta at a participant; what it needs of a federation stands in its attributes.

    One object serves all participants and rounds: what it keeps from round to round it gives back as tensors, which
    stay with their participant, go into a checkpoint with its state, and are dropped with a round that came to nothing.
    """

    name: str
    """what errors call it, and by which what it carries is found again; one of a kind in a federation"""
    keeps_names: bool = True
    """whether what comes out is a delta again: the same names and shapes, finite floats"""
    needs_sum: bool = False
    """whether single outcomes mean nothing and only their sum does: the rule must be `summable`"""

    def carries(self, infos: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:  # noqa: ARG002 (most carry nothing)
        """Type (a float) and shape of all it may carry from round to round, by its own names, for such a delta.

        A rule that writes the factors anew every round goes with none that carries anything.
        """
        return {}

    @abstractmethod
    def apply(
        self, delta: Mapping[str, Tensor], origin: Origin, carried: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Makes an outcome of a delta, and what is carried to the next round.

        Args:
            delta: float32 by name, local − global; not to be changed.
            origin: Whose it is.
            carried: From the round before; empty in the first one.

        Raises:
            FederationError: It cannot; the participant is not in this round.
        """
