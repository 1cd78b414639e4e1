"""FedNova: a mean of changes per step, so that who takes more of them does not pull harder.

Knows named tensors and counts of steps. Knows nothing about participants or how training goes.
"""

from __future__ import annotations

from dataclasses import replace

from llmchain_fed.errors import FederationError
from llmchain_fed.updates.aggregation.mean import RunningMean
from llmchain_fed.updates.collection import Collection, Combined, Contribution, Round


class FedNova(Collection):
    """w + τ_eff · Σ p_k (w_k − w)/τ_k with τ_eff = Σ p_k τ_k: who takes more steps does not pull harder.

    arXiv 2007.07481, whose τ_k counts steps of plain SGD; for other optimizers it is the same normalisation by the
    number of steps. With equal step counts it is FedAvg.
    """

    def zero(self, about: Round) -> None:
        """Begins a round, from whose state changes are counted."""
        self._state = about.state
        self._mean = RunningMean()
        self._steps = 0.0
        self._total = 0.0

    def check(self, given: Contribution) -> None:
        """Makes sure that a participant's change can be divided by its steps.

        Raises:
            FederationError: It does not say how many they were.
        """
        if given.steps is None or given.steps < 1:
            msg = (
                f"fednova divides by local steps, and the update says {given.steps!r}. Its participant must count them."
            )
            raise FederationError(msg)

    def add(self, given: Contribution) -> None:
        """Takes in one participant's change per step."""
        self.check(given)
        assert given.steps is not None
        changes = {n: (t.float() - self._state[n].float()) / given.steps for n, t in given.tensors.items()}
        self._mean.add(replace(given, tensors=changes))
        self._steps += given.steps * given.weight
        self._total += given.weight

    def finish(self) -> Combined:
        """The normalised mean, added to where the round began."""
        change, tau = self._mean.finish().values, self._steps / max(self._total, 1e-300)
        return Combined({n: (self._state[n].float() + tau * c).to(self._state[n].dtype) for n, c in change.items()})
