"""Roster: who takes part. Who has said hello and fits the contract, who is absent, and why.

Knows the transport's `hello` and what participants say of themselves. Knows nothing about rounds, and believes nothing
that it can check.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from llmchain_fed.data import DataReport
from llmchain_fed.errors import (
    ContractError,
    DeadlineError,
    FederationError,
    LLMChainFedError,
    ParticipantError,
    TransportError,
)
from llmchain_fed.federated import wire
from llmchain_fed.federated.history import ParticipantRecord
from llmchain_fed.federated.overlap import Overlap
from llmchain_fed.federated.runtime import Transport
from llmchain_fed.federated.trainee import Trainee, check_contract
from llmchain_fed.federated.update import MAX_EXAMPLES
from llmchain_fed.training import TrainingConfig

# What another process reports of itself makes it absent. Any other error is this process's own and raised.
_LARGEST_RANK = 2**16
ABSENCE = (ContractError, DeadlineError, ParticipantError, TransportError)


@dataclass(frozen=True)
class Hello:
    """What a participant said when it joined."""

    held_out: bool
    num_examples: int | None = None
    """usable examples; None where only training will tell"""
    num_tokens: int | None = None
    """completion tokens"""
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


class Roster:
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
        transport: Transport,
        trainee: Trainee,
        training: TrainingConfig,
        federation: str | None = None,
        *,
        aggregation: str | None = None,
    ) -> None:
        self._transport, self._trainee, self._aggregation = transport, trainee, aggregation
        self._training = training.to_plain()
        self.federation = federation or secrets.token_hex(8)
        """tells this federation from an earlier one of the same participants"""
        self.joined: dict[str, Hello] = {}
        self.absent: dict[str, Exception] = {}
        """who is not there now, and why"""

    def join(self, *, timeout: float | None = None) -> list[str]:
        """Asks everyone who has not joined what they hold and whether they stand on the same contract.

        Args:
            timeout: seconds to wait for them.

        Returns:
            Who has joined now.

        Raises:
            LLMChainFedError: A participant's own error in this process, such as examples that cannot be used.
        """
        nodes = self._transport.nodes()
        self.absent = {n: e for n, e in self.absent.items() if n in nodes}
        newcomers = [node for node in nodes if node not in self.joined]
        if not newcomers:
            return []
        found: dict[str, Hello] = {}
        for node, answer in self.ask(newcomers, timeout=timeout):
            if isinstance(answer, Hello):
                found[node] = answer
                self.absent.pop(node, None)
            else:
                self.absent[node] = answer
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
        contract = self._trainee.contract()
        said = {"contract": contract, "training": self._training, "federation": self.federation}
        said |= {"aggregation": self._aggregation}
        for node, answer in self._transport.call("hello", nodes, json.dumps(said).encode(), timeout):
            found: Hello | Exception
            try:
                if isinstance(answer, Exception):
                    raise answer
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

    def record_of(self, node: str) -> ParticipantRecord:
        """The record of one that a round did not ask: absent and why, or idle."""
        why = self.absent.get(node)
        return ParticipantRecord("absent", f"{type(why).__name__}: {why}") if why else ParticipantRecord("idle")


def _read(node: str, answer: bytes, contract: Mapping[str, Any]) -> Hello:
    said = wire.read_json(answer)
    name = said.get("participant")
    if name != node:
        msg = f"the peer at {node!r} calls itself {name!r:.80}: start it with the name of its node."
        raise ParticipantError(msg)
    check_contract(contract, said.get("contract"), f"participant {node!r}")
    examples, tokens, report = said.get("num_examples"), said.get("num_tokens"), said.get("report")
    counted = all(count is None or (type(count) is int and count >= 1) for count in (examples, tokens))
    rank, alpha, holds = said.get("rank"), said.get("alpha"), said.get("holds")
    counted = counted and (rank is None or (type(rank) is int and 1 <= rank <= _LARGEST_RANK))
    counted = counted and (alpha is None or (type(alpha) in (int, float) and 0 < alpha <= _LARGEST_RANK))
    try:
        overlap = Overlap.read(said["overlap"], MAX_EXAMPLES) if said.get("overlap") is not None else None
    except ValueError:
        counted = False
    if not counted or not (report is None or _is_report(report)):
        msg = f"what {node!r} says it holds makes no sense: {answer[:200]!r}"
        raise ParticipantError(msg)
    known = DataReport(**report) if report is not None else None
    holds = holds[:64] if isinstance(holds, str) else None
    options = said.get("options")
    options = options[:64] if isinstance(options, str) else None
    return Hello(said.get("held_out") is True, examples, tokens, known, holds, rank, alpha, options, overlap)


def _is_report(found: object) -> bool:
    """Whether these are counts that `DataReport` knows."""
    known = {field.name for field in fields(DataReport)}
    return isinstance(found, dict) and found.keys() <= known and all(type(c) is int and c >= 0 for c in found.values())
