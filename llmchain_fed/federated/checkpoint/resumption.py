"""Resumption: what is still to be done, once a server stands where a checkpoint had it, until its participants do, too.

Knows what participants had, and where they stood, at the checkpoint. Knows nothing of files or of when somebody joins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmchain_fed.federated.checkpoint import membership
from llmchain_fed.federated.checkpoint import state as resuming
from llmchain_fed.federated.checkpoint.contents import Contents
from llmchain_fed.federated.checkpoint.membership import MembershipChange
from llmchain_fed.federated.protocol.answers import Introduction
from llmchain_fed.federated.server.server import Server
from llmchain_fed.model.local_model import LocalModel


class Resumption:
    """Compares participants with a checkpoint as they join, and tells them where they stood.

    | a participant                             | is in                    | what comes next                        |
    |-------------------------------------------|--------------------------|----------------------------------------|
    | has not joined since                      | `_declarations`, `_owed` | when it joins, it is compared and told |
    | took no part then                         | `_owed`                  | when it joins, it is told to begin     |
    | was compared; the telling was interrupted | `_owed`                  | it is told with the next who join      |
    | was told                                  | neither                  | nothing: it takes part as any other    |

    Args:
        server: Stands where the checkpoint was.
        found: The checkpoint.
        change: What changed of the members; None where they must be those of then.
        declarations: What the checkpoint says of those who take part now, by name.
        states: Where they stood, by name; of one that keeps that for itself there is none.
    """

    def __init__(
        self,
        server: Server,
        found: Contents,
        change: MembershipChange | None,
        declarations: Mapping[str, Any],
        states: Mapping[str, bytes],
    ) -> None:
        self._server, self._found, self._change = server, found, change
        self._declarations, self._states = dict(declarations), dict(states)
        self._owed = set(server.runtime.nodes())

    def joined(self, known: dict[str, bytes]) -> None:
        """Compares and tells those who are there and were not told yet: an earlier attempt may have failed half way.

        Args:
            known: Participants' states as the next checkpoint begins with them; what changes of them is written there.

        Raises:
            CheckpointError: So many have other examples than they did that those who are left are no quorum.
        """
        if not (self._owed or self._declarations):
            return
        there = self._server.client_manager.joined
        self._send_away(there)
        self.compare(there, known)
        self.tell([name for name in there if name in self._owed])

    def _send_away(self, there: Mapping[str, Introduction]) -> None:
        """Whoever is not as it was is absent, and its record says why: one alone does not end the others' run."""
        others = {} if self._change is not None else membership.different(there, self._declarations)
        if len(there) - len(others) < self._server.settings.config.quorum:
            return  # `compare` says of the first what is to be done
        for name, changes in others.items():
            why = resuming.other_declaration(name, changes, self._found)
            self._server.client_manager.leave(name, resuming.OtherExamplesError(why))

    def compare(self, hellos: Mapping[str, Introduction], known: dict[str, bytes]) -> None:
        """Refuses, or takes note of, what participants have that is not what they had.

        Raises:
            CheckpointError: One has something else, and members must be those of then.
        """
        if self._change is None:
            resuming.check_declarations(hellos, self._declarations, self._found)
        else:
            differences = membership.different(hellos, self._declarations)
            for name in differences.keys() & known.keys():
                state = membership.adapted(known[name], differences[name])
                if not membership.has_own(state):
                    forget_adapters(self._server.model, [name], known)
                known[name] = self._states[name] = state
            notes, changed = self._change.tell(differences)
            self._server.round_notes += notes
            self._server.members_changed |= changed
        self._declarations = {name: said for name, said in self._declarations.items() if name not in hellos}

    def tell(self, names: list[str]) -> None:
        """Tells participants where they stood at the checkpoint."""
        resuming.give_back(self._server, names, self._states)
        self._owed -= set(names)
        self._states = {name: state for name, state in self._states.items() if name not in names}


def forget_adapters(model: LocalModel, names: Iterable[str], states: Mapping[str, bytes]) -> None:
    """Takes the personal models of those who have none any more out of this process's model."""
    for name in names:
        if name in model.adapters[1:] and name in states and membership.has_own(states[name]):
            model.remove_adapter(name)
