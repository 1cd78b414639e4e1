"""Comparing: did federating help? The experiment in which every arm begins where the federation began; and `reset`.

Knows the federation of this process and its start. Knows nothing about how an arm trains or a table is drawn.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llmchain_fed._config import plain_number
from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.client.state import ProgressByRound
from llmchain_fed.federated.comparison.arms import BUILT_IN, Arm, checked_arms
from llmchain_fed.federated.comparison.comparable import check_comparable
from llmchain_fed.federated.comparison.experiment import Experiment, about
from llmchain_fed.federated.comparison.results import Comparison
from llmchain_fed.federated.comparison.start import Start, undisturbed
from llmchain_fed.federated.comparison.store import Store
from llmchain_fed.federated.comparison.trials import Bench
from llmchain_fed.federated.fit import checked_rounds
from llmchain_fed.federated.measures.kept import Keeper
from llmchain_fed.federated.reporting import lines
from llmchain_fed.federated.reporting.screen import Screen
from llmchain_fed.federated.runtime import Runtime
from llmchain_fed.federated.server.server import Server
from llmchain_fed.model.weights import content_hash

SCALES = (0.25, 0.5, 1.0, 2.0)
"""the grid that is searched by default, times the federation's own learning rate"""


class Comparing(ABC):
    """The part of `FederatedAveraging` that begins anew: for each arm of a comparison, or for good."""

    _server: Server
    _runtime: Runtime
    _given: Any
    _llm: Any
    _start: Start | None
    _screen: Screen | None
    _writes: bool
    _keeper: Keeper
    _show_adapters: Callable[[], None]

    @abstractmethod
    def _check_closed(self) -> None: ...

    def compare(
        self,
        arms: Iterable[str | Arm] = BUILT_IN,
        *,
        seeds: int | Sequence[int] = 5,
        rounds: int | None = None,
        out: str | Path | None = None,
        grid: Sequence[float] | None = None,
        validation: float = 0.2,
    ) -> Comparison:
        """Trains this federation and what it should be compared with, and measures all on the same held-out texts.

        Every arm starts from the weights that this federation was made with, sees the same number of examples (of a
        participant, each example as often), and has its own learning rate: the one of `grid` with the lowest loss on a
        validation part, which is set apart from the training examples by a hash. For choosing, an arm is trained
        without that part under the first seed; then it is trained on all training examples, once under every seed.
        Held-out examples choose nothing. The arms:

        - "base": untrained.
        - "alone": each participant by itself, a federation of one, with a learning rate of its own.
        - "federated": this federation, with its rule, codecs and server optimizer.
        - "centralised": one who has everybody's examples, at a participant's batch size and at that times participants.
        - "personal": the federation, but for the last round, in which every participant trains on from the federated
          weights by itself, as often as in a round (fine-tuning, arXiv 2002.04758). Of one round it is "alone".
        - `Arm(name, fn)`: a baseline of your own.

        While it runs the chain answers as the arm at hand. Afterwards, also after Ctrl-C or an error, weights, rounds,
        history and random numbers are as they were before, and callbacks have been told nothing.

        Args:
            arms: Which.
            seeds: So many, counted from 0, or these. They decide the order of data and dropout.
            rounds: Of every arm; by default as many as are completed, or 3 where there are none.
            out: A folder where each finished training is kept as JSON; called again with it, compare goes on. More
                arms, seeds and learning rates may be added.
            grid: Learning rates that each arm chooses from; by default a quarter, half, one and two times the
                federation's own.
            validation: The share of the training examples that they are chosen on.

        Raises:
            ConfigError: The participants are elsewhere (`runtime=`): there, `alone` and `personal` are measured at each
                site. Or an option makes no sense, a participant holds out nothing, or `out` is of another comparison.
            DataError: Examples cannot be used.
            NonFiniteLossError: An arm diverges at every learning rate, or in the end at the one that was chosen.
            FederationError: A round opened by `train()` is not closed; a participant's training failed.
        """
        if not self._runtime.sequential:
            msg = (
                "compare trains every arm in one process, and the participants of this runtime are elsewhere: there, "
                "alone and personal are measured at each site (train_locally, personalize). Compare a federation whose "
                "participants= are in this process."
            )
            raise ConfigError(msg)
        self._check_closed()
        server, start = self._server, self._start
        assert start is not None
        wanted = checked_arms(arms)
        rounds = checked_rounds("compare", self._server.round or 3 if rounds is None else rounds, server)
        chosen, share = _checked_seeds(seeds), _checked_share(validation)
        clients = {name: c for name, c in self._runtime.local.items() if isinstance(c, Client)}
        check_comparable(server, clients)
        start.fresh_optimizer()
        bench = Bench(self._given, self._llm, server, start, clients, rounds, share)
        rates = _checked_grid([bench.base_lr * scale for scale in SCALES] if grid is None else grid)
        decided_by = about(bench, server.settings.config.decisive(), server.target.contract(), _digest_of(start), share)
        store = Store(out, decided_by)
        say = (lambda text: lines.write(lines.stamped(text))) if self._screen is not None else (lambda _: None)
        with store.opened(), undisturbed(server.model):
            found = Experiment(bench, wanted, chosen, rates, store, say).run()
            store.write("comparison.json", found.to_json())
            return found

    def reset(self) -> None:
        """Puts chain and federation back to where they were when this object was made, as if no round had been.

        The weights are those of then, there are no rounds and no history, participants have no personal models and
        begin their data anew, and a server optimizer has no memory. For this a federation in one process keeps the
        trainable weights of its beginning, beside the four or so copies that a round needs: some megabytes of a LoRA
        adapter, but as much as the model where all of it is trained. A federation that was resumed goes back to the
        weights of the chain that was passed to `resume`.

        Raises:
            ConfigError: The participants are elsewhere (`runtime=`); or rounds were written to `checkpoint_dir`.
            FederationError: A round opened by `train()` is not closed.
        """
        if self._start is None:
            msg = (
                "reset puts back participants of this process, and those of this runtime are elsewhere. Make a new "
                "federation, with a fresh chain."
            )
            raise ConfigError(msg)
        self._check_closed()
        if self._writes and self._server.round:
            msg = (
                "the rounds so far lie in checkpoint_dir, and a federation that begins anew would write into them. Use "
                "roll_back(round), or make a new federation with another checkpoint_dir."
            )
            raise ConfigError(msg)
        server = self._server
        self._start.restore_optimizer(server.settings.server_optimizer)
        self._start.state.load(server.model)
        server.start_anew()
        self._keeper.forget()
        for client in self._runtime.local.values():
            if isinstance(client, Client):
                client.progress, client.kept = ProgressByRound(), set()
        self._show_adapters()


def _digest_of(start: Start) -> str:
    remainder = {f"{n} {part}": t for n, f in start.state.remainder.items() for part, t in (("a", f.a), ("b", f.b))}
    return content_hash({**start.state.values, **remainder})


def _checked_seeds(given: int | Sequence[int]) -> list[int]:
    given = plain_number(given)
    numbers = range(given) if type(given) is int else given
    found = [plain_number(seed) for seed in numbers] if isinstance(numbers, Iterable) else []
    fit = all(type(seed) is int and -(2**63) <= seed < 2**63 for seed in found)
    if not found or not fit or len(set(found)) < len(found):
        msg = f"seeds is a count of at least 1, or different whole numbers, got {given!r:.80}."
        raise ConfigError(msg)
    return found


def _checked_grid(given: Sequence[float]) -> list[float]:
    given = [given] if isinstance(given, (int, float)) else given
    found = [plain_number(lr) for lr in given] if isinstance(given, Iterable) else []
    positive = all(type(lr) in (int, float) and 0 < lr < math.inf for lr in found)
    if not found or not positive or len(set(found)) < len(found):
        msg = f"grid is a list of different learning rates above 0, such as [5e-4, 1e-3], got {given!r:.80}."
        raise ConfigError(msg)
    return sorted(float(lr) for lr in found)


def _checked_share(given: float) -> float:
    share = plain_number(given)
    if type(share) is not float or not 0 < share < 1:
        msg = f"validation is a share of the training examples, between 0 and 1, such as 0.2, got {given!r:.80}."
        raise ConfigError(msg)
    return share
