"""The NVFlare transport as an operator sees it, without an engine: which link broke, for whom it waits, how it ends.

Belongs here: calls, jobs and sites over a pretended engine, the site's bridge. Does not: the real engine
(test_runtime_federation), frames themselves (test_link, security/test_frames), the way to the hub (test_supervisor).
"""

import json
import os
import queue
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

from llmchain_fed import NVFlare
from llmchain_fed.errors import ConfigError, TransportError
from llmchain_fed.federated.client.operations import operations
from llmchain_fed.runtimes.messaging import frames
from llmchain_fed.runtimes.messaging.chunked_calls import ChunkedCalls
from llmchain_fed.runtimes.nvflare import bridge as bridges
from llmchain_fed.runtimes.nvflare import certificates, gathering, job, jobs
from llmchain_fed.runtimes.nvflare import runtime as nvflare_runtime
from llmchain_fed.runtimes.nvflare.engine_state import SeenSite
from llmchain_fed.runtimes.nvflare.gathering import Sites
from llmchain_fed.runtimes.nvflare.supervision.reaching import Hindrance
from llmchain_fed.runtimes.site.policy import Audit, Policy
from llmchain_fed.runtimes.site.server import SiteServer

OPEN = Policy(operations=operations())


class Echo:
    """Answers with what it is asked, after a while; `given_up` says that its work was ended."""

    def __init__(self, seconds=0.0):
        self.seconds, self.given_up = seconds, threading.Event()

    def handle(self, op, payload):
        self.given_up.wait(self.seconds)
        return payload

    def give_up(self):
        self.given_up.set()

    def take_up(self):
        self.given_up.clear()

    def obey(self, limits):
        pass


class Engine:
    """The hub's engine and its sites, pretended: `ill[name]` says what is wrong with one.

    away: not connected; refuses: ends each job; silent peer, no peer: as its bridge says; silent: its engine.
    """

    port = 1

    def __init__(self, folder, names="abcd", seconds=0.0, **ill):
        self.ill, self.begin, self.jobs, self.down = ill, 0.05, [], False
        self.lost, self.deadly = 0, None
        """how often a job's process at the hub was lost; by a frame with this in it"""
        self.peers = {name: Echo(seconds) for name in names}
        self.sites = {n: SiteServer(p, OPEN, Audit(folder / f"{n}.jsonl")) for n, p in self.peers.items()}
        self.over = set()

    def connected(self):
        if self.down:
            msg = "the hub's engine is out of reach: nobody listens"
            raise TransportError(msg)
        return {name: time.time() for name in self.sites if self.ill.get(name) != "away"}

    def submit(self, folder):
        names = json.loads((folder / "meta.json").read_text())["deploy_map"]["app"][1:]
        (component,) = json.loads((folder / "app/config/config_fed_server.json").read_text())["components"]
        self.jobs.append(names)
        if not any(self.ill.get(name) == "refuses" for name in names):
            args = (component["args"]["socket"], component["args"]["run"], names, str(len(self.jobs) - 1))
            threading.Thread(target=self.bridge, args=args, daemon=True).start()
        return str(len(self.jobs) - 1)

    def status(self, number):
        refused = any(self.ill.get(name) == "refuses" for name in self.jobs[int(number)])
        return ("FINISHED:EXECUTION_EXCEPTION" if refused else "FINISHED" if number in self.over else "RUNNING"), ""

    def abort(self, number):
        pass

    def close(self):
        pass

    def bridge(self, path, run, names, number):
        collab = SimpleNamespace(is_aborted=False, clients=[SimpleNamespace(name=n) for n in names])
        collab.get_clients = lambda asked: (
            lambda timeout, blocking: SimpleNamespace(
                exchange=lambda frame, allowed: Answers(self, asked, frame, timeout)
            )
        )
        time.sleep(self.begin)
        hub = bridges.HubBridge(path, run)
        for _ in range(100):
            with suppress(TransportError, OSError, EOFError), frames.dial(path) as driver:
                driver.send_bytes(frames.pack({"run": run, "sites": names}))
                LOCAL.collab = collab
                if self.deadly is not None:
                    if self.dies(driver):
                        continue
                    return
                hub._serve(driver, set(names))
                self.over.add(number)
                return
            time.sleep(0.05)

    def dies(self, driver):
        """Takes orders until one is deadly, or it is told to stop."""
        while True:
            order = driver.recv_bytes(frames.MAX_OUTER, 60.0)
            head, frame = frames.read(order)
            if self.deadly in bytes(frame):
                self.lost += 1
                time.sleep(0.05)
                return True
            if "nodes" not in head:
                return False
            for name in head["nodes"]:
                driver.send_bytes(frames.pack({"node": name}, self.sites[name].answer(bytes(frame))))
            driver.send_bytes(frames.pack({"do": "done"}))


LOCAL = threading.local()


class Local:
    """In place of the engine's call interface, which is each thread's own."""

    def __getattr__(self, name):
        return getattr(LOCAL.collab, name)


class Answers:
    """What a call to several sites comes to: each answers in its own time."""

    def __init__(self, engine, names, frame, seconds):
        self.engine, self.names, self.frame, self.seconds, self.failures = engine, names, frame, seconds, {}

    def __iter__(self):
        told = queue.Queue()
        for name in self.names:
            threading.Thread(target=lambda n=name: told.put((n, self.of(n))), daemon=True).start()
        for _ in self.names:
            name, answer = told.get()
            if isinstance(answer, Exception):
                self.failures[name] = answer
            else:
                yield name, answer

    def of(self, name):
        match self.engine.ill.get(name):
            case "silent":
                time.sleep(self.seconds)
                return TimeoutError()
            case "away" | "refuses":
                return OSError("target_unreachable")
            case "silent peer":
                return bridges._fault("TransportError", f"its peer has been silent for {self.seconds:.0f} s.")
            case "no peer":
                return bridges._fault("TransportError", "its engine answers, its peer does not: nobody.")
        return self.engine.sites[name].answer(self.frame)


@pytest.fixture
def start(tmp_path_factory, monkeypatch):
    """`start(engine, …)`: a transport over a pretended engine, and the lines that it said."""
    monkeypatch.setattr(bridges, "collab", Local())
    opened = []

    def begin(engine, **options):
        folder, said = tmp_path_factory.mktemp("l"), []
        admin = folder / "admin" / "startup"
        admin.mkdir(parents=True)
        (admin / "fed_admin.json").write_text(json.dumps({"admin": {"host": "localhost", "port": 1, "username": "x"}}))
        monkeypatch.setattr(nvflare_runtime, "EngineSession", lambda _: engine)
        options = {"sites": list(engine.sites), "patience": 1.0, "startup": 0.6, "say": said.append} | options
        opened.append(NVFlare(admin.parent, socket=folder / "h.sock", **options))
        return opened[-1], said

    yield begin
    for runtime in opened:
        runtime.close()


@pytest.fixture
def quick(monkeypatch):
    for module, name, value in ((jobs, "_REUSE", 0.1), (jobs, "_PROBE", 0.5), (jobs, "_KNOWN", 0.2),
                                (jobs, "_COMING", 1.0), (gathering, "_LOOK", 0.05)):  # fmt: skip
        monkeypatch.setattr(module, name, value)


def ask(runtime, names="abcd", payload=b"x", op="hello"):
    return {n: a if isinstance(a, bytes) else str(a) for n, a in runtime.call(op, list(names), payload)}


# --- calls ----------------------------------------------------------------------------------------------------------


def exchange_with(sites, gone=(), told=None):
    """An exchange over sites in this process; those who are gone are so from the second poll on."""
    polls = dict.fromkeys(sites, 0)

    def exchange(nodes, frame, seconds):
        head, _ = frames.read(frame)
        if told is not None:
            told.append((head["do"], list(nodes)))
        for node in nodes:
            polls[node] += head["do"] == "poll"
            if node in gone and polls[node] > 1:
                yield node, TransportError("its peer has been silent for 8 s.")
            else:
                yield node, sites[node].answer(frame)

    return exchange


def sites_in(folder, **seconds):
    return {n: SiteServer(Echo(s), OPEN, Audit(folder / f"{n}.jsonl")) for n, s in seconds.items()}


def test_who_gives_no_answer_is_told_while_the_others_work_and_answers_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr("llmchain_fed.runtimes.messaging.chunked_calls._POLL", 0.1)
    sites = sites_in(tmp_path, a=1.0, b=9.0, c=0.0)
    calls = ChunkedCalls(exchange_with(sites, gone=["b"]), 1.0)
    began, arrived = time.monotonic(), []
    for name, answer in calls.call("train", ["a", "b", "c"], b"x", None):
        arrived.append((name, answer if isinstance(answer, bytes) else str(answer), time.monotonic() - began))
    assert [(n, a) for n, a, _ in arrived] == [("b", "its peer has been silent for 8 s."), ("a", b"x"), ("c", b"x")]
    assert arrived[0][2] < 0.8 < arrived[1][2]


@pytest.mark.parametrize("how", ["left", "interrupted"])
def test_a_call_that_is_ended_in_the_middle_ends_the_work_at_the_sites(how, tmp_path, monkeypatch):
    monkeypatch.setattr("llmchain_fed.runtimes.messaging.chunked_calls._POLL", 0.1)
    sites, told = sites_in(tmp_path, a=30.0, b=30.0, c=0.0), []
    carry = exchange_with(sites, gone=["b"], told=told)

    def exchange(nodes, frame, seconds):
        if how == "interrupted" and len(told) > 5 and frames.read(frame)[0]["do"] == "poll":
            raise KeyboardInterrupt
        return list(carry(nodes, frame, seconds))

    call = ChunkedCalls(exchange, 1.0).call("train", ["a", "b", "c"], b"x", None)
    with suppress(KeyboardInterrupt):
        for _ in call:
            if how == "left":
                call.close()
    assert told[-1] == ("drop", ["a", "c"])
    assert sites["a"]._peer.given_up.wait(1.0)


# --- which link broke -----------------------------------------------------------------------------------------------


@pytest.fixture
def bridge_of_a_site(tmp_path, monkeypatch):
    """(the socket's path, call with how many seconds → the error's message)"""
    path = tmp_path / "a.sock"
    monkeypatch.setenv(job.SOCKET, str(path))
    monkeypatch.setattr(bridges, "collab", SimpleNamespace(caller="server"))
    site = bridges.SiteBridge()

    def call(*seconds):
        return frames.read(site.exchange(frames.pack({"do": "ping"}), *seconds))[0]["error"]

    return path, call


def be_silent(channel):
    with channel:
        time.sleep(1.5)


@pytest.mark.parametrize("until", ["it listens", "it has shaken hands"])
def test_a_frozen_peer_is_told_from_one_that_is_not_there(until, bridge_of_a_site):
    path, call = bridge_of_a_site
    error = call(1.0)
    assert error["type"] == "TransportError"
    assert error["message"].startswith("its engine answers, its peer does not: ")
    with frames.listen(path) as listener:
        if until != "it listens":
            threading.Thread(target=listener.serve, args=(be_silent,), daemon=True).start()
        began = time.monotonic()
        error = call(1.0)
        assert 0.9 < time.monotonic() - began < 2.5
    assert error == {"type": "TransportError", "message": "its peer has been silent for 1 s."}
    assert str(path.parent) not in json.dumps(error)


@pytest.mark.parametrize("seconds", [0, -1.0, 86_401, float("inf"), float("nan"), "9", None, [1.0]])
def test_a_bridge_believes_no_time_that_makes_no_sense(seconds, bridge_of_a_site):
    path, call = bridge_of_a_site
    with frames.listen(path):  # nobody answers there: who is believed waits
        began = time.monotonic()
        assert call(seconds)["type"] == "TransportError"
        assert time.monotonic() - began < 1.0


@pytest.mark.parametrize(
    ("ill", "wanted"),
    [
        ("silent", "its engine has been silent for"),
        ("silent peer", "its peer has been silent for"),
        ("no peer", "its engine answers, its peer does not"),
    ],
)
def test_each_broken_link_is_told_by_its_name_and_the_first_reason_is_kept(ill, wanted, start, quick, tmp_path):
    engine = Engine(tmp_path)
    runtime, _ = start(engine)
    assert ask(runtime) == dict.fromkeys("abcd", b"x")
    engine.ill["d"] = ill
    first = ask(runtime)
    assert first.pop("d").startswith(wanted)
    assert first == dict.fromkeys("abc", b"x")
    engine.ill["d"] = "away"
    began = time.monotonic()
    later = ask(runtime)["d"]
    assert time.monotonic() - began < 1.5
    assert later.startswith("site 'd' cannot be asked: ")
    assert wanted in later
    assert "out since " in later
    engine.ill.clear()
    time.sleep(0.01)
    assert ask(runtime)["d"] == b"x"


def test_what_is_found_later_does_not_replace_what_happened():
    sites = Sites(["a"])
    assert sites.why("a") == "it is not connected to the hub"
    sites.met("a")
    sites.missed("a", "its peer has been silent for 8 s.")
    sites.missed("a", "its peer has been silent for 1 s.")
    assert sites.why("a").startswith("its peer has been silent for 8 s (out since ")
    sites.missed("a", "it is not connected to the hub.")
    assert sites.why("a").startswith("it is not connected to the hub (out since ")
    assert sites.why("a").endswith("; before: its peer has been silent for 8 s)")
    sites.met("a")
    assert sites.there() == ["a"]
    assert sites.why("a") == "it is not connected to the hub"


def test_a_sites_own_words_do_not_decide_whether_it_is_asked_again():
    sites, now = Sites(["a", "b"]), time.time()
    for name, unreached in (("a", False), ("b", True)):
        sites.met(name)
        sites.missed(name, "it is not connected, its engine has been silent", unreached=unreached)
    assert sites.is_worth_asking("a", now - 5)
    assert not sites.is_worth_asking("b", now - 5)
    assert sites.is_worth_asking("b", now + 5)


# --- jobs -----------------------------------------------------------------------------------------------------------


def test_it_says_for_whom_it_waits_and_goes_on_without_them(start, quick, tmp_path):
    engine = Engine(tmp_path, d="away")
    runtime, said = start(engine)
    began = time.monotonic()
    found = ask(runtime)
    assert 0.6 < time.monotonic() - began < 4
    assert found.pop("d") == "site 'd' cannot be asked: it is not connected to the hub"
    assert found == dict.fromkeys("abc", b"x")
    assert said == ["waiting for d; going on without them after 1 s", "a job runs, with a, b, c"]


def test_a_site_that_comes_late_gets_a_job_of_its_own_and_the_others_keep_theirs(start, quick, tmp_path):
    engine = Engine(tmp_path, d="away")
    runtime, _ = start(engine)
    ask(runtime)
    del engine.ill["d"]
    assert ask(runtime) == dict.fromkeys("abcd", b"x")
    assert engine.jobs == [["a", "b", "c"], ["d"]]
    engine.ill["d"] = "away"
    ask(runtime)
    engine.begin = 30.0  # its next job hangs: the others wait once, and not for long
    engine.ill["d"] = "silent"
    for most in (3.0, 1.5, 1.5):
        began = time.monotonic()
        assert {n: a for n, a in ask(runtime).items() if n != "d"} == dict.fromkeys("abc", b"x")
        assert time.monotonic() - began < most


def test_a_site_that_ends_the_job_is_found_by_name_and_the_others_work(start, quick, tmp_path):
    engine = Engine(tmp_path, d="refuses")
    runtime, said = start(engine)
    found = ask(runtime)
    assert "the engine ended the job before it ran (FINISHED:EXECUTION_EXCEPTION)" in found.pop("d")
    assert found == dict.fromkeys("abc", b"x")
    assert engine.jobs == [["a", "b", "c", "d"], ["a"], ["b"], ["c"], ["d"]]
    assert "site d refused the job (FINISHED:EXECUTION_EXCEPTION)" in said
    ask(runtime)
    assert len(engine.jobs) == 5, "it is left alone for a while"


@pytest.fixture
def seen(monkeypatch):
    """What the hub's engine wrote down of sites, to be changed."""
    from llmchain_fed.runtimes.nvflare.engine_state import EngineState

    state = EngineState(name="server", pid=1, started=1.0, written=1.0, state="running", says="", hub="localhost:1")
    monkeypatch.setattr(gathering.engine_state, "of_hub", lambda _: state)
    return state.sites


def test_whoever_is_turned_away_under_a_name_takes_nothing_from_its_owner(start, quick, tmp_path, seen):
    troubles = {"c": "another key came under its name", "d": "is seen from two places"}
    seen |= {name: SeenSite(connected=True, since=1.0, trouble=trouble) for name, trouble in troubles.items()}
    engine = Engine(tmp_path)
    runtime, said = start(engine)
    assert ask(runtime) == dict.fromkeys("abcd", b"x")
    assert engine.jobs == [["a", "b", "c", "d"]]
    assert [said.count(f"site {name}: {trouble}") for name, trouble in troubles.items()] == [1, 1]


def test_why_a_site_cannot_come_is_said_where_the_hubs_engine_knows_it(start, quick, tmp_path, seen):
    trouble = "another key came under its name"
    seen["d"] = SeenSite(trouble=trouble)
    engine = Engine(tmp_path, d="away")
    runtime, said = start(engine)
    assert trouble in ask(runtime)["d"]
    assert engine.jobs == [["a", "b", "c"]]
    assert f"site d: {trouble}" in said
    seen.clear()
    engine.ill.clear()
    time.sleep(0.01)
    assert ask(runtime)["d"] == b"x"


def test_while_nobody_is_there_each_has_its_own_reason(start, quick, tmp_path, seen):
    seen["b"] = SeenSite(trouble="another key came under its name")
    engine = Engine(tmp_path, "ab", a="away", b="away")
    runtime, said = start(engine, startup=0.1)
    found = ask(runtime, "ab")
    for why in found.values():
        assert "a: it is not connected to the hub; b: another key came under its name" in why
    assert any("waiting for a, b; giving up after" in line for line in said)


def test_a_job_whose_process_at_the_hub_is_gone_is_replaced_within_the_call(start, quick, tmp_path):
    engine = Engine(tmp_path)
    runtime, said = start(engine)
    ask(runtime)
    link = runtime._jobs._link
    (bridge,) = link._bridges.values()
    link.expect("none", alone=True)
    bridge.channel.close()
    assert ask(runtime, op="train") == dict.fromkeys("abcd", b"x")
    assert any("job" in line and "another one begins" in line for line in said) or len(engine.jobs) == 2


def test_a_job_that_is_lost_again_with_each_frame_is_given_up(start, quick, tmp_path):
    engine = Engine(tmp_path)
    engine.deadly = b"put"
    runtime, _ = start(engine, recovery=60.0)
    began = time.monotonic()
    found = ask(runtime, op="train")
    assert all("It was lost 4 times in a row" in why for why in found.values()), found
    assert engine.lost == 4
    assert time.monotonic() - began < 15


def test_a_job_that_is_lost_again_is_not_tried_for_longer_than_recovery(start, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_LOSSES", 10**6)
    engine = Engine(tmp_path)
    engine.deadly = b"put"
    runtime, _ = start(engine, recovery=1.0)
    began = time.monotonic()
    assert "times in a row" in ask(runtime, op="train")["a"]
    assert time.monotonic() - began < 8
    assert engine.lost > 1


def test_a_job_is_said_to_run_with_those_who_answer_in_it(start, quick, tmp_path):
    runtime, said = start(Engine(tmp_path, d="no peer"))
    ask(runtime)
    assert said[-1].startswith("a job runs, with a, b, c; not d: its engine answers, its peer does not")


def test_an_engine_that_is_out_of_reach_is_one_error_and_said(start, quick, tmp_path):
    engine = Engine(tmp_path)
    engine.down = True
    runtime, said = start(engine)
    found = ask(runtime)
    assert set(found.values()) == {
        f"site {n!r} cannot be asked: the hub's engine is out of reach: nobody listens" for n in "abcd"
    } & set(found.values())
    assert all("the hub's engine is out of reach" in why for why in found.values())
    assert "giving up after" in said[0]


def test_closing_takes_seconds_even_if_the_engine_is_frozen(start, quick, tmp_path, monkeypatch):
    assert jobs._FAREWELL + nvflare_runtime._PEERS + nvflare_runtime._JOBS + nvflare_runtime._SESSION < 8
    for name in ("_PEERS", "_JOBS", "_SESSION"):
        monkeypatch.setattr(nvflare_runtime, name, 0.3)
    engine = Engine(tmp_path, seconds=30.0)
    runtime, _ = start(engine, patience=0.5)
    call = runtime.call("train", list("abcd"), b"x")
    threading.Timer(0.7, lambda: engine.ill.update(b="silent")).start()
    assert next(call)[0] == "b"
    call.close()
    assert all(engine.peers[name].given_up.wait(1.0) for name in "acd"), "their work is given up"
    engine.status = engine.abort = engine.close = lambda *_: time.sleep(60)
    began = time.monotonic()
    runtime.close()
    assert time.monotonic() - began < 3
    assert not os.path.exists(runtime._jobs._socket)
    assert "this runtime is closed" in ask(runtime)["a"]


def test_a_site_that_does_not_come_to_a_job_is_left_out_of_it(monkeypatch):
    from nvflare.collab.runtime.controller import CollabController
    from nvflare.collab.runtime.defs import SETUP_TASK_NAME, SYNC_TASK_NAME

    from llmchain_fed.runtimes.nvflare.controller import Controller

    asked, offer = [], SimpleNamespace(publish_interface={"": {}})

    def broadcast_and_wait(self, task, fl_ctx, **options):
        asked.append((task.name, options))
        if task.name == SYNC_TASK_NAME:
            self.client_info |= {"a": offer, "c": offer}
        else:
            self.client_setup_status |= dict.fromkeys(options["targets"], True)

    monkeypatch.setattr(CollabController, "broadcast_and_wait", broadcast_and_wait)
    found = Controller(server_obj_id="_server")
    found.client_info = dict.fromkeys("abc")
    found.client_setup_status = dict.fromkeys("abc", False)
    for name in (SYNC_TASK_NAME, SETUP_TASK_NAME):
        found.broadcast_and_wait(task=SimpleNamespace(name=name), fl_ctx=None, min_responses=3)
    assert found.client_info == dict.fromkeys("abc", offer), "none is missing: the engine would end the job for all"
    assert found.client_setup_status == dict.fromkeys("abc", True)
    assert asked[1][1] == {"targets": ["a", "c"], "min_responses": 2}


# --- before the first round -----------------------------------------------------------------------------------------


def test_check_looks_at_the_kit_then_the_way_then_the_engine(start, tmp_path, monkeypatch):
    engine, steps = Engine(tmp_path), []
    runtime, _ = start(engine)
    monkeypatch.setattr(certificates, "check", lambda _: steps.append("kit"))
    way = [None, Hindrance("nobody listens"), Hindrance("another authority signed it", lasting=True)]
    monkeypatch.setattr(nvflare_runtime, "hindrance", lambda _: steps.append("way") or way[0])
    runtime.check()
    assert steps == ["kit", "way"]
    monkeypatch.setattr(nvflare_runtime, "_CHECK", 0.3)
    engine.connected = lambda: time.sleep(30)
    with pytest.raises(TransportError, match="shakes hands, and does not answer its administrator"):
        runtime.check()
    engine.connected = lambda: Engine.connected(SimpleNamespace(down=True))
    with pytest.raises(TransportError, match="the hub's engine is out of reach"):
        runtime.check()
    for kind, wanted in ((TransportError, "the hub's engine is out of reach: nobody listens. Start it"),
                         (ConfigError, "another authority signed it.")):  # fmt: skip
        way.pop(0)
        with pytest.raises(kind) as error:
            runtime.check()
        assert str(error.value).startswith(wanted)
