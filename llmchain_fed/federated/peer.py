"""LocalPeer: does a participant's work on a LocalModel when it is asked to, and answers in bytes.

Knows local training and evaluation, its participant's data and private state, and the messages. Knows nothing of other
participants or of what becomes of its update. It leaves the model as it found it, but for the personal adapters.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from llmchain_fed.data import EncodedExamples
from llmchain_fed.errors import ConfigError, DeadlineError, FederationError, LLMChainFedError
from llmchain_fed.evaluation import evaluate_locally
from llmchain_fed.federated import personal, private_state, wire
from llmchain_fed.federated.codecs import make_codec
from llmchain_fed.federated.feedback import encode_with_feedback
from llmchain_fed.federated.finiteness import spelled, told
from llmchain_fed.federated.global_state import GlobalState
from llmchain_fed.federated.held import STALE, Held
from llmchain_fed.federated.local_data import LocalData
from llmchain_fed.federated.participant import Participant
from llmchain_fed.federated.personal import Ditto, loaded
from llmchain_fed.federated.private_state import Progress
from llmchain_fed.federated.rule import LoraLayout, selected
from llmchain_fed.federated.runtime import OPERATIONS, Operation
from llmchain_fed.federated.trainee import Trainee, check_contract
from llmchain_fed.federated.update import Update
from llmchain_fed.training import TrainingConfig, TrainingResult, train_locally


class LocalPeer:
    """One participant, its data and its private state, on a model of this process.

    Args:
        trainee: What to train.
        participant: Whose examples.
        config: How to train; the participant's own options go first. None: as the hub says in its hello.
        samples: Held-out examples that may leave with the chain's answers, at most; None is as many as are asked for.
        held: What this process's participants have been sent; None makes one for this participant alone.

    Raises:
        ConfigError: The participant's own options are not valid.
    """

    def __init__(
        self,
        trainee: Trainee,
        participant: Participant,
        config: TrainingConfig | None,
        *,
        samples: int | None = None,
        held: Held | None = None,
    ) -> None:
        self._trainee, self._model = trainee, trainee.model
        self._participant, self._name = participant, participant.name
        self._told = config is None
        self._samples = samples
        self._config = _own_config(config or TrainingConfig(), participant)
        self._data = LocalData(trainee, participant, self._config)
        self._held = held or Held(trainee.model)
        self._scaling = _own_scaling(trainee, participant)
        self._federation: str | None = None
        self._given_up = threading.Event()
        self._shown = False
        self._progress: dict[int, Progress] = {-1: Progress()}

    def handle(self, op: Operation, payload: bytes) -> bytes:
        """Answers one operation.

        `hello` compares contracts and says what the participant holds; `train` and `evaluate` work on the global state
        in the payload; `personal_state` gives back, or takes, where the participant stands; `stop` forgets the
        federation.

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
            self._held.forget()
            return b"{}"
        if self._told and self._federation is None:
            msg = f"{self._name!r} has not been told yet how to train (it has restarted, perhaps): hello comes first."
            raise FederationError(msg)
        header, infos = wire.inspect(payload, max_bytes=len(payload))
        tensors = wire.values(payload, infos)
        del payload  # of full weights, a copy less while they are trained
        if op == "personal_state":
            return self._personal_state(header, tensors)
        with self._model.exclusive():
            state = self._held.receive(header, tensors)
        if state is None:
            return STALE
        del tensors
        with self._at_own_rank():
            if op == "evaluate":
                return json.dumps(spelled(self._evaluate(header, state))).encode()
            if any(what in header for what in ("personal", "curve", "time_step")):
                return json.dumps(spelled(self._try(header, state))).encode()
            return self._train(header, state)

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

    def show_adapter(self, completed: int) -> None:
        """Makes the personal model, if there is one, an adapter of this process's model, by the participant's name.

        Args:
            completed: Rounds that count; an interrupted one has not happened.
        """
        progress = self._latest(completed)
        if progress.has_own:
            self._add_adapter(self._own_model(progress, GlobalState.of(self._model)))
        elif self._name in self._model.adapters[1:] and self._shown:
            self._model.remove_adapter(self._name)  # of a round that was taken back

    def _own_model(self, progress: Progress, state: GlobalState) -> dict[str, Tensor]:
        """The personal model's factors as one adapter that needs no remainder beside it; there is one."""
        if progress.personal:
            return progress.personal
        own = {**state.values, **progress.private} if progress.private else progress.ditto
        return personal.with_remainder(own, state.remainder, self._scaling or self._model.lora_scaling())

    def _add_adapter(self, values: Mapping[str, Tensor]) -> None:
        self._model.add_adapter(self._name, values, scaling=self._scaling)
        self._shown = True

    def _hello(self, payload: bytes) -> bytes:
        asked = wire.read_json(payload)
        contract = self._trainee.contract()
        check_contract(contract, asked.get("contract"), f"the hub that {self._name!r} is asked by")
        if self._told:
            self._adopt(asked.get("training"))
        if self._federation not in (None, asked.get("federation")):
            self._progress = {-1: Progress()}  # another federation begins: nothing is carried over
        data = self._data.train()
        answer: dict[str, Any] = {
            "participant": self._name,
            "contract": contract,
            "held_out": self._data.holds_out,
            "holds": self._model.weights_hash,
            "rank": self._participant.rank,
            "alpha": self._participant.alpha,
            "options": hashlib.sha256(repr(self._config).encode()).hexdigest()[:16],
        }
        if isinstance(data, EncodedExamples):
            answer |= {
                "num_examples": len(data),
                "num_tokens": data.report.completion_tokens,
                "report": asdict(data.report),
            }
        held_out = self._data.held_out() if self._data.holds_out else None
        if isinstance(held_out, EncodedExamples):  # by which its held-out loss counts
            answer["held_out_examples"], answer["held_out_tokens"] = len(held_out), held_out.report.completion_tokens
        if (found := self._data.overlap()) is not None:
            answer["overlap"] = found.to_plain()
        self._federation = str(asked.get("federation"))
        return json.dumps(answer).encode()

    def _adopt(self, training: Any) -> None:
        """The federation's training options, the participant's own over them."""
        if not isinstance(training, dict):
            msg = f"the hub did not say how {self._name!r} should train."
            raise ConfigError(msg)
        self._config = _own_config(TrainingConfig(**training), self._participant)
        self._data.limit(self._config)

    def _personal_state(self, header: Mapping[str, Any], tensors: dict[str, Tensor]) -> bytes:
        if "progress" in header:
            self._progress = private_state.read(header["progress"], tensors)
            if header.get("new_pass"):
                data, size = self._data.train(), self._config.batch_size
                self._progress = private_state.at_new_pass(self._progress, data, size)
        asked = header.get("round")  # one that was interrupted has not happened
        latest = max((r for r in self._progress if not isinstance(asked, int) or r < asked), default=-1)
        return private_state.pack({latest: self._progress.get(latest, Progress())})

    # --- training ---------------------------------------------------------------------------------------------------

    def _train(self, header: Mapping[str, Any], state: GlobalState) -> bytes:
        number = header["round"]
        progress = self._latest(number)
        place = {"participant": self._name, "round": number, "first_step": progress.next_step}
        check = self._watch(header.get("seconds"))
        trained, result = self._trained(header, state, progress, place, check)
        shared = {n: trained[n] for n in selected(trained, header.get("shares", "all"))}
        private = {n: t for n, t in trained.items() if n not in shared} if progress.private or _keeps(header) else {}
        codec = make_codec(header.get("codec"))
        parts, residual = shared, progress.residual
        if codec is not None:
            delta = {n: t.float() - state.values[n].float() for n, t in shared.items()}
            carried = {n: residual[n] for n in shared if n in residual} if header.get("feedback") else None
            parts, _, left = encode_with_feedback(codec, delta, carried or None)
            residual = residual | left if header.get("feedback") else {}
        pulled, own = progress.ditto, progress.personal
        if "ditto" in header:
            ditto, data = Ditto(**header["ditto"]), self._data.train()
            pulled = personal.train_ditto(
                self._model, state, pulled, ditto, data, self._config, before_step=check, **place
            )
            own = {}  # an adapter made before this round is older than this one
        update = Update(
            participant=self._name,
            round=number,
            base=self._model.fingerprint(),
            tensors=parts,
            num_examples=result.examples,
            num_tokens=result.tokens,
            metrics={"train_loss": result.loss, "steps": result.steps, "seconds": result.seconds},
            codec=codec.name if codec is not None else None,
        )
        answer = update.to_bytes()
        kept = {r: p for r, p in self._progress.items() if p is progress}
        now = Progress(result.next_step, result.optimizer_state, residual, private, pulled, own)
        self._progress = kept | {number: now}
        return answer

    def _trained(
        self,
        header: Mapping[str, Any],
        state: GlobalState,
        progress: Progress,
        place: Mapping[str, Any],
        check: Callable[[], None],
    ) -> tuple[dict[str, Tensor], TrainingResult]:
        """What local training makes of the tensors that are trained in this round."""
        model = self._model
        with loaded(model, state, progress.private), ExitStack() as inside:
            if header.get("trains", "all") != "all":
                names = model.trainable_parameters().keys()
                inside.enter_context(model.freezing(names - set(selected(names, header["trains"]))))
            result = train_locally(
                model,
                self._data.train(),
                self._config,
                optimizer_state=progress.optimizer_state,
                before_step=check,
                **place,
            )
            return model.trainable_state(), result

    def _try(self, header: Mapping[str, Any], state: GlobalState) -> dict[str, Any]:
        """Training that ends in no update: it counts as training where a policy counts, and ends when that would."""
        place = {"participant": self._name, "round": header["round"]}
        check = self._watch(header.get("seconds"))
        if "curve" in header:
            steps = header["curve"]
            config = personal.steps_config(self._config, max(1, *steps), header.get("lr")).replace(max_steps=1)
            curve = personal.adaptation_curve(self._model, state, self._data, config, steps, before_step=check, **place)
            return {"curve": curve}
        return self._fine_tune(header, state) if "personal" in header else self._time_step(state, place)

    def _fine_tune(self, header: Mapping[str, Any], state: GlobalState) -> dict[str, Any]:
        """Makes a personal model from the global one, and says what that did to the held-out loss."""
        asked, number = header["personal"], header["round"]
        config = personal.steps_config(self._config, asked["steps"], asked.get("lr"))
        place = {"participant": self._name, "round": number, "before_step": self._watch(header.get("seconds"))}
        values, result = personal.fine_tune(self._model, state, self._data.train(), config, **place)
        at = max((r for r in self._progress if r < number), default=-1)
        self._progress = self._progress | {at: replace(self._latest(number), personal=values)}
        answer: dict[str, Any] = {"train_loss": result.loss, "steps": result.steps, "seconds": result.seconds}
        if self._data.holds_out:
            answer["losses"] = self._side_by_side(state, self._progress[at])
        return answer

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

    def _latest(self, before: int | None = None) -> Progress:
        """Where it stands before a round: an interrupted or repeated one has not happened."""
        at = max((r for r in self._progress if before is None or r < before), default=None)
        return self._progress[at] if at is not None else Progress()  # rolled back beyond what is kept: from the start

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self, header: Mapping[str, Any], state: GlobalState) -> dict[str, Any]:
        progress = self._latest(header.get("round"))
        if header.get("side_by_side"):
            return self._side_by_side(state, progress)
        with loaded(self._model, state, progress.private):
            result = evaluate_locally(self._model, self._data.held_out(), precision=self._config.precision)
            answer: dict[str, Any] = told(result.loss) | {"tokens": result.tokens, "examples": result.examples}
            self._add_samples(answer, header)
        return answer

    def _side_by_side(self, state: GlobalState, progress: Progress) -> dict[str, float]:
        if progress.has_own:
            self._add_adapter(self._own_model(progress, state))
        name = self._name if progress.has_own else None
        return personal.side_by_side(self._model, state, name, self._data, self._config)

    def _time_step(self, state: GlobalState, place: Mapping[str, Any]) -> dict[str, Any]:
        """Seconds of one optimizer step, the second of two, and how many a round has."""
        data = self._data.train()
        times = []
        with loaded(self._model, state):
            for _ in range(2):
                config = personal.steps_config(self._config, 1, None)
                times.append(train_locally(self._model, data, config, **place).seconds)
        per_pass = -(-len(data) // self._config.batch_size) if hasattr(data, "__len__") else 0
        return {"seconds": times[-1], "steps": self._config.max_steps or per_pass * (self._config.epochs or 1)}

    def _add_samples(self, answer: dict[str, Any], header: Mapping[str, Any]) -> None:
        """As many held-out examples with the chain's answers as are wanted and may leave."""
        wanted = header.get("samples", 0)
        allowed = wanted if self._samples is None else min(wanted, self._samples)
        if wanted and not allowed:
            answer["samples_error"] = "the site's policy lets no samples leave"
        chosen = self._data.first_held_out(allowed)
        if not chosen:
            return
        try:
            pairs = self._trainee.answer(chosen, header["sample_tokens"])
        except LLMChainFedError as error:  # the loss is worth having without them
            answer["samples_error"] = str(error) if self._samples is None else type(error).__name__
            pairs = []
        answer["samples"] = [
            {"prompt": p, "reference": e.completion, "answer": a} for e, (p, a) in zip(chosen, pairs, strict=False)
        ]

    @contextmanager
    def _at_own_rank(self) -> Iterator[None]:
        if self._participant.rank is None:
            yield
            return
        assert self._scaling is not None
        with self._model.resized(self._participant.rank, self._scaling):
            yield


def _keeps(header: Mapping[str, Any]) -> bool:
    """Whether what is trained and not shared belongs to the participant."""
    return bool(header.get("trains", "all") == "all" and header.get("shares", "all") != "all")


def _own_scaling(trainee: Trainee, participant: Participant) -> dict[str, float] | None:
    """Layer → s of a participant whose LoRA rank is its own.

    Raises:
        ConfigError: The model has no LoRA adapter, or a smaller one.
    """
    if participant.rank is None:
        return None
    layout = LoraLayout.of(trainee.model)
    if layout is None or layout.refused or layout.rank is None or participant.rank > layout.rank:
        have = "no plain LoRA adapter" if layout is None or layout.refused else f"rank {layout.rank}"
        msg = (
            f"participant {participant.name!r} wants rank {participant.rank}, and the model has {have}. A "
            "participant's rank is at most the adapter's: give the chain the largest one."
        )
        raise ConfigError(msg)
    return layout.scaling_at(participant.rank, participant.alpha)


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
