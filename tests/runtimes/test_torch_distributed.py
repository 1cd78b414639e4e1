"""TorchDistributed: real torchrun jobs of three ranks over tiny models, against the same federation in one process.

Belongs here: what crosses ranks. Does not: what a round does (test_averaging).
"""

import functools
import json
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from federation_processes import free_port
from ranks import SCRIPT, torchrun
from torchrun_script import SHARES, federate, hashes, tiny_chain

from llmchain_fed import ConfigError, Ditto, FederationError, TorchDistributed
from llmchain_fed.runtimes import process_group
from llmchain_fed.runtimes.messaging import heads


def by_hand(out, *options, seconds=100):
    """The same three ranks without an agent that stops the others when one dies."""
    port = free_port()
    ranks = []
    for rank in range(3):
        environment = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        command = [sys.executable, str(SCRIPT), str(out), *map(str, options)]
        with (out / f"rank{rank}.log").open("wb") as log:
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return ranks


def lines(out, rank):
    """Ours, of what a rank wrote."""
    return [line for line in (out / f"rank{rank}.log").read_text().splitlines() if line.startswith("llmchain_fed: ")]


def finished(ranks, out, seconds=120):
    try:
        for rank in ranks:
            rank.communicate(timeout=seconds)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    return {r["rank"]: r for r in (json.loads(p.read_text()) for p in out.glob("rank*.json"))}


@functools.cache
def in_process(kind, lora, rounds=3):
    """The first rounds of three."""
    chain = tiny_chain(kind, lora=lora)
    fed = federate(chain, SHARES, rounds=rounds, fit={"of": 3})
    return chain.model.trainable_state(), fed.history, chain.invoke({"text": "save the page"})


def difference(report, state):
    return max(float((torch.tensor(report["state"][n]) - t).abs().max()) for n, t in state.items())


@pytest.mark.parametrize(("kind", "lora"), [("causal", True), ("seq2seq", False)])
def test_three_ranks_learn_what_one_process_learns(kind, lora, tmp_path):
    status, output, reports = torchrun(tmp_path, "--kind", kind, *(["--lora"] if lora else []))
    assert status == 0, output
    state, history, answer = in_process(kind, lora)
    assert sorted(reports) == [0, 1, 2]
    for report in reports.values():
        assert "error" not in report
        assert difference(report, state) < 1e-5
        assert report["answer"] == answer
        assert report["round"] == 3
        assert report["reports"] == ["a", "b", "c", "d"]
        assert report["history"] == reports[0]["history"]
        assert report["threads"] == max(1, len(os.sched_getaffinity(0)) // 3)
    assert [r["mine"] for _, r in sorted(reports.items())] == [["a"], ["b", "c"], ["d"]]
    for ours, theirs in zip(reports[0]["history"]["rounds"], history, strict=True):
        assert list(ours["participants"]) == ["a", "b", "c", "d"]
        assert ours["held_out_after"] == pytest.approx(theirs.held_out_after, rel=1e-4)
        for name, record in ours["participants"].items():
            assert record["status"] == "trained"
            assert record["train_loss"] == pytest.approx(theirs.participants[name].train_loss, rel=1e-4)
            assert record["bytes_up"] == pytest.approx(theirs.participants[name].bytes_up, abs=64)  # digits of floats


def test_all_ranks_end_with_the_best_rounds_weights_and_personal_models(tmp_path):
    status, output, reports = torchrun(tmp_path, "--keep-best", "--lora")
    assert status == 0, output
    chain = tiny_chain("causal", lora=True)
    federate(chain, SHARES, rounds=1, samples=0, personal=Ditto(lam=0.3), fit={"of": 3})
    wanted = hashes(chain, SHARES)
    assert sorted(reports) == [0, 1, 2]
    for report in reports.values():
        assert (report["best"], report["kept"]) == (1, 1)
        assert report["global"] == wanted["global"]
        assert report["personal"] == {name: wanted["personal"][name] for name in report["personal"]}
    assert sorted(name for report in reports.values() for name in report["personal"]) == sorted(SHARES)


def test_a_participant_whose_training_fails_is_recorded_and_the_others_go_on(tmp_path):
    status, output, reports = torchrun(tmp_path, "--misbehave", "raise", "--lora", "--rounds", 2)
    assert status == 0, output
    first, second = (r["participants"]["d"] for r in reports[1]["history"]["rounds"])
    assert (first["status"], second["status"]) == ("trained", "failed")
    assert second["reason"] == "ParticipantError: RuntimeError: out of memory"


@pytest.mark.federation
def test_a_participant_that_is_late_is_dropped(tmp_path):
    options = ("--lora", "--rounds", 1, "--deadline", 4.0)  # ample for the others
    status, output, reports = torchrun(tmp_path, "--misbehave", "slow", *options)
    assert status == 0, output
    statuses = {n: p["status"] for n, p in reports[1]["history"]["rounds"][0]["participants"].items()}
    assert statuses == {"a": "trained", "b": "trained", "c": "trained", "d": "late"}


def test_a_failed_quorum_is_raised_on_every_rank_and_earlier_rounds_are_kept(tmp_path):
    status, output, reports = torchrun(tmp_path, "--misbehave", "raise", "--lora", "--quorum", 4)
    assert status == 0, output  # the script reports errors
    assert reports[0]["error"][0] == "QuorumError"
    state, _, _ = in_process("causal", True, 1)
    for rank in (1, 2):
        assert reports[rank]["error"][0] == "FederationError"
        assert "rank 0, which leads, stopped: QuorumError: round 2 has 3 usable updates" in reports[rank]["error"][1]
    assert all(difference(report, state) < 1e-5 for report in reports.values())


@pytest.mark.federation
def test_a_rank_that_dies_is_named_on_rank_0(tmp_path):
    reports = finished(by_hand(tmp_path, "--misbehave", "die", "--lora"), tmp_path)
    kind, message = reports[0]["error"]
    assert kind == "FederationError"
    assert "rank 2 ('d') is gone: " in message
    assert "rank 0, which leads, stopped: FederationError: rank 2 ('d') is gone" in reports[1]["error"][1]
    assert 2 not in reports


@pytest.mark.federation
def test_the_others_end_also_where_one_waits_to_hand_over_its_answer(tmp_path):
    """Rank 2 has trained and waits for rank 0, which will never take it: rank 1 is dead, and comes first."""
    reports = finished(by_hand(tmp_path, "--misbehave", "die", "--by", 1, "--lora"), tmp_path)
    assert "rank 1 ('b', 'c') is gone: " in reports[0]["error"][1]
    assert "rank 0, which leads, stopped: FederationError: rank 1 ('b', 'c') is gone" in reports[2]["error"][1]
    assert abs(reports[2]["ended"] - reports[0]["ended"]) < 20, "the timeout is 60 s"
    assert not any("terminate called" in (tmp_path / f"rank{rank}.log").read_text() for rank in range(3))


@pytest.mark.federation
def test_a_rank_without_an_answer_is_named_within_the_timeout(tmp_path):
    ranks = by_hand(tmp_path, "--misbehave", "hang", "--lora", "--timeout", 8)
    try:
        reports = finished(ranks[:2], tmp_path)
    finally:
        ranks[2].kill()
        ranks[2].communicate()
    assert "rank 2 ('d') was silent for 8 s, though its process runs" in reports[0]["error"][1]
    assert "rank 2 ('d') was silent for 8 s, though its process runs" in reports[1]["error"][1]


@pytest.mark.federation
@pytest.mark.parametrize(("frozen", "group"), [(1, None), (0, None), (1, "own")])
def test_a_frozen_rank_is_named_within_patience_by_all_others(frozen, group, tmp_path):
    """Rank 0 keeps the store where no agent of torchrun's does: it is frozen then, too."""
    own = ["--own-group"] if group else []
    ranks = by_hand(tmp_path, "--misbehave", "freeze", "--by", frozen, "--lora", "--patience", 3, *own)
    others = [process for rank, process in enumerate(ranks) if rank != frozen]
    try:
        reports = finished(others, tmp_path, seconds=120)
    finally:
        ranks[frozen].kill()
        ranks[frozen].communicate()
    who, since = {0: "rank 0 ('a')", 1: "rank 1 ('b', 'c')"}[frozen], float((tmp_path / "frozen").read_text())
    for rank in {0, 1, 2} - {frozen}:
        kind, message = reports[rank]["error"]
        assert kind == "FederationError"
        assert f"{who} has given no sign of life for 3 s: frozen (stopped, swapping), or its machine is gone" in message
        assert reports[rank]["ended"] - since < 3 + 5
        assert [who in line for line in lines(tmp_path, rank)] == [True]
        assert "Exception raised from" not in (tmp_path / f"rank{rank}.log").read_text()
    assert [process.returncode for process in others] == [0, 0]  # the script reports errors


def test_who_cannot_be_watched_is_said(tmp_path, capfd):
    """In a group of the user's whose store is a file: a rank that is frozen while it has the lock delays all."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        runtime = TorchDistributed(threads=torch.get_num_threads())
        runtime.host({})
        runtime.close()
        assert dist.is_initialized(), "it is its maker's to leave"
    finally:
        dist.destroy_process_group()
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("llmchain_fed: "))
    assert "no store to watch its ranks by (a FileStore, whose lock a frozen rank may have)" in line


@pytest.mark.federation
def test_a_rank_that_is_busy_for_longer_than_patience_is_not_named(tmp_path):
    """Neither the leader nor a follower; both train for longer than that."""
    options = ("--misbehave", "busy", "--by", 0, "--by", 2, "--lora", "--rounds", 1, "--patience", 4)
    status, output, reports = torchrun(tmp_path, *options)
    assert status == 0, output
    assert not any("error" in report for report in reports.values())
    assert "llmchain_fed: " not in output


@pytest.mark.federation
def test_a_rank_whose_script_fails_says_why_in_its_last_line_and_the_others_know(tmp_path):
    reports = finished(by_hand(tmp_path, "--misbehave", "no-data", "--by", 1, "--lora"), tmp_path)
    why = "FileNotFoundError: no such file: patients.jsonl"
    assert lines(tmp_path, 1) == [f"llmchain_fed: rank 1 ended: {why}"]
    assert f"rank 1 (no participants) ended: {why}" in reports[0]["error"][1]


@pytest.mark.federation
def test_max_restarts_starts_all_anew(tmp_path):
    status, output, reports = torchrun(tmp_path, "--misbehave", "die", "--lora", restarts=1)
    assert status == 0, output
    assert sorted(p.name for p in tmp_path.glob("*.attempt1.json")) == [f"rank{n}.attempt1.json" for n in range(3)]
    state, _, _ = in_process("causal", True)
    assert all(difference(report, state) < 1e-5 for report in reports.values())


@pytest.mark.federation
def test_two_machines_of_one_and_two_ranks(tmp_path):
    """Two agents, as on two machines; here both on this one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--master-addr=127.0.0.1"]
    command += [f"--master-port={free_port()}"]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    agents = [
        subprocess.Popen(
            [*command, f"--node-rank={node}", f"--nproc-per-node={ranks}", str(SCRIPT), str(tmp_path), "--lora"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
        )
        for node, ranks in ((0, 1), (1, 2))
    ]  # fmt: skip
    reports = finished(agents, tmp_path, seconds=100)
    assert [agent.returncode for agent in agents] == [0, 0]
    state, _, _ = in_process("causal", True)
    assert all(difference(report, state) < 1e-5 for report in reports.values())
    cores = len(os.sched_getaffinity(0))
    assert [reports[rank]["threads"] for rank in range(3)] == [cores, max(1, cores // 2), max(1, cores // 2)]


@pytest.mark.federation
def test_without_restarts_torchrun_names_the_rank(tmp_path):
    status, output, _ = torchrun(tmp_path, "--misbehave", "die", "--lora")
    assert status != 0
    assert re.search(r"rank\s*: 2", output)
    assert "SIGKILL" in output


def test_one_name_on_two_ranks(tmp_path):
    status, output, reports = torchrun(tmp_path, "--same-name")
    assert status == 0, output
    for report in reports.values():
        assert report["error"][0] == "DuplicateParticipantError"
        assert "ranks [0, 1, 2]" in report["error"][1]


@pytest.mark.federation
def test_other_weights_on_one_rank(tmp_path):
    status, output, reports = torchrun(tmp_path, "--other-seed", "--rounds", 1)
    assert status == 0, output
    record = reports[0]["history"]["rounds"][0]["participants"]["d"]
    assert record["status"] == "absent"
    assert re.match(r"ContractError: another contract \(base weights: \w+… at d, \w+… at the hub\)", record["reason"])


def test_outside_torchrun_it_says_how_to_start(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set: start .* torchrun"):
        TorchDistributed()
    for wrong in ({"timeout": 0}, {"patience": 2}, {"patience": float("nan")}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is .* seconds, got"):
            TorchDistributed(**wrong)


def test_a_port_in_use_and_ranks_that_do_not_come_are_said(monkeypatch, capfd):
    monkeypatch.setattr(process_group, "_WORD_AFTER", 0.3)
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        port = taken.getsockname()[1]
        places = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in places.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=f"port {port} is in use on this machine.*--master-port"):
            TorchDistributed(timeout=5)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(FederationError, match=r"rank 0 of 2 found no others at 127.0.0.1:\d+ within 1 s"):
        TorchDistributed(timeout=1)
    assert "llmchain_fed: rank 0 of 2 waits for the others at 127.0.0.1:" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("[/a/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:160. This is typically caused by a remote worker "
         "crashing. GLHF!", "Connection closed by peer [127.0.0.1]:160"),
        ("[/a/gloo/pair.cc:553] Read timeout [10.0.0.1]:1", "Read timeout [10.0.0.1]:1"),
        ("no such \x1b store", "no such \\x1b store"),
        ("", ""),
    ],
)  # fmt: skip
def test_gloo_is_quoted_without_its_source(said, wanted):
    assert process_group.words(RuntimeError(said)) == wanted


def test_errors_keep_their_type_between_ranks_and_lose_it_between_organisations():
    plain = heads.to_plain(ConfigError("x" * 5000))
    assert len(plain["message"]) == 2000
    assert type(heads.from_same_script(plain)) is ConfigError
    assert str(heads.from_site(plain)).startswith("ConfigError: xx")
    assert type(heads.from_site({"type": "DeadlineError", "message": "late"})).__name__ == "DeadlineError"
    for nonsense in (None, {}, {"type": "SystemExit", "message": 3}, {"type": "LLMChainFedError"}):
        for read in (heads.from_same_script, heads.from_site):
            assert read(nonsense).args[0] is not None
