"""CheckpointManager: writes a checkpoint after each round, goes back to one, serves one beside the newest.

A `Resumption` is what is still to be done then, until participants stand where the checkpoint had them, too. Knows the
hub and checkpoints. Knows nothing about how a round is run, or of when somebody joins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from llmchain_fed._config import plain_number
from llmchain_fed.errors import CheckpointError, ConfigError, UnsupportedModelError
from llmchain_fed.federated.checkpoint import contents, files, fitting, membership
from llmchain_fed.federated.checkpoint.membership import Members, MembershipChange
from llmchain_fed.federated.checkpoint.schema import Contents, options_again
from llmchain_fed.federated.client.personalization import with_remainder
from llmchain_fed.federated.options import FederationOptions
from llmchain_fed.federated.protocol.answers import Introduction
from llmchain_fed.federated.protocol.global_state import GlobalState
from llmchain_fed.federated.server.server import Server
from llmchain_fed.federated.target import Target
from llmchain_fed.model.local_model import LocalModel


class _Rounds(Enum):
    """Whose rounds lie in the directory, as far as this run knows.

    | state | reached by                 | rounds that lie there                       | a write                     |
    |-------|----------------------------|---------------------------------------------|-----------------------------|
    | ANY   | a run that begins anew     | nobody has looked                           | is refused if there are any |
    | OWN   | a write                    | this run's                                  | adds one                    |
    | LATER | going on from a checkpoint | this run's, and those of a future that will | adds one, and drops those   |
    |       |                            | not be                                      | of that future              |
    """

    ANY = "any"
    OWN = "own"
    LATER = "later"


class CheckpointManager:
    """Keeps a federation's checkpoints.

    Args:
        directory: The folder that checkpoints are written to; None writes none.
        shown: Called once participants stand where a checkpoint had them: their personal models become adapters.

    Raises:
        ConfigError: `directory` is no path. Whether a run can have it, `check_directory` says.
    """

    def __init__(self, server: Server, directory: str | Path | None, *, shown: Callable[[], object]) -> None:
        self._server, self._leads, self._shown = server, server.runtime.leads, shown
        self._keep = server.settings.config.keep_checkpoints
        self.directory = _path(directory) if directory is not None else None
        self._rounds = _Rounds.ANY
        self.spare: int | None = None
        """a round that stays, however old its checkpoint"""
        self.states: dict[str, bytes] = {}
        """participants' states as they were asked for last, after so many rounds:"""
        self._asked: int | None = None
        self._resumption: Resumption | None = None

    def described(self) -> dict[str, Any]:
        """The federation's options, flat, for those who watch it."""
        found: dict[str, Any] = {}
        for name, value in self._server.settings.config.model_dump(mode="json").items():
            nested = value if isinstance(value, dict) else {"": value}
            found |= {f"{name}.{key}" if key else name: v for key, v in nested.items()}
        return found | {"fingerprint": self._server.model.fingerprint()}

    # --- writing ----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint of the server as it is now, if there is a directory.

        Raises:
            CheckpointError: It cannot be written; former ones are as they were.
        """
        if self.directory is None or not self._leads:
            return
        self.check_directory()
        made = contents.checkpoint_of(self._server, self.states, self._asked)
        # before it is written: what fails once the folder has its name leaves a round that is this run's own
        self.states, self._asked = dict(made.participants), made.round
        self._rounds = _Rounds.OWN if self._rounds is _Rounds.ANY else self._rounds
        files.write(self.directory, made, keep=self._keep, spare=self.spare)
        self._drop_later(made.round)

    def _drop_later(self, than: int) -> None:
        """Rounds of a future that will not be, once this run has written one of its own in their place."""
        assert self.directory is not None
        for number in files.rounds(self.directory) if self._rounds is _Rounds.LATER else []:
            if number > than:
                files.remove(self.directory, number)
        self._rounds = _Rounds.OWN

    def check_directory(self) -> None:
        """Makes sure, before anything is trained, that a run that begins anew has the directory for itself.

        Raises:
            CheckpointError: It contains another run's rounds, or cannot be made or written to.
        """
        if self.directory is None or self._rounds is not _Rounds.ANY or not self._leads:
            return
        if there := files.rounds(self.directory):
            msg = (
                f"{str(self.directory)!r} contains rounds {there} of an earlier run. Go on from them with "
                "FederatedAveraging.resume(…), or choose another checkpoint_dir."
            )
            raise CheckpointError(msg)
        files.prepare(self.directory)

    # --- going on ---------------------------------------------------------------------------------------------------

    @staticmethod
    def read(
        directory: str | Path, number: int | None, given: FederationOptions, optimizer: Any, model: Any
    ) -> tuple[Contents, FederationOptions]:
        """A checkpoint, and the options to go on with.

        What is `given` again goes first; the model that goes on says how large a checkpoint can be.

        Raises:
            ConfigError: `directory` is no path.
            CheckpointError: See `files.read` and `Contents.of`; or an option is missing that no file stores.
        """
        found = read_for(Target.of(model, given.get("llm")).model, _path(directory), number)
        try:
            return found, options_again(found.config, given, optimizer)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None

    def go_on(self, found: Contents, members: Members = "same") -> None:
        """Puts the server where the checkpoint was; later ones are dropped with the next one that is written.

        Raises:
            CheckpointError: It is another federation's, or a participant has other examples than it did; nothing has
                changed.
            ConfigError: Members may have changed, and there is none.
            LLMChainFedError: A participant's own error in this process, such as examples that cannot be used.
        """
        server = self._server
        nodes, here = server.runtime.nodes(), server.runtime.sequential
        change = contents.check(server, found, members)
        if change is not None and not nodes:
            msg = "members='changed' goes on with those who take part from now on: pass participants=…."
            raise ConfigError(msg)
        declarations = {n: said for n, said in found.about.declarations.items() if n in nodes}
        hellos: dict[str, Introduction] = server.client_manager.joined  # others say what they have when they join
        if here:
            asked = dict(server.client_manager.ask(nodes if change else list(declarations)))
            hellos = {n: answer for n, answer in asked.items() if isinstance(answer, Introduction)}
        if change is None:
            contents.check_declarations(hellos, declarations, found)
        fitting.check_participants(found, server, membership.different(hellos, declarations).keys())
        former = dict(vars(self))
        try:
            with contents.as_before(server):
                states = contents.restore(server, found)
                self.states = {n: state for n, state in states.items() if n in nodes}
                self._asked, self._rounds = found.round, _Rounds.LATER
                trained = {name for record in server.history for name in record.trained}
                # who is new begins at the start, even where the history knows the name: that was another one
                anew = [n for n in nodes if n not in trained or (change is not None and n in change.joined)]
                begun = {**dict.fromkeys(anew, membership.START), **self.states}
                self._resumption = Resumption(server, found, change, declarations, begun)
                forget_adapters(server.model, change.left if change is not None else (), states)
                if here:  # at once: `train()` needs nobody to join, and may bring other examples
                    self._resumption.compare(hellos, self.states)
                    self._resumption.tell(nodes)
                self._shown()
        except BaseException:
            vars(self).update(former)
            self._shown()
            raise

    def give_back(self) -> None:
        """Tells participants that have joined where they stood at the checkpoint that this run goes on from, if any.

        Raises:
            CheckpointError: So many have other examples than they did that those who are left are no quorum.
        """
        if self._resumption is not None:
            self._resumption.joined(self.states)

    def roll_back(self, to: int) -> None:
        """Takes the hub, and its participants, back to the end of a round.

        Raises:
            ConfigError: `to` is no round.
            CheckpointError: There is no checkpoint of it, or it is another federation's; nothing has changed.
        """
        to = _checked_round("roll_back", to)
        found = read_for(self._server.model, self._there("roll_back"), to)
        self.go_on(found)
        self._server.patience = []
        if self._leads:
            self._drop_later(found.round)
        for name in self._server.client_manager.present():  # they join anew, and are told where they stood
            self._server.client_manager.leave(name)

    def promote(self, number: int, name: str) -> None:
        """Makes a round's global weights a resident adapter.

        Raises:
            ConfigError: A participant has that name, or `number` is no round.
            CheckpointError: There is no checkpoint of it, or it is of another base, adapter or prompt.
            UnsupportedModelError: The model has no LoRA adapter.
        """
        model = self._server.model
        number = _checked_round("promote", number)
        if name in self._server.runtime.nodes():
            msg = f"{name!r} is a participant, whose personal model would take its place. Choose another name."
            raise ConfigError(msg)
        if not model.adapters:
            msg = "promote makes an adapter of a round's weights, and this model has none. Use roll_back, or LoRA."
            raise UnsupportedModelError(msg)
        if number == self._server.round:
            state = GlobalState.of(model)
        else:
            found = read_for(model, self._there("promote"), number)
            contents.check_contract(self._server, found)
            if (kept := found.found.about["history"].get("kept")) not in (None, number):
                msg = f"it has the weights of round {kept}, the best, and not its own"
                raise found.found.unusable(msg)
            state = fitting.state_of(found, model)
        with torch.no_grad():
            model.add_adapter(name, with_remainder(state.values, state.remainder, model.lora_scaling()))

    def _there(self, what: str) -> Path:
        if self.directory is None:
            msg = f"{what} needs the checkpoints of earlier rounds: pass checkpoint_dir= when the federation begins."
            raise CheckpointError(msg)
        return self.directory


class Resumption:
    """Compares participants with a checkpoint as they join, and tells them where they stood.

    | a participant                             | is in                    | what comes next                        |
    |-------------------------------------------|--------------------------|----------------------------------------|
    | has not joined since                      | `_declarations`, `_owed` | when it joins, it is compared and told |
    | took no part then                         | `_owed`                  | when it joins, it is told to begin     |
    | was compared; the telling was interrupted | `_owed`                  | it is told with the next who join      |
    | was told                                  | neither                  | nothing: it takes part as any other    |

    Args:
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

        What changes of states is written to `known`, those that the next checkpoint begins with.

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
            why = contents.other_declaration(name, changes, self._found)
            self._server.client_manager.leave(name, contents.OtherExamplesError(why))

    def compare(self, hellos: Mapping[str, Introduction], known: dict[str, bytes]) -> None:
        """Refuses, or takes note of, what participants have that is not what they had.

        Raises:
            CheckpointError: One has something else, and members must be those of then.
        """
        if self._change is None:
            contents.check_declarations(hellos, self._declarations, self._found)
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
        contents.give_back(self._server, names, self._states)
        self._owed -= set(names)
        self._states = {name: state for name, state in self._states.items() if name not in names}


def forget_adapters(model: LocalModel, names: Iterable[str], states: Mapping[str, bytes]) -> None:
    """Takes the personal models of those who have none any more out of this process's model."""
    for name in names:
        if name in model.adapters[1:] and name in states and membership.has_own(states[name]):
            model.remove_adapter(name)


def read_for(model: LocalModel, directory: Path, number: int | None) -> Contents:
    """The checkpoint of a round, as far as it can be one of a federation of this model.

    Raises:
        CheckpointError: See `files.read` and `Contents.of`.
    """
    return Contents.of(files.read(directory, number, fitting.limits_of(model)))


def _path(directory: Any) -> Path:
    try:
        return Path(directory)
    except TypeError:
        msg = f"checkpoint_dir is the path of a directory, got {directory!r:.80}."
        raise ConfigError(msg) from None


def _checked_round(what: str, number: Any) -> int:
    if type(number := plain_number(number)) is not int:
        msg = f"{what} takes the number of a round, such as 3, got {number!r:.80}."
        raise ConfigError(msg)
    return number
