"""LocalPeer: does a participant's work on a LocalModel when it is asked to, and answers in bytes.

Knows local training and evaluation, its participant's data, and the messages. Knows nothing of other participants or of
what becomes of its update. It leaves the model as it found it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any, TypeVar

from torch import Tensor

from llmchain_fed.chain import LLMChain, find_chain
from llmchain_fed.data import EncodedExamples, Example, Prompt, encode_examples, is_ready_tensors, read_examples
from llmchain_fed.errors import ConfigError, DataError, FederationError, LLMChainFedError, UnsupportedModelError
from llmchain_fed.evaluation import evaluate_locally
from llmchain_fed.face import LocalFace
from llmchain_fed.federated import wire
from llmchain_fed.federated.participant import Participant
from llmchain_fed.federated.runtime import Operation
from llmchain_fed.federated.update import Update
from llmchain_fed.model import LocalModel
from llmchain_fed.training import TrainingConfig, encoded, train_locally

_T = TypeVar("_T")


@dataclass(frozen=True)
class Trainee:
    """What is trained: a LocalModel, and the chain that renders its prompts, if there is one."""

    model: LocalModel
    chain: LLMChain | None = None

    @property
    def prompt(self) -> Prompt | None:
        """What renders inputs to text."""
        return self.chain

    @classmethod
    def of(cls, given: Any) -> Trainee:
        """Finds the model in a chain (also a wrapped one), an LLM, a LocalModel or a bare module.

        Raises:
            UnsupportedModelError: None of these.
        """
        if isinstance(given, LocalModel):
            return cls(given)
        if isinstance(given, LocalFace):
            return cls(given.model)
        chain = find_chain(given)
        if chain is not None:
            return cls(chain.model, chain)
        if hasattr(given, "named_parameters"):
            return cls(LocalModel(given))
        msg = (
            f"cannot train {type(given).__name__}: pass an LLMChain (or prompt | LocalLLM), a "
            "LocalLLM, a LocalModel or a "
            "torch module."
        )
        raise UnsupportedModelError(msg)

    def answer(self, examples: list[Example], max_new_tokens: int) -> list[tuple[str, str]]:
        """(prompt, answer) per example; generated without callbacks, so that examples reach no tracer."""
        texts = [self.text(e) for e in examples]
        if self.chain is None:
            return list(zip(texts, self.model.generate(texts, max_new_tokens=max_new_tokens), strict=True))
        options = self.chain.generation_options()
        options["max_new_tokens"] = min(options["max_new_tokens"], max_new_tokens)
        special = self.chain.adds_special_tokens
        return list(zip(texts, self.model.generate(texts, add_special_tokens=special, **options), strict=True))

    def text(self, example: Example) -> str:
        """The prompt the model sees for this example."""
        if example.prompt is not None or self.chain is None:
            return str(example.prompt)
        return self.chain.render(example.inputs or {})

    def contract(self) -> dict[str, Any]:
        """What all sides of a federation must share, as digests."""
        layout = {n: (str(p.dtype), tuple(p.shape)) for n, p in sorted(self.model.trainable_parameters().items())}
        prompt = self.chain.prompt_identity() if self.chain is not None else None
        return {
            "base": self.model.fingerprint(),
            "adapter": hashlib.sha256(repr(layout).encode()).hexdigest(),
            "prompt": hashlib.sha256(repr(prompt).encode()).hexdigest(),
            "version": version("llmchain-fed"),
        }


@dataclass
class _Progress:
    """Where a participant stands after a round; an interrupted round leaves the former one in force."""

    next_step: int = 0
    optimizer_state: dict[str, Any] | None = field(default=None, repr=False)


class LocalPeer:
    """One participant, its data and its private state, on a model of this process.

    Args:
        trainee: What to train.
        participant: Whose examples.
        config: How to train; the participant's own options go first.
    """

    def __init__(self, trainee: Trainee, participant: Participant, config: TrainingConfig) -> None:
        self._trainee = trainee
        self._name = participant.name
        self._participant = participant
        self._config = _own_config(config, participant)
        self._data: Any = None
        self._held_out: Any = None
        self._held_out_examples: list[Example] = []
        self._progress: dict[int, _Progress] = {-1: _Progress()}

    def handle(self, op: Operation, payload: bytes) -> bytes:
        """Answers `hello`, `train` or `evaluate`.

        Raises:
            FederationError: Another operation.
            LLMChainFedError: What the work itself raises.
        """
        match op:
            case "hello":
                return self._hello()
            case "train":
                header, state = self._read(payload)
                with self._state(state):
                    return self._train(header["round"])
            case "evaluate":
                header, state = self._read(payload)
                with self._state(state):
                    return self._evaluate(header)
        msg = f"unknown operation {op!r}; a peer answers hello, train and evaluate."
        raise FederationError(msg)

    def take(self, participant: Participant) -> None:
        """Other examples for the next rounds; where it stands (optimizer, position) is kept."""
        if participant.examples is not self._participant.examples:
            self._participant, self._data = replace(self._participant, examples=participant.examples), None

    def _hello(self) -> bytes:
        data = self._encoded()
        answer: dict[str, Any] = {
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
        return json.dumps(answer).encode()

    def _train(self, round_number: int) -> bytes:
        progress = self._progress[max(r for r in self._progress if r < round_number)]
        result = train_locally(
            self._trainee.model,
            self._encoded(),
            self._config,
            participant=self._name,
            round=round_number,
            first_step=progress.next_step,
            optimizer_state=progress.optimizer_state,
        )
        kept = {r: p for r, p in self._progress.items() if p is progress}
        self._progress = kept | {round_number: _Progress(result.next_step, result.optimizer_state)}
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
        chosen = self._first_usable(header.get("samples", 0))
        if chosen:
            try:
                pairs = self._trainee.answer(chosen, header["sample_tokens"])
            except LLMChainFedError as error:  # the loss is worth having without them
                answer["samples_error"] = str(error)
                pairs = []
            answer["samples"] = [
                {"prompt": p, "reference": e.completion, "answer": a} for e, (p, a) in zip(chosen, pairs, strict=False)
            ]
        return json.dumps(answer).encode()

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
    def _state(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        """The broadcast weights inside, and the former ones back afterwards, whatever happens."""
        model = self._trainee.model
        with model.exclusive():
            former = model.trainable_state()
            try:
                model.load_state(state)
                yield
            finally:
                model.load_state(former)


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
