"""The public `Site`: a chain, a participant and a policy behind a socket, as a script of one's own serves it.

Belongs here: what `Site` promises. Does not: frames and slices (test_server), what a policy refuses
(security/test_policy), the command (test_peer_command).
"""

import json
import stat
import threading

import pytest
from sites import SocketTransport, answering
from tiny import PAIRS

from llmchain_fed import ConfigError, DataError, FederatedAveraging, Participant, Site, TrainingConfig
from llmchain_fed.runtimes.messaging import frames, heads
from llmchain_fed.runtimes.site.policy import Policy

TRAINING = TrainingConfig(learning_rate=5e-3, batch_size=4, epochs=1)


def test_a_site_of_ones_own_script_trains_as_a_participant_of_this_process_does(make_chain, tmp_path):
    said = []
    site = Site(make_chain(), Participant("a", PAIRS[:8]), policy=Policy(max_rounds=2), say=said.append)
    assert site.examples.startswith("trains on 8 ")
    threading.Thread(target=site.serve, args=(tmp_path / "a.sock",), daemon=True).start()
    transport = SocketTransport({"a": answering(tmp_path / "a.sock")})
    chain, here = make_chain(), make_chain()
    FederatedAveraging(chain, runtime=transport, training=TRAINING, progress=False).fit(2)
    FederatedAveraging(here, participants={"a": PAIRS[:8]}, training=TRAINING, progress=False).fit(2)
    assert chain.model.weights_hash == here.model.weights_hash
    assert [line.split(",")[0] for line in said if line.startswith("training")] == [
        "training begins: round 1", "training ends: round 1", "training begins: round 2", "training ends: round 2",
    ]  # fmt: skip
    written = tmp_path / "a.sock.audit.jsonl"  # beside the socket, unless another is given
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert [line["round"] for line in lines if line["op"] == "train"] == [1, 1, 2, 2]
    status = heads.read_status(frames.ask(tmp_path / "a.sock", frames.pack({"do": "status"})))
    assert (status.name, status.examples, status.trainings, status.max_rounds) == ("a", 8, 2, 2)
    assert status.audit == str(written)


def test_a_site_trains_on_labels_as_a_participant_of_this_process_does(make_chain, tmp_path):
    """Loss, labels and weights travel in the hub's hello; what held-out examples are taken for travels back."""
    data = [(x, ("page", "erreur")[at % 4 == 3]) for at, (x, _) in enumerate(PAIRS[:8])]
    how = TRAINING.replace(loss="labels", labels=["page", "erreur"], class_weight="balanced")
    part = Participant("a", data, held_out=data[:4])
    site = Site(make_chain(), part, policy=Policy(max_rounds=2), say=lambda _line: None)
    threading.Thread(target=site.serve, args=(tmp_path / "a.sock",), daemon=True).start()
    transport = SocketTransport({"a": answering(tmp_path / "a.sock")})
    chain, here = make_chain(), make_chain()
    found = FederatedAveraging(chain, runtime=transport, training=how, progress=False).fit(2)
    wanted = FederatedAveraging(here, participants=[part], training=how, progress=False).fit(2)
    assert chain.model.weights_hash == here.model.weights_hash
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.participants["a"].held_out_after == theirs.participants["a"].held_out_after
        assert mine.participants["a"].notes == theirs.participants["a"].notes


def test_what_cannot_be_served_is_said_before_anything_is(make_chain, tmp_path):
    with pytest.raises(DataError, match="participant 'a'"):
        Site(make_chain(), Participant("a", []))
    for participant, policy in ((("a", PAIRS), None), (Participant("a", PAIRS), {"max_rounds": 1}), ("a", Policy())):
        with pytest.raises(ConfigError, match=r"a Participant and a Policy.*Policy\.from_file"):
            Site(make_chain(), participant, policy=policy)
    with pytest.raises(ConfigError, match="audit file"):
        Site(make_chain(), Participant("a", PAIRS), audit=tmp_path / "nowhere" / "audit.jsonl")
