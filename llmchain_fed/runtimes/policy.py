"""Policy: what a site lets others ask of it. Audit: the file in which every request is written down.

Knows options, operations and a file. Knows nothing about models or sockets. The site's operator owns both.
"""

from __future__ import annotations

import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from llmchain_fed._config import FrozenConfig, read_options
from llmchain_fed.errors import ConfigError, ContractError, DeadlineError, PolicyError, TransportError
from llmchain_fed.federated.runtime import Operation

# Their messages name options, digests and times, never a value of an example.
_HARMLESS = (ConfigError, ContractError, DeadlineError, PolicyError, TransportError)


class Policy(FrozenConfig):
    """What a site allows. The default lets it take part and lets no text of its examples leave.

    >>> Policy(max_rounds=20)
    Policy(max_rounds=20)
    """

    operations: tuple[Operation, ...] = ("hello", "train", "evaluate", "stop")
    """which operations are answered; `personal_state` lets the hub keep this site's optimizer and place in the data"""
    max_rounds: int | None = Field(default=None, ge=0)
    """trainings this peer does before it must be started again; None is no limit"""
    max_payload_bytes: int = Field(default=2**30, ge=1)
    """bytes of a request: global weights of a larger model need more"""
    samples: int = Field(default=0, ge=0)
    """held-out examples that may leave with the chain's answers, for the history and its report"""
    error_messages: bool = False
    """whether the messages of errors may leave, which can quote an example; else their type does, and the rest stays in
    the audit file"""

    @classmethod
    def from_file(cls, path: str | Path) -> Policy:
        """Reads a policy from YAML.

        Raises:
            ConfigError: No such file, no mapping, an unknown option or a value out of range.
        """
        return cls(**read_options(path, "policy"))

    def check(self, op: str, num_bytes: int, rounds: int) -> None:
        """Makes sure that a request is allowed.

        Args:
            op: What is asked.
            num_bytes: Size of its payload.
            rounds: Trainings done so far.

        Raises:
            PolicyError: It is not, and why.
        """
        if op not in self.operations:
            msg = f"this site does not answer {op!r:.40}; its policy allows {', '.join(self.operations) or 'nothing'}."
            raise PolicyError(msg)
        if num_bytes > self.max_payload_bytes:
            msg = f"{num_bytes:,} bytes are more than the {self.max_payload_bytes:,} this site's policy takes."
            raise PolicyError(msg)
        if op == "train" and self.max_rounds is not None and rounds >= self.max_rounds:
            msg = f"this site has trained {rounds} times; its policy allows {self.max_rounds}."
            raise PolicyError(msg)

    def told(self, error: BaseException) -> dict[str, str]:
        """What of an error may leave: its type, and its message where that can quote no example or may."""
        shown = self.error_messages or isinstance(error, _HARMLESS)
        message = str(error) if shown else "the site keeps the message to itself; its audit file has it"
        return {"type": type(error).__name__, "message": message}


class Audit:
    """Appends one JSON line per request to a file: when, what, how large, how it ended.

    Args:
        path: The file; made for this account alone. None keeps no audit.

    Raises:
        ConfigError: It cannot be written.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._path = Path(path) if path is not None else None
        self._lock = threading.Lock()
        if self._path is not None:
            try:
                os.close(self._open())
            except OSError as error:
                msg = f"the audit file {self._path} cannot be written: {error}."
                raise ConfigError(msg) from error

    def write(self, **entry: Any) -> None:
        """Writes one line, and it is on the disk before this returns.

        Raises:
            PolicyError: It cannot be written: what is not written down is not answered.
        """
        if self._path is None:
            return
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds")} | entry)
        try:
            with self._lock, os.fdopen(self._open(), "a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            msg = f"the audit file cannot be written ({type(error).__name__}), and without it nothing is answered."
            raise PolicyError(msg) from error

    def _open(self) -> int:
        """A descriptor to append with. Made anew each time, so that a file moved away by log rotation stays whole."""
        assert self._path is not None
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        if os.fstat(descriptor).st_mode & 0o077:  # it quotes errors, which can quote examples
            os.fchmod(descriptor, 0o600)
        return descriptor
