"""The round loop: one round from top to bottom, and how it is closed. Each line is a step that has its own module.

Knows the order of the steps. Knows nothing about how one is done: not where anybody trains, nor what rules do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from llmchain_fed.errors import QuorumError, UpdateRefusedError
from llmchain_fed.federated.history import ParticipantRecord, RoundRecord
from llmchain_fed.federated.server.divergence import nothing_finite
from llmchain_fed.federated.server.evaluation import Measurement
from llmchain_fed.federated.server.round import OpenRound
from llmchain_fed.federated.server.server import Server
from llmchain_fed.untrusted import printable
from llmchain_fed.updates import serialization

UNUSABLE = "the updates of this round cannot be combined"


def run_round(
    server: Server,
    begins: Callable[[int, tuple[str, ...]], object],
    ends: Callable[[RoundRecord], object],
) -> RoundRecord:
    """One round with those who are there.

    `begins` is told its number, counted from 1, and who will be asked; `ends` of the round once it has happened: it
    writes the checkpoint and tells those who watch.

    Raises:
        QuorumError: Too few updates are usable; nothing has changed.
    """
    started = time.perf_counter()
    chosen = server.client_manager.sample(server.settings, server.round)
    begins(server.round + 1, tuple(chosen))
    before = server.measure(server.round)  # held-out losses under the weights as they are
    opened = server.begin()  # the global state is published: participants are sent what they lack of it
    for arrival in server.dispatcher.train(server.task(opened), chosen, opened.largest_update(chosen)):
        record = opened.accept(arrival)  # verified, decoded and added to the rule's collection, or why not
        server.dispatcher.judge(arrival, record)  # who is in and out, and why
    try:
        done = close_round(server, opened, started, before, server.idle(opened))
    except QuorumError:
        server.diverged = nothing_finite(opened.records)
        raise
    ends(done)
    return done


def close_round(
    server: Server,
    opened: OpenRound,
    started: float,
    before: Measurement | None,
    idle: Mapping[str, ParticipantRecord],
) -> RoundRecord:
    """Aggregates what has arrived and loads it; what fails or is interrupted puts weights and server optimizer back.

    Updates that cannot be combined, each of which was finite for itself, leave the weights as they were: the round
    counts, and its record says why.

    It began at `started`, by `time.perf_counter`; `idle` are the records of those who were not asked.

    Raises:
        QuorumError: Too few updates are usable; nothing has changed.
    """
    server.diverged = None
    with server.restoring() as former:
        try:
            combined = opened.aggregate(server.settings.config.quorum, server.ask)  # updates → one of their kind
            new, unusable = server.moved(opened, former.state, combined), []  # the server optimizer
        except UpdateRefusedError as error:
            former.undo()
            new, unusable = former.state, [f"{UNUSABLE} ({printable(error, 300)}): the weights are as before"]
        record = server.record_of(opened, idle)
        former.leave(new)  # loaded into the chain
        after = server.measure(server.round + 1) if before else None
        server.evaluator.fill(record, before, after, server.history)
        record.notes += unusable
        record.update_norm = serialization.distance(new.values, former.state.values)
        record.weights_version = server.model.weights_version
        diverged = server.diverges(record, after)
        record.seconds = time.perf_counter() - started
    server.complete(record, diverged)
    return record
