"""Sockets and keys: who may talk, who is talked to, and who waits for whom.

Belongs here: silent, slow and stopped callers, strangers' sockets, keys and folders. Does not: what is said
(test_frames).
"""

import os
import shutil
import socket
import stat
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from bounded import bounded, within
from sites import answering, check_socket

from llmchain_fed.errors import ConfigError, TransportError
from llmchain_fed.runtimes.messaging import channel, frames
from llmchain_fed.runtimes.nvflare.link import Link
from llmchain_fed.runtimes.site.policy import Audit, Policy
from llmchain_fed.runtimes.site.server import SiteServer

ROOT = os.geteuid() == 0


class Echo:
    def handle(self, op, payload):
        return payload

    def give_up(self):
        pass

    def take_up(self):
        pass

    def obey(self, limits):
        pass


@pytest.fixture
def path(tmp_path_factory):
    """Where a site listens."""
    found = tmp_path_factory.mktemp("s") / "a.sock"
    threading.Thread(target=SiteServer(Echo(), Policy(), Audit(None)).serve, args=(found,), daemon=True).start()
    return answering(found)


def connected(path):
    """Somebody who connects and says nothing."""
    found = socket.socket(socket.AF_UNIX)
    found.connect(str(path))
    return found


# --- who waits for whom ---------------------------------------------------------------------------------------------


def test_callers_who_are_silent_or_stop_in_the_middle_block_nobody(path):
    strangers = [connected(path) for _ in range(40)]
    for number, stranger in enumerate(strangers):
        stranger.sendall([b"", b"\x00", struct.pack("!I", 64), struct.pack("!I", 64) + bytes(30)][number % 4])
    began = time.monotonic()
    for _ in range(3):
        check_socket(path)
    assert time.monotonic() - began < 3
    for stranger in strangers:
        stranger.close()


def test_when_all_places_are_taken_the_oldest_that_shows_no_key_gives_up_its_own(path):
    strangers = [connected(path) for _ in range(channel._MOST_CALLERS + 5)]
    time.sleep(0.3)
    check_socket(path)
    strangers[0].settimeout(3)
    assert strangers[0].recv(200)[4:] != b""  # the challenge
    assert strangers[0].recv(1) == b"", "the oldest was sent away"
    for stranger in strangers:
        stranger.close()


def test_a_handshake_has_an_end_however_slowly_it_comes(path, monkeypatch):
    monkeypatch.setattr(channel, "HANDSHAKE", 0.5)
    with connected(path) as stranger:
        stranger.settimeout(3)
        began = time.monotonic()
        closed = False
        while not closed and time.monotonic() - began < 3:
            try:
                stranger.sendall(b"\x00")
                time.sleep(0.1)
            except OSError:
                closed = True
        assert closed
        assert time.monotonic() - began < 2


def test_the_driver_is_not_blocked_either(tmp_path_factory):
    path = tmp_path_factory.mktemp("l") / "hub.sock"
    link = Link(path)
    try:
        strangers = [connected(path) for _ in range(20)]
        with frames.dial(path):  # has the key, and is silent
            bridge = frames.dial(path)
            bridge.send_bytes(frames.pack({"run": "r", "sites": ["a"]}))
            assert link.wait(3.0) == ["a"]
        bridge.close()
        for stranger in strangers:
            stranger.close()
    finally:
        link.close()
    assert not path.exists()
    assert not frames.key_path(path).exists()


@bounded(seconds=20, megabytes=64)
def test_a_message_that_is_announced_too_large_takes_no_memory_and_no_time():
    ours, theirs = socket.socketpair()
    with channel.Channel(ours) as receiving, theirs:
        theirs.sendall(struct.pack("!I", 2**32 - 1))
        with within(2), pytest.raises(OSError, match="4,294,967,295 bytes was announced where at most 100"):
            receiving.recv_bytes(100, 1.0)
    ours, theirs = socket.socketpair()
    with channel.Channel(ours) as receiving, theirs:
        theirs.sendall(struct.pack("!I", 100) + b"x")
        with within(2), pytest.raises(TimeoutError):
            receiving.recv_bytes(100, 0.2)
    ours, theirs = socket.socketpair()
    with channel.Channel(ours) as sending, theirs, within(2), pytest.raises(TimeoutError):
        sending.send_bytes(bytes(2**22), 0.2)  # nobody takes it


def test_messages_of_any_size_go_through():
    ours, theirs = socket.socketpair()
    with channel.Channel(ours) as a, channel.Channel(theirs) as b:
        for size in (0, 1, 4, 70_000, 3 * 2**20):
            data = os.urandom(size)
            sender = threading.Thread(target=a.send_bytes, args=(data, 5.0))
            sender.start()
            assert b.recv_bytes(size, 5.0) == data
            sender.join()
        a.close()
        with pytest.raises(EOFError):
            b.recv_bytes(10, 1.0)


# --- who is talked to -----------------------------------------------------------------------------------------------


def test_who_listens_without_the_key_is_told_nothing(path, tmp_path):
    """Another process of this account has put its socket there; the key is the true one's."""
    said = []
    place = tmp_path / "x.sock"
    impostor = socket.socket(socket.AF_UNIX)
    impostor.bind(str(place))
    place.chmod(0o600)
    shutil.copy(frames.key_path(path), frames.key_path(place))
    frames.key_path(place).chmod(0o600)
    impostor.listen()

    def hear():
        for _ in range(2):  # a key that is not taken is read once more
            other, _ = impostor.accept()
            with other:
                other.sendall(struct.pack("!I", 32) + bytes(32))
                said.append(other.recv(1000))
                other.sendall(struct.pack("!I", 32) + bytes(32))
                said.append(other.recv(1000))

    threading.Thread(target=hear, daemon=True).start()
    with pytest.raises(TransportError, match="who listens there has another key"):
        frames.ask(place, b"secret content")
    impostor.close()
    assert b"secret content" not in b"".join(said)


def test_a_proof_cannot_be_handed_back_to_who_gave_it():
    assert channel._proof(b"k", b"dials", b"a", b"b") != channel._proof(b"k", b"listens", b"a", b"b")


@pytest.mark.skipif(not ROOT, reason="only root can give a file to another account")
@pytest.mark.parametrize("whose", ["socket", "key"])
def test_a_socket_or_key_of_another_account_is_not_talked_to(whose, path):
    os.chown(path if whose == "socket" else frames.key_path(path), 65534, 65534)
    with pytest.raises(TransportError, match="socket and key do not both belong to this account"):
        frames.dial(path)


@pytest.mark.skipif(not ROOT, reason="only root can give a folder to another account")
def test_a_folder_of_another_account_has_no_socket_of_ours(path):
    os.chown(path.parent, 65534, 65534)
    with pytest.raises(TransportError, match="belongs to another account"):
        frames.dial(path)
    with pytest.raises(
        ConfigError, match=r"belongs to another account\. Use a folder that only this account can write"
    ):
        frames.listen(path.parent / "b.sock")
    assert not (path.parent / "b.sock").exists()


def test_a_folder_that_others_can_write_to_is_refused_unless_it_is_sticky(path):
    for mode, refused in ((0o777, True), (0o1777, False), (0o757, True), (0o755, False)):
        path.parent.chmod(mode)
        if not refused:
            check_socket(path)
            continue
        with pytest.raises(TransportError, match="other accounts can write to"):
            frames.dial(path)
        with pytest.raises(ConfigError, match="other accounts can write to"):
            frames.listen(path.parent / "b.sock")
    above = path.parent / "open" / "inner"
    above.mkdir(parents=True)
    above.parent.chmod(0o777)
    with pytest.raises(ConfigError, match=r"other accounts can write to .*open"):
        frames.listen(above / "b.sock")


def test_a_key_that_others_can_read_is_none(path):
    frames.key_path(path).chmod(0o644)
    with pytest.raises(TransportError, match="socket or key is open to other accounts"):
        frames.dial(path)


@pytest.mark.parametrize("what", ["link", "pipe", "folder", "short", "long", "none", "device"])
def test_what_lies_in_the_place_of_a_key_and_is_none(what, path):
    key = frames.key_path(path)
    kept = key.read_bytes()
    key.unlink()
    match what:
        case "link":
            (key.parent / "elsewhere").write_bytes(kept)
            key.symlink_to(key.parent / "elsewhere")
        case "pipe":
            os.mkfifo(key, 0o600)
        case "folder":
            key.mkdir(0o700)
        case "short":
            key.write_bytes(b"x")
            key.chmod(0o600)
        case "long":
            key.write_bytes(bytes(10**6))
            key.chmod(0o600)
        case "device":
            key.symlink_to("/dev/zero")
    with within(3), pytest.raises(TransportError, match="nobody answers at"):
        frames.dial(path)


def test_what_lies_in_the_place_of_a_socket_and_is_none(path):
    link = path.with_name("b.sock")
    link.symlink_to(path)
    shutil.copy(frames.key_path(path), frames.key_path(link))
    with pytest.raises(TransportError, match="it is no socket"):
        frames.dial(link)
    with pytest.raises(ConfigError, match="is there and is no socket"):
        frames.listen(link)
    link.unlink()
    link.symlink_to(path.with_name("nowhere"))
    with pytest.raises(ConfigError, match="is there and is no socket"):
        frames.listen(link)
    assert not path.with_name("nowhere").exists()


# --- beginning and ending -------------------------------------------------------------------------------------------


def test_of_several_who_begin_to_listen_at_once_one_is_found_with_its_own_key(tmp_path):
    place = tmp_path / "a.sock"
    found, start = [], threading.Barrier(6)

    def begin():
        start.wait()
        with suppress(ConfigError):
            found.append(frames.listen(place))

    threads = [threading.Thread(target=begin) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    serving = [threading.Thread(target=listener.serve, args=(lambda c: c.close(),)) for listener in found]
    for thread in serving:
        thread.start()
    with frames.dial(place):
        pass
    for listener in found:
        listener.close()
    for thread in serving:
        thread.join()


def test_a_process_that_ends_leaves_the_socket_and_key_of_the_one_after_it(tmp_path):
    place = tmp_path / "a.sock"
    former = frames.listen(place)
    former._socket.close()  # stopped listening, and cleans up only later
    later = frames.listen(place)
    former.close()
    assert place.exists()
    assert frames.key_path(place).exists()
    assert stat.S_IMODE(place.stat().st_mode) == stat.S_IMODE(frames.key_path(place).stat().st_mode) == 0o600
    later.close()
    assert [p.name for p in tmp_path.iterdir()] == []


def test_both_are_for_this_account_alone_under_any_umask(tmp_path):
    former = os.umask(0)
    try:
        listener = frames.listen(tmp_path / "a.sock")
    finally:
        os.umask(former)
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    listener.close()
    assert Path(tmp_path).is_dir()
