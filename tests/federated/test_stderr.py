"""What cannot be written to a screen, a log or a pipe costs that line and nothing else.

Belongs here: everything of ours that writes to stderr or stdout beside a federation. Does not: what is written.
"""

import errno
import os
import sys
import threading

import pytest
from tiny import PAIRS

from llmchain_fed import FederatedAveraging
from llmchain_fed.cli import console
from llmchain_fed.federated.reporting import lines
from llmchain_fed.runtimes import process_group
from llmchain_fed.tracking.status_file import StatusFile


class Full:
    """A stream on a full disk; one that was closed."""

    encoding = "utf-8"

    def __init__(self, error, terminal=False):
        self._error, self._terminal = error, terminal

    def write(self, _):
        raise self._error()

    def flush(self):
        raise self._error()

    def isatty(self):
        return self._terminal


def full():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(params=[full, BrokenPipeError, ValueError], ids=["full", "pipe", "no"])
def lost(request, monkeypatch):
    for name in ("stderr", "stdout"):
        monkeypatch.setattr(sys, name, Full(request.param))


def test_lines_of_commands_and_ranks(lost):
    console.say("x")
    console.error_line(OSError("x"))
    process_group.say("a line of a rank")
    lines.show("a history")


@pytest.mark.parametrize("terminal", [False, True], ids=["log", "terminal"])
def test_a_federation_goes_on_and_its_status_file_too(terminal, make_chain, tmp_path, monkeypatch):
    pytest.importorskip("rich")
    from llmchain_fed import ConsoleTable

    screen = Full(full, terminal)
    status = StatusFile(tmp_path / "status.json", rounds=1)
    shares = {"a": PAIRS[:6], "b": PAIRS[6:]}
    fed = FederatedAveraging(
        make_chain(lora=True), participants=shares, samples=0, callbacks=[status, ConsoleTable(screen)], lr=0.01
    )
    monkeypatch.setattr(sys, "stderr", screen)
    with status:
        fed.fit(1)
    assert len(fed.history) == 1
    monkeypatch.setattr("llmchain_fed.tracking.status_file.write_whole", lambda *_, **__: (_ for _ in ()).throw(full()))
    before = threading.active_count()
    with StatusFile(tmp_path / "status.json", rounds=1) as again:
        again.note("x")
        thread = again._thread
        again._wake.set()
        thread.join(0.3)
        assert thread.is_alive(), "it goes on"
    assert threading.active_count() <= before
