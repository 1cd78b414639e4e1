"""What a participant may run on its own machine in place of the bridge: it gives orders to the other sites of its job.

Lies as `sitecustomize.py` in the path of that site's engine, so it takes no listing of classes to get in: the machine
is the attacker's. What the others answer is written to the file that ATTACK_LOG names.
"""

import json
import os
import threading

from nvflare.collab import collab

from llmchain_fed.runtimes.messaging import frames
from llmchain_fed.runtimes.nvflare import bridge

honest = bridge.SiteBridge.exchange
once = threading.Lock()


def orders(call):
    """Frames in the hub's name; `call` is the hub's own call, which all sites are told alike."""
    for op in ("train", "evaluate", "hello", "stop", "personal_state"):
        head = {"do": "put", "call": f"evil-{op}", "op": op, "offset": 0, "total": 2}
        yield f"put {op}", frames.pack(head, b"{}")
    yield "put over the hub's", frames.pack({"do": "put", "call": call, "op": "stop", "offset": 0, "total": 2}, b"{}")
    yield "poll", frames.pack({"do": "poll", "call": call, "wait": 0.0})
    yield "get", frames.pack({"do": "get", "call": call, "offset": 0})
    yield "drop", frames.pack({"do": "drop", "call": call})
    yield "ping", frames.pack({"do": "ping"})
    yield "in the hub's name", frames.pack({"do": "carry", "caller": "server"}, frames.pack({"do": "ping"}))
    yield "a note", frames.pack({"do": "refused", "caller": "server", "bytes": 1, "count": 1})
    yield "no frame", b"\xff" * 64
    yield "no bytes", {"do": "ping"}


def attack(call):
    found = []
    for what, frame in orders(call):
        answers = collab.other_clients(timeout=10).exchange(frame)
        for name, answer in answers:
            found.append([what, name, answer.decode("latin-1") if isinstance(answer, bytes) else repr(answer)])
        found += [[what, name, f"raised {error}"] for name, error in getattr(answers, "failures", {}).items()]
    with open(os.environ["ATTACK_LOG"], "w") as file:
        json.dump(found, file)


@collab.publish
def exchange(self, frame: bytes, seconds: float = 60.0) -> bytes:
    head, _ = frames.read(frame)
    if head.get("op") == "train" and once.acquire(blocking=False):
        attack(head["call"])  # while the hub lets both train
    return honest(self, frame, seconds)


bridge.SiteBridge.exchange = exchange
