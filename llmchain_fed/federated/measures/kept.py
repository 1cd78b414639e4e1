"""Keeper: the best round so far, kept so that a fit can end with it.

Knows the hub, its participants' states and its checkpoints. Knows nothing about when a fit ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmchain_fed.errors import CheckpointError, FederationError
from llmchain_fed.federated.checkpoint import files, fitting
from llmchain_fed.federated.checkpoint.manager import CheckpointManager, read_for
from llmchain_fed.federated.history import RoundRecord
from llmchain_fed.federated.measures.monitor import LOSS, Monitored
from llmchain_fed.federated.protocol import messages
from llmchain_fed.federated.protocol.global_state import GlobalState
from llmchain_fed.federated.protocol.tasks import PersonalStateTask
from llmchain_fed.federated.server.server import Server
from llmchain_fed.untrusted import shown
from llmchain_fed.updates import server_optimizers
from llmchain_fed.updates.server_optimizers import ResumableServerOptimizer

_ASK = "personal_state"


@dataclass(frozen=True)
class KeptRound:
    """One round's global state, the server optimizer's memory, and where participants stood."""

    round: int
    state: GlobalState = field(repr=False)
    undo: Callable[[], None] = field(repr=False)
    """puts the server optimizer's memory back to what it was then"""
    states: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """participant → where it stood: its personal model, too; of one that keeps that for itself there is none"""

    def restore(self, server: Server) -> None:
        """The server and its participants are where they were then; rounds and history stay as they are."""
        with server.restoring() as now:
            self.undo()
            now.leave(self.state)
            present = [n for n in self.states if n in server.runtime.nodes()]
            for _ in server.runtime.call(_ASK, present, {n: self.states[n] for n in present}) if present else ():
                pass  # one that is away, or may not be told, stays with the personal model that it has


class Keeper:
    """Keeps one copy of the best round's trained state, beside the checkpoints where there are some.

    | the best round                                    | its weights are           |
    |---------------------------------------------------|---------------------------|
    | is of a fit of this object that kept the best     | here                      |
    | is the one whose weights the chain has            | the chain's               |
    | is of a run that was interrupted, and resumed     | in its checkpoint         |
    | anything else                                     | gone: it is no candidate  |
    """

    def __init__(self, server: Server, checkpoints: CheckpointManager) -> None:
        self._server, self._checkpoints = server, checkpoints
        self._kept: KeptRound | None = None

    def forget(self) -> None:
        """What was kept is of rounds that are taken back."""
        self._kept = None

    def begin(self, monitored: Monitored) -> None:
        """Before a fit: the best of the rounds whose weights there still are is the one to beat."""
        server, history = self._server, self._server.history
        now = history.kept or server.round
        there = {now}
        if history.best is not None and (self._has(history.best) or self._lies_there(history.best)):
            there.add(history.best)
        best = monitored.best(history, there)
        history.best = best.round if best is not None else None
        if history.best == now and not self._has(now):
            self._kept = self._of(now)
        self._checkpoints.spare = history.best

    def judged(self) -> None:
        """A round is judged, and its checkpoint not written yet: that of the best stays."""
        self._checkpoints.spare = self._server.history.best

    def completed(self, record: RoundRecord) -> None:
        """A round and its checkpoint are there; if it is the best, it is kept."""
        if self._server.history.best == record.round:
            self._kept = self._of(record.round)

    def finish(self) -> bool:
        """Ends with the best round's weights; whether they are others than the last round's.

        Raises:
            CheckpointError: Its checkpoint is damaged; everything is as after the last round.
        """
        server, history = self._server, self._server.history
        best, self._checkpoints.spare = history.best, None
        if best is None or best == (history.kept or server.round):
            return False
        found = self._kept if self._has(best) else self._read(best)
        assert found is not None
        found.restore(server)
        history.kept = best
        ahead = sorted(server.client_manager.joined.keys() - found.states.keys())
        by = Monitored(history.monitor or LOSS)  # which way is better was decided when it became the best
        value = by.measured(next(record for record in history if record.round == best)).pool
        server.round_notes.append(f"begins at the weights of round {best}, the best by {by} ({value:.4g})")
        if ahead:
            said = shown(", ".join(ahead), 300)
            server.round_notes.append(f"{said} did not say where they stood in round {best}, and go on from the last")
        return True

    def load(self) -> bool:
        """As `finish`, after a fit.

        Raises:
            FederationError: No round has been measured, or the weights of the best are gone.
            CheckpointError: Its checkpoint is damaged; everything is as before.
        """
        best, now = self._server.history.best, self._server.history.kept or self._server.round
        if best is None:
            msg = "no round has been measured, so none is the best. Run fit() with evaluation=…"
            raise FederationError(msg)
        if best != now and not (self._has(best) or self._lies_there(best)):
            msg = (
                f"the weights of round {best}, the best, are not kept any more. Let fit(keep='best') keep them, or a "
                "checkpoint_dir= with keep_checkpoints=None."
            )
            raise FederationError(msg)
        return self.finish()

    def _has(self, number: int) -> bool:
        return self._kept is not None and self._kept.round == number

    def _lies_there(self, number: int) -> bool:
        """Whether the checkpoint of a round is there with its own weights, and not an earlier best's in their place."""
        folder = self._checkpoints.directory
        if folder is None or number not in files.rounds(folder):
            return False
        try:
            return files.about(folder, number)["history"]["kept"] in (None, number)
        except (CheckpointError, KeyError, TypeError):  # damaged: whoever goes back to it is told
            return False

    def _of(self, number: int) -> KeptRound:
        server = self._server
        undo = server_optimizers.snapshot(server.settings.server_optimizer)
        states = self._checkpoints.states if self._checkpoints.directory is not None else self._asked()
        return KeptRound(number, GlobalState.of(server.model), undo, dict(states))

    def _read(self, number: int) -> KeptRound:
        server, folder = self._server, self._checkpoints.directory
        assert isinstance(folder, Path)
        found = read_for(server.model, folder, number)
        optimizer = server.settings.server_optimizer

        def undo() -> None:
            if isinstance(optimizer, ResumableServerOptimizer):
                optimizer.load_state_dict(found.found.tensors.get("server", {}), found.about.server_optimizer)

        return KeptRound(number, fitting.state_of(found, server.model), undo, dict(found.found.participants))

    def _asked(self) -> dict[str, bytes]:
        """Where participants stand, of those who say it.

        Personal models, a kept optimizer, the place in the data and what a codec still owes belong to a round as its
        weights do: without them further rounds would go on from two rounds at once.
        """
        server = self._server
        ask = messages.write(PersonalStateTask(round=server.round + 1))
        answers = server.runtime.call(_ASK, list(server.client_manager.joined), ask, server.settings.config.deadline)
        return {name: answer for name, answer in answers if isinstance(answer, bytes)}
