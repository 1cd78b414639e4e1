"""ClientWork: a participant's training and measuring on a LocalModel of this process.

Knows local training and evaluation, its participant's data and private state, and the messages' headers. Knows nothing
of what may be asked, or of how messages come. It leaves the model as it found it, but for the personal adapters.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from llmchain_fed.errors import DeadlineError, LLMChainFedError
from llmchain_fed.federated.client import personalization
from llmchain_fed.federated.client.data import LocalData
from llmchain_fed.federated.client.limits import Counted, Limits, counted, refuse
from llmchain_fed.federated.client.own_options import own_config, own_scaling
from llmchain_fed.federated.client.personalization import loaded
from llmchain_fed.federated.client.state import Progress
from llmchain_fed.federated.options import Ditto
from llmchain_fed.federated.participant import Participant
from llmchain_fed.federated.protocol.finiteness import told
from llmchain_fed.federated.protocol.global_state import GlobalState
from llmchain_fed.federated.target import Target
from llmchain_fed.training.evaluation import evaluate_locally
from llmchain_fed.training.loop import TrainingConfig, TrainingResult, train_locally
from llmchain_fed.updates.aggregation.base import selected
from llmchain_fed.updates.codecs import make_codec
from llmchain_fed.updates.codecs.error_feedback import encode_with_feedback
from llmchain_fed.updates.update import Update


class ClientWork:
    """The part of `Client` that trains and measures.

    Args:
        trainee: What to train.
        participant: Whose examples.
        config: How to train; the participant's own options go first.
        samples: Held-out examples that may leave with the chain's answers, at most; None is as many as are asked for.

    Raises:
        ConfigError: The participant's own options are not valid.
    """

    def __init__(
        self, target: Target, participant: Participant, config: TrainingConfig, *, samples: int | None
    ) -> None:
        self._target, self._model = target, target.model
        self._participant, self._name = participant, participant.name
        self._samples = samples
        self._config = own_config(config, participant)
        self._data = LocalData(target, participant, self._config)
        self._scaling = own_scaling(target, participant)
        self._limits: Limits | None = None
        self._given_up = threading.Event()
        self._shown = False
        self._kept: set[str] = set()
        """names of tensors that a hub let this participant keep, in whatever federation since this peer was made"""
        self._progress: dict[int, Progress] = {-1: Progress()}

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
        return personalization.with_remainder(own, state.remainder, self._scaling or self._model.lora_scaling())

    def _add_adapter(self, values: Mapping[str, Tensor]) -> None:
        self._model.add_adapter(self._name, values, scaling=self._scaling)
        self._shown = True

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
            pulled = personalization.train_ditto(
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
        self._kept |= private.keys()
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
        data = counted(self._data.train(), self._limits)
        with loaded(model, state, progress.private), ExitStack() as inside:
            if header.get("trains", "all") != "all":
                names = model.trainable_parameters().keys()
                inside.enter_context(model.freezing(names - set(selected(names, header["trains"]))))
            result = train_locally(
                model,
                data,
                self._config,
                optimizer_state=progress.optimizer_state,
                before_step=check,
                **place,
            )
            if isinstance(data, Counted) and self._limits is not None:
                data.check(self._limits)
            return model.trainable_state(), result

    def _try(self, header: Mapping[str, Any], state: GlobalState) -> dict[str, Any]:
        """Training that ends in no update: it counts as training where a policy counts, and ends when that would."""
        place = {"participant": self._name, "round": header["round"]}
        check = self._watch(header.get("seconds"))
        if "curve" in header:
            steps = header["curve"]
            config = personalization.steps_config(self._config, max(1, *steps), header.get("lr")).replace(max_steps=1)
            curve = personalization.adaptation_curve(
                self._model, state, self._data, config, steps, before_step=check, **place
            )
            return {"curve": curve}
        if "personal" in header:
            return self._fine_tune(header, state)
        return self._time_step(state, place | {"before_step": check})

    def _fine_tune(self, header: Mapping[str, Any], state: GlobalState) -> dict[str, Any]:
        """Makes a personal model from the global one, and says what that did to the held-out loss."""
        asked, number = header["personal"], header["round"]
        config = personalization.steps_config(self._config, asked["steps"], asked.get("lr"))
        place = {"participant": self._name, "round": number, "before_step": self._watch(header.get("seconds"))}
        values, result = personalization.fine_tune(self._model, state, self._data.train(), config, **place)
        at = max((r for r in self._progress if r < number), default=-1)
        progress = replace(self._latest(number), personal=values)
        answer: dict[str, Any] = {"train_loss": result.loss, "steps": result.steps, "seconds": result.seconds}
        if self._data.holds_out:
            answer["losses"] = self._side_by_side(state, progress)
        self._progress = self._progress | {at: progress}
        return answer

    def _watch(self, seconds: float | None) -> Callable[[], None]:
        """What ends, before a step, a training whose result nobody waits for any more, or that the limits end."""
        started, limits, steps = time.monotonic(), self._limits, itertools.count(1)

        def check() -> None:
            spent = time.monotonic() - started
            if self._given_up.is_set() or (seconds is not None and spent > seconds):
                msg = f"{self._name!r} was not done in time ({spent:.1f} s): nobody waits any more."
                raise DeadlineError(msg)
            if limits is not None:
                limits.check_steps(next(steps))
                if spent > limits.max_seconds:
                    refuse("max_seconds", f"training takes more than the {limits.max_seconds:g} s that are allowed")

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
        return personalization.side_by_side(self._model, state, name, self._data, self._config)

    def _time_step(self, state: GlobalState, place: Mapping[str, Any]) -> dict[str, Any]:
        """Seconds of one optimizer step, the second of two, and how many a round has."""
        data = self._data.train()
        times = []
        with loaded(self._model, state):
            for _ in range(2):
                config = personalization.steps_config(self._config, 1, None)
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
            pairs = self._target.answer(chosen, header["sample_tokens"])
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
