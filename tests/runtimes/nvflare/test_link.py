"""The driver's end of the bridge, and the bridge, over real sockets and without an engine.

Belongs here: frames between driver and bridge, interruptions, intruders. Does not: jobs and sites (test_nvflare).
"""

import json
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from llmchain_fed.errors import TransportError
from llmchain_fed.runtimes.messaging import frames, heads
from llmchain_fed.runtimes.nvflare import bridge as bridges
from llmchain_fed.runtimes.nvflare import job
from llmchain_fed.runtimes.nvflare.link import JobLostError, Link, UnreachedError


class Collab:
    """The engine's call interface with two sites in memory."""

    def __init__(self, answer):
        self.is_aborted, self.answer = False, answer
        self.clients = [SimpleNamespace(name="a"), SimpleNamespace(name="b")]

    def get_clients(self, names):
        def group(timeout, blocking):
            def exchange(frame, seconds):
                answers = Answers((n, self.answer(n, frame)) for n in names if n != "b")
                answers.failures = {"b": TimeoutError("it is gone")} if "b" in names else {}
                return answers

            return SimpleNamespace(exchange=exchange)

        return group


class Answers(list):
    failures: dict


@pytest.fixture
def connect(tmp_path_factory, monkeypatch):
    """`connect(answer)`: a Link whose bridge carries frames to `answer(name, frame)`."""
    ends = []

    def start(answer, run="r"):
        collab = Collab(answer)
        monkeypatch.setattr(bridges, "collab", collab)
        start.path = tmp_path_factory.mktemp("l") / "hub.sock"
        link = Link(start.path)
        hub = bridges.HubBridge(str(start.path), run)
        thread = threading.Thread(target=bridges.HubBridge.run, args=(hub,), daemon=True)
        thread.start()
        assert link.wait(5.0) == ["a", "b"]
        ends.append((link, thread, collab))
        return link

    start.ends = ends
    yield start
    for link, thread, collab in ends:
        link.close()
        collab.is_aborted = True
        thread.join(5)
        assert not thread.is_alive(), "the bridge's loop must end when the driver says stop"


def echo(name, frame):
    return frame


def test_frames_go_there_and_back_and_a_failed_site_is_one_error(connect):
    link = connect(echo)
    frame = frames.pack({"do": "ping"}, bytes(frames.SLICE))
    (a, answer), (_, error), (_, unknown) = link.exchange(["a", "b", "c"], frame, 5.0)
    assert (a, answer) == ("a", frame)
    assert isinstance(error, TransportError)
    assert str(error) == "its engine has been silent for 5 s."
    assert "it was not when this job began" in str(unknown)


def test_a_site_that_offers_another_bridge_is_its_own_trouble(connect):
    """The engine refuses the call to all of a group where one of it takes other arguments."""
    link = connect(echo)
    (_, _, collab) = connect.ends[0]
    inner = collab.get_clients

    def get_clients(names):
        def group(timeout, blocking):
            if "b" in names:
                msg = "function 'exchange' only supports 1 args"
                raise RuntimeError(msg)
            return inner(names)(timeout, blocking)

        return group

    collab.get_clients = get_clients
    (_, answer), (_, error) = link.exchange(["a", "b"], b"x", 5.0)
    assert answer == b"x"
    assert str(error) == "it offers another bridge than the hub asks: both need one version of llmchain-fed."
    assert link.exchange(["a"], b"y", 5.0) == [("a", b"y")], "the job goes on"


@pytest.mark.parametrize(
    ("raised", "wanted"),
    [
        (TypeError("takes 1 positional arguments but 2 were given"), "both need one version of llmchain_fed"),
        (RuntimeError("target a does not have method 'exchange'"), "both need one version of llmchain_fed"),
        (RuntimeError("app server has no client 'b'"), "it is not connected to the hub (app server has no client 'b')"),
        (OSError("cell is closed"), "it is not connected to the hub (cell is closed)"),
        (TimeoutError(), "its engine has been silent for 5 s"),
    ],
)
def test_a_call_that_cannot_be_begun_is_told_by_its_own_reason(connect, raised, wanted):
    link = connect(echo)
    (_, _, collab) = connect.ends[0]
    inner = collab.get_clients

    def get_clients(names):
        if "b" in names:
            raise raised
        return inner(names)

    collab.get_clients = get_clients
    (_, answer), (_, error) = link.exchange(["a", "b"], b"x", 5.0)
    assert (answer, type(error)) == (b"x", UnreachedError)
    assert wanted.replace("_fed", "-fed") in str(error).replace("_fed", "-fed")


def test_a_job_that_is_ended_while_sites_are_asked_is_no_sites_trouble(connect):
    link = connect(echo)
    (_, _, collab) = connect.ends[0]

    def get_clients(names):
        collab.is_aborted = True
        msg = "run is aborted"
        raise RuntimeError(msg)

    collab.get_clients = get_clients
    found = link.exchange(["a", "b"], b"x", 5.0)
    assert [type(error) for _, error in found] == [JobLostError] * 2, "another job is begun for them"


def test_where_all_jobs_are_lost_who_was_in_none_is_told_so(connect):
    link = connect(lambda name, frame: (_ for _ in ()).throw(EOFError))
    with link._changed:
        (bridge,) = link._bridges.values()
    bridge.channel.close()
    (_, lost), (_, never) = link.exchange(["a", "z"], b"x", 1.0)
    assert isinstance(lost, JobLostError)
    assert type(never) is UnreachedError, "nobody waits for a job with it"


class Peer:
    """Listens where a site's bridge asks, and keeps what it is asked."""

    def __init__(self, path):
        self.heard, self.listener = [], frames.listen(path)
        threading.Thread(target=self.listener.serve, args=(self.hear,), daemon=True).start()

    def hear(self, channel):
        with channel:
            self.heard.append(channel.recv_bytes(frames.MAX_OUTER, 5.0))
            channel.send_bytes(frames.pack({"state": "here"}), 5.0)


@pytest.fixture
def bridge_of_a_site(tmp_path, monkeypatch):
    """(call as whom with what → the head of the answer, the peer behind it)"""
    peer = Peer(tmp_path / "a.sock")
    monkeypatch.setenv(job.SOCKET, str(tmp_path / "a.sock"))
    site = bridges.SiteBridge()

    def call(caller, frame):
        monkeypatch.setattr(bridges, "collab", SimpleNamespace(caller=caller))
        return frames.read(site.exchange(frame))[0]

    yield call, peer
    peer.listener.close()


def wait_until(said, seconds=5.0):
    until = time.monotonic() + seconds
    while not said() and time.monotonic() < until:
        time.sleep(0.01)
    assert said()


def test_a_bridge_hands_on_the_hubs_frames_with_the_callers_name_and_nobody_elses(bridge_of_a_site):
    call, peer = bridge_of_a_site
    frame = frames.pack({"do": "ping"}, b"secret")
    assert call("server", frame) == {"state": "here"}
    head, inner = frames.read(peer.heard.pop())
    assert (head, bytes(inner)) == ({"do": "carry", "caller": "server"}, frame)
    for caller in ("b", "Server", "server ", "\x1b[2J", "x" * 10_000, "", None):
        refused = call(caller, frame)
        assert refused["error"]["type"] == "PolicyError"
        wait_until(lambda: peer.heard)
        note = peer.heard.pop()
        assert b"secret" not in note
        _, head, body = heads.request(note)
        assert (head["do"], head["bytes"], head["count"], bytes(body)) == ("refused", len(frame), 1, b"")
        assert head["caller"].isprintable()
        assert len(head["caller"]) <= 101
    call("b", {"no": "bytes"})
    wait_until(lambda: peer.heard)
    assert heads.request(peer.heard.pop())[1]["count"] == 2


def test_a_bridge_that_is_flooded_writes_down_who_and_how_often_in_few_lines(bridge_of_a_site):
    call, peer = bridge_of_a_site
    for _ in range(3000):
        call("b", b"x")
    wait_until(lambda: len(peer.heard) >= bridges._EACH + 3)
    counts = [heads.request(note)[1]["count"] for note in peer.heard]
    assert counts == [*range(1, bridges._EACH + 1), 1000, 2000, 3000]


def test_a_bridge_tells_the_hub_no_path_and_no_traceback(bridge_of_a_site, tmp_path, monkeypatch):
    call, peer = bridge_of_a_site
    peer.listener.close()
    for path in (str(tmp_path / "a.sock"), str(tmp_path / "none" / "b.sock"), "/etc/passwd", "\x00", ""):
        monkeypatch.setenv(job.SOCKET, path.replace("\x00", "~"))
        answer = call("server", frames.pack({"do": "ping"}))
        assert answer["error"]["type"] == "TransportError"
        assert not any(part in json.dumps(answer) for part in (str(tmp_path), "/etc", ".sock", "Errno", ".py"))
    for frame in (None, {"do": "ping"}, "text", bytes(frames.MAX_FRAME + 1)):
        assert call("server", frame)["error"]["message"] == "what this site was sent is no frame."
    monkeypatch.setattr(frames, "ask", lambda *_: 1 / 0)
    assert "ZeroDivision" not in json.dumps(call("server", b""))


@pytest.mark.parametrize("answer", [None, {"a": 1}, bytes(frames.MAX_FRAME + 1)], ids=["none", "dict", "oversized"])
def test_an_answer_that_is_no_frame_is_that_sites_error_alone(answer, connect):
    link = connect(lambda name, frame: answer)
    ((_, error),) = link.exchange(["a"], b"x", 5.0)
    assert str(error) == "its answer is no frame"
    assert link.wait(0.0) == ["a", "b"]


def test_an_interrupted_exchange_leaves_nothing_for_the_next(connect):
    """Ctrl-C while a site is slow: its answer must not be taken for that of the frame which follows."""

    def slow(name, frame):
        time.sleep(1.0 if frame == b"slow" else 0.0)
        return frame

    link = connect(slow)

    def interrupt(*_):
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            link.exchange(["a"], b"slow", 5.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert link.wait(5.0) == ["a", "b"], "the bridge dials again"
    for number in range(5):
        assert link.exchange(["a"], b"%d" % number, 5.0) == [("a", b"%d" % number)]


def test_a_bridge_of_another_submission_is_told_to_stop(connect):
    link = connect(echo, run="old")
    link.expect("new", alone=True)
    assert link.wait(1.5) is None
    _, thread, _ = connect.ends[0]
    thread.join(5)
    assert not thread.is_alive()


def test_a_driver_that_goes_away_is_waited_for_from_then_on(connect, monkeypatch):
    monkeypatch.setattr(bridges, "_LINGER", 1.5)
    link = connect(echo)
    time.sleep(2.0)  # longer than it waits for a driver: the one it has counts
    assert link.exchange(["a"], b"x", 5.0) == [("a", b"x")]
    with link._changed:
        (bridge,) = link._bridges.values()
    link._forget(bridge)  # as when the driver is killed
    assert link.wait(5.0) == ["a", "b"]
    assert link.exchange(["a"], b"y", 5.0) == [("a", b"y")]


def test_strangers_at_the_socket_are_ignored(connect):
    link = connect(echo)
    for greeting in (b"", b"x", frames.pack({"run": "r"}), frames.pack({"run": "r", "sites": 3})):
        with frames.dial(connect.path) as stranger:
            stranger.send_bytes(greeting)
    assert link.exchange(["a"], b"x", 5.0) == [("a", b"x")]
