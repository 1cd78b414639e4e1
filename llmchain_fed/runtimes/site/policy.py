"""Policy: what a site lets others ask of it, also in sentences. Audit: the file in which every request is written down.

Knows options, operations and files. Knows nothing about models or sockets. The site's operator owns both.
"""

from __future__ import annotations

import json
import os
import shlex
import stat
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from llmchain_fed import untrusted
from llmchain_fed._config import parse_options, unknown_option
from llmchain_fed.errors import ConfigError, ContractError, DeadlineError, PolicyError, TransportError
from llmchain_fed.federated.client.limits import Limits, refuse
from llmchain_fed.federated.client.operations import operations, task_type
from llmchain_fed.training.metrics import COLLAPSED
from llmchain_fed.untrusted import printable, shown

# Their messages name options, digests and times, never a value of an example.
_HARMLESS = (ConfigError, ContractError, DeadlineError, PolicyError, TransportError)
_LONGEST = 2000  # characters of a text in the audit file
_REMEDY = "Correct that line; `llmchain-fed policy explain FILE` says what a file lets happen."
LIMITATIONS = (
    "What no policy prevents: updates can leak what they were trained on. A hub chooses the weights that training "
    "starts from, which can make an update depend on few of its examples, and compares many updates over parts of the "
    "examples that its seed, batch size or max_length choose.",
    "The rule's name is the hub's word: what is enforced is which tensors leave. What the hub does with them, and to "
    "whom it shows them, is not seen here.",
    "Losses and counts tell something of the examples too: how well the weights that were sent know them.",
)


def _known(operation: str) -> str:
    if operation not in operations():
        msg = f"no operation is called {shown(operation, 40)!r}; there are {', '.join(operations())}"
        raise ValueError(msg)
    return operation


def counts_as_training(operation: str) -> bool:
    """Whether an operation is one of the trainings of which a policy allows so many."""
    return operation in operations() and task_type(operation).task.counts_as_training


class Policy(Limits):
    """What a site allows: what it answers, and within which limits. The default lets no text of its examples leave.

    A hub measures before and after each round: with `max_rounds` alone, `max_evaluations` is twice that and two more,
    or its default where that is less: who allows 1,000 rounds or more says both.

    >>> Policy(max_rounds=20)
    Policy(max_evaluations=42, max_rounds=20)
    """

    operations: tuple[Annotated[str, AfterValidator(_known)], ...] = Field(
        default=("hello", "train", "personalize", "evaluate", "side_by_side", "curve", "time_step", "stop"),
        strict=False,
    )
    """which operations are answered; `personal_state` lets the hub keep this site's optimizer and place in the data"""
    max_rounds: int | None = Field(default=1_000, ge=0, le=10**9)
    """trainings this peer does before it must be started again, personal models, curves and trial steps included; None
    is no limit"""
    max_payload_bytes: int = Field(default=2**30, ge=1, le=2**40)
    """bytes of a request: global weights of a larger model need more"""
    error_messages: bool = False
    """whether the messages of errors may leave, which can quote an example; else their type does, and the rest stays in
    the audit file"""

    @model_validator(mode="after")
    def _evaluations_follow_rounds(self) -> Self:
        if self.max_rounds is not None and "max_evaluations" not in self.model_fields_set:
            following = min(2 * self.max_rounds + 2, type(self).model_fields["max_evaluations"].default)
            object.__setattr__(self, "max_evaluations", following)  # past pydantic: `replace` sees it as not given
        return self

    @classmethod
    def from_file(cls, path: str | Path) -> Policy:
        """Reads a policy from YAML.

        Raises:
            ConfigError: No such file, no mapping; or an unknown option, a wrong type or a value out of range, with its
                line.
        """
        data = untrusted.read_file(path, most=untrusted.MAX_YAML, what="the policy file", error=ConfigError)
        found = parse_options(data, path, "policy")
        for name, value in found.items():
            try:
                if name not in cls.model_fields:
                    raise ConfigError(unknown_option(shown(name, 60), cls.model_fields))
                cls(**{name: value})
            except ConfigError as error:
                lines = untrusted.key_lines(data)
                why = printable(str(error).removeprefix(f"{cls.__name__}: "), 600)
                msg = f"the policy file {shown(str(path), 300)}, line {lines[name]}: {why}. {_REMEDY}"
                raise ConfigError(msg) from None
        return cls(**found)

    def check(self, op: str, num_bytes: int, rounds: int) -> None:
        """Makes sure that a request is allowed after so many rounds, as far as its operation and its size tell.

        Raises:
            PolicyError: It is not, and why; it begins with the option's name.
        """
        if op not in self.operations:
            allowed = ", ".join(self.operations) or "nothing"
            refuse("operations", f"this site does not answer {shown(op, 40)!r}, allowed are {allowed}")
        if num_bytes > self.max_payload_bytes:
            refuse("max_payload_bytes", f"{num_bytes:,} bytes are sent, at most {self.max_payload_bytes:,} are allowed")
        if counts_as_training(op) and self.max_rounds is not None and rounds >= self.max_rounds:
            refuse(
                "max_rounds",
                f"this site has trained {rounds:,} times, at most {self.max_rounds:,} are allowed until its peer is "
                "started again",
            )

    def told(self, error: BaseException) -> dict[str, str]:
        """What of an error may leave: its type, and its message where that can quote no example or may."""
        leaves = self.error_messages or is_harmless(error)
        message = (
            printable(error, _LONGEST) if leaves else "the site keeps the message to itself; its audit file has it"
        )
        return {"type": type(error).__name__, "message": message}


def is_harmless(error: BaseException) -> bool:
    """Whether an error's message can quote no example."""
    return isinstance(error, _HARMLESS)


class AuditError(PolicyError):
    """A request is not answered because it cannot be written down: this passes, and is no decision of the site's."""


class Audit:
    """Appends one JSON line per request to a file: when, what, how large, how it ended.

    Args:
        path: The file; made for this account alone. None keeps no audit.
        say: Tells the operator that it cannot be written, once, and that it can be again.

    Raises:
        ConfigError: It cannot be written.
    """

    def __init__(self, path: str | Path | None, say: Callable[[str], None] = lambda _: None) -> None:
        self.path = Path(path) if path is not None else None
        self._lock, self._say = threading.Lock(), say
        self._broken = False
        if self.path is not None:
            try:
                os.close(self._open())
            except (OSError, ValueError) as error:
                where, folder = shown(str(self.path), 300), self.path.absolute().parent
                remedy = "" if folder.is_dir() else f" Make its folder first: mkdir -p {shlex.quote(str(folder))}"
                msg = f"the audit file {where} cannot be written: {_said(error)}.{shown(remedy, 400)}"
                raise ConfigError(msg) from error

    def write(self, **entry: Any) -> None:
        """Writes one line, and it is on the disk before this returns.

        Raises:
            AuditError: It cannot be written: what is not written down is not answered.
        """
        if self.path is None:
            return
        kept = {name: _bounded(value) for name, value in entry.items()}
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds")} | kept)
        with self._lock:
            try:
                self._append(f"{line}\n".encode())
            except OSError as error:
                why = f"the audit file cannot be written: {_said(error)}"
                if not self._broken:
                    self._say(f"{why}: nothing is answered until it can")
                self._broken = True
                msg = f"{why}, and without it nothing is answered."
                raise AuditError(msg) from error
            if self._broken:
                self._say("the audit file can be written again")
            self._broken = False

    def _append(self, line: bytes) -> None:
        """All of a line or nothing of it: what a full disk has cut would make the next one unreadable, too."""
        descriptor = self._open()
        try:
            size = os.fstat(descriptor).st_size
            try:
                left = memoryview(line)
                while left:
                    left = left[os.write(descriptor, left) :]
                os.fsync(descriptor)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        """A descriptor to append with. Made anew each time, so that a file moved away by log rotation stays whole."""
        assert self.path is not None
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        descriptor = os.open(self.path, flags, 0o600)  # without waiting for who might read a pipe
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1:
                msg = "it is no regular file of this account's, under one name. Choose a path that is free"
                raise OSError(msg)
            if found.st_mode & 0o077:  # it quotes errors, which can quote examples
                os.fchmod(descriptor, 0o600)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _said(error: OSError | ValueError) -> str:
    """The system's words, which name no path, and its number."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror} ({error.errno})"
    return shown(str(error), 200)


def _bounded(value: Any) -> Any:
    """A text that can be shown, a number that can be written; anything else in short."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) >= 2**63:
        return shown(value)
    return value if isinstance(value, (int, float)) else printable(value, _LONGEST)


def explain(policy: Policy) -> list[str]:
    """One sentence or two per option, in the order of what happens; those with their default value say so.

    >>> explain(Policy(max_rounds=20))[1]
    'max_rounds: it trains 20 times at most, personal models, curves and trial steps included, until the operator
    starts the peer again.'
    """
    told = _answers(policy) | _training(policy) | _leaving(policy)
    fields = type(policy).model_fields
    by_default = {name for name in told if getattr(policy, name) == fields[name].default}
    return [f"{name}: {text}{' (default)' if name in by_default else ''}" for name, text in told.items()]


def _answers(policy: Policy) -> dict[str, str]:
    refused = [op for op in operations() if op not in policy.operations]
    stays = "; where this site stands (optimizer, residual, personal model) stays here"
    stays = stays if "personal_state" in refused else ""
    times = "as often as it is asked" if policy.max_rounds is None else f"{policy.max_rounds:,} times at most"
    states = _count(policy.max_states, "global state")
    return {
        "operations": f"it answers {_and(policy.operations)}, and refuses {_and(refused)}{stays}.",
        "max_rounds": f"it trains {times}, personal models, curves and trial steps included, until the operator starts "
        "the peer again.",
        "max_payload_bytes": f"a request has {policy.max_payload_bytes:,} bytes at most.",
        "max_states": f"it keeps {states} at most, so that a hub can send what changed.",
    }


def _training(policy: Policy) -> dict[str, str]:
    known = policy.aggregations is not None
    rules = f"under {_or(policy.aggregations)} alone" if policy.aggregations is not None else "whatever the rule"
    shared = "only what that rule shares leaves"
    shared = shared if known else f"where the hub names a rule of this package, {shared}"
    one_step = ", so a hub may ask for one by one" if policy.min_batch_size == 1 else ""
    one_update = ", so a hub may ask for the gradient of one" if policy.min_examples_per_update == 1 else ""
    batch, update = (
        _count(policy.min_batch_size, "example"),
        _count(policy.min_examples_per_update, "different example"),
    )
    return {
        "aggregations": f"it takes part {rules}; {shared}, and what a federation let it keep for itself never does.",
        "optimizers": f"a hub may choose {_or(policy.optimizers)}.",
        "max_learning_rate": f"a learning rate above {policy.max_learning_rate:g} is refused.",
        "max_steps": f"one request may take {_count(policy.max_steps, 'optimizer step')} at most.",
        "max_seconds": f"one request may train for {policy.max_seconds:,g} seconds at most, whatever the hub's "
        "deadline.",
        "min_batch_size": f"an optimizer step is made of {batch} at least{one_step}; what is left of a pass may be "
        "fewer.",
        "min_examples_per_update": f"an update is made of {update} at least{one_update}.",
    }


def _leaving(policy: Policy) -> dict[str, str]:
    told = "their types leave, and messages only where they can quote no example; the audit file has them all"
    if policy.error_messages:
        told = "their types and messages, which can quote an example, leave"
    texts = f"{_count(policy.samples, 'held-out example')} at most may leave, with the chain's answers"
    losses = _count(policy.max_evaluations, "held-out loss", "held-out losses")
    return {
        "codecs": f"an update may travel as {_or(policy.codecs)} (none: as it is).",
        "max_evaluations": f"{losses} at most, at weights of the hub's choice, are told until the operator starts the "
        "peer again; points of curves count.",
        "samples": f"{texts}." if policy.samples else "no text of an example leaves.",
        "metrics": f"of its held-out examples the values of {_and(policy.metrics)} may leave, as numbers over all"
        f"{'; collapsed is which label all are taken for' if COLLAPSED in policy.metrics else ''}."
        if policy.metrics
        else "no metric of its held-out examples leaves.",
        "error_messages": f"of errors {told}.",
    }


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _and(names: Sequence[str]) -> str:
    return _joined(names, "and")


def _or(names: Sequence[str]) -> str:
    return _joined(names, "or")


def _joined(names: Sequence[str], last: str) -> str:
    if len(names) < 2:
        return names[0] if names else "nothing"
    return f"{', '.join(names[:-1])} {last} {names[-1]}"
