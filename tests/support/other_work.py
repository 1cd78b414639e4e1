"""One client that does something else when it is asked: it fails, is interrupted, or lies."""

from dataclasses import replace

from llmchain_fed.federated.client import operations


def does(monkeypatch, peer, work, op="train"):
    """`work(client, task, state)` takes the place of what this client does; the others work as they did."""
    honest = operations.task_type(op)

    def instead(client, *asked):
        return work(client, *asked) if client is peer else honest.work(client, *asked)

    monkeypatch.setitem(operations._TYPES, op, replace(honest, work=instead))
