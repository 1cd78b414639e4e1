"""Client: does a participant's work on a LocalModel when it is asked to, and answers in bytes.

Knows the messages, what may be asked, and where its participant stands. Knows nothing of other participants or of what
becomes of its update. What it is sent is checked before a value of it is used; how it trains stands in `local_work`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any

from llmchain_fed.data.encoding import EncodedExamples
from llmchain_fed.errors import ConfigError, FederationError, PolicyError
from llmchain_fed.federated.client import given_state, personalization
from llmchain_fed.federated.client import state as private_state
from llmchain_fed.federated.client.data import LocalData
from llmchain_fed.federated.client.global_state_cache import STALE, GlobalStateCache
from llmchain_fed.federated.client.limits import Limits, refuse, steps_of
from llmchain_fed.federated.client.own_options import own_config
from llmchain_fed.federated.client.state import Progress
from llmchain_fed.federated.client.work import ClientWork
from llmchain_fed.federated.participant import Participant
from llmchain_fed.federated.protocol import tasks
from llmchain_fed.federated.protocol.expected import Layout
from llmchain_fed.federated.protocol.finiteness import spelled
from llmchain_fed.federated.protocol.tasks import HelloMessage
from llmchain_fed.federated.runtime import OPERATIONS, Operation
from llmchain_fed.federated.target import Target, check_contract
from llmchain_fed.training.loop import TrainingConfig
from llmchain_fed.untrusted import decoding, shown
from llmchain_fed.updates import serialization
from llmchain_fed.updates.lora_layout import selected
from llmchain_fed.updates.serialization import TensorInfo
from llmchain_fed.updates.transforms import UpdateTransform, carried_by


class Client(ClientWork):
    """One participant, its data and its private state, on a model of this process.

    Args:
        trainee: What to train.
        participant: Whose examples.
        config: How to train; the participant's own options go first. None: as the hub says in its hello.
        samples: Held-out examples that may leave with the chain's answers, at most; None is as many as are asked for.
        held: What this process's participants have been sent; None makes one for this participant alone.
        transforms: What happens to an update before it is sent, one after the other.

    Raises:
        ConfigError: The participant's own options are not valid.
    """

    def __init__(
        self,
        target: Target,
        participant: Participant,
        config: TrainingConfig | None,
        *,
        samples: int | None = None,
        global_states: GlobalStateCache | None = None,
        transforms: Sequence[UpdateTransform] = (),
    ) -> None:
        super().__init__(target, participant, config or TrainingConfig(), samples=samples, transforms=transforms)
        self._told = config is None
        self._global_states = global_states or GlobalStateCache(target.model, most=Limits().max_states)
        self._evaluations, self._counting = 0, threading.Lock()
        self._federation: str | None = None
        self._aggregation: str | None = None

    def handle(self, op: Operation, payload: bytes) -> bytes:
        """Answers one operation.

        `hello` compares contracts and says what the participant holds; `train` and `evaluate` work on the global state
        in the payload; `personal_state` gives back, or takes, where the participant stands; `stop` forgets the
        federation. What is refused has changed nothing: neither weights, nor where the participant stands, nor what of
        the global state is held.

        Raises:
            FederationError: Another operation, one before `hello` told a peer in its own process how to train, or a
                message that is not what a hub sends.
            ContractError: The hub stands on another base, adapter, prompt or version.
            PolicyError: The limits do not allow it, or it asks for what is private.
            DeadlineError: The round's time is over before the training is.
            LLMChainFedError: What the work itself raises.
        """
        if op not in OPERATIONS:
            msg = f"unknown operation '{shown(op, 40)}'; a peer answers {', '.join(OPERATIONS)}."
            raise FederationError(msg)
        if op == "hello":
            return self._hello(payload)
        if op == "stop":
            tasks.check_stop(payload)
            self._progress, self._federation = {-1: Progress()}, None
            self._global_states.forget()
            return b"{}"
        if self._told and self._federation is None:
            msg = f"{self._name!r} has not been told yet how to train (it has restarted, perhaps): hello comes first."
            raise FederationError(msg)
        what = f"the {op} message"
        with decoding(what, FederationError):
            layout = Layout.of(self._model, self._participant.rank, self._scaling)
            header, infos = serialization.inspect(payload, max_bytes=len(payload), max_header=layout.max_header)
            header = tasks.checked_header(op, header)
            if op == "personal_state":
                given = self._given(header, infos, payload, layout)
            else:
                layout.check(header, infos)
        if op == "personal_state":
            return self._personal_state(header, given)
        self._check(op, header, layout)
        with self._model.exclusive(), decoding(what, FederationError):
            tensors = serialization.values(payload, infos)
            del payload  # of full weights, a copy less while they are trained
            state = self._global_states.receive(header, tensors)
        if state is None:
            return STALE
        del tensors
        self._spend(self._measurements(op, header))
        with self._at_own_rank():
            if op == "evaluate":
                return json.dumps(spelled(self._evaluate(header, state))).encode()
            if any(what in header for what in ("personal", "curve", "time_step")):
                return json.dumps(spelled(self._try(header, state))).encode()
            return self._train(header, state)

    def obey(self, limits: Limits) -> None:
        """Lets nothing be asked that these limits do not allow, from now on."""
        self._limits = limits
        self._samples = limits.samples if self._samples is None else min(self._samples, limits.samples)
        self._global_states.most = limits.max_states

    @property
    def participant(self) -> Participant:
        """Whose peer this is."""
        return self._participant

    @property
    def config(self) -> TrainingConfig:
        """How it trains, its own options included."""
        return self._config

    def inspect(self) -> str:
        """What became of the examples, in a line; reads them.

        Raises:
            DataError: They cannot be used.
        """
        return self._data.inspect()

    @property
    def data(self) -> LocalData:
        """What it trains on and is evaluated on, for who shares its process."""
        return self._data

    def give_up(self) -> None:
        """Ends the work that runs in another thread at its next step: nobody waits for its result any more."""
        self._given_up.set()

    def take_up(self) -> None:
        """Lets work that comes from now on run to its end again."""
        self._given_up.clear()

    def taking(self, participant: Participant) -> AbstractContextManager[None]:
        """Other examples from now on, unless what is done within fails; optimizer and position are kept."""
        return self._data.taking(participant)

    def _hello(self, payload: bytes) -> bytes:
        asked = tasks.read_hello(payload)
        contract = self._target.contract()
        check_contract(self._name, site=contract, server=asked.get("contract"))
        said = tasks.checked_hello(asked)
        config = self._config_for(said)
        if self._limits is not None:
            self._limits.check_aggregation(said.aggregation)
            self._limits.check_training(config)
        with self._data.limiting(config):
            data = self._data.train()
            if self._limits is not None:
                self._limits.check_usable(data)
                self._limits.check_steps(steps_of(data, config))
            told = json.dumps(self._introduction(contract, config, data)).encode()
        if self._federation not in (None, said.federation):
            self._progress = {-1: Progress()}  # another federation begins: nothing is carried over
        elif config != self._config:  # an optimizer goes on with the settings it was made with
            self._progress = {n: replace(p, optimizer_state=None) for n, p in self._progress.items()}
        self._config, self._aggregation, self._federation = config, said.aggregation, said.federation
        return told

    def _introduction(self, contract: Mapping[str, Any], config: TrainingConfig, data: Any) -> dict[str, Any]:
        """What it says of itself: counts and digests."""
        answer: dict[str, Any] = {
            "participant": self._name,
            "contract": contract,
            "held_out": self._data.holds_out,
            "holds": self._model.weights_hash,
            "rank": self._participant.rank,
            "alpha": self._participant.alpha,
            "options": hashlib.sha256(repr(config).encode()).hexdigest()[:16],
        }
        if isinstance(data, EncodedExamples):
            answer["num_examples"], answer["num_tokens"] = len(data), data.report.completion_tokens
            answer["report"] = asdict(data.report)
        held_out = self._data.held_out() if self._data.holds_out else None
        if isinstance(held_out, EncodedExamples):  # by which its held-out loss counts
            answer["held_out_examples"], answer["held_out_tokens"] = len(held_out), held_out.report.completion_tokens
        if (found := self._data.overlap()) is not None:
            answer["overlap"] = found.to_plain()
        return answer

    def _config_for(self, said: HelloMessage) -> TrainingConfig:
        """The federation's training options, the participant's own over them; its own alone in the hub's process."""
        if not self._told:
            return self._config
        if said.training is None:
            msg = f"the hub did not say how {self._name!r} should train."
            raise ConfigError(msg)
        return own_config(TrainingConfig(**said.training.model_dump(exclude_unset=True)), self._participant)

    # --- what may be asked --------------------------------------------------------------------------------------------

    def _check(self, op: Operation, header: Mapping[str, Any], layout: Layout) -> None:
        """Makes sure, before a value of the message is read, that it may be asked.

        Raises:
            FederationError: It is about another base, or about tensors that are not trained here.
            PolicyError: The limits do not allow it, or it asks for what is private.
        """
        if header["base"] != self._model.fingerprint():
            msg = f"the {op} message is about another base than this one, or about this one before it was changed."
            raise FederationError(msg)
        if op == "train":
            self._check_training(header, layout)
        self._spend(self._measurements(op, header), count=False)

    def _check_training(self, header: Mapping[str, Any], layout: Layout) -> None:
        update = not any(what in header for what in ("personal", "curve", "time_step"))
        data, progress = self._data.train(), self._latest(header["round"])
        if update:
            for part in (header.get("trains", "all"), header.get("shares", "all")):
                layout.check_part(part)
            self._check_private(layout, header)
            self._check_kept(layout, header, progress)
        limits, config = self._limits, self._config
        if limits is None:
            return
        asked = header.get("personal", header)
        limits.check_training(config, asked.get("lr"))
        steps = steps_of(data, config)
        if update:
            limits.check_parts(self._aggregation, header)
            limits.check_codec(header.get("codec"))
            limits.check_update(data, config, self._name, header["round"], progress.next_step)
            more = header["ditto"].get("max_steps", steps) if "ditto" in header else 0
            steps = steps + more if steps is not None and more is not None else None
        elif "personal" in header:  # its mean training loss is told, of these examples
            steps, own = asked["steps"], personalization.steps_config(config, asked["steps"], asked.get("lr"))
            limits.check_update(data, own, self._name, header["round"], 0)
        else:
            steps = max(header["curve"]) if "curve" in header else 2
        limits.check_steps(steps)

    def _check_private(self, layout: Layout, header: Mapping[str, Any]) -> None:
        """What a federation let this participant keep for itself never leaves, in whatever round it is asked for.

        A peer of the hub's own process follows the one federation it was made for. Another one remembers names as long
        as it lives: training the same examples from the same start, under another rule or another federation's name,
        would make the same values again.
        """
        private = (self._kept if self._told else set()).union(*(p.private for p in self._progress.values()))
        if asked := private & set(selected(layout.values, header.get("shares", "all"))):
            msg = (
                f"{len(asked)} of the tensors that are asked for, such as {min(asked)}, have been this participant's "
                "own in an earlier round: what is private never leaves. Start its peer anew for a federation of all."
            )
            raise PolicyError(msg)

    def _check_kept(self, layout: Layout, header: Mapping[str, Any], progress: Progress) -> None:
        """A kept optimizer knows the tensors that it was made for; its values were looked at when it was given back."""
        if progress.optimizer_state is None or not self._told or not isinstance(self._config.optimizer, str):
            return
        names = selected(layout.values, header.get("trains", "all"))
        shapes = [layout.values[n].shape for n in names]
        if not given_state.fits(progress.optimizer_state, self._config, shapes, values=False):
            msg = "the optimizer that was kept has trained other tensors than this round trains. Keep none, or go on."
            raise FederationError(msg)

    def _measurements(self, op: Operation, header: Mapping[str, Any]) -> int:
        """Held-out losses that an answer tells, at weights of the hub's choice."""
        if op == "evaluate":
            return 1
        return len(header.get("curve", ())) + ("personal" in header and self._data.holds_out)

    def _spend(self, measurements: int, *, count: bool = True) -> None:
        """Counts measurements, which nothing a hub sends takes back.

        Raises:
            PolicyError: They are more than the limits allow.
        """
        with self._counting:
            spent = self._evaluations + measurements
            if measurements and self._limits is not None and spent > self._limits.max_evaluations:
                refuse(
                    "max_evaluations",
                    f"{measurements:,} more held-out losses are asked for after {self._evaluations:,}, at most "
                    f"{self._limits.max_evaluations:,} are allowed until this peer is started again",
                )
            self._evaluations += measurements * count

    # --- where it stands ----------------------------------------------------------------------------------------------

    def _given(
        self, header: Mapping[str, Any], infos: Mapping[str, TensorInfo], payload: bytes, layout: Layout
    ) -> dict[int, Progress] | None:
        """A state that the message gives back, if it can be this participant's; None where it only asks.

        Raises:
            ParticipantError: It cannot.
        """
        if "progress" not in header:
            if infos:
                msg = f"the personal_state message gives nothing back and brings {len(infos)} tensors."
                raise FederationError(msg)
            return None
        given_state.check_layout(header["progress"], infos, layout, carried_by(self._transforms, layout.values))
        found = private_state.read(header["progress"], serialization.values(payload, infos))
        if self._told:
            given_state.check_values(found, self._config, layout)
        return found

    def _personal_state(self, header: Mapping[str, Any], given: dict[int, Progress] | None) -> bytes:
        if given is not None:
            if header.get("new_pass"):
                given = private_state.at_new_pass(given, self._data.train(), self._config.batch_size)
            self._progress = given
        asked = header.get("round")  # one that was interrupted has not happened
        latest = max((r for r in self._progress if asked is None or r < asked), default=-1)
        return private_state.pack({latest: self._progress.get(latest, Progress())})
