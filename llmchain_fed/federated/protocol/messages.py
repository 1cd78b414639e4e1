"""Messages: tasks and answers as bytes, and the reverse over bounded readers. No other module reads or writes a header.

Knows JSON, safetensors and the fields of tasks. Knows nothing of what is done with them. A task without tensors is a
JSON object. One with tensors is safetensors whose header carries its fields, and for a task on the global state beside
them `state`, which says what the tensors make of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from llmchain_fed import untrusted
from llmchain_fed.errors import FederationError, LLMChainFedError, ParticipantError
from llmchain_fed.federated.protocol.answers import Introduction, TaskAnswer
from llmchain_fed.federated.protocol.finiteness import spelled
from llmchain_fed.federated.protocol.tasks import (
    REMEDY,
    HelloTask,
    PersonalStateTask,
    StateHeader,
    StateTask,
    Task,
    TensorTask,
)
from llmchain_fed.federated.target import check_contract
from llmchain_fed.untrusted import checked, decoding, shown
from llmchain_fed.updates import serialization
from llmchain_fed.updates.serialization import TensorInfo

TaskT = TypeVar("TaskT", bound=Task)
AnswerT = TypeVar("AnswerT", bound=TaskAnswer)
_STATE = "state"
_LONGEST_HEADER = 2**22  # bytes that are read for an operator's sake


class Header(NamedTuple):
    """What stands before a message's tensors."""

    task: TensorTask
    state: StateHeader
    """of a task on the global state; it says nothing for others"""
    infos: Mapping[str, TensorInfo]
    """what tensors there are"""


@dataclass(frozen=True)
class Glance:
    """What an operator is told of a request: its round, counted from 1, or which federation greets by which rule."""

    round: int | None = None
    federation: str | None = None
    rule: str | None = None

    def told(self) -> dict[str, Any]:
        """What is known of it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


# --- tasks ------------------------------------------------------------------------------------------------------------


def write(task: Task, tensors: Mapping[str, Tensor] | None = None, state: StateHeader | None = None) -> bytes:
    """A task as bytes, with tensors and what they make of the global state."""
    header = task.model_dump(exclude_unset=True)
    if not isinstance(task, TensorTask):
        return json.dumps(header).encode()
    if state is not None:
        header[_STATE] = state.model_dump(exclude_unset=True)
    return serialization.pack({name: tensor.contiguous() for name, tensor in (tensors or {}).items()}, header)


def read(kind: type[TaskT], payload: bytes) -> TaskT:
    """A task that comes without tensors.

    Raises:
        FederationError: It is no JSON object; or a field is unknown, missing, of another type or out of range.
    """
    found = untrusted.read_json(payload, most=kind.max_message, what=_what(kind), error=FederationError)
    return checked(kind, found, what=_what(kind), error=FederationError, remedy=REMEDY)


def read_hello(payload: bytes, name: str, contract: Mapping[str, Any]) -> HelloTask:
    """A hello to a participant of this name and this contract.

    The hub's contract is compared before another field is looked at: of another version they may be others.

    Raises:
        ContractError: The hub stands on another one.
        FederationError: See `read`.
    """
    kind = HelloTask
    found = untrusted.read_json(payload, most=kind.max_message, what=_what(kind), error=FederationError)
    check_contract(name, site=contract, server=found.get("contract"))
    return checked(kind, found, what=_what(kind), error=FederationError, remedy=REMEDY)


def read_header(kind: type[TensorTask], payload: bytes, max_header: int = serialization.MAX_HEADER) -> Header:
    """The fields of a task with tensors, before a value of these is read; a header has at most so many bytes.

    Raises:
        FederationError: See `read`; or a combination of fields that makes no sense.
        UpdateRefusedError: It is no safetensors of ours.
    """
    found, infos = serialization.inspect(payload, max_bytes=len(payload), max_header=max_header)
    said = found.pop(_STATE, {}) if issubclass(kind, StateTask) else {}
    task = checked(kind, found, what=_what(kind), error=FederationError, remedy=REMEDY)
    state = checked(StateHeader, said, what=f"the state of {_what(kind)}", error=FederationError, remedy=REMEDY)
    return Header(task, state, infos)


def read_personal_state(payload: bytes) -> tuple[PersonalStateTask, dict[str, Tensor]]:
    """Where a participant stood, as it answered or as a checkpoint has it.

    Raises:
        FederationError: See `read_header`.
    """
    with decoding("the personal state", FederationError):
        header = read_header(PersonalStateTask, payload)
        assert isinstance(header.task, PersonalStateTask)
        return header.task, serialization.values(payload, header.infos)


def glance(kind: type[Task], payload: bytes | bytearray) -> Glance:
    """What an operator is told of a request, whose payload may be anything."""
    with suppress(LLMChainFedError, KeyError, TypeError):
        if issubclass(kind, HelloTask):
            hello = read(kind, bytes(payload))
            return Glance(federation=hello.federation, rule=hello.aggregation)
        size = int.from_bytes(payload[:8], "little")
        if issubclass(kind, TensorTask) and len(payload) - size >= 8 and size <= _LONGEST_HEADER:
            number = serialization.peek(payload[8 : 8 + size]).get("round")
            return Glance(round=number if type(number) is int else None)
    return Glance()


def _what(kind: type[Task]) -> str:
    return f"the {kind.operation} message"


# --- answers ----------------------------------------------------------------------------------------------------------


def write_answer(answer: TaskAnswer) -> bytes:
    """An answer as bytes: JSON, with words for losses that are not finite."""
    return json.dumps(spelled(answer.model_dump(by_alias=True, exclude_unset=True))).encode()


def read_answer(kind: type[AnswerT], data: bytes, what: str, longest: int | None = None) -> AnswerT:
    """An answer, of which every field has its type and its range, and which is `what` in an error's words.

    It has at most as many bytes as its type says, or `longest` where that does not know.

    Raises:
        ParticipantError: It makes no sense.
    """
    with decoding(what, ParticipantError):
        found = serialization.read_json(data, most=kind.max_bytes if longest is None else longest)
        return checked(kind, found, what=what, error=ParticipantError)


def read_introduction(data: bytes, name: str, contract: Mapping[str, Any]) -> Introduction:
    """What the participant at the node of this name says of itself.

    Who it is, and whether it stands on the hub's contract, is looked at before another field.

    Raises:
        ContractError: It stands on another one.
        ParticipantError: It calls itself otherwise, or what it says makes no sense.
    """
    found = serialization.read_json(data, most=Introduction.max_bytes)
    if (own := found.get("participant")) != name:
        msg = f"the peer at {name!r} calls itself {shown(own)!r}: start it with the name of its node."
        raise ParticipantError(msg)
    check_contract(name, site=found.get("contract"), server=contract)
    return checked(Introduction, found, what=f"what {name!r} says of itself", error=ParticipantError)
