"""Start: where a federation began, so that it can be put back there; and a stretch of work that leaves no trace.

Knows weights, server optimizers and random generators. Knows nothing about arms or rounds.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.protocol.global_state import GlobalState
from llmchain_fed.federated.server.server import Server
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.updates.low_rank import Factors
from llmchain_fed.updates.server_optimizers import ResumableServerOptimizer, ServerOptimizer


@dataclass(frozen=True)
class Start:
    """The weights and the server optimizer's memory with which a federation was made."""

    state: GlobalState
    optimizer: ServerOptimizer | None = field(default=None, repr=False)
    copied: bool = True
    """whether the optimizer could be copied; one of a user's own may refuse"""

    @classmethod
    def of(cls, server: Server) -> Start:
        """Where a server is that has run no round yet; its values are those it has for its participants, no copy."""
        state = GlobalState(dict(server.broadcast.state_for()), _remainder_of(server.model))
        try:
            return cls(state, copy.deepcopy(server.settings.server_optimizer))
        except Exception:
            return cls(state, copied=False)

    def fresh_optimizer(self) -> ServerOptimizer | None:
        """A server optimizer with the memory of the beginning.

        Raises:
            ConfigError: The federation's cannot be copied.
        """
        if not self.copied:
            msg = (
                "the server optimizer cannot be copied, so it cannot begin anew. Give it settings(), state_dict() and "
                "load_state_dict(), or make it copyable."
            )
            raise ConfigError(msg)
        return copy.deepcopy(self.optimizer)

    def restore_optimizer(self, optimizer: ServerOptimizer | None) -> None:
        """Gives the federation's own server optimizer the memory of the beginning.

        Raises:
            ConfigError: It cannot be copied; nothing has changed.
        """
        fresh = self.fresh_optimizer()
        if isinstance(optimizer, ResumableServerOptimizer) and isinstance(fresh, ResumableServerOptimizer):
            optimizer.load_state_dict(*fresh.state_dict())
        elif optimizer is not None:
            vars(optimizer).clear()
            vars(optimizer).update(vars(fresh))


def state_of(model: LocalModel) -> GlobalState:
    """What a model has now, as copies that nobody else writes into."""
    return GlobalState(model.trainable_state(), _remainder_of(model))


def _remainder_of(model: LocalModel) -> dict[str, Factors]:
    return {layer: Factors(b.clone(), a.clone()) for layer, (b, a) in model.remainder().items()}


@contextmanager
def undisturbed(model: LocalModel) -> Iterator[None]:
    """Whatever happens inside, the weights and the global random generators are afterwards as they were before."""
    state, python = state_of(model), random.getstate()
    numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        state.load(model)
        random.setstate(python)
        torch.set_rng_state(cpu)
        if numpy is not None:
            sys.modules["numpy"].random.set_state(numpy)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
