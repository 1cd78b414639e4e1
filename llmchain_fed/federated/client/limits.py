"""Limits: how a participant lets itself be trained and measured, whoever asks.

Knows training options, messages and counts of examples. Knows nothing about operations, files or who asks. A site's
policy is made of these limits and of what it answers at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints
from torch.utils.data import DataLoader

from llmchain_fed._config import FrozenConfig
from llmchain_fed.data.encoding import IGNORE, EncodedExamples
from llmchain_fed.errors import PolicyError
from llmchain_fed.federated.protocol.tasks import TrainTask
from llmchain_fed.training.batch_sampler import BatchSampler, Place, length_buckets
from llmchain_fed.training.config import DEFAULT_LEARNING_RATE, TrainingConfig
from llmchain_fed.training.metrics import BUILT_IN, COLLAPSED, MAX_NAME
from llmchain_fed.training.schedule import Schedule, batches_per_pass
from llmchain_fed.untrusted import shown
from llmchain_fed.updates.aggregation import AGGREGATIONS
from llmchain_fed.updates.codecs import CODECS

_MOST = 10**9
_UNDONE = 0.1  # share of what was learnt before that one step may take back by decay or proximal term


def _codec(name: str) -> str:
    if name not in ("none", *CODECS):
        msg = f"one of none, {', '.join(CODECS)} is wanted"
        raise ValueError(msg)
    return name


class Limits(FrozenConfig):
    """What a participant's training, updates and measurements may be.

    Every check raises a `PolicyError` where it is not so, which begins with the option's name.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    max_steps: int = Field(default=10_000, ge=1, le=_MOST)
    """optimizer steps that one request may take, a personal model's beside them included"""
    max_seconds: float = Field(default=86_400.0, gt=0.0, le=_MOST)
    """seconds that the training of one request, or the answers for its metrics, may take, whatever deadline the hub
    sets"""
    min_batch_size: int = Field(default=2, ge=1, le=_MOST)
    """examples that an optimizer step is made of at least, but for the last step of a pass over the examples"""
    min_examples_per_update: int = Field(default=2, ge=1, le=_MOST)
    """different examples that an update is made of at least, and that a participant has"""
    max_learning_rate: float = Field(default=1.0, gt=0.0)
    """of any training; of a schedule the largest one counts"""
    optimizers: tuple[Literal["adamw", "adam", "sgd"], ...] = Field(default=("adamw", "adam", "sgd"), strict=False)
    """which a hub may choose"""
    codecs: tuple[Annotated[str, AfterValidator(_codec)], ...] = Field(default=("none", *CODECS), strict=False)
    """what an update may travel as; "none" is as it is"""
    aggregations: tuple[Annotated[str, StringConstraints(min_length=1, max_length=100)], ...] | None = Field(
        default=None, strict=False
    )
    """rules that are taken part in, by name; None is any. A name that is none of this package's shares everything"""
    max_evaluations: int = Field(default=2_000, ge=0, le=_MOST)
    """held-out losses, at weights of the hub's choice, that are told until the peer is started again; a point of an
    adaptation curve is one, and so is all that is told side by side"""
    max_states: int = Field(default=2, ge=1, le=1_000)
    """global states that are kept, so that a hub can send what changed: the common one, and the own rank's"""
    samples: int = Field(default=0, ge=0, le=_MOST)
    """held-out examples that may leave with the chain's answers, for the history and its report"""
    metrics: tuple[Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME)], ...] = Field(
        default=(*BUILT_IN, COLLAPSED), strict=False
    )
    """values over the held-out examples that may leave, by name: of a metric that this site registered itself each that
    it returns must be listed; "collapsed" is which label a model takes all of them for, where it is one for all"""

    # --- before anything is done ------------------------------------------------------------------------------------

    def check_training(self, config: TrainingConfig, learning_rate: float | None = None) -> None:
        """Makes sure that training with these options, the participant's own over the hub's, is allowed.

        A learning rate that is asked for takes the place of theirs.
        """
        if isinstance(config.optimizer, str) and config.optimizer not in self.optimizers:  # an object is one's own
            refuse(
                "optimizers", f"{config.optimizer!r} is asked for, allowed are {', '.join(self.optimizers) or 'none'}"
            )
        chosen = learning_rate if learning_rate is not None else config.learning_rate
        if chosen is None and isinstance(config.optimizer, str):
            chosen = DEFAULT_LEARNING_RATE
        if chosen is not None and chosen > self.max_learning_rate:
            refuse("max_learning_rate", f"{chosen:g} is asked for, at most {self.max_learning_rate:g} is allowed")
        self._check_lasting(config, chosen)
        if config.batch_size < self.min_batch_size:
            refuse(
                "min_batch_size",
                f"{config.batch_size:,} examples a step are asked for, at least {self.min_batch_size:,} are allowed",
            )

    def _check_lasting(self, config: TrainingConfig, learning_rate: float | None) -> None:
        """Makes sure that no step undoes those before it.

        It multiplies what they learnt by 1 − η·λ, with FedProx by 1 − η·μ: near 0, the last step's examples alone would
        make the update, and those may be a single one that was left of a pass.
        """
        pulled = (learning_rate or 0.0) * max(config.proximal_mu, config.weight_decay or 0.0)
        if self.min_examples_per_update > 1 and pulled > _UNDONE:
            refuse(
                "min_examples_per_update",
                f"proximal_mu or weight_decay times the learning rate is {pulled:g}, at most {_UNDONE:g} is allowed: "
                "a step would undo those before it, and the last one's few examples alone make the update",
            )

    def check_steps(self, steps: int | None) -> None:
        """Makes sure that so many optimizer steps are allowed; None is a number that only training will tell."""
        if steps is not None and steps > self.max_steps:
            refuse("max_steps", f"{steps:,} optimizer steps are asked for, at most {self.max_steps:,} are allowed")

    def check_usable(self, data: Any) -> None:
        """Makes sure that a participant has enough examples for an update of enough of them."""
        if isinstance(data, EncodedExamples):
            self.check_examples(_distinct(data, ([row] for row in range(len(data))), self.min_examples_per_update))

    def check_examples(self, count: int) -> None:
        """Makes sure that an update may be made of so many different examples."""
        if count < self.min_examples_per_update:
            refuse(
                "min_examples_per_update",
                f"an update would be made of {count:,} different examples, at least {self.min_examples_per_update:,} "
                "are allowed",
            )

    def check_update(
        self,
        data: Any,
        config: TrainingConfig,
        place: Place,
        sampler: BatchSampler | None,
        schedule: Schedule | None = None,
    ) -> None:
        """Makes sure that an update will be made of enough different examples; a DataLoader's are counted later.

        They are drawn as training draws them. A step whose learning rate is a tenth of the round's largest, or less,
        counts as none: else a schedule could leave the examples of a single step to make the update.
        """
        if isinstance(data, EncodedExamples):
            rows = (sampler or length_buckets)(data, config, place)
            if schedule is not None:
                two_passes = 2 * len(data)  # steps, within which these lie
                drawn = enumerate(itertools.islice(rows, schedule.steps or two_passes))
                # of a long warm-up the first steps do not count: so many that do are looked at
                rows = itertools.islice((batch for step, batch in drawn if schedule.counts(step)), two_passes)
            self.check_examples(_distinct(data, rows, self.min_examples_per_update))

    def check_codec(self, codec: str | None) -> None:
        """Makes sure that an update may travel as this."""
        name = "none" if codec is None else codec.partition(":")[0]
        if name not in self.codecs:
            refuse("codecs", f"{shown(name)} is asked for, allowed are {', '.join(self.codecs) or 'none at all'}")

    def check_aggregation(self, name: str | None) -> None:
        """Makes sure that a rule of this name, as the hub says, is taken part in."""
        if self.aggregations is not None and name not in self.aggregations:
            said = shown(name) if name is not None else "a rule without a name"
            refuse("aggregations", f"{said} is asked for, allowed are {', '.join(self.aggregations) or 'none'}")

    def check_parts(self, name: str | None, task: TrainTask) -> None:
        """Makes sure that a round trains and shares what the rule that the hub named does.

        Whether its hello told the truth is seen by this alone.
        """
        self.check_aggregation(name)
        rule = AGGREGATIONS.get(name) if name is not None else None
        asked = task.trains, task.shares
        if rule is not None:
            said = rule.trains(task.index), rule.shares(task.index)
        elif self.aggregations is not None:
            said = "all", "all"
        else:
            return
        if asked != said:
            refuse(
                "aggregations",
                f"a round that trains {asked[0]!r} and shares {asked[1]!r} is asked for, and the rule that the hub "
                f"named ({shown(name)}) trains {said[0]!r} and shares {said[1]!r}",
            )


def refuse(option: str, why: str) -> NoReturn:
    """The error of an option that does not allow what was asked.

    Raises:
        PolicyError: Always; it begins `policy.<option>: `, and quotes nothing but what was asked and what is allowed.
    """
    msg = f"policy.{option}: {why}."
    raise PolicyError(msg)


def _distinct(data: EncodedExamples, batches: Iterable[Sequence[int]], enough: int) -> int:
    """How many different examples there are in the batches; no more are looked for than is enough."""
    seen: set[tuple[tuple[int, ...], ...]] = set()
    rows = itertools.chain.from_iterable(batches)
    for row in itertools.islice(rows, 2 * len(data)):  # within two passes' length lies a whole pass
        seen.add(tuple(tuple(ids) for ids in data[row]))
        if len(seen) >= enough:
            break
    return len(seen)


class Counted(DataLoader):  # type: ignore[type-arg]
    """A DataLoader of which one knows afterwards how many different examples came out of it.

    Beyond `enough` of them none are counted, nor those before the batch at which the training starts, nor those of
    steps that do not count in its `schedule`.
    """

    def __init__(self, inner: Any, enough: int, schedule: Schedule | None, next_step: int) -> None:
        self._inner, self._enough, self._schedule = inner, enough, schedule
        length = batches_per_pass(inner)
        self._step = -(next_step % length if length else next_step)  # what comes before the first step is passed over
        self._seen: set[bytes] = set()
        self.largest = 0
        """examples of the largest batch"""

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Any:
        for batch in self._inner:
            self.largest = max(self.largest, len(batch["labels"]))
            counts = self._step >= 0 and (self._schedule is None or self._schedule.counts(self._step))
            self._step += 1
            for i in range(len(batch["labels"])) if counts and len(self._seen) < self._enough else ():
                mask = batch["attention_mask"][i].bool() if "attention_mask" in batch else slice(None)
                ids, labels = batch["input_ids"][i][mask], batch["labels"][i]
                kept = labels[labels != IGNORE]
                self._seen.add(ids.cpu().numpy().tobytes() + b"|" + kept.cpu().numpy().tobytes())
            yield batch

    def check(self, limits: Limits) -> None:
        """Makes sure, before an update leaves, that it was made of enough.

        Raises:
            PolicyError: It was not.
        """
        if self.largest < limits.min_batch_size:
            refuse(
                "min_batch_size",
                f"the DataLoader gives {self.largest:,} examples a step, at least {limits.min_batch_size:,} are "
                "allowed",
            )
        limits.check_examples(len(self._seen))


def counted(data: Any, limits: Limits | None, schedule: Schedule | None = None, next_step: int = 0) -> Any:
    """The same data; a DataLoader's examples are counted where there are limits.

    `next_step` is where in it a training with `max_steps` starts; one of whole passes starts at 0.
    """
    if limits is None or isinstance(data, EncodedExamples):
        return data
    return Counted(data, limits.min_examples_per_update, schedule, next_step)
