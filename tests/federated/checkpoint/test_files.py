"""A checkpoint is on disk whole or not at all, contains nothing that runs, and is read only if it is what was written.

Belongs here: the files, what happens when writing fails, and what is refused when reading. Does not: what a federation
makes of it (test_resuming), processes that are killed (test_kills).
"""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import PAIRS

from llmchain_fed import FederatedAveraging, TrainingConfig
from llmchain_fed.errors import CheckpointError, ConfigError
from llmchain_fed.federated.checkpoint import files as checkpoint
from llmchain_fed.federated.checkpoint.files import Checkpoint
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.options import Ditto
from llmchain_fed.updates.server_optimizers import FedAdam

KEPT = TrainingConfig(
    optimizer="adamw", learning_rate=0.005, batch_size=4, max_steps=1, epochs=None, keep_optimizer=True
)
SHARES = {"a": PAIRS[:6], "b": PAIRS[6:]}
FULL = OSError(errno.ENOSPC, "No space left on device")


def made(number: int, **about) -> Checkpoint:
    """A checkpoint of a round, with every kind of file, whose values say which round it is of."""
    tensors = {
        "global": {"w": torch.full((3, 2), float(number)), "b": torch.arange(4.0)},
        "copy": {"w": torch.full((3, 2), number + 0.5)},
        "server": {"m/w": torch.full((3, 2), -float(number))},
    }
    return Checkpoint(number, {"note": f"round {number}", **about}, tensors, {"ann": b"ann" * number, "bob": b"bob"})


def write(directory: Path, number: int, *, keep: int | None = None, **about) -> Path:
    return checkpoint.write(directory, made(number, **about), keep=keep)


def assert_reads_as(directory: Path, number: int, chosen: int | None = None, **about):
    found, wanted = checkpoint.read(directory, chosen), made(number, **about)
    assert (found.round, dict(found.about), dict(found.participants)) == (number, wanted.about, wanted.participants)
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, tensors in wanted.tensors.items():
        assert found.tensors[name].keys() == tensors.keys()
        assert all(torch.equal(found.tensors[name][n], t) for n, t in tensors.items())


def names_in(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def federation(chain, directory, participants=SHARES, **options):
    options = {"training": KEPT, "progress": False} | options
    return FederatedAveraging(chain, participants=participants, checkpoint_dir=directory, **options)


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(tmp_path):
    folder = write(tmp_path / "deep" / "run", 3)
    assert folder == tmp_path / "deep" / "run" / "round-000003"
    assert_reads_as(tmp_path / "deep" / "run", 3)
    assert names_in(tmp_path / "deep" / "run") == ["round-000003"]


def test_a_federation_leaves_safetensors_and_json_and_nothing_else(make_chain, tmp_path):
    """Opened by safetensors and json themselves; no byte of a pickle or of a zip that could contain one."""
    options = {"codec": "int8", "broadcast_codec": "int8", "personal": Ditto(), "server_optimizer": FedAdam(lr=0.01)}
    federation(make_chain(lora=True), tmp_path, **options).fit(rounds=2)
    folder = tmp_path / "round-000002"
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    owners = [f"participants/{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors" for name in SHARES]
    assert files == sorted(["manifest.json", "global.safetensors", "copy.safetensors", "server.safetensors", *owners])
    digest, text = (folder / "manifest.json").read_text(encoding="utf-8").split("\n", 1)
    assert hashlib.sha256(text.encode()).hexdigest() == digest
    manifest = json.loads(text)
    assert set(manifest["files"]) == set(files) - {"manifest.json"}
    for name, wanted in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == wanted
        assert not data.startswith((b"\x80", b"PK"))
        with safe_open(folder / name, framework="pt") as opened:
            assert list(opened.keys())
    chain = make_chain(lora=True)
    with safe_open(folder / "global.safetensors", framework="pt") as opened:
        assert set(opened.keys()) == chain.model.trainable_state().keys()
    assert not any(text in (folder / "manifest.json").read_text(encoding="utf-8") for pair in PAIRS for text in pair)


def test_names_decide_nothing_about_where_files_are(make_chain, tmp_path):
    """Also names that differ by what a file system may not tell apart."""
    names = ["../../etc/x", "a/b", "..", "/abs", "C:\\x", "x" * 500, "A", "a", "é", "\u0065\u0301", "nul\x00byte", "\n"]
    people = {name: PAIRS[i % 4 : i % 4 + 2] for i, name in enumerate(names)}
    home = tmp_path / "kept"
    fed = federation(make_chain(), home, people)
    fed.fit(rounds=1)
    assert names_in(tmp_path) == ["kept"]
    assert names_in(home) == ["round-000001"]
    assert sorted(p.name for p in (home / "round-000001").iterdir()) == [
        "global.safetensors",
        "manifest.json",
        "participants",
    ]
    inside = names_in(home / "round-000001" / "participants")
    assert len(inside) == len(set(names)) == len(names)
    assert all(len(name) < 64 and name.removesuffix(".safetensors").isalnum() for name in inside)
    assert sorted(checkpoint.read(home).participants) == sorted(names)
    again = FederatedAveraging.resume(home, make_chain(), participants=people, progress=False)
    again.fit(rounds=1)
    assert len(again.history[-1].trained) == len(names)


def test_a_text_that_no_encoding_has_stops_no_run(tmp_path):
    """Half a surrogate pair, as a site's JSON may bring one with a sample answer."""
    write(tmp_path, 1, sample="half \ud83d of one, and « all » of 😀")
    assert_reads_as(tmp_path, 1, sample="half \ud83d of one, and « all » of 😀")


def test_it_is_nobody_elses_to_read(tmp_path):
    """Trained values say something of the examples."""
    mode = write(tmp_path, 1).stat().st_mode
    assert mode & 0o077 == 0


# --- which one --------------------------------------------------------------------------------------------------------


def test_the_newest_is_read_unless_a_round_is_named(tmp_path):
    for number in (9, 10, 2, 1_000_000):  # by number, not by name
        write(tmp_path, number)
    assert checkpoint.rounds(tmp_path) == [2, 9, 10, 1_000_000]
    assert_reads_as(tmp_path, 1_000_000)
    assert_reads_as(tmp_path, 9, 9)
    with pytest.raises(CheckpointError, match=r"no checkpoint of round 3 .*rounds there: 2, 9, 10, 1000000"):
        checkpoint.read(tmp_path, 3)


def test_only_the_newest_are_kept(tmp_path):
    for number in range(1, 6):
        write(tmp_path, number, keep=2)
    assert checkpoint.rounds(tmp_path) == [4, 5]
    assert names_in(tmp_path) == ["round-000004", "round-000005"]
    write(tmp_path, 6, keep=1)
    assert checkpoint.rounds(tmp_path) == [6]


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (None, [1, 2, 3, 4, 5])])
def test_a_federation_keeps_as_many_as_it_is_told(keep, left, make_chain, tmp_path):
    federation(make_chain(), tmp_path, keep_checkpoints=keep).fit(rounds=5)
    assert checkpoint.rounds(tmp_path) == left


def test_three_are_kept_by_default(make_chain, tmp_path):
    federation(make_chain(), tmp_path).fit(rounds=5)
    assert checkpoint.rounds(tmp_path) == [3, 4, 5]


@pytest.mark.parametrize("keep", [0, -1, True, 1.5, "all"])
def test_a_count_that_is_none_is_refused(keep, make_chain, tmp_path):
    with pytest.raises(ConfigError, match="keep_checkpoints"):
        federation(make_chain(), tmp_path, keep_checkpoints=keep)


@pytest.mark.parametrize("directory", [5, 1.5, b"there", ["there"]])
def test_a_directory_that_is_no_path_is_refused(directory, make_chain):
    with pytest.raises(ConfigError, match="checkpoint_dir is the path of a directory, got"):
        federation(make_chain(), directory)
    for nowhere in (directory, None):
        with pytest.raises(ConfigError, match="checkpoint_dir is the path of a directory, got"):
            FederatedAveraging.resume(nowhere, make_chain(), participants=SHARES, progress=False)


def test_a_directory_that_no_file_system_can_have_is_refused_before_anything_is_trained(make_chain, tmp_path):
    fed = federation(make_chain(), f"{tmp_path}/a\0b")
    with pytest.raises(CheckpointError, match="Choose another checkpoint_dir"):
        fed.fit(rounds=1)
    assert fed.round == 0


def test_what_else_lies_there_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "round-1").mkdir()
    (tmp_path / "round-000009").write_text("a file, no folder")
    for number in range(1, 4):
        write(tmp_path, number, keep=1)
    assert checkpoint.rounds(tmp_path) == [3]
    assert names_in(tmp_path) == ["notes.txt", "round-000003", "round-000009", "round-1"]


# --- writing that fails -----------------------------------------------------------------------------------------------

_STEPS = ["mkdtemp", "open", "fsync", "chmod", "rename", "mkdir"]


class Failing:
    """Lets a call through so many times, then raises."""

    def __init__(self, real, error: BaseException, after: int) -> None:
        self.real, self.error, self.after, self.calls = real, error, after, 0

    def __call__(self, *args, **options):
        self.calls += 1
        if self.calls > self.after:
            raise self.error
        return self.real(*args, **options)

    def __get__(self, instance, owner):
        return lambda *args, **options: self(instance, *args, **options)


def install(patched: pytest.MonkeyPatch, step: str, error: BaseException, after: int) -> Failing:
    owner = {"mkdtemp": checkpoint.tempfile, "fsync": os}.get(step, Path)
    failing = Failing(getattr(owner, step), error, after)
    patched.setattr(owner, step, failing)
    return failing


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
@pytest.mark.parametrize("step", _STEPS)
def test_a_write_that_fails_at_any_step_leaves_the_former_ones(step, error, tmp_path, monkeypatch):
    """Every call of every kind fails in its turn; the new round is there whole, or not at all."""
    calls = 0
    while True:
        directory = tmp_path / f"{step}-{calls}"
        write(directory, 1)
        write(directory, 2)
        with monkeypatch.context() as patched:
            failing = install(patched, step, error, calls)
            if wrote(directory, error):
                assert failing.calls <= calls
                break
        there = checkpoint.rounds(directory)
        assert there[-1] in (2, 3)
        for number in there:
            assert_reads_as(directory, number, number)
        assert 2 in there
        assert 1 in there or 3 in there
        write(directory, 4)
        assert_reads_as(directory, 4)
        assert all(name.startswith("round-") for name in names_in(directory)), names_in(directory)
        calls += 1
        assert calls < 60
    assert calls >= 1, f"{step} is not called at all: this test would not see a failure of it"


def wrote(directory: Path, error: BaseException) -> bool:
    try:
        write(directory, 3, keep=2)
    except CheckpointError:
        assert isinstance(error, OSError), "an interruption is no failure of the disk"
        return False
    except KeyboardInterrupt:
        return False
    return True


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
@pytest.mark.parametrize("step", _STEPS)
def test_replacing_the_only_checkpoint_never_leaves_none(step, error, tmp_path, monkeypatch):
    """A personal adapter made after the last round writes that round again; with keep=1 there is nothing before it."""
    calls = 0
    while True:
        directory = tmp_path / f"{step}-{calls}"
        checkpoint.write(directory, made(1, which="former"), keep=1)
        done = False
        with monkeypatch.context() as patched:
            install(patched, step, error, calls)
            try:
                checkpoint.write(directory, made(1, which="new"), keep=1)
                done = True
            except (CheckpointError, KeyboardInterrupt):
                pass
        which = checkpoint.read(directory).about["which"]
        assert_reads_as(directory, 1, which=which)
        assert checkpoint.rounds(directory) == [1]
        if done:
            assert which == "new"
            break
        checkpoint.write(directory, made(2), keep=None)
        assert names_in(directory) == ["round-000001", "round-000002"]
        assert_reads_as(directory, 1, 1, which=which)
        calls += 1
        assert calls < 60
    assert calls >= 1


def test_a_replaced_round_that_was_left_behind_does_not_come_back(tmp_path):
    """Killed between the two renames and the sweep: the former one lies beside the new one, and goes with it."""
    write(tmp_path, 1)
    write(tmp_path, 2, which="new")
    shutil.copytree(tmp_path / "round-000002", tmp_path / ".former-000002")
    assert_reads_as(tmp_path, 2, which="new")
    checkpoint.remove(tmp_path, 2)
    assert checkpoint.rounds(tmp_path) == [1]


def test_what_killed_processes_left_is_swept_by_the_next(tmp_path):
    write(tmp_path, 1)
    (tmp_path / ".writing-abc" / "participants").mkdir(parents=True)
    (tmp_path / ".writing-abc" / "global.safetensors").write_bytes(b"half")
    assert checkpoint.rounds(tmp_path) == [1]
    write(tmp_path, 2)
    assert names_in(tmp_path) == ["round-000001", "round-000002"]


def test_what_is_no_json_is_refused_before_anything_is_there(tmp_path):
    write(tmp_path, 1)
    for about in ({"x": object()}, {"x": float("nan")}, {"x": {1, 2}}):
        with pytest.raises(CheckpointError, match="round 2 cannot be written"):
            write(tmp_path, 2, **about)
    shared = torch.arange(4.0)
    with pytest.raises(CheckpointError, match="round 2 cannot be written"):
        checkpoint.write(tmp_path, Checkpoint(2, {}, {"global": {"a": shared, "b": shared.view(2, 2).t()}}, {}), keep=1)
    assert names_in(tmp_path) == ["round-000001"]


# --- a federation over a disk that fails ------------------------------------------------------------------------------


def test_a_full_disk_costs_the_checkpoint_and_not_the_round(make_chain, tmp_path, monkeypatch):
    straight = make_chain()
    federation(straight, None).fit(rounds=3)
    chain = make_chain()
    fed = federation(chain, tmp_path)
    fed.fit(rounds=1)
    with monkeypatch.context() as patched:
        install(patched, "fsync", FULL, 2)
        with pytest.raises(CheckpointError, match=r"round 2 cannot be written.*No space left"):
            fed.fit(rounds=2)
    assert fed.round == len(fed.history) == 2
    two = make_chain()
    federation(two, None).fit(rounds=2)
    assert all(torch.equal(t, two.model.trainable_state()[n]) for n, t in chain.model.trainable_state().items())
    assert checkpoint.rounds(tmp_path) == [1]
    fed.fit(rounds=1)
    assert names_in(tmp_path) == ["round-000001", "round-000003"]
    assert all(torch.equal(t, straight.model.trainable_state()[n]) for n, t in chain.model.trainable_state().items())


def test_a_disk_that_fails_after_the_very_first_write_does_not_lock_the_run_out(make_chain, tmp_path, monkeypatch):
    """The folder has its name and syncing the directory fails: the rounds there are this run's own."""
    fed = federation(make_chain(), tmp_path)
    real = checkpoint._sync

    def failing(folder):
        if folder == tmp_path:
            raise FULL
        real(folder)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_sync", failing)
        with pytest.raises(CheckpointError, match="No space left"):
            fed.fit(rounds=1)
    fed.fit(rounds=1)
    assert checkpoint.rounds(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    "call",
    [
        lambda fed: fed.fit(rounds=1),
        lambda fed: fed.personalize("a", steps=1),
        lambda fed: fed.train(SHARES["a"], "a"),
        lambda fed: fed.train(SHARES["a"], "newcomer"),
    ],
    ids=["fit", "personalize", "train", "train a newcomer"],
)
def test_anothers_rounds_are_refused_before_anything_is_trained(call, make_chain, tmp_path, monkeypatch):
    federation(make_chain(), tmp_path).fit(rounds=1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    chain = make_chain(lora=True)
    fed = federation(chain, tmp_path)
    start, there = chain.model.weights_version, fed._runtime.nodes()
    monkeypatch.setattr(Client, "handle", lambda self, op, payload: pytest.fail(f"{op} was asked"))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"contains rounds \[1\] of an earlier run.*resume"):
            call(fed)
    assert (chain.model.weights_version, fed._runtime.nodes()) == (start, there)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_two_runs_that_begin_at_once_do_not_mix(make_chain, tmp_path):
    first, second = (federation(make_chain(), tmp_path) for _ in range(2))
    first.train(SHARES["a"], "a")
    second.train(SHARES["a"], "a")
    first.step()
    with pytest.raises(CheckpointError, match="earlier run"):
        second.step()
    assert checkpoint.read(tmp_path).about["federation"] == first._server.client_manager.federation


def test_a_directory_that_cannot_be_written_is_refused_before_anything_is_trained(make_chain, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    chain = make_chain()
    start = chain.model.weights_version
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match=r"checkpoint.*file"):
            federation(chain, directory).fit(rounds=1)
    with monkeypatch.context() as patched:  # permissions stop nobody who runs the tests as root
        install(patched, "mkdtemp", PermissionError(errno.EACCES, "Permission denied"), 0)
        with pytest.raises(CheckpointError, match="Permission denied"):
            federation(chain, tmp_path / "read-only").fit(rounds=1)
    assert chain.model.weights_version == start


# --- reading what has been damaged ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory, tokenizer) -> Path:
    """A federation's two checkpoints, with every kind of file."""
    directory = tmp_path_factory.mktemp("kept")
    options = {"codec": "int8", "broadcast_codec": "int8", "personal": Ditto(), "server_optimizer": FedAdam(lr=0.01)}
    federation(fresh_chain(tokenizer), directory / "run", **options).fit(rounds=2)
    return directory / "run"


def fresh_chain(tokenizer):
    from tiny import TEMPLATE, lora_config, tiny_module, with_lora

    from llmchain_fed import LLMChain, LocalLLM, LocalModel

    module = with_lora(tiny_module("causal", len(tokenizer)), lora_config("causal"))
    return LLMChain(llm=LocalLLM(model=LocalModel(module, tokenizer, name="tiny")), prompt=TEMPLATE)


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def copied(kept: Path, to: Path) -> Path:
    shutil.copytree(kept, to)
    return to


def refused(directory: Path, name: str, number: int | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(directory, number)
    assert caught.type is CheckpointError
    assert name in str(caught.value)
    assert "round-000002" in str(caught.value)
    assert "round=1" in str(caught.value), "the remedy: an earlier one"
    return str(caught.value)


@pytest.fixture
def damaged(kept, tmp_path):
    """`damaged(change)`: every file of the newest checkpoint in turn, changed; yields name and copy."""

    def each(change):
        names = files_of(kept / "round-000002")
        assert len(names) == 6
        for i, name in enumerate(names):
            directory = copied(kept, tmp_path / f"copy-{i}")
            change(directory / "round-000002" / name)
            yield name, directory
            shutil.rmtree(directory)

    return each


def test_a_missing_file_is_named(damaged):
    for name, directory in damaged(Path.unlink):
        refused(directory, name)
        assert checkpoint.read(directory, 1).round == 1


def test_a_file_cut_off_anywhere_is_named(kept, damaged):
    lengths = [lambda n: 0, lambda n: 1, lambda n: 7, lambda n: 8, lambda n: n // 2, lambda n: n - 1]
    for length in lengths:
        for name, directory in damaged(lambda path: os.truncate(path, length(path.stat().st_size))):  # noqa: B023
            refused(directory, name)


def test_a_file_with_more_at_its_end_is_named(damaged):
    for name, directory in damaged(lambda path: path.write_bytes(path.read_bytes() + b"\n")):
        refused(directory, name)


def test_a_single_flipped_bit_is_noticed_wherever_it_is(kept, tmp_path):
    """Some forty places in every file, both ends and the border of the manifest's first line among them."""
    directory = copied(kept, tmp_path / "copy")
    for name in files_of(kept / "round-000002"):
        path = directory / "round-000002" / name
        data = path.read_bytes()
        generator = torch.Generator().manual_seed(len(data))
        drawn = torch.randint(0, len(data), (32,), generator=generator).tolist()
        for i, place in enumerate([0, 7, 8, 63, 64, 65, len(data) // 2, len(data) - 1, *drawn]):
            path.write_bytes(data[:place] + bytes([data[place] ^ (1 << i % 8)]) + data[place + 1 :])
            refused(directory, name)
        path.write_bytes(data)
    assert checkpoint.read(directory).round == 2


def test_files_that_changed_places_are_noticed(kept, tmp_path):
    """Each is a good file, but not the one that stood there."""
    directory = copied(kept, tmp_path / "copy")
    one, two = sorted((directory / "round-000002" / "participants").iterdir())
    first, second = one.read_bytes(), two.read_bytes()
    assert first != second
    one.write_bytes(second)
    two.write_bytes(first)
    refused(directory, "participants/")


def test_a_round_under_anothers_name_is_noticed(kept, tmp_path):
    directory = copied(kept, tmp_path / "copy")
    shutil.rmtree(directory / "round-000002")
    shutil.copytree(directory / "round-000001", directory / "round-000002")
    refused(directory, "of round 1")


@pytest.mark.parametrize("name", ["extra.safetensors", "participants/x.safetensors", ".hidden", "a/b/run.pkl"])
def test_a_file_too_many_is_named(name, kept, tmp_path):
    directory = copied(kept, tmp_path / "copy")
    path = directory / "round-000002" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    assert "not written by a federation" in refused(directory, name)


def test_a_file_that_became_a_folder_is_named(damaged):
    def replace(path):
        path.unlink()
        path.mkdir()

    for name, directory in damaged(replace):
        refused(directory, name)


def signed(content) -> bytes:
    """A manifest with the digest that belongs to it, as somebody makes who edits one by hand."""
    text = content if isinstance(content, str) else json.dumps(content)
    return f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}".encode()


def test_a_manifest_that_makes_no_sense_is_refused_though_its_digest_is_right(kept, tmp_path):
    directory = copied(kept, tmp_path / "copy")
    path = directory / "round-000002" / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8").split("\n", 1)[1])
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(b"of somebody else")
    outside = {**content["files"], "../../secret.safetensors": hashlib.sha256(secret.read_bytes()).hexdigest()}
    for wrong in (
        "",
        "{",
        "[]",
        "null",
        "7",
        "[" * 100_000,
        {},
        {**content, "format": 99},
        {**content, "round": 1},
        {**content, "files": outside},
        {**content, "files": {**content["files"], str(secret): outside["../../secret.safetensors"]}},
        {**content, "files": None},
        {**content, "participants": None},
        {**content, "participants": {"nowhere.safetensors": "a"}},
        {k: v for k, v in content.items() if k != "about"},
        {k: v for k, v in content.items() if k != "files"},
    ):
        path.write_bytes(signed(wrong))
        refused(directory, "")
    for raw in (b"", b"\n", b"\xff\xfe", path.read_bytes()[:64], b"0" * 64 + b"\n{}"):
        path.write_bytes(raw)
        refused(directory, "manifest.json")
    path.write_bytes(signed(content))
    assert checkpoint.read(directory).round == 2


def test_a_good_digest_over_no_safetensors_is_refused(kept, tmp_path):
    directory = copied(kept, tmp_path / "copy")
    folder = directory / "round-000002"
    (folder / "global.safetensors").write_bytes(b"\x80\x04N.")  # a pickle of None
    content = json.loads((folder / "manifest.json").read_text(encoding="utf-8").split("\n", 1)[1])
    content["files"]["global.safetensors"] = hashlib.sha256(b"\x80\x04N.").hexdigest()
    (folder / "manifest.json").write_bytes(signed(content))
    refused(directory, "no safetensors")


def test_a_damaged_checkpoint_changes_neither_chain_nor_history_nor_directory(kept, tokenizer, tmp_path, damaged):
    """Neither where a run is resumed from it nor where one goes back to it."""
    chain = fresh_chain(tokenizer)
    state, version = chain.model.trainable_state(), chain.model.weights_version
    for name, directory in damaged(lambda path: os.truncate(path, path.stat().st_size - 1)):
        before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
        with pytest.raises(CheckpointError) as caught:
            FederatedAveraging.resume(directory, chain, participants=SHARES, progress=False)
        assert name in str(caught.value)
        assert {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()} == before
    assert chain.model.weights_version == version
    directory = copied(kept, tmp_path / "back")
    fed = FederatedAveraging.resume(directory, chain, participants=SHARES, progress=False)
    fed.fit(rounds=1)
    state, history = chain.model.trainable_state(), fed.history.to_json()
    (directory / "round-000002" / "server.safetensors").unlink()
    for act in (fed.roll_back, fed.promote):
        with pytest.raises(CheckpointError, match=r"server\.safetensors"):
            act(2)
    assert fed.round == 3
    assert fed.history.to_json() == history
    assert all(torch.equal(t, state[n]) for n, t in chain.model.trainable_state().items())
    assert checkpoint.rounds(directory) == [1, 2, 3]
    assert chain.model.adapters == fresh_and_personal(fed)


def fresh_and_personal(fed) -> list[str]:
    """The adapters there would be without the one that was refused."""
    return ["global", *fed._peers]


def test_the_newest_being_damaged_one_can_go_on_from_the_one_before(kept, tokenizer, tmp_path):
    directory = copied(kept, tmp_path / "copy")
    (directory / "round-000002" / "global.safetensors").unlink()
    fed = FederatedAveraging.resume(directory, fresh_chain(tokenizer), participants=SHARES, round=1, progress=False)
    fed.fit(rounds=1)
    mended, wanted = checkpoint.read(directory), checkpoint.read(kept)
    for name, tensors in wanted.tensors.items():
        assert all(torch.equal(mended.tensors[name][n], t) for n, t in tensors.items())
