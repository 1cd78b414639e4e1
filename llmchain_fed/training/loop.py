"""train_locally: the one training loop, for a participant of a federation and for plain fine-tuning alike.

Knows torch optimizers and batches. Knows nothing of LangChain, other participants or aggregation.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from llmchain_fed.data.encoding import IGNORE, Batch, EncodedExamples, controls_of, encoded, no_examples, unwrap
from llmchain_fed.data.examples import Examples
from llmchain_fed.data.prompt import Prompt
from llmchain_fed.data.report import DataReport
from llmchain_fed.errors import ConfigError, EmptyParticipantError, NonFiniteLossError
from llmchain_fed.model.generation.answers import seeded
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.model.weights import all_finite, write_state
from llmchain_fed.training import running_state, trainable
from llmchain_fed.training.batch_sampler import BatchSampler, Place, length_buckets, seed_of
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.training.gradient_checkpointing import check_checkpointing, checkpointing
from llmchain_fed.training.gradient_step import GradientStep, StepResult
from llmchain_fed.training.label_loss import LabelGradient
from llmchain_fed.training.loss import computing_in, examples_with_loss, summed_loss
from llmchain_fed.training.schedule import LearningRate, Schedule, batches_per_pass, steps_of


@dataclass
class TrainingResult:
    """What one call of `train_locally` did. The model has the trained weights."""

    loss: float
    """nats per completion token (per example with `loss="labels"`), mean over `losses`; 0 where there is none"""
    losses: list[float]
    """the same, per step that had examples"""
    examples: int
    """usable examples that the participant has (n_k)"""
    tokens: int
    """completion tokens that the participant has"""
    steps: int
    seconds: float
    next_step: int
    """where a run with `max_steps` goes on in the data"""
    report: DataReport
    optimizer_state: dict[str, Any] | None = field(default=None, repr=False)


def train_locally(
    model: LocalModel | Any,
    examples: Examples | EncodedExamples,
    config: TrainingConfig | None = None,
    *,
    prompt: Prompt | None = None,
    participant: str = "local",
    round: int = 0,  # noqa: A002 (the field's own word)
    rounds: int | None = None,
    first_step: int = 0,
    optimizer_state: dict[str, Any] | None = None,
    before_step: Callable[[], None] | None = None,
    after_step: Callable[[int, int | None], object] | None = None,
    anchor: Mapping[str, Tensor] | None = None,
    gradient_step: GradientStep | None = None,
    batch_sampler: BatchSampler | None = None,
) -> TrainingResult:
    """Fine-tunes the model's trainable weights in place on one participant's examples.

    The order of the data and dropout follow from (seed, participant, round): a rerun is bit-identical, and no two
    rounds repeat their batches. The loss of a batch is the mean over its completion tokens, prompts masked; what a
    module's own loss adds to that is not trained on. Parts frozen in evaluation mode that have running state (batch
    norms) stay in evaluation mode.

    Args:
        model: The LocalModel to train, or a chain over one; it is locked meanwhile and left in evaluation mode.
        examples: Any form that `read_examples` takes, ready `EncodedExamples`, or a DataLoader of ready tensors.
        config: The options of the training.
        prompt: It renders the examples' inputs; by default the chain does, where one is given.
        participant: Whose data this is, which the randomness follows from.
        round: The round, counted from 0, which the randomness follows from.
        rounds: How many rounds the federation has, over which a schedule of the learning rate runs; None: it runs over
            this call, whatever its round.
        first_step: How many batches earlier rounds have consumed; it counts with `max_steps` alone.
        optimizer_state: The state that the optimizer goes on from; None is a fresh optimizer.
        before_step: It is called before every optimizer step; what it raises ends the training, and the weights
            are as before the call.
        after_step: It is told after every optimizer step how many are done, and of how many; None where a DataLoader
            does not know its length.
        anchor: What `proximal_mu` pulls towards, by stable name; None is where the training began.
        gradient_step: It makes a gradient of each batch, whatever `config.loss` says; None is `mean_loss_gradient`, or
            `LabelGradient` for labels.
        batch_sampler: It draws the batches; None is `length_buckets`, or the DataLoader itself.

    Raises:
        ConfigError: A DataLoader and a `batch_sampler` are given; the learning rate has a schedule and a DataLoader
            does not know its length; or the module has no gradient checkpointing, and that is asked for.
        LabelError: With `loss="labels"`, a completion is no label, or the examples are a DataLoader.
        EmptyParticipantError: Not a single example is usable.
        NonFiniteLossError: The loss or a weight became NaN or infinite; the weights are as before the call.
        DataError: See `read_examples`.
        UnsayableError: More completions than `config.tolerance` could never be an answer.
        NotTrainableError: No parameter requires a gradient.
        UnsupportedModelError: Trained here, the module would not be what plain training makes of it, for a reason that
            the message names: tokens that see later ones, running statistics …
    """
    config = config or TrainingConfig()
    place = Place(participant, round, first_step)
    model, prompt = unwrap(model, prompt)
    check_checkpointing(model, config)
    still = trainable.admit(model)
    data = encoded(examples, model, prompt, config.max_length, tolerance=config.tolerance)
    if isinstance(data, EncodedExamples):
        trainable.check_batches(model, min(config.micro_batch_size or config.batch_size, len(data)))
    steps = steps_of(data, config)
    schedule = Schedule.of(config, steps, round, rounds)
    batches = _batches(data, config, place, batch_sampler)
    if config.loss == "labels" and gradient_step is None:
        gradient_step = LabelGradient.of(data, model, config, controls_of(prompt))
    parameters = model.trainable_parameters()
    with model.exclusive():
        started = time.perf_counter()
        before = {n: p.detach().clone() for n, p in parameters.items()}
        try:
            pulled_to = before if anchor is None else {n: anchor[n].to(before[n]) for n in before}
            optimizer = config.make_optimizer(list(parameters.values()))
            if optimizer_state is not None:
                # a copy, because torch keeps the tensors it is given and changes them
                optimizer.load_state_dict(copy.deepcopy(optimizer_state))
            step, pace = gradient_step or mean_loss_gradient, _Pace(optimizer, schedule, before_step, after_step, steps)
            done = _train(model, batches, config, place, optimizer, pulled_to, step, pace, still)
            report = data.report if isinstance(data, EncodedExamples) else _report(data, done, config, participant)
            return TrainingResult(
                loss=sum(done.losses) / len(done.losses) if done.losses else 0.0,
                losses=done.losses,
                examples=report.used,
                tokens=report.completion_tokens,
                steps=done.steps,
                seconds=time.perf_counter() - started,
                next_step=first_step + done.steps,
                report=report,
                optimizer_state=copy.deepcopy(optimizer.state_dict()) if config.keep_optimizer else None,
            )
        except BaseException:
            write_state(parameters, before)
            raise
        finally:
            model.module.eval()


@dataclass
class _Done:
    """What has come by in one call."""

    losses: list[float] = field(default_factory=list)
    steps: int = 0
    examples: int = 0
    tokens: int = 0

    def add(self, batch: Batch, result: StepResult) -> None:
        self.steps += 1
        self.examples, self.tokens = self.examples + result.examples, self.tokens + result.tokens
        if batch.rows is None or batch.rows:  # an empty batch has no loss
            self.losses.append(result.loss)


class _Pace:
    """What happens around each step: its learning rate, who may end the training, and who is told of it."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule | None,
        before: Callable[[], None] | None,
        after: Callable[[int, int | None], object] | None,
        steps: int | None,
    ) -> None:
        self._rate, self._before, self._after, self._steps = LearningRate(optimizer, schedule), before, after, steps

    def begins(self, step: int) -> None:
        if self._before is not None:
            self._before()
        self._rate.before(step)

    def ended(self, done: int) -> None:
        if self._after is not None:
            self._after(done, self._steps)

    def over(self) -> None:
        self._rate.restore()


def _train(
    model: LocalModel,
    batches: Iterator[Batch],
    config: TrainingConfig,
    place: Place,
    optimizer: torch.optim.Optimizer,
    anchor: Mapping[str, Tensor],
    gradient_step: GradientStep,
    pace: _Pace,
    still: list[str],
) -> _Done:
    parameters, done = model.trainable_parameters(), _Done()
    with (
        running_state.restored(model.module) as buffers,
        seeded(seed_of(config.seed, place.participant, place.round), model.device),
        computing_in(config.precision, model.module),
        checkpointing(model.module, wanted=config.gradient_checkpointing),
    ):
        model.module.train()
        running_state.keep_still(model.module, still)
        for batch in batches:
            pace.begins(done.steps)
            optimizer.zero_grad(set_to_none=True)
            result = gradient_step(model, batch, config)
            if not done.steps:  # what the trial at the door did not show
                running_state.check_unchanged(model.module, buffers)
            done.add(batch, result)
            if not math.isfinite(result.loss):
                msg = (
                    f"the loss of {place.participant!r} became {result.loss} at step {done.steps} of round "
                    f"{place.round + 1}, so its weights are worthless. Lower the learning rate or set max_grad_norm."
                )
                raise NonFiniteLossError(msg)
            if config.proximal_mu:
                # the gradient of mu/2 · ‖w − anchor‖²
                for name, parameter in parameters.items():
                    if parameter.grad is not None:
                        parameter.grad.add_(parameter.detach() - anchor[name], alpha=config.proximal_mu)
            if config.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
            optimizer.step()
            pace.ended(done.steps)
        pace.over()
        optimizer.zero_grad(set_to_none=True)
    spoilt = next((name for name, p in parameters.items() if not all_finite(p.detach())), None)
    if spoilt is not None:
        msg = (
            f"{spoilt} of {place.participant!r} is not finite at the end. Lower the learning rate or set max_grad_norm."
        )
        raise NonFiniteLossError(msg)
    return done


def mean_loss_gradient(model: LocalModel, batch: Batch, config: TrainingConfig, /) -> StepResult:
    """The gradient of the mean loss over all completion tokens of the batch, whatever forward passes it takes."""
    passes = batch.passes(model, config.micro_batch_size)
    total = sum(int((p["labels"] != IGNORE).sum()) for p in passes) if len(passes) > 1 else 0
    loss, tokens, examples = 0.0, 0, 0
    for one in passes:
        summed, count = summed_loss(model.module, one)
        if not count:
            continue
        mean = summed / (total or count)
        mean.backward()  # type: ignore[no-untyped-call]
        loss, tokens = loss + float(mean.detach()), tokens + count
        examples += examples_with_loss(model.module, one)
    return StepResult(loss, tokens, examples)


def _report(loader: Any, done: _Done, config: TrainingConfig, participant: str) -> DataReport:
    """What a DataLoader has for one pass, from what came by over how often it came by."""
    if not done.tokens:
        why = "the DataLoader's batches carry no label" if done.steps else "the DataLoader gave no batch"
        raise EmptyParticipantError(no_examples(participant, why))
    per_pass = batches_per_pass(loader)
    passes = done.steps / per_pass if per_pass else config.epochs or 1
    return DataReport(used=round(done.examples / passes), completion_tokens=round(done.tokens / passes))


# --- batches ----------------------------------------------------------------------------------------------------------


def _batches(
    data: EncodedExamples | Any, config: TrainingConfig, place: Place, sampler: BatchSampler | None
) -> Iterator[Batch]:
    """The batches of one call of `train_locally`."""
    if isinstance(data, EncodedExamples):
        return (Batch([data[i] for i in rows]) for rows in _drawn(data, config, place, sampler or length_buckets))
    if sampler is not None:
        msg = "a DataLoader draws its batches itself, so no batch_sampler can. Give the examples, or leave it out."
        raise ConfigError(msg)
    return (Batch(None, ready) for ready in _given(data, config, place.first_step))


def _drawn(
    data: EncodedExamples, config: TrainingConfig, place: Place, sampler: BatchSampler
) -> Iterator[Sequence[int]]:
    """What a sampler draws, each of it rows that there are."""
    drawn = sampler(data, config, place)
    if not isinstance(drawn, Iterable):
        msg = f"a batch sampler gives the rows of each step, a list of numbers for each, got {drawn!r:.80}."
        raise ConfigError(msg)
    for rows in drawn:
        found = list(rows) if isinstance(rows, Iterable) else [None]  # an array of numpy's will do
        if not all(isinstance(i, Integral) and 0 <= i < len(data) for i in found):
            msg = (
                f"the batch sampler draws {rows!r:.80}, and {len(data):,} examples have the rows 0 to {len(data) - 1}."
            )
            raise ConfigError(msg)
        yield [int(i) for i in found]


def _given(loader: Any, config: TrainingConfig, first_step: int) -> Iterator[Any]:
    """What a DataLoader gives in one call, which goes on where earlier rounds ended."""
    if not config.max_steps:
        return _passes(loader, config)
    length = batches_per_pass(loader)
    start = first_step % length if length else first_step
    return itertools.islice(_passes(loader, config), start, start + config.max_steps)


def _passes(loader: Any, config: TrainingConfig) -> Iterator[Any]:
    """The batches of a DataLoader, over and over with `max_steps`; an empty one ends at once."""
    for _ in itertools.count() if config.max_steps else range(config.epochs or 1):
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            return
