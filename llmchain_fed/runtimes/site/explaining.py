"""Explaining: what a policy lets happen, and what it refuses, in sentences.

Knows a policy's options. Knows nothing of files or of how a policy is enforced.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmchain_fed.federated.client.operations import operations
from llmchain_fed.runtimes.site.policy import Policy

LIMITATIONS = (
    "What no policy prevents: updates can leak what they were trained on. A hub chooses the weights that training "
    "starts from, which can make an update depend on few of its examples, and compares many updates over parts of the "
    "examples that its seed, batch size or max_length choose.",
    "The rule's name is the hub's word: what is enforced is which tensors leave. What the hub does with them, and to "
    "whom it shows them, is not seen here.",
    "Losses and counts tell something of the examples too: how well the weights that were sent know them.",
)


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
