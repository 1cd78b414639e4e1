"""A site without an engine, and the way to it over a real UNIX socket."""

import json
import socket
import threading
import time
from contextlib import suppress

from llmchain_fed import TrainingConfig
from llmchain_fed.errors import (
    DeadlineError,
    TransportError,
)
from llmchain_fed.federated.client.operations import operations
from llmchain_fed.federated.runtime import Runtime
from llmchain_fed.runtimes.messaging import frames, heads
from llmchain_fed.runtimes.messaging.chunked_calls import ChunkedCalls
from llmchain_fed.runtimes.nvflare import kits
from llmchain_fed.runtimes.nvflare.session import EngineSession
from llmchain_fed.runtimes.site.policy import Policy

TRAINING = TrainingConfig(learning_rate=5e-3, batch_size=4, epochs=2)


OPEN = Policy(operations=operations(), samples=9, error_messages=True)


class Echo:
    """A peer that gives back what it is sent, and can be told to be slow or to fail."""

    def __init__(self):
        self.calls, self.given_up = [], threading.Event()

    def handle(self, op, payload):
        self.calls.append((op, len(payload)))
        if payload == b"fail":
            raise ValueError("the example says: Page verrouillée")
        if payload.startswith(b"slow"):
            for _ in range(400):
                if self.given_up.is_set():
                    raise DeadlineError("nobody waits")
                time.sleep(0.01)
        return payload

    def give_up(self):
        self.given_up.set()

    def take_up(self):
        self.given_up.clear()

    def obey(self, limits):
        pass


class Sockets:
    """Carries frames straight to sites' sockets: what the engine does, without the engine."""

    def __init__(self, paths):
        self.paths, self.frames = paths, 0

    def __call__(self, nodes, frame, seconds):
        answers = {}

        def ask(node):
            try:
                answers[node] = frames.ask(self.paths[node], frame)
            except TransportError as error:
                answers[node] = error

        threads = [threading.Thread(target=ask, args=(n,)) for n in nodes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.frames += 1
        return [(n, answers[n]) for n in nodes]


class SocketTransport(Runtime):
    def __init__(self, paths, patience=10.0):
        self.exchange = Sockets(paths)
        self.calls = ChunkedCalls(self.exchange, patience)

    def nodes(self):
        return list(self.exchange.paths)

    def call(self, op, nodes, payload, timeout=None):
        return self.calls.call(op, nodes, payload, timeout)


def check_socket(path):
    """Makes sure that somebody answers at `path`."""
    reply, _ = heads.read_reply(frames.ask(path, frames.pack({"do": "ping"})))
    assert not isinstance(reply, heads.Failed), reply


def wait_for_hub(kit):
    """Until the hub's port answers."""
    until = time.monotonic() + 60
    while True:
        with suppress(OSError), socket.create_connection(kits.address(kit), timeout=1):
            return
        assert time.monotonic() < until, "no hub answers: see nvflare.log in its kit"
        time.sleep(0.2)


def wait_for_sites(admin, names):
    """Until the hub's engine knows the engines of all these sites, however slow the machine is that starts them."""
    session, until = EngineSession(admin), time.monotonic() + 120
    try:
        while missing := set(names) - connected(session):
            assert time.monotonic() < until, f"{missing} never came: see engine.log in their kits"
            time.sleep(0.2)
    finally:
        session.close()


def connected(session):
    """The sites that the hub's engine knows; none while it does not answer yet."""
    try:
        return session.connected().keys()
    except TransportError:
        return set()


def answering(path):
    """`path`, once somebody answers there: a socket has its name before it has its key and before anybody listens."""
    until = time.monotonic() + 30
    while True:
        try:
            check_socket(path)
            return path
        except TransportError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def audit(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def task(**header):
    """A train request whose safetensors metadata contains `header`."""
    text = json.dumps({"__metadata__": {"llmchain_fed": json.dumps(header) if isinstance(header, dict) else header}})
    return len(text).to_bytes(8, "little") + text.encode()
