"""Client: one participant, which answers what a server asks of it, in bytes.

Knows messages, what its participant lets be asked, and where it stands. Knows nothing of other participants or of what
becomes of its update. What it is sent is checked before a value of it is used; what an operation does stands in
`operations`.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from llmchain_fed.data.split import Split
from llmchain_fed.errors import DeadlineError, FederationError
from llmchain_fed.federated.client import personalization
from llmchain_fed.federated.client.data import LocalData
from llmchain_fed.federated.client.global_state_cache import GlobalStateCache
from llmchain_fed.federated.client.joining import own_config, own_scaling
from llmchain_fed.federated.client.limits import Limits, refuse
from llmchain_fed.federated.client.operations import TaskType, task_type
from llmchain_fed.federated.client.state import ProgressByRound
from llmchain_fed.federated.participant import Participant, hold_out
from llmchain_fed.federated.protocol import messages
from llmchain_fed.federated.protocol.answers import TaskAnswer
from llmchain_fed.federated.protocol.expected import Layout
from llmchain_fed.federated.protocol.global_state import STALE, GlobalState
from llmchain_fed.federated.protocol.tasks import HelloTask, StateTask, StopTask, Task, TensorTask
from llmchain_fed.federated.target import Target
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.training.batch_sampler import BatchSampler
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.training.evaluation import EvaluationResult, evaluate_as
from llmchain_fed.training.gradient_step import GradientStep
from llmchain_fed.training.metrics import Function
from llmchain_fed.untrusted import decoding
from llmchain_fed.updates import serialization
from llmchain_fed.updates.transforms import checked_transforms
from llmchain_fed.updates.transforms.base import UpdateTransform


class Client:
    """One participant, its data and its private state, on a model of this process.

    Args:
        config: How to train; the participant's own options go first. None: as the hub says in its hello.
        global_states: What this process's participants have been sent; None makes one for this participant alone.
        transforms: What happens to an update before it is sent, one after the other.
        gradient_step: It makes a gradient of each batch, in any training; None is `mean_loss_gradient`.
        batch_sampler: It draws the batches, likewise; None is `length_buckets`, or the DataLoader itself.
        progress: Whether a bar on stderr shows how far its examples are read.
        metrics: Name → function of those that are its own, beside the built-in names.

    Raises:
        ConfigError: The participant's own options, or the transforms, are not valid.
    """

    def __init__(
        self,
        target: Target,
        participant: Participant,
        config: TrainingConfig | None,
        *,
        global_states: GlobalStateCache | None = None,
        transforms: Sequence[UpdateTransform] = (),
        gradient_step: GradientStep | None = None,
        batch_sampler: BatchSampler | None = None,
        progress: bool = False,
        metrics: Mapping[str, Function] | None = None,
    ) -> None:
        self.target, self.model = target.of_participant(participant), target.model
        if isinstance(participant.held_out, Split):
            participant = hold_out(participant, participant.held_out, self.target.prompt, seed=0)
        self.participant, self.name = participant, participant.name
        self.follows = config is None
        """whether a hub says how it trains"""
        self.config = own_config(config or TrainingConfig(), participant)
        """how it trains, its own options included"""
        self.data: LocalData = LocalData(self.target, participant, self.config, progress=progress)
        self.scaling = own_scaling(target, participant)
        """layer → s, where its LoRA rank is its own"""
        self.transforms = checked_transforms(transforms)
        self.gradient_step, self.batch_sampler = gradient_step, batch_sampler
        self.metrics = dict(metrics or {})
        self.tell_step: Callable[[str, int, int | None], object] | None = None
        """is told, after each optimizer step of a round, whose it is, how many are done and of how many"""
        self.limits: Limits | None = None
        self.global_states = global_states or GlobalStateCache(target.model, most=Limits().max_states)
        self.progress = ProgressByRound()
        self.kept: set[str] = set()
        """names of tensors that a server let it keep for itself, in whatever federation since this client was made"""
        self.federation: str | None = None
        self.aggregation: str | None = None
        """the rule's name, as the hub says"""
        self.shown = False
        """whether its personal model is an adapter of the model by this client's doing"""
        self._given_up = threading.Event()
        self._evaluations, self._counting = 0, threading.Lock()

    def handle(self, op: str, payload: bytes) -> bytes:
        """Answers one operation, whose task is in the payload.

        `hello` compares contracts and says what the participant has; `train`, `evaluate` and others work on the global
        state in the payload; `personal_state` gives back, or takes, where the participant stands; `stop` forgets the
        federation. What is refused has changed nothing of all this.

        Raises:
            FederationError: Another operation, one before `hello` told a peer in its own process how to train, or a
                message that is not what a hub sends.
            ContractError: The hub stands on another base, adapter, prompt or version.
            PolicyError: The limits do not allow it, or it asks for what is private.
            DeadlineError: The round's time is over before the training is.
            LLMChainFedError: What the work itself raises.
        """
        kind = task_type(op)
        if self.follows and self.federation is None and kind.task not in (HelloTask, StopTask):
            msg = f"{self.name!r} has not been told yet how to train (it has restarted, perhaps): hello comes first."
            raise FederationError(msg)
        if not issubclass(kind.task, TensorTask):
            return _told(self._plain(kind, payload))
        what = f"the {op} message"
        header, layout = self._admitted(kind, kind.task, payload)
        task = header.task
        if not isinstance(task, StateTask):
            with decoding(what, FederationError):
                return _told(kind.work(self, task, layout, serialization.values(payload, header.infos)))
        with self.model.exclusive(), decoding(what, FederationError):
            tensors = serialization.values(payload, header.infos)
            del payload  # of full weights, a copy less while they are trained
            state = self.global_states.receive(header.state, tensors)
        if state is None:
            return STALE
        del tensors
        self._spend(task)
        with self._at_own_rank():
            return _told(kind.work(self, task, state))

    def _plain(self, kind: TaskType, payload: bytes) -> TaskAnswer | bytes:
        """The work of a task without tensors."""
        task: Task
        if kind.task is HelloTask:
            task = messages.read_hello(payload, self.name, self.target.contract())
        else:
            task = messages.read(kind.task, payload)
        self._spend(task)
        answer: TaskAnswer | bytes = kind.work(self, task)
        return answer

    def _admitted(self, kind: TaskType, of: type[TensorTask], payload: bytes) -> tuple[messages.Header, Layout]:
        """What a message says, if it may be asked; no value of its tensors has been read then."""
        with decoding(f"the {of.operation} message", FederationError):
            layout = Layout.of(self.model, self.participant.rank, self.scaling)
            header = messages.read_header(of, payload, layout.max_header)
            task = header.task
            if isinstance(task, StateTask):
                layout.check(header.state, header.infos)
        if isinstance(task, StateTask) and task.base != self.model.fingerprint():
            msg = (
                f"the {of.operation} message is about another base than this one, or about this one before it was "
                "changed."
            )
            raise FederationError(msg)
        if kind.check is not None:
            kind.check(self, task, layout, header.infos)
        self._spend(task, count=False)
        return header, layout

    def obey(self, limits: Limits) -> None:
        """Lets nothing be asked that these limits do not allow, from now on."""
        self.limits = limits
        self.global_states.most = limits.max_states

    def give_up(self) -> None:
        """Ends the work that runs in another thread at its next step: nobody waits for its result any more."""
        self._given_up.set()

    def take_up(self) -> None:
        """Lets work that comes from now on run to its end again."""
        self._given_up.clear()

    def show_adapter(self, completed: int) -> None:
        """Makes the personal model, if there is one, an adapter of this process's model, by the participant's name.

        An interrupted round is none of those that are completed: it has not happened.
        """
        _, progress = self.progress.before(completed + 1)
        if progress.has_own:
            personalization.add_adapter(self, personalization.own_model(self, progress, GlobalState.of(self.model)))
        elif self.name in self.model.adapters[1:] and self.shown:
            self.model.remove_adapter(self.name)  # of a round that was taken back

    def place(self, task: StateTask) -> dict[str, Any]:
        """What `train_locally` is told of a training that a task asks for, beside data and options."""
        return {
            "participant": self.name,
            "round": task.index,
            "before_step": self.watch(task.seconds),
            "gradient_step": self.gradient_step,
            "batch_sampler": self.batch_sampler,
            "prompt": self.target.prompt,
        }

    def after_step(self) -> Callable[[int, int | None], object] | None:
        """What is called after each step of a round's training; None where nobody is told."""
        return partial(self.tell_step, self.name) if self.tell_step is not None else None

    def measure(self, model: LocalModel) -> EvaluationResult:
        """The held-out loss of a model in which its weights are loaded."""
        return evaluate_as(self.config, model, self.data.held_out(), self.target.prompt)

    def told_of(self, error: BaseException) -> str:
        """What of an error may stand in an answer: its type alone where there are limits: it can quote examples."""
        return type(error).__name__ if self.limits is not None else f"{type(error).__name__}: {error!s:.300}"

    def watch(self, seconds: float | None) -> Callable[[], None]:
        """What ends, before a step, a training whose result nobody waits for any more, or that the limits end."""
        steps, check_time = itertools.count(1), self.time_limit(seconds, "training")

        def check() -> None:
            check_time()
            if self.limits is not None:
                self.limits.check_steps(next(steps))

        return check

    def time_limit(self, seconds: float | None, what: str) -> Callable[[], None]:
        """What ends work, between two parts of it, that has no one waiting any more, or takes longer than is allowed.

        Raises:
            DeadlineError: Nobody waits any more.
            PolicyError: It takes longer.
        """
        started, limits = time.monotonic(), self.limits

        def check() -> None:
            spent = time.monotonic() - started
            if self._given_up.is_set() or (seconds is not None and spent > seconds):
                msg = f"{self.name!r} was not done in time ({spent:.1f} s): nobody waits any more."
                raise DeadlineError(msg)
            if limits is not None and spent > limits.max_seconds:
                refuse("max_seconds", f"{what} takes more than the {limits.max_seconds:g} s that are allowed")

        return check

    def _spend(self, task: Task, *, count: bool = True) -> None:
        """Counts what a task measures, which nothing a hub sends takes back."""
        measurements = task.losses(held_out=self.data.holds_out)
        with self._counting:
            spent = self._evaluations + measurements
            if measurements and self.limits is not None and spent > self.limits.max_evaluations:
                refuse(
                    "max_evaluations",
                    f"{measurements:,} more held-out losses are asked for after {self._evaluations:,}, at most "
                    f"{self.limits.max_evaluations:,} are allowed until this peer is started again",
                )
            self._evaluations += measurements * count

    @contextmanager
    def _at_own_rank(self) -> Iterator[None]:
        if self.participant.rank is None:
            yield
            return
        assert self.scaling is not None
        with self.model.resized(self.participant.rank, self.scaling):
            yield


def _told(answer: TaskAnswer | bytes) -> bytes:
    return messages.write_answer(answer) if isinstance(answer, TaskAnswer) else answer
