"""Site: one participant that answers hubs from a process of its own, under its policy.

Knows a chain, a participant, a policy and where it is written down what was asked. Knows nothing of frames (`server`)
or of the engine that brings them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.participant import Participant
from llmchain_fed.federated.target import Target
from llmchain_fed.runtimes.site.log import SiteLog
from llmchain_fed.runtimes.site.policy import Audit, Policy
from llmchain_fed.runtimes.site.server import SiteServer
from llmchain_fed.training.metrics import Function, Metric, checked_name
from llmchain_fed.untrusted import one_line


class Site:
    """A participant behind a UNIX socket: what `llmchain-fed peer` runs, for a script of one's own.

    `Site(chain, participant, policy=Policy(max_rounds=20)).serve("peer.sock")` loads nothing anew: the chain is the
    participant's own, and what it learns from others is not kept in it.

    Args:
        chain: What is trained: a chain, an LLM or a model, as for `FederatedAveraging`.
        participant: Whose examples, which never leave this process. They are read now.
        policy: What may be asked, by operations and limits; None is the default policy.
        metrics: Name → function, as in `Metric`, of what this site can measure beside the built-in names, or in their
            place; only those that the policy's `metrics` lists are told.
        audit: Where every request is written down; None is `<socket>.audit.jsonl`.
        say: Is told in a line what happens.

    Raises:
        ConfigError: The audit file cannot be written, the participant's own options are not valid, or a metric is no
            function with a name.
        DataError: The examples cannot be used.
    """

    def __init__(
        self,
        chain: Any,
        participant: Participant,
        *,
        policy: Policy | None = None,
        metrics: Mapping[str, Function] | None = None,
        audit: Audit | str | Path | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        if not isinstance(policy, Policy | None) or not isinstance(participant, Participant):
            msg = f"a site has a Participant and a Policy, got {participant!r:.80} and {policy!r:.80}. Pass "
            raise ConfigError(msg + "Participant(name, examples), and Policy(…) or Policy.from_file(path).")
        self.policy = policy or Policy()
        self._audit = Audit(audit, say) if isinstance(audit, (str, Path)) else audit
        self._say = say
        target = chain if isinstance(chain, Target) else Target.of(chain)
        own = {checked_name(name): Metric(fn, name=name).fn for name, fn in (metrics or {}).items()}
        self.client = Client(target, participant, None, metrics={n: fn for n, fn in own.items() if callable(fn)})
        self.examples = self.client.data.inspect()
        """what became of the examples, in a line"""

    def serve(self, socket: str | Path) -> None:
        """Answers at a socket until the process ends, or whatever is raised here ends it.

        Raises:
            ConfigError: The socket, or the audit file beside it, cannot be made.
        """
        audit = self._audit or Audit(Path(socket).with_name(Path(socket).name + ".audit.jsonl"), self._say)
        self.server(audit).serve(socket)

    def server(self, audit: Audit) -> SiteServer:
        """What answers frames, for another way to bring them than a socket."""
        client = self.client
        about = {
            "name": one_line(client.name, 250),
            "examples": client.data.count(),
            "held_out": client.data.holds_out,
            "audit": one_line(audit.path.absolute(), 4000) if audit.path is not None else None,
            "contract": client.target.contract(),
        }
        return SiteServer(client, self.policy, audit, SiteLog(self._say, about))
