"""Whatever is in a checkpoint whose digests are right: a federation goes on from it, or one error says where it is odd.

Weights, history and files are as before then, and neither time nor memory follows from what somebody wrote there.
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from bounded import bounded, within
from corpus.checkpoints import (
    FEDERATIONS,
    REMOVED,
    SHARES,
    VALUES,
    build,
    changed,
    copied,
    files,
    fresh_chain,
    manifest,
    places,
    put,
    rehead,
    retouch,
    sign,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmchain_fed import FederatedAveraging, untrusted
from llmchain_fed.errors import CheckpointError, ConfigError, ParticipantError
from llmchain_fed.federated.checkpoint import files as checkpoint
from llmchain_fed.federated.checkpoint.manager import read_for
from llmchain_fed.federated.client import state as private_state
from llmchain_fed.federated.protocol.expected import Layout
from llmchain_fed.federated.protocol.tasks import ProgressData
from llmchain_fed.updates.lora_layout import A, B
from llmchain_fed.updates.serialization import describe

FOLDER = "round-000002"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Kind → a federation's checkpoints of two rounds."""
    return {kind: build(tmp_path_factory.mktemp(kind) / "run", kind) for kind in FEDERATIONS}


class Victim:
    """A chain and a federation that goes on, whose weights, history and files nobody's checkpoint may spoil."""

    def __init__(self, kept: Path, to: Path) -> None:
        shutil.copytree(kept, to)
        self.directory, self.chain = to, fresh_chain()
        self.fed = self.resumed()
        self.fed.fit(rounds=1)

    def resumed(self, chain=None, **options):
        return FederatedAveraging.resume(
            self.directory, chain or self.chain, participants=SHARES, progress=False, **options
        )

    def stands(self):
        model = self.chain.model
        weights = {n: t.numpy().tobytes() for n, t in model.trainable_state().items()}
        beside = {n: (b.numpy().tobytes(), a.numpy().tobytes()) for n, (b, a) in model.remainder().items()}
        adapters = {n: {k: t.numpy().tobytes() for k, t in model.adapter_state(n).items()} for n in model.adapters}
        return weights, beside, adapters, self.fed.round, self.fed.history.to_json(), self.fed._server.broadcast.number

    def tries(self, act, *, seconds=5.0, unread=False):
        """What an act on the directory as it is now ends in; None where it goes on."""
        before, written = self.stands(), {} if unread else files(self.directory)
        try:
            with within(seconds):
                act()
        except (CheckpointError, ConfigError) as error:
            refused = error
        else:
            return None
        assert self.stands() == before
        assert unread or files(self.directory) == written
        assert len(str(refused)) < 1500
        assert untrusted.printable(str(refused)) == str(refused)
        return refused

    def all_refuse(self, what, *, alone=True, promoted=True, unread=False):
        """Each way to use the checkpoint of round 2 ends in a refusal; the last of them."""
        acts = [lambda: self.resumed(round=2), lambda: self.fed.roll_back(2)]
        acts += [lambda: self.fed.promote(2)] if promoted else []
        acts += [lambda: checkpoint.read(self.directory, 2)] if alone else []
        for act in acts:
            refused = self.tries(act, unread=unread)
            assert isinstance(refused, CheckpointError), what
            assert FOLDER in str(refused) or "of round 2" in str(refused)
        return refused


def broken(kept, kind, tmp_path):
    return Victim(kept[kind], tmp_path / "victim")


# --- the manifest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "share"), [("everything", 0.4), ("remainder", 0.1), ("torch", 0.1)])
@bounded(seconds=200, megabytes=1000)
def test_every_value_of_a_manifest_replaced_by_every_other_kind(kept, kind, share, tmp_path):
    """Each is read for the model; what passes that, and a share of what does not, is used in all three ways."""
    rng, passed = random.Random(0), []
    with copied(kept[kind], tmp_path / "run") as directory:
        chain, content = fresh_chain(), manifest(directory)
        cases = [(place, value) for place in places(content) for value in (*VALUES, REMOVED)]
        assert len(cases) > 1000
        cases = rng.sample(cases, int(share * len(cases)))
        version = chain.model.weights_version
        for place, value in cases:
            made = changed(content, place, value)
            if made == content:
                continue
            sign(directory, made)
            try:
                with within(3):
                    read_for(chain.model, directory, 2)
            except CheckpointError as error:
                said = str(error)
                assert said.startswith("the checkpoint ")
                assert len(said) < 1500
                assert untrusted.printable(said) == said
                assert all(part in said for part in (FOLDER, "manifest.json", "round=1")), said
                if place[0] == "about" and len(place) > 1 and value in ([], ["x"], {}):
                    assert str(place[1]) in said, (place, value, said)
            else:
                passed.append((place, value))
        assert chain.model.weights_version == version
    assert len(passed) < len(cases) / 3
    victim = broken(kept, kind, tmp_path)
    for place, value in rng.sample([case for case in cases if case not in passed], 5):
        if (made := changed(content, place, value)) != content:
            sign(victim.directory, made)
            victim.all_refuse((place, value), alone=False)
    for place, value in rng.sample(passed, min(8, len(passed))):
        sign(victim.directory, changed(content, place, value))
        victim.tries(lambda: victim.resumed(fresh_chain(), round=2))
        victim.tries(lambda: victim.fed.promote(2))
        victim.tries(lambda: victim.fed.roll_back(2))


TEXTS = {
    "nothing": "",
    "no object": "[]",
    "a number": "7",
    "100,000 levels": '{"about":' + "[" * 100_000 + "]" * 100_000 + "}",
    "2 million levels": "[" * 2_000_000,
    "a name twice": '{"format":1,"format":1}',
    "NaN": '{"about":NaN}',
    "an integer of 4,300 digits": '{"round":' + "9" * 4300 + "}",
    "200,000 names": json.dumps({str(n): 0 for n in range(200_000)}),
    "300,000 lists": "[" + "[]," * 300_000 + "[]]",
    "70 MB": '{"about":"' + "x" * 70_000_000 + '"}',
}


@bounded(seconds=120, megabytes=1500)
def test_manifests_that_are_no_manifest(kept, tmp_path):
    victim = broken(kept, "torch", tmp_path)
    for what, text in TEXTS.items():
        sign(victim.directory, text)
        victim.all_refuse(what)
    for data in (b"", b"\xff\xfe", b"0" * 64 + b"\n{}"):
        (victim.directory / FOLDER / "manifest.json").write_bytes(data)
        victim.all_refuse(data)


def _many_records(content):
    record = content["about"]["history"]["rounds"][0]
    content["about"]["history"]["rounds"] = [{"round": n + 1, "participants": {}} for n in range(60_000)] + [record]


def _many_people(content):
    content["about"]["history"]["rounds"][1]["participants"] = {str(n): {"status": "odd"} for n in range(120_000)}


def _many_unknown(content):
    content["about"]["config"] |= {f"option{n}": 0 for n in range(120_000)}


def _many_declarations(content):
    content["about"]["declarations"] |= {str(n): {"examples": -1} for n in range(50_000)}


def _named_twice(content):
    content["about"]["participants"] = ["a", "b", "a"]


def _argument(name, value):
    def change(content):
        content["about"]["config"][name] = value

    return change


MEANINGS = {
    "60,000 records": _many_records,
    "120,000 participants of a round": _many_people,
    "120,000 options": _many_unknown,
    "50,000 declarations": _many_declarations,
    "a participant twice": _named_twice,
    "a share of nothing": lambda content: content["about"]["config"].update(max_weight_share=5e-324),
    "a federation's id with a space": lambda content: content["about"].update(federation="a b"),
    "a contract of words": lambda content: content["about"]["contract"].update(base="x" * 129),
    "checkpoint_dir": _argument("checkpoint_dir", "/tmp/elsewhere"),
    "callbacks": _argument("callbacks", []),
    "model": _argument("model", "x"),
    "participants": _argument("participants", {"a": "/etc/passwd"}),
    "runtime": _argument("runtime", None),
    "_federation": _argument("_federation", "x"),
    "training": _argument("training", None),
    "progress": _argument("progress", False),
    "evaluation is a path": _argument("evaluation", "/etc/passwd"),
    "a round too few": lambda content: content["about"]["history"]["rounds"].pop(),
    "patience of one": lambda content: content["about"].update(patience=[1.0]),
    "patience of words": lambda content: content["about"].update(patience=["a", "b"]),
    "patience without end": lambda content: content["about"].update(patience=[0] * 200_000),
    "patience of no round": lambda content: content["about"].update(patience=[0, 0]),
    "patience of a round to come": lambda content: content["about"].update(patience=[0, 99]),
    "a file of another name": lambda content: content["files"].update({"../../x.safetensors": "0" * 64}),
    "an optimizer's class": lambda content: content["about"]["config"].update(
        training={"optimizer": {"class": ["os.system"], "options": ""}}
    ),
    "torch.optim's module": lambda content: content["about"]["config"].update(
        server_optimizer={"class": "TorchServerOptimizer", "optimizer": "os.system", "options": {}}
    ),
    "no optimizer": lambda content: content["about"]["config"].update(
        server_optimizer={"class": "TorchServerOptimizer"}
    ),
    "an option that is a mapping": lambda content: content["about"]["config"].update(
        server_optimizer={"class": "FedAdam", "lr": {"a": 1}}
    ),
}


@bounded(seconds=150, megabytes=1500)
def test_manifests_whose_fields_mean_nothing(kept, tmp_path):
    victim, content = broken(kept, "torch", tmp_path), manifest(kept["torch"])
    for what, change in MEANINGS.items():
        made = json.loads(json.dumps(content))
        change(made)
        sign(victim.directory, made)
        victim.all_refuse(what, alone=False)


# --- tensors ----------------------------------------------------------------------------------------------------------


def first(tensors):
    return next(iter(sorted(tensors)))


GLOBAL = {
    "one missing": lambda t: t.pop(first(t)),
    "one too many": lambda t: t.update(foreign=torch.zeros(1)),
    "NaN": lambda t: t[first(t)].fill_(float("nan")),
    "infinite": lambda t: t[first(t)].fill_(float("inf")),
    "another shape": lambda t: t.update({first(t): t[first(t)].T.contiguous()}),
    "a scalar": lambda t: t.update({first(t): torch.tensor(1.0)}),
    "double precision": lambda t: t.update({first(t): t[first(t)].double()}),
    "integers": lambda t: t.update({first(t): t[first(t)].to(torch.int32)}),
    "nothing": lambda t: t.clear(),
}
REMAINDER = {
    "half a pair": lambda t: t.pop(next(n for n in t if "remainder_B" in n)),
    "the other half": lambda t: t.pop(next(n for n in t if "remainder_A" in n)),
    "of no layer": lambda t: t.update(
        {"x.remainder_A.weight": torch.ones(1, 4), "x.remainder_B.weight": torch.ones(4, 1)}
    ),
    "a vector": lambda t: t.update({next(n for n in t if "remainder_A" in n): torch.ones(3)}),
    "a scalar": lambda t: t.update({next(n for n in t if "remainder_A" in n): torch.tensor(1.0)}),
    "NaN": lambda t: t[next(n for n in t if "remainder_A" in n)].fill_(float("nan")),
}


def _wide(tensors):
    name = next(n for n in tensors if "remainder_A" in n)
    twin = name.replace("_A.", "_B.")
    tensors[name] = torch.zeros(4000, tensors[name].shape[1])
    tensors[twin] = torch.zeros(tensors[twin].shape[0], 4000)


@bounded(seconds=150, megabytes=1500)
def test_global_and_copied_tensors_that_are_another_models(kept, tmp_path):
    for kind, file, changes in (
        ("everything", "global.safetensors", GLOBAL),
        ("everything", "copy.safetensors", GLOBAL),
        ("remainder", "global.safetensors", REMAINDER | {"wide": _wide}),
    ):
        victim = broken(kept, kind, tmp_path)
        for what, change in changes.items():
            shutil.rmtree(victim.directory / FOLDER)
            shutil.copytree(kept[kind] / FOLDER, victim.directory / FOLDER)
            retouch(victim.directory, file, change)
            if file == "copy.safetensors":
                victim.all_refuse(what, alone=False, promoted=False)
            else:
                victim.all_refuse(what, alone=False)
        shutil.rmtree(victim.directory)


SERVER = {
    "everything": {
        "of another model": lambda t: t.update({"m/foreign": torch.zeros(2), "v/foreign": torch.zeros(2)}),
        "one slot missing": lambda t: t.pop(first(t)),
        "another slot": lambda t: t.update({f"x{first(t)}": torch.zeros(2)}),
        "NaN": lambda t: t[first(t)].fill_(float("nan")),
        "both of another shape": lambda t: t.update({n: torch.zeros(2) for n in t if n[1:] == first(t)[1:]}),
        "squares below nothing": lambda t: [t[n].fill_(-1.0) for n in t if n.startswith("v/")],
        "no slash": lambda t: t.update(name=torch.zeros(2)),
    },
    "torch": {
        "of another model": lambda t: t.update({"exp_avg/foreign": torch.zeros(2)}),
        "one slot missing": lambda t: t.pop(first(t)),
        "another shape": lambda t: t.update({first(t): torch.zeros(7)}),
        "squares below nothing": lambda t: [t[n].fill_(-1.0) for n in t if n.startswith("exp_avg_sq/")],
        "infinite": lambda t: t[first(t)].fill_(float("inf")),
    },
}


@pytest.mark.parametrize("kind", SERVER)
@bounded(seconds=100, megabytes=1500)
def test_a_server_optimizers_memory_that_no_step_could_use(kept, kind, tmp_path):
    victim = broken(kept, kind, tmp_path)
    for what, change in SERVER[kind].items():
        shutil.rmtree(victim.directory / FOLDER)
        shutil.copytree(kept[kind] / FOLDER, victim.directory / FOLDER)
        retouch(victim.directory, "server.safetensors", change)
        victim.all_refuse(what, alone=False, promoted=False)


# --- participants -----------------------------------------------------------------------------------------------------


def progress(change):
    def change_header(header):
        for item in header["progress"].values():
            change(item)

    return change_header


STATES = {
    "no progress": lambda header: header.pop("progress"),
    "progress is a list": lambda header: header.update(progress=[1]),
    "nobody's": lambda header: header.update(progress={}),
    "round x": lambda header: header.update(progress={"x": {"next_step": 0, "optimizer": None}}),
    "round 10^30": lambda header: header.update(progress={str(10**30): {"next_step": 0, "optimizer": None}}),
    "step -1": progress(lambda item: item.update(next_step=-1)),
    "step 10^30": progress(lambda item: item.update(next_step=10**18)),
    "step x": progress(lambda item: item.update(next_step="x")),
    "no groups": progress(lambda item: item["optimizer"].update(param_groups=[])),
    "groups are a number": progress(lambda item: item["optimizer"].update(param_groups=7)),
    "another learning rate": progress(lambda item: item["optimizer"]["param_groups"][0].update(lr=1e30)),
    "a learning rate of words": progress(lambda item: item["optimizer"]["param_groups"][0].update(lr="high")),
    "fewer parameters": progress(lambda item: item["optimizer"]["param_groups"][0].update(params=[0])),
    "values are a list": progress(lambda item: item["optimizer"].update(values=[1])),
    "of no parameter": progress(lambda item: item["optimizer"].update(values={"999": {"x": 1}})),
}


def some(part):
    return lambda tensors: next(n for n in sorted(tensors) if part in n)


def _filled(part, value):
    return lambda t: t[some(part)(t)].fill_(value)


def _shaped(part):
    return lambda t: t.update({some(part)(t): torch.zeros(7)})


KEPT_TENSORS = {
    "a residual of another shape": _shaped("/residual/"),
    "a residual that is NaN": _filled("/residual/", float("nan")),
    "what no transform here carries": lambda t: t.update(
        {some("/residual/")(t).replace("residual", "half"): torch.zeros(2)}
    ),
    "a personal model of another shape": _shaped("/ditto/"),
    "a personal model that is NaN": _filled("/ditto/", float("nan")),
    "half a personal model": lambda t: t.pop(some("/ditto/")(t)),
    "a tensor of another model": lambda t: t.update({some("/ditto/")(t) + "x": torch.zeros(2)}),
    "moments of another shape": _shaped("/exp_avg"),
    "moments that are infinite": _filled("/exp_avg", float("inf")),
    "squares below nothing": _filled("/exp_avg_sq", -1.0),
    "of another round": lambda t: t.update({"77/ditto/x": torch.zeros(2)}),
    "no slash": lambda t: t.update(x=torch.zeros(2)),
}


@bounded(seconds=150, megabytes=1500)
def test_participants_states_that_could_not_go_on(kept, tmp_path):
    victim = broken(kept, "everything", tmp_path)
    (name,) = [n for n, owner in manifest(victim.directory)["participants"].items() if owner == "b"]
    good = (victim.directory / FOLDER / name).read_bytes()
    for what, change in STATES.items():
        put(victim.directory, name, good)
        rehead(victim.directory, name, change)
        victim.all_refuse(what, alone=False, promoted=False)
    for what, change in KEPT_TENSORS.items():
        put(victim.directory, name, good)
        retouch(victim.directory, name, change)
        victim.all_refuse(what, alone=False, promoted=False)
    for data in (b"", b"\x80\x04N.", b"PK\x03\x04", good[:100], b"\xff" * 100):
        put(victim.directory, name, data)
        victim.all_refuse(data, alone=False, promoted=False)


# --- files ------------------------------------------------------------------------------------------------------------


def _fifo(path, _):
    path.unlink()
    os.mkfifo(path)


def _link(path, outside):
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)


def _folder(path, _):
    path.unlink()
    path.mkdir()


def _large(path, _):
    os.truncate(path, 2**40)  # a hole: nothing of it is on the disk


FILES = {
    "a pipe": _fifo,
    "a link": _link,
    "a folder": _folder,
    "a terabyte": _large,
    "none": lambda path, _: path.unlink(),
}


@bounded(seconds=100, megabytes=500)
def test_files_that_are_none(kept, tmp_path):
    victim = broken(kept, "everything", tmp_path)
    for what, change in FILES.items():
        for name in ("manifest.json", "global.safetensors", "server.safetensors"):
            shutil.rmtree(victim.directory / FOLDER, ignore_errors=True)
            shutil.copytree(kept["everything"] / FOLDER, victim.directory / FOLDER)
            change(victim.directory / FOLDER / name, tmp_path / "outside")
            refused = victim.all_refuse(what, unread=True)
            assert name in str(refused)
        shutil.rmtree(victim.directory / FOLDER)
    shutil.copytree(kept["everything"] / FOLDER, victim.directory / FOLDER)
    people = victim.directory / FOLDER / "participants"
    people.rename(tmp_path / "people")
    people.symlink_to(tmp_path / "people")
    victim.all_refuse("a link to a folder", unread=True)
    shutil.rmtree(victim.directory / FOLDER)
    (victim.directory / FOLDER).symlink_to(kept["everything"] / FOLDER)  # a good one, but elsewhere
    with pytest.raises(CheckpointError, match="no checkpoint of round 2"):
        checkpoint.read(victim.directory, 2)


HEADERS = {
    "nothing": b"",
    "a pickle": b"\x80\x04N.",
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "a header of 15 MB": (15 * 2**20).to_bytes(8, "little") + b"[" * (15 * 2**20),
    "490,000 dimensions": b'{"w":{"dtype":"F32","shape":[' + b"1," * 490_000 + b'1],"data_offsets":[0,4]}}',
    "4,300 digits": b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 4300 + b"]}}",
}


@bounded(seconds=60, megabytes=1000)
def test_headers_of_tensors_that_are_none(kept, tmp_path):
    victim = broken(kept, "torch", tmp_path)
    for what, data in HEADERS.items():
        whole = data if not data.startswith(b"{") else len(data).to_bytes(8, "little") + data + bytes(4)
        put(victim.directory, "global.safetensors", whole)
        victim.all_refuse(what)


@bounded(seconds=60, megabytes=1000)
def test_bytes_of_any_kind_in_place_of_any_file(kept, tmp_path):
    """Found by search; each with its right digest."""
    with copied(kept["torch"], tmp_path / "run") as directory:
        model, names = fresh_chain().model, [*manifest(directory)["files"]]
        good = {name: (directory / FOLDER / name).read_bytes() for name in names}
        version = model.weights_version

        @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.sampled_from(names), st.integers(0, 2000), st.binary(min_size=1, max_size=40), st.booleans())
        def check(name, at, data, cut):
            at = min(at, len(good[name]))
            put(directory, name, good[name][:at] + data + (b"" if cut else good[name][at + len(data) :]))
            said = ""
            try:
                with within(2):
                    read_for(model, directory, 2)
            except CheckpointError as error:
                said = str(error)
            assert untrusted.printable(said) == said
            assert len(said) < 1500
            put(directory, name, good[name])

        check()
        assert model.weights_version == version


def test_a_personal_adapter_may_be_as_wide_as_a_remainder_beside_it_makes_it():
    """Rank 2 over a matrix of (6, 4): six columns, and a seventh means nothing."""
    layout = Layout(describe({f"x.{A}": torch.zeros(2, 4), f"x.{B}": torch.zeros(6, 2)}))

    def check(rank):
        own = {f"0/personal/x.{A}": torch.zeros(rank, 4), f"0/personal/x.{B}": torch.zeros(6, rank)}
        private_state.check_layout({"0": ProgressData(next_step=0, optimizer=None)}, describe(own), layout, {})

    check(2)
    check(6)
    with pytest.raises(ParticipantError, match=r"0/personal/x\..* which no tensor of that name is here"):
        check(7)
