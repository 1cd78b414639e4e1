"""train_locally: the one training loop, for a participant of a federation and for plain fine-tuning alike.

Knows torch optimizers and batches. Knows nothing of LangChain, other participants or aggregation.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmchain_fed.data.encoding import (
    IGNORE,
    DataReport,
    EncodedExamples,
    Examples,
    Prompt,
    bucketed_order,
    collate,
    encode_examples,
    is_ready_tensors,
    unwrap,
)
from llmchain_fed.data.sayable import check_tolerance
from llmchain_fed.errors import EmptyParticipantError, NonFiniteLossError
from llmchain_fed.model.generation.answers import seeded
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.model.weights import all_finite
from llmchain_fed.training import running_state, trainable
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.training.loss import computing_in, on_device, summed_loss

__all__ = ["TrainingConfig", "TrainingResult", "batches_of", "encoded", "no_examples", "seed_of", "train_locally"]


@dataclass
class TrainingResult:
    """What one call of `train_locally` did. The model holds the trained weights."""

    loss: float
    """nats per completion token, mean over the steps"""
    losses: list[float]
    """nats per completion token, per step"""
    examples: int
    """usable examples the participant holds (n_k)"""
    tokens: int
    """completion tokens the participant holds"""
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
    first_step: int = 0,
    optimizer_state: dict[str, Any] | None = None,
    before_step: Callable[[], None] | None = None,
    anchor: Mapping[str, Tensor] | None = None,
) -> TrainingResult:
    """Fine-tunes the model's trainable weights in place on one participant's examples.

    The order of the data and dropout follow from (seed, participant, round): a rerun is bit-identical, and no two
    rounds repeat their batches. The loss of a batch is the mean over its completion tokens, prompts masked; what a
    module's own loss adds to that is not trained on. Parts frozen in evaluation mode that have running state (batch
    norms) stay in evaluation mode.

    Args:
        model: What to train, a LocalModel or a chain over one; held exclusively meanwhile, and left in evaluation mode.
        examples: Any form that `read_examples` takes, ready `EncodedExamples`, or a DataLoader of ready tensors.
        config: How to train.
        prompt: What renders the examples' inputs; the chain itself, where one is given.
        participant: Whose data this is; part of the randomness.
        round: Which round this is; part of the randomness.
        first_step: With `max_steps`: how many batches earlier rounds have consumed.
        optimizer_state: To go on with instead of a fresh optimizer.
        before_step: Called before every optimizer step; what it raises ends the training, and the weights are as
            before the call.
        anchor: What `proximal_mu` pulls towards, by stable name; None is where the training began.

    Raises:
        EmptyParticipantError: Not a single usable example.
        NonFiniteLossError: The loss or a weight became NaN or infinite; the weights are as before the call.
        DataError: See `read_examples`.
        UnsayableError: More completions than `config.tolerance` could never be an answer.
        NotTrainableError: No parameter requires a gradient.
        UnsupportedModelError: Trained here, the module would not be what plain training makes of it, for a reason that
            the message names: tokens that see later ones, running statistics …
    """
    config = config or TrainingConfig()
    model, prompt = unwrap(model, prompt)
    trainable.admit(model)
    data = encoded(examples, model, prompt, config.max_length, tolerance=config.tolerance)
    if isinstance(data, EncodedExamples):
        trainable.check_batches(model, min(config.micro_batch_size or config.batch_size, len(data)))
    parameters = model.trainable_parameters()
    with model.exclusive():
        before = {n: p.detach().clone() for n, p in parameters.items()}
        buffers = {n: b.detach().clone() for n, b in model.module.named_buffers()}
        try:
            pulled_to = before if anchor is None else {n: anchor[n].to(before[n]) for n in before}
            return _train(
                model, data, config, pulled_to, buffers, participant, round, first_step, optimizer_state, before_step
            )
        except BaseException:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(before[name])
            raise
        finally:
            for name, buffer in model.module.named_buffers():
                if name in buffers and buffers[name].shape == buffer.shape:  # some are made by the forward pass
                    buffer.copy_(buffers[name])
            model.module.eval()


def _train(
    model: LocalModel,
    data: EncodedExamples | Any,
    config: TrainingConfig,
    anchor: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    participant: str,
    round_number: int,
    first_step: int,
    optimizer_state: dict[str, Any] | None,
    before_step: Callable[[], None] | None,
) -> TrainingResult:
    started = time.perf_counter()
    parameters = model.trainable_parameters()
    optimizer = config.make_optimizer(list(parameters.values()))
    if optimizer_state is not None:
        # a copy, because torch keeps the tensors it is given and changes them
        optimizer.load_state_dict(copy.deepcopy(optimizer_state))
    losses: list[float] = []
    count = _Count()
    still = trainable.admit(model)
    model.module.train()
    running_state.keep_still(model.module, still)
    with (
        seeded(seed_of(config.seed, participant, round_number), model.device),
        computing_in(config.precision, model.module),
    ):
        for batches in _steps(data, model, config, participant, round_number, first_step):
            if before_step is not None:
                before_step()
            optimizer.zero_grad(set_to_none=True)
            loss = _accumulate(model, batches, count)
            if not losses:  # what the trial at the door did not show
                running_state.check_unchanged(model.module, buffers)
            if not math.isfinite(loss):
                msg = (
                    f"the loss of {participant!r} became {loss} at step {len(losses) + 1} of round "
                    f"{round_number}, so its weights are worthless. "
                    "Lower the learning rate or set max_grad_norm."
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
            losses.append(loss)
        optimizer.zero_grad(set_to_none=True)
    spoilt = next((name for name, p in parameters.items() if not all_finite(p.detach())), None)
    if spoilt is not None:
        msg = f"{spoilt} of {participant!r} is not finite at the end. Lower the learning rate or set max_grad_norm."
        raise NonFiniteLossError(msg)
    if not count.tokens:
        why = "the DataLoader's batches carry no label" if losses else "the DataLoader gave no batch"
        raise EmptyParticipantError(no_examples(participant, why))
    report = data.report if isinstance(data, EncodedExamples) else _report(data, count, config, len(losses))
    return TrainingResult(
        loss=sum(losses) / len(losses),
        losses=losses,
        examples=report.used,
        tokens=report.completion_tokens,
        steps=len(losses),
        seconds=time.perf_counter() - started,
        next_step=first_step + len(losses),
        report=report,
        optimizer_state=copy.deepcopy(optimizer.state_dict()) if config.keep_optimizer else None,
    )


@dataclass
class _Count:
    examples: int = 0
    tokens: int = 0


def _report(loader: Any, count: _Count, config: TrainingConfig, steps: int) -> DataReport:
    """What a DataLoader holds, from what came by over how often it came by."""
    per_pass = _length(loader)
    passes = steps / per_pass if per_pass else config.epochs or 1
    return DataReport(used=round(count.examples / passes), completion_tokens=round(count.tokens / passes))


def _accumulate(model: LocalModel, batches: list[dict[str, Tensor]], count: _Count) -> float:
    """Gradients of the mean loss over all tokens of one step's forward passes; returns that loss."""
    batches = [on_device(batch, model.device) for batch in batches]
    total = sum(int((b["labels"] != IGNORE).sum()) for b in batches) if len(batches) > 1 else 0
    loss = 0.0
    for batch in batches:
        summed, tokens = summed_loss(model.module, batch)
        if not tokens:
            continue
        mean = summed / (total or tokens)
        mean.backward()  # type: ignore[no-untyped-call]
        loss += float(mean.detach())
        count.tokens += tokens
        count.examples += len(batch["labels"])
    return loss


def _steps(
    data: EncodedExamples | Any,
    model: LocalModel,
    config: TrainingConfig,
    participant: str,
    round_number: int,
    first_step: int,
) -> Iterator[list[dict[str, Tensor]]]:
    """The forward passes of each optimizer step."""
    if not isinstance(data, EncodedExamples):
        length = _length(data)
        start = first_step % length if length else first_step
        stop = start + config.max_steps if config.max_steps else None
        for batch in itertools.islice(_passes(data, config), start if stop else 0, stop):
            yield [batch]
        return
    lengths = data.lengths()
    for rows in batches_of(lengths, config, participant, round_number, first_step):
        size = config.micro_batch_size or len(rows)
        yield [collate([data[i] for i in rows[at : at + size]], model) for at in range(0, len(rows), size)]


def _passes(loader: Any, config: TrainingConfig) -> Iterator[Any]:
    """The batches of a DataLoader, over and over with `max_steps`; an empty one ends at once."""
    for _ in itertools.count() if config.max_steps else range(config.epochs or 1):
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            return


def _length(loader: Any) -> int | None:
    """Batches per pass; None where the DataLoader's dataset does not know."""
    try:
        return len(loader)
    except TypeError:
        return None


def batches_of(
    lengths: list[int], config: TrainingConfig, participant: str, round_number: int, first_step: int
) -> Iterator[list[int]]:
    """Which examples each optimizer step of a round is made of, as rows."""
    if config.max_steps is None:
        for epoch in range(config.epochs or 1):
            rng = random.Random(seed_of(config.seed, participant, round_number, epoch))  # noqa: S311 (order, no secret)
            yield from bucketed_order(lengths, config.batch_size, rng)
        return
    # The stream of all passes does not depend on the round: rounds walk on through it.
    per_pass = -(-len(lengths) // config.batch_size)
    step = first_step
    while step < first_step + config.max_steps:
        rng = random.Random(seed_of(config.seed, participant, "pass", step // per_pass))  # noqa: S311 (order, no secret)
        order = bucketed_order(lengths, config.batch_size, rng)[step % per_pass :]
        order = order[: first_step + config.max_steps - step]
        yield from order
        step += len(order)


def seed_of(*parts: object) -> int:
    """63 bits from any values, the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def encoded(
    examples: Examples | EncodedExamples,
    model: LocalModel,
    prompt: Prompt | None,
    max_length: int | None,
    *,
    tolerance: float | None = None,
) -> EncodedExamples | Any:
    """Examples in the form the loop takes; a DataLoader stays as it is.

    Args:
        examples: See `train_locally`.
        model: Whose tokens.
        prompt: What renders inputs.
        max_length: tokens beyond which an example is left out.
        tolerance: The share of completions that may be left out because no answer could be theirs; None is any.

    Raises:
        EmptyParticipantError: Not a single usable example.
        UnsayableError: More completions than `tolerance` could never be an answer.
        DataError: See `read_examples`.
    """
    if is_ready_tensors(examples):
        return examples
    data = (
        examples
        if isinstance(examples, EncodedExamples)
        else encode_examples(examples, model, prompt, max_length=max_length)
    )
    check_tolerance(data.report.unsayable, data.report.used, data.unsayable, tolerance)
    if not len(data):
        raise EmptyParticipantError(no_examples("the participant", repr(data.report)))
    return data


def no_examples(who: str, report: str) -> str:
    """The sentence for `EmptyParticipantError`."""
    return f"{who} has no usable example ({report}): there is nothing to learn. Check the data path and max_length."
