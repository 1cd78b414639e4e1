"""Replication: the processes of one script end every call with the same weights, history and result.

Knows the hub's state as bytes and the runtime that carries it. Knows nothing about what is done in between.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import Field

from llmchain_fed.data.report import DataReport
from llmchain_fed.errors import FederationError
from llmchain_fed.federated.history import History
from llmchain_fed.federated.history_data import MOST_PARTICIPANTS, Count, Name
from llmchain_fed.federated.protocol.global_state import GlobalState, named, parted
from llmchain_fed.federated.server.server import Server
from llmchain_fed.untrusted import Strict, checked, decoding
from llmchain_fed.updates import serialization


class Replication:
    """Lets one process work while the others help, and then stand where it does, of which `adopted` is told there."""

    def __init__(self, server: Server, adopted: Callable[[], object]) -> None:
        self._server, self._adopted = server, adopted
        self._result: Any = None

    def do(self, work: Callable[[], Any]) -> Any:
        """What `work`, called by the leading process only, gives: JSON, on every process.

        Raises:
            FederationError: On the others, where the work failed or its process is gone.
        """
        runtime = self._server.runtime
        if not runtime.replicated:
            return work()
        if not runtime.leads:
            runtime.follow(self._adopt)
            return self._result
        try:
            found = work()
        except BaseException as error:
            runtime.publish(self._outcome(), error)
            raise
        runtime.publish(self._outcome(found))
        return found

    def _outcome(self, result: Any = None) -> bytes:
        """What the other processes need in order to stand where this one does."""
        server, state = self._server, GlobalState.of(self._server.model)
        header = {
            "round": server.round,
            "history": json.loads(server.history.to_json()),
            "reports": {name: asdict(report) for name, report in server.data_reports.items()},
            "result": result,
        }
        return serialization.pack({**state.values, **named(state.remainder)}, header)

    def _adopt(self, outcome: bytes) -> None:
        what = "what the leading process says it did"
        with decoding(what, FederationError):
            header, infos = serialization.inspect(outcome, max_bytes=len(outcome))
            found = checked(_Outcome, header, what=what, error=FederationError)
            history = History.from_dict(found.history, what=what, error=FederationError)
            reports = {name: DataReport(**report) for name, report in found.reports.items()}
            state = GlobalState(*parted(serialization.values(outcome, infos)))
        state.load(self._server.model)
        self._server.round, self._server.history, self._server.data_reports = found.round, history, reports
        self._result = found.result
        self._adopted()


class _Outcome(Strict):
    """What one process tells the others, beside the weights."""

    round: Count
    history: Any
    reports: Annotated[
        dict[Name, Annotated[dict[str, Count], Field(max_length=64)]], Field(max_length=MOST_PARTICIPANTS)
    ]
    result: Any
