"""NVFlare: the runtime across organisations. Calls the sites' peers through jobs of the engine that it keeps running.

Knows sites, jobs and sliced calls. Knows nothing of models or rounds. The loop never notices that a job was replaced:
peers keep their models and the call they are at, and the driver goes on with it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmchain_fed.errors import ConfigError, FederationError, TransportError
from llmchain_fed.federated.runtime import Operation, Payload, Runtime
from llmchain_fed.runtimes.aside import within
from llmchain_fed.runtimes.messaging.chunked_calls import ChunkedCalls
from llmchain_fed.runtimes.names import check_name
from llmchain_fed.runtimes.nvflare import certificates
from llmchain_fed.runtimes.nvflare.gathering import Sites, in_the_hubs_words
from llmchain_fed.runtimes.nvflare.jobs import Jobs
from llmchain_fed.runtimes.nvflare.link import UnreachedError
from llmchain_fed.runtimes.nvflare.session import EngineSession
from llmchain_fed.runtimes.nvflare.supervision.reaching import hindrance

# seconds of `close`: a hub or site that is frozen keeps nobody from stopping, eight with the farewell of a call
_PEERS, _JOBS, _SESSION = 2.0, 2.0, 1.0
_CHECK = 9.0  # seconds of `check`


class NVFlare(Runtime):
    """Participants at several organisations, each behind its own NVFlare site and its own peer process.

    `FederatedAveraging(chain, runtime=NVFlare("kits/admin", sites=["org-a", "org-b"])).fit(3)` on the hub's machine,
    where its engine runs. Mutual TLS by the engine; what travels is JSON and update bytes, in slices, and no
    code. A site that is cut off is absent and asked again when it is back; the hub's engine may be killed and restarted
    within `recovery` seconds, and this process too: the job waits for it.

    Args:
        admin: Folder of the administrator's kit.
        sites: Their names, which are the participants' names.
        socket: Where the job finds this process; by default a path that follows from `admin`.
        patience: seconds without a sign of life after which a site counts as absent.
        recovery: seconds within which the engine must be back after it went away.
        startup: seconds to wait for all sites to connect before the first job, and before the next once all were lost;
            later ones join as they come. A site's engine says every four seconds that it is there and tries every ten
            to find a hub that was away, so whoever does not come within ten is ill or late, and others need not wait.
            While nobody is there at all, six times as long.
        say: Told in one line for whom this waits, how long at most, and what begins; nobody by default.

    Raises:
        ConfigError: No kit, no or doubled sites, or somebody listens at the socket.
        MissingExtraError: The extra `nvflare` is not installed.
    """

    def __init__(
        self,
        admin: str | Path,
        *,
        sites: Sequence[str],
        socket: str | Path | None = None,
        patience: float = 30.0,
        recovery: float = 120.0,
        startup: float = 10.0,
        say: Callable[[str], object] | None = None,
    ) -> None:
        if isinstance(sites, str) or not sites or len(set(sites)) < len(sites):
            msg = f"sites are the names of the participating sites, each once, got {sites!r}."
            raise ConfigError(msg)
        for name in sites:
            check_name(name)
        if not min(patience, recovery, startup) > 0:
            msg = f"patience, recovery and startup are positive numbers of seconds, got {patience, recovery, startup}."
            raise ConfigError(msg)
        self._admin = Path(admin).absolute()
        self._session = EngineSession(self._admin)
        self._sites = Sites([str(name) for name in sites])
        self._jobs = Jobs(
            self._session,
            Path(socket).absolute() if socket is not None else _socket_of(self._admin),
            self._sites,
            recovery=recovery,
            startup=startup,
            say=say or (lambda _: None),
        )
        self._calls = ChunkedCalls(self._jobs.exchange, patience, self._jobs.farewell)

    @property
    def jobs(self) -> int:
        """Jobs submitted: more than one says that the engine or a site was away."""
        return self._jobs.count

    def __repr__(self) -> str:
        return f"NVFlare({len(self.nodes())} sites ({', '.join(self.nodes()[:4])}), {self.jobs} jobs submitted)"

    def __enter__(self) -> NVFlare:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.close(over=kind is None)

    def check(self) -> None:
        """Makes sure that the administrator's kit can be used and that the hub's engine answers; within ten seconds.

        Raises:
            ConfigError: What has to be mended first: a certificate, a name, what answers at the hub's address.
            TransportError: What may pass: the engine is not started, or does not answer.
        """
        certificates.check(self._admin)
        until = time.monotonic() + _CHECK
        found = hindrance(self._admin)
        if found is not None and found.lasting:
            msg = f"{found.says}."
            raise ConfigError(msg)
        if found is not None:
            msg = f"the hub's engine is out of reach: {found.says}. Start it with `llmchain-fed engine`, then go on."
            raise TransportError(msg)
        try:
            within(max(until - time.monotonic(), 1.0), self._session.connected)
        except TimeoutError:
            msg = "the hub's engine is out of reach: it shakes hands, and does not answer its administrator."
            raise TransportError(msg) from None

    # --- the seam ---------------------------------------------------------------------------------------------------

    def nodes(self) -> list[str]:
        """The sites, whether they are connected now or not."""
        return list(self._sites.names)

    def expect(self, num_bytes: int, op: Operation = "train") -> None:
        """Says how large an answer to `op` may be from now on."""
        self._calls.expect(num_bytes, op)

    def call(
        self, op: Operation, nodes: Iterable[str], payload: Payload, timeout: float | None = None
    ) -> Iterator[tuple[str, bytes | Exception]]:
        """As `Runtime.call`; a site that is not connected is a `TransportError`, not awaited.

        Raises:
            FederationError: A node nobody knows.
        """
        names = list(nodes)
        for name in names:
            if name not in self._sites.names:
                msg = f"there is no site {name!r}. Known: {', '.join(self._sites.names)}."
                raise FederationError(msg)
        trouble, started = None, time.monotonic()
        try:
            self._jobs.find(names)
        except TransportError as error:
            trouble = str(error)
        there = [name for name in names if name in self._sites.there()]
        for name in names:
            if name not in there:
                why = trouble if trouble is not None and not self._sites.is_refused(name) else self._sites.why(name)
                yield name, TransportError(f"site {name!r} cannot be asked: {why}")
        left = max(timeout - (time.monotonic() - started), 0.0) if timeout is not None else None
        for name, answer in self._calls.call(op, there, payload, left):
            if isinstance(answer, TransportError):
                unreached = isinstance(answer, UnreachedError)
                answer = TransportError(str(in_the_hubs_words(self._session, name, answer)))  # of one kind for all
                self._sites.missed(name, str(answer), unreached=unreached)
            yield name, answer

    def close(self, *, over: bool = True) -> None:
        """Ends the jobs and closes session and socket; for good.

        Args:
            over: Whether the federation is, which peers are told: they forget where they stand. One that was stopped,
                or failed, may go on: a `with` block that ends by an error says nothing of the kind.
        """
        if over:
            with suppress(TimeoutError):
                within(_PEERS, self._tell_peers)
        with suppress(TimeoutError):
            within(_JOBS, self._jobs.close)
        with suppress(TimeoutError):
            within(_SESSION, self._session.close)

    def _tell_peers(self) -> None:
        calls = ChunkedCalls(self._jobs.farewell, _PEERS, self._jobs.farewell)
        with suppress(FederationError):
            for _ in calls.call("stop", self._sites.there(), b"{}", _PEERS):
                pass


def _socket_of(admin: Path) -> Path:
    """A short path that is the same whenever this kit's driver starts; `frames.listen` sees to whose folder it is."""
    folder = Path(tempfile.gettempdir()) / f"llmchain_fed-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{hashlib.sha256(str(admin).encode()).hexdigest()[:16]}.sock"
