"""ClientManager: who takes part. Who has said hello and fits the contract, who is absent, and why.

Knows the transport's `hello` and what participants say of themselves. Knows nothing about rounds, and believes nothing
that it can check.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import Field

from llmchain_fed.data.encoding import DataReport
from llmchain_fed.errors import (
    ContractError,
    DeadlineError,
    FederationError,
    LLMChainFedError,
    ParticipantError,
    PolicyError,
    TransportError,
)
from llmchain_fed.federated.client.overlap import Overlap
from llmchain_fed.federated.history import ParticipantRecord, told_of
from llmchain_fed.federated.participant import Alpha, Rank
from llmchain_fed.federated.runtime import Runtime
from llmchain_fed.federated.server.attendance import Attendance
from llmchain_fed.federated.target import ContractData, Digest, Target, check_contract
from llmchain_fed.training.loop import TrainingConfig
from llmchain_fed.untrusted import Strict, checked, decoding, shown
from llmchain_fed.updates import serialization
from llmchain_fed.updates.update import MAX_EXAMPLES

# What another process reports of itself makes it absent. Any other error is this process's own and raised.
ABSENCE = (ContractError, DeadlineError, ParticipantError, PolicyError, TransportError)
_LONGEST = 2**16  # bytes of an answer to hello; an honest one has some two thousand
_Count = Annotated[int, Field(ge=1, le=MAX_EXAMPLES)]


class HelloAnswer(Strict):
    """What a participant says of itself when it joins: all its fields, with their types and ranges."""

    participant: str
    contract: ContractData
    held_out: bool = False
    num_examples: _Count | None = None
    num_tokens: _Count | None = None
    report: dict[str, Annotated[int, Field(ge=0, le=MAX_EXAMPLES)]] | None = Field(default=None, max_length=64)
    held_out_examples: _Count | None = None
    held_out_tokens: _Count | None = None
    holds: Digest | None = None
    rank: Rank | None = None
    alpha: Alpha | None = None
    options: Digest | None = None
    overlap: list[int] | None = Field(default=None, max_length=3, fail_fast=True)


@dataclass(frozen=True)
class Hello:
    """What a participant said when it joined."""

    held_out: bool
    num_examples: int | None = None
    """usable examples; None where only training will tell"""
    num_tokens: int | None = None
    """completion tokens"""
    held_out_tokens: int | None = None
    """completion tokens of what it holds out, by which its held-out loss counts; None where only evaluating tells"""
    report: DataReport | None = None
    holds: str | None = None
    """hash of the weights it has before it is sent any"""
    rank: int | None = None
    """its own LoRA rank, if it has one"""
    alpha: float | None = None
    options: str | None = None
    """digest of the training options it follows, its own included"""
    overlap: Overlap | None = None
    """what of its held-out examples it trains on"""


class ClientManager:
    """Keeps who takes part.

    Args:
        transport: The way to them.
        trainee: What is trained, whose contract all must share.
        training: How they train; told to those in other processes.
        federation: Its id, where one goes on.
        aggregation: The rule's name, which a site's policy may ask for.
    """

    def __init__(
        self,
        transport: Runtime,
        target: Target,
        training: TrainingConfig,
        federation: str | None = None,
        *,
        aggregation: str | None = None,
    ) -> None:
        self._transport, self._target, self._aggregation = transport, target, aggregation
        self._training = training.to_plain()
        self.federation = federation or secrets.token_hex(8)
        """tells this federation from an earlier one of the same participants"""
        self.attendance = Attendance()
        """who is in and out since when, and why first; everybody who asks participants reports to it"""
        self.joined: dict[str, Hello] = {}
        self.absent: dict[str, Exception] = {}
        """who is not there now, and why it is not now"""

    def join(self, *, timeout: float | None = None, again: bool = False) -> list[str]:
        """Asks everyone who has not joined what they hold and whether they stand on the same contract.

        Whoever was lost meanwhile, when it was to evaluate perhaps, has not: it may have restarted, and is told anew.

        Args:
            timeout: seconds to wait for them.
            again: In the same round: who refused by its policy would refuse again, and is left alone until the next.

        Returns:
            Who has joined now.

        Raises:
            LLMChainFedError: A participant's own error in this process, such as examples that cannot be used.
        """
        nodes = self._transport.nodes()
        self.absent = {n: e for n, e in self.absent.items() if n in nodes}
        self.attendance.expect(nodes)
        for node in () if again else self.attendance.doubtful:
            self.joined.pop(node, None)
        newcomers = [node for node in nodes if node not in self.joined]
        if again:
            newcomers = [node for node in newcomers if not isinstance(self.absent.get(node), PolicyError)]
        if not newcomers:
            return []
        found: dict[str, Hello] = {}
        for node, answer in self.ask(newcomers, timeout=timeout):
            if isinstance(answer, Hello):
                found[node] = answer
                self.absent.pop(node, None)
                self.attendance.came(node)
            else:
                self.absent[node] = answer
                self.attendance.out(node, answer)
        self.joined |= found
        return list(found)

    def ask(self, nodes: list[str], *, timeout: float | None = None) -> Iterator[tuple[str, Hello | Exception]]:
        """What participants hold, or why they cannot join; by this alone nobody joins.

        Args:
            nodes: Who is asked.
            timeout: seconds to wait for them.

        Raises:
            LLMChainFedError: See `join`.
        """
        contract = self._target.contract()
        said = {"contract": contract, "training": self._training, "federation": self.federation}
        said |= {"aggregation": self._aggregation}
        answers = self._transport.call("hello", nodes, json.dumps(said).encode(), timeout)
        for node, answer in self.attendance.following("hello", nodes, answers):
            found: Hello | Exception
            try:
                if isinstance(answer, Exception):
                    raise answer
                with decoding(f"what {shown(node)!r} answers to hello", ParticipantError):
                    found = _read(node, answer, contract)
            except ABSENCE as error:
                found = error
            except LLMChainFedError:
                raise
            except Exception as error:
                msg = f"participant {node!r} cannot join: {type(error).__name__}: {error}"
                raise FederationError(msg) from error
            yield node, found

    def present(self) -> list[str]:
        """Who can be asked, in the transport's order."""
        return [node for node in self._transport.nodes() if node in self.joined]

    def leave(self, node: str, why: Exception | None = None) -> None:
        """Takes a participant off, so that it is asked anew before the next round."""
        self.joined.pop(node, None)
        if why is not None:
            self.absent[node] = why
            self.attendance.out(node, why, lasting=not isinstance(why, TransportError))

    @property
    def reasons(self) -> dict[str, Exception]:
        """Who is absent, and why first."""
        standings = self.attendance.standings
        return {node: standings[node].error or why for node, why in self.absent.items()}

    def record_of(self, node: str) -> ParticipantRecord:
        """The record of one that a round did not ask: absent and why, first of all why first, or idle."""
        if (why := self.absent.get(node)) is None:
            return ParticipantRecord("idle")
        return ParticipantRecord("absent", self.attendance.told(node, told_of(why)))


def _read(node: str, answer: bytes, contract: Mapping[str, Any]) -> Hello:
    found = serialization.read_json(answer, most=_LONGEST)
    name = found.get("participant")
    if name != node:
        msg = f"the peer at {node!r} calls itself {shown(name)!r}: start it with the name of its node."
        raise ParticipantError(msg)
    check_contract(node, site=found.get("contract"), server=contract)
    who = f"participant {node!r}"
    said = checked(HelloAnswer, found, what=f"what {node!r} says it holds", error=ParticipantError)
    known = _report(said, who)
    if said.alpha is not None and said.rank is None:
        msg = f"{who} has an alpha without a rank of its own: give it both."
        raise ParticipantError(msg)
    if not said.held_out and (said.held_out_examples or said.held_out_tokens):
        msg = f"{who} counts held-out examples and says that it has none."
        raise ParticipantError(msg)
    if said.num_examples is not None and said.num_tokens is not None and said.num_tokens < said.num_examples:
        msg = f"{who} counts fewer completion tokens ({said.num_tokens:,}) than examples ({said.num_examples:,})."
        raise ParticipantError(msg)
    try:
        overlap = Overlap.read(said.overlap, MAX_EXAMPLES) if said.overlap is not None else None
    except ValueError:
        msg = f"what {node!r} says it holds makes no sense: its overlap is {shown(said.overlap)}."
        raise ParticipantError(msg) from None
    return Hello(
        held_out=said.held_out,
        num_examples=said.num_examples,
        num_tokens=said.num_tokens,
        held_out_tokens=said.held_out_tokens,
        report=known,
        holds=said.holds,
        rank=said.rank,
        alpha=said.alpha,
        options=said.options,
        overlap=overlap,
    )


def _report(said: HelloAnswer, who: str) -> DataReport | None:
    """What became of its examples, which must be where its counts come from."""
    if said.report is None:
        return None
    if strange := sorted(said.report.keys() - {field.name for field in fields(DataReport)}):
        msg = f"what {who} says it holds makes no sense: its report counts {shown(strange[0])!r}."
        raise ParticipantError(msg)
    report = DataReport(**said.report)
    counted = {
        "num_examples": (said.num_examples, report.used),
        "num_tokens": (said.num_tokens, report.completion_tokens),
    }
    for name, (count, supported) in counted.items():
        if count != supported:
            msg = f"what {who} says it holds makes no sense: {name} is {count}, its data report supports {supported:,}."
            raise ParticipantError(msg)
    return report
