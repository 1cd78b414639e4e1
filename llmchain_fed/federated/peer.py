"""LocalPeer: does a participant's work on a LocalModel when it is asked to, and answers in bytes.

Knows local training and evaluation, its participant's data, and the messages. Knows nothing of other participants or of
what becomes of its update. It leaves the model as it found it.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, TypeVar

from torch import Tensor

from llmchain_fed.data import EncodedExamples, Example, encode_examples, is_ready_tensors, read_examples
from llmchain_fed.errors import ConfigError, DataError, DeadlineError, FederationError, LLMChainFedError
from llmchain_fed.evaluation import evaluate_locally
from llmchain_fed.federated import private_state, wire
from llmchain_fed.federated.participant import Participant
from llmchain_fed.federated.private_state import Progress
from llmchain_fed.federated.runtime import OPERATIONS, Operation
from llmchain_fed.federated.trainee import Trainee
from llmchain_fed.federated.update import Update
from llmchain_fed.training import TrainingConfig, encoded, train_locally

_T = TypeVar("_T")


class LocalPeer:
    """One participant, its data and its private state, on a model of this process.

    Args:
        trainee: What to train.
        participant: Whose examples.
        config: How to train; the participant's own options go first. None: as the hub says in its hello.
        samples: Held-out examples that may leave with the chain's answers, at most; None is as many as are asked for.

    Raises:
        ConfigError: The participant's own options are not valid.
    """

    def __init__(
        self, trainee: Trainee, participant: Participant, config: TrainingConfig | None, *, samples: int | None = None
    ) -> None:
        self._trainee = trainee
        self._name = participant.name
        self._participant = participant
        self._told = config is None
        self._samples = samples
        self._config = _own_config(config or TrainingConfig(), participant)
        self._federation: str | None = None
        self._given_up = threading.Event()
        self._data: Any = None
        self._held_out: Any = None
        self._held_out_examples: list[Example] = []
        self._progress: dict[int, Progress] = {-1: Progress()}

    def handle(self, op: Operation, payload: bytes) -> bytes:
        """Answers one operation.

        `hello` compares contracts and says what the participant holds; `train` and `evaluate` work on the weights in
        the payload; `personal_state` gives back, or takes, where the participant stands; `stop` forgets the federation.

        Raises:
            FederationError: Another operation, or one before `hello` told a peer in its own process how to train.
            ContractError: The hub stands on another base, adapter, prompt or version.
            DeadlineError: The round's time is over before the training is.
            LLMChainFedError: What the work itself raises.
        """
        if op not in OPERATIONS:
            msg = f"unknown operation {op!r}; a peer answers {', '.join(OPERATIONS)}."
            raise FederationError(msg)
        if op == "hello":
            return self._hello(payload)
        if op == "stop":
            self._progress, self._federation = {-1: Progress()}, None
            return b"{}"
        if self._told and self._federation is None:
            msg = f"{self._name!r} has not been told yet how to train (it has restarted, perhaps): hello comes first."
            raise FederationError(msg)
        header, tensors = self._read(payload)
        del payload  # of full weights, a copy less while they are trained
        if op == "personal_state":
            return self._personal_state(header, tensors)
        with self._state(tensors):
            return self._train(header) if op == "train" else self._evaluate(header)

    def inspect(self) -> str:
        """What became of the examples, in a line; reads them.

        Raises:
            DataError: They cannot be used.
        """
        found = f"trains on {_report(self._encoded())}"
        if self._participant.held_out is not None:
            found += f", holds out {_report(self._encoded_held_out())}"
        return found

    def give_up(self) -> None:
        """Ends the work that runs in another thread at its next step: nobody waits for its result any more."""
        self._given_up.set()

    def take_up(self) -> None:
        """Lets work that comes from now on run to its end again."""
        self._given_up.clear()

    def take(self, participant: Participant) -> None:
        """Other examples for the next rounds; where it stands (optimizer, position) is kept."""
        if participant.examples is not self._participant.examples:
            self._participant, self._data = replace(self._participant, examples=participant.examples), None

    def _hello(self, payload: bytes) -> bytes:
        asked = wire.read_json(payload)
        self._trainee.check_contract(asked.get("contract"), f"the hub that {self._name!r} is asked by")
        if self._told:
            self._adopt(asked.get("training"))
        if self._federation not in (None, asked.get("federation")):
            self._progress = {-1: Progress()}  # another federation begins: nothing is carried over
        data = self._encoded()
        answer: dict[str, Any] = {
            "participant": self._name,
            "contract": self._trainee.contract(),
            "held_out": self._participant.held_out is not None,
        }
        if isinstance(data, EncodedExamples):
            answer |= {
                "num_examples": len(data),
                "num_tokens": data.report.completion_tokens,
                "report": asdict(data.report),
            }
        if self._participant.held_out is not None:
            self._encoded_held_out()
        self._federation = str(asked.get("federation"))
        return json.dumps(answer).encode()

    def _adopt(self, training: Any) -> None:
        """The federation's training options, the participant's own over them."""
        if not isinstance(training, dict):
            msg = f"the hub did not say how {self._name!r} should train."
            raise ConfigError(msg)
        config = _own_config(TrainingConfig(**training), self._participant)
        if config.max_length != self._config.max_length:
            self._data = self._held_out = None  # what is too long has changed
        self._config = config

    def _personal_state(self, header: Mapping[str, Any], tensors: dict[str, Tensor]) -> bytes:
        if "progress" in header:
            self._progress = private_state.read(header["progress"], tensors)
        return private_state.pack(self._progress)

    def _train(self, header: Mapping[str, Any]) -> bytes:
        round_number = header["round"]
        progress = self._progress[max(r for r in self._progress if r < round_number)]
        result = train_locally(
            self._trainee.model,
            self._encoded(),
            self._config,
            participant=self._name,
            round=round_number,
            first_step=progress.next_step,
            optimizer_state=progress.optimizer_state,
            before_step=self._watch(header.get("seconds")),
        )
        kept = {r: p for r, p in self._progress.items() if p is progress}
        self._progress = kept | {round_number: Progress(result.next_step, result.optimizer_state)}
        update = Update(
            participant=self._name,
            round=round_number,
            base=self._trainee.model.fingerprint(),
            tensors=self._trainee.model.trainable_state(),
            num_examples=result.examples,
            num_tokens=result.tokens,
            metrics={"train_loss": result.loss, "steps": result.steps, "seconds": result.seconds},
        )
        return update.to_bytes()

    def _evaluate(self, header: Mapping[str, Any]) -> bytes:
        held_out = self._encoded_held_out()
        result = evaluate_locally(self._trainee.model, held_out, precision=self._config.precision)
        answer: dict[str, Any] = {"loss": result.loss, "tokens": result.tokens, "examples": result.examples}
        wanted = header.get("samples", 0)
        allowed = wanted if self._samples is None else min(wanted, self._samples)
        if wanted and not allowed:
            answer["samples_error"] = "the site's policy lets no samples leave"
        chosen = self._first_usable(allowed)
        if chosen:
            try:
                pairs = self._trainee.answer(chosen, header["sample_tokens"])
            except LLMChainFedError as error:  # the loss is worth having without them
                answer["samples_error"] = str(error) if self._samples is None else type(error).__name__
                pairs = []
            answer["samples"] = [
                {"prompt": p, "reference": e.completion, "answer": a} for e, (p, a) in zip(chosen, pairs, strict=False)
            ]
        return json.dumps(answer).encode()

    def _watch(self, seconds: float | None) -> Callable[[], None]:
        """What ends a training whose result nobody waits for any more."""
        started = time.monotonic()

        def check() -> None:
            if self._given_up.is_set() or (seconds is not None and time.monotonic() - started > seconds):
                msg = (
                    f"{self._name!r} was not done in time ({time.monotonic() - started:.1f} s): nobody waits any more."
                )
                raise DeadlineError(msg)

        return check

    def _encoded(self) -> Any:
        if self._data is None:
            self._data = self._ready(self._participant.examples)
        return self._data

    def _encoded_held_out(self) -> Any:
        if self._held_out is None:
            held_out = self._participant.held_out
            if not is_ready_tensors(held_out):  # read once: it may be a generator
                held_out = self._held_out_examples = self._named(lambda: list(self._read_examples()))
            self._held_out = self._ready(held_out)
        return self._held_out

    def _read_examples(self) -> Iterator[Example]:
        return read_examples(self._participant.held_out, self._trainee.prompt)

    def _first_usable(self, count: int) -> list[Example]:
        """The first held-out examples that are neither empty nor too long."""
        model, prompt, longest = self._trainee.model, self._trainee.prompt, self._config.max_length
        usable = (e for e in self._held_out_examples if len(encode_examples([e], model, prompt, max_length=longest)))
        return list(itertools.islice(usable, count))

    def _ready(self, examples: Any) -> Any:
        config, trainee = self._config, self._trainee
        return self._named(lambda: encoded(examples, trainee.model, trainee.prompt, config.max_length))

    def _named(self, read: Callable[[], _T]) -> _T:
        """What `read` returns; what it raises says whose examples they are."""
        try:
            return read()
        except DataError as error:
            raise type(error)(f"participant {self._name!r}: {error}") from None  # noqa: EM102

    def _read(self, payload: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
        header, infos = wire.inspect(payload, max_bytes=len(payload))
        return header, wire.values(payload, infos)

    @contextmanager
    def _state(self, state: dict[str, Tensor]) -> Iterator[None]:
        """The broadcast weights inside, and the former ones back afterwards, whatever happens; empties `state`."""
        model = self._trainee.model
        with model.exclusive():
            former = model.trainable_state()
            try:
                model.load_state(state)
                state.clear()
                yield
            finally:
                model.load_state(former)


def _report(data: Any) -> str:
    return repr(data.report) if isinstance(data, EncodedExamples) else "a DataLoader"


def _own_config(config: TrainingConfig, participant: Participant) -> TrainingConfig:
    """The federation's configuration with the participant's own options over it."""
    if not participant.training:
        return config
    options = dict(participant.training)
    if options.get("max_steps") is not None:  # of two ways to end a round its own counts
        options.setdefault("epochs", None)
    elif options.get("epochs") is not None:
        options.setdefault("max_steps", None)
    try:
        own: TrainingConfig = config.replace(**options)
    except ConfigError as error:
        msg = f"participant {participant.name!r}: {error}"
        raise ConfigError(msg) from None
    return own
