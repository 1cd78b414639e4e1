"""Callbacks and trackers: what the real libraries wrote, read back with their own readers.

Belongs here: `llmchain_fed.tracking`. Does not: when the round loop calls it.
"""

from __future__ import annotations

import io
import json
import math
import os
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from llmchain_fed.errors import MissingExtraError
from llmchain_fed.federated.callbacks import Callback, RunInfo, metrics_of, notes_of, samples_of
from llmchain_fed.federated.history import History, ParticipantRecord, RoundRecord, Sample

ODD = "org/ä b"
ROOT = Path(__file__).resolve().parents[2]
EXTRAS = [
    ("tensorboard", "TensorBoard", "tensorboard", ("log",)),
    ("mlflow", "MLflow", "mlflow", ()),
    ("trackio", "Trackio", "trackio", ()),
    ("console", "ConsoleTable", "rich", ()),
]


def make_record(number, **changes):
    """Two participants: one trained, one with an odd name whose loss is NaN and who failed."""
    participants = {
        "django": ParticipantRecord(
            "trained",
            train_loss=2.0 / number,
            held_out_before=1.25,
            held_out_after=1.0 / number,
            examples=372,
            update_norm=0.5,
            cosine_to_mean=0.75,
            bytes_up=1_000_001,
            bytes_down=2_000_000,
            evaluation_bytes=300,
        ),
        ODD: ParticipantRecord(
            "failed", reason="out of memory", train_loss=math.nan, bytes_down=7, notes=["[red] zero"]
        ),
    }
    fields = {
        "held_out_after": 1.0 / 3 / number,
        "update_norm": math.inf,
        "seconds": 12.5,
        "samples": [
            Sample("django", "Translate: Page\n", "Page", before="```\nPag", after=None),
            Sample(ODD, "Translate: <b>|", "verrouillée", before="x", after="y"),
        ],
    }
    return RoundRecord(number, participants, **(fields | changes))


OPTIONS = {"model": "tiny", "learning_rate": 5e-4, "codec": None, "long": "x" * 7000}


def run_info(start=0, rounds=2, **options):
    return RunInfo(OPTIONS | options, ("django", ODD), start, rounds)


def fit(callback, *numbers, error=None, **options):
    """What the loop does, over hand-made rounds."""
    history = History([make_record(n) for n in range(1, numbers[0])])
    callback.on_fit_begin(run_info(numbers[0] - 1, len(numbers), **options))
    for number in numbers:
        history.append(make_record(number))
        callback.on_round_end(history[-1], history)
    if error is None:
        callback.on_fit_end(history)
    else:
        callback.on_error(error)
    return history


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """Whatever tries to leave this machine fails the test."""
    connect, resolve = socket.socket.connect, socket.getaddrinfo
    reached_for = []  # asked at the end: a tracker may swallow the refusal, or meet it in a thread of its own

    def refuse(host):
        if host not in ("127.0.0.1", "::1", "localhost", None):
            reached_for.append(host)
            msg = f"this test has no network, and something reached for {host}"
            raise OSError(msg)

    def guarded_connect(self, address):
        if self.family != socket.AF_UNIX:
            refuse(address[0])
        return connect(self, address)

    def guarded_resolve(host, *args, **kwargs):
        refuse(host)
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_resolve)
    yield
    assert reached_for == []


def outside_of_ci(code, cwd, **environment):
    """Runs code as a user would, not as a test, with every attempt to reach another machine printed as ESCAPED."""
    guard = (
        "import sys\n"
        "def hook(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'):\n"
        "        host = args[1][0] if event == 'socket.connect' and isinstance(args[1], tuple) else args[0]\n"
        "        if isinstance(host, str) and host not in ('127.0.0.1', '::1', 'localhost'):\n"
        "            sys.__stdout__.write(f'ESCAPED {host}\\n'); sys.__stdout__.flush()\n"
        "            raise OSError('this test has no network')\n"
        "sys.addaudithook(hook)\n"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "GITHUB_", "HF_")) and k != "CI"}
    path = os.pathsep.join(
        [str(ROOT / "tests" / "support"), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, "-c", guard + code],
        cwd=cwd,
        env={**kept, "PYTHONPATH": path, "HOME": str(cwd), **environment},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert "ESCAPED" not in done.stdout
    return done.stdout


# --- the protocol ---------------------------------------------------------------------------------------------------


def test_a_callback_does_nothing_by_itself():
    assert len(fit(Callback(), 1, 2)) == 2
    fit(Callback(), 1, error=KeyboardInterrupt())


def test_metrics_are_the_records_numbers():
    found = metrics_of(make_record(2))
    assert found["held_out/after"] == 1.0 / 6
    assert found["train_loss"] == found["participant/django/train_loss"] == 1.0
    assert (found["bytes/up"], found["bytes/down"], found["bytes/evaluation"]) == (1_000_001, 2_000_007, 300)
    assert (found["seconds/round"], found["seconds/training"]) == (12.5, 0.0)
    assert (found["participants/trained"], found["participants/asked"]) == (1, 2)
    assert found["participant/django/cosine_to_mean"] == 0.75
    assert found[f"participant/{ODD}/bytes_down"] == 7
    assert all(type(value) is float for value in found.values())


def test_what_was_not_measured_or_is_not_finite_is_left_out():
    found = metrics_of(make_record(1))
    assert not {"held_out/before", "update_norm", "aggregation_gap", f"participant/{ODD}/train_loss"} & set(found)
    assert all(map(math.isfinite, found.values()))


def test_the_aggregation_gap_is_taken_where_a_record_has_one():
    record = RoundRecord(1, {})
    record.aggregation_gap = 0.125
    assert metrics_of(record)["aggregation_gap"] == 0.125


def test_names_with_slashes_do_not_collide():
    names = ["a", "a/train_loss", "a/b", "a/b/train_loss"]
    record = RoundRecord(1, {n: ParticipantRecord("trained", train_loss=float(i)) for i, n in enumerate(names)})
    found = metrics_of(record)
    assert [found[f"participant/{n}/train_loss"] for n in names] == [0.0, 1.0, 2.0, 3.0]


def test_samples_are_fenced_whatever_they_contain():
    texts = samples_of(make_record(1))
    assert "````\n```\nPag\n````" in texts["django"]
    assert "after" not in texts["django"]
    assert "```\nTranslate: <b>|\n```" in texts[ODD]


def test_notes_say_who_did_not_train_and_why():
    assert notes_of(make_record(1)) == [f"{ODD}: failed (out of memory)", f"{ODD}: [red] zero"]


@pytest.mark.parametrize(("module", "name", "extra", "args"), EXTRAS)
def test_a_missing_tracker_names_its_extra(module, name, extra, args, monkeypatch):
    for needed in ("tensorboard", "torch.utils.tensorboard", "mlflow", "trackio", "rich", "rich.console"):
        monkeypatch.setitem(sys.modules, needed, None)
    adapter = getattr(__import__(f"llmchain_fed.tracking.{module}", fromlist=[name]), name)
    with pytest.raises(MissingExtraError, match=rf"pip install {extra}; .* pip install -e '\.\[{extra}\]'"):
        adapter(*args)


# --- TensorBoard ----------------------------------------------------------------------------------------------------


def events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def scalars_of(folder, tag):
    return [(e.step, e.value) for e in events_of(folder).Scalars(tag)]


def text_of(folder, tag):
    events = events_of(folder).Tensors(f"{tag}/text_summary")
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in events]


@pytest.fixture
def board(tmp_path):
    pytest.importorskip("tensorboard")
    from llmchain_fed.tracking.tensorboard import TensorBoard

    return TensorBoard(tmp_path / "events")


def test_tensorboard_has_the_rounds_numbers(board):
    history = fit(board, 1, 2)
    events = events_of(board.log_dir)
    assert set(events.Tags()["scalars"]) == set(metrics_of(history[0]))
    for name in metrics_of(history[0]):
        expected = [(r.round, pytest.approx(metrics_of(r)[name], rel=1e-6)) for r in history]
        assert scalars_of(board.log_dir, name) == expected


def test_tensorboard_has_settings_and_samples_as_text(board):
    history = fit(board, 1, 2)
    assert text_of(board.log_dir, f"samples/{ODD}") == [(r.round, samples_of(r)[ODD]) for r in history]
    ((_, table),) = text_of(board.log_dir, "federation/settings")
    assert "| learning_rate | 0.0005 |" in table
    assert f"| participants | django, {ODD} |" in table


def test_tensorboard_goes_on_in_a_second_fit(board):
    fit(board, 1, 2)
    fit(board, 3, error=RuntimeError("the loop failed later"))
    assert [step for step, _ in scalars_of(board.log_dir, "bytes/up")] == [1, 2, 3]


def test_tensorboard_shows_a_round_that_was_run_again_once(board):
    fit(board, 1, 2, 3)
    fit(board, 2, 3)  # restored from the checkpoint after round 1
    assert [step for step, _ in scalars_of(board.log_dir, "bytes/up")] == [1, 2, 3]


def test_tensorboard_without_samples_writes_no_example(tmp_path):
    pytest.importorskip("tensorboard")
    from llmchain_fed.tracking.tensorboard import TensorBoard

    fit(TensorBoard(tmp_path, samples=False), 5)
    assert [step for step, _ in scalars_of(tmp_path, "bytes/up")] == [5]
    assert not any(b"verrouill" in path.read_bytes() for path in tmp_path.iterdir())


# --- MLflow ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def flow(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    from llmchain_fed.tracking.mlflow import MLflow

    monkeypatch.chdir(tmp_path)  # MLflow puts a local store's artifacts into the working directory
    return MLflow(f"sqlite:///{tmp_path / 'runs.db'}", run_name="first")


def read(flow):
    """(run, artifact reader) by a client of our own."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{Path.cwd() / 'runs.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "llmchain-fed"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == flow.run_id

    def metric(name):
        from llmchain_fed.tracking.mlflow import safe_name

        return [(m.step, m.value) for m in client.get_metric_history(flow.run_id, safe_name(name))]

    def artifact(name):
        return json.loads(Path(client.download_artifacts(flow.run_id, name, str(Path.cwd()))).read_text("utf-8"))

    return run, metric, artifact


def test_mlflow_has_settings_numbers_and_history(flow):
    history = fit(flow, 1, 2)
    run, metric, artifact = read(flow)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert run.data.params["learning_rate"] == "0.0005"
    assert (run.data.params["codec"], run.data.params["participants"]) == ("null", "2")
    assert len(run.data.params["long"]) <= 6000
    assert run.data.params["long"].endswith("(whole in federation.json)")
    assert artifact("federation.json")["options"] == OPTIONS
    assert artifact("history.json") == json.loads(history.to_json())
    assert len(run.data.metrics) == len(metrics_of(history[0]))
    for name in metrics_of(history[0]):
        assert metric(name) == [(r.round, metrics_of(r)[name]) for r in history]


def test_mlflow_goes_on_with_the_same_run(flow):
    fit(flow, 1)
    fit(flow, 2, 3, learning_rate=1e-4)
    run, metric, artifact = read(flow)
    assert [step for step, _ in metric("held_out/after")] == [1, 2, 3]
    assert (run.data.params["learning_rate"], run.data.params["learning_rate.from_round_2"]) == ("0.0005", "0.0001")
    assert len(artifact("history.json")["rounds"]) == 3
    assert run.info.status == "FINISHED"


def test_mlflow_goes_on_with_a_run_of_another_process(flow):
    from llmchain_fed.tracking.mlflow import MLflow

    fit(flow, 1)
    fit(MLflow(f"sqlite:///{Path.cwd() / 'runs.db'}", run_id=flow.run_id), 2)
    assert [step for step, _ in read(flow)[1]("bytes/up")] == [1, 2]


def test_a_failed_fit_is_a_failed_run_with_its_rounds(flow):
    fit(flow, 1, error=RuntimeError("quorum"))
    run, metric, artifact = read(flow)
    assert run.info.status == "FAILED"
    assert run.data.tags["error"] == "RuntimeError: quorum"
    assert len(metric("bytes/up")) == len(artifact("history.json")["rounds"]) == 1
    fit(flow, 2)
    assert read(flow)[0].info.status == "FINISHED"


def test_a_run_ends_as_failed_where_its_history_cannot_be_stored(flow, monkeypatch):
    monkeypatch.setattr(type(flow._client), "log_text", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        fit(flow, 1)
    assert read(flow)[0].info.status == "FAILED"


def test_an_error_before_there_is_a_run_makes_none(flow):
    flow.on_error(RuntimeError())
    assert flow.run_id is None


def test_mlflow_stores_why_a_fit_stopped_early_and_more_participants_than_one_call_takes(flow):
    record = RoundRecord(1, {f"site {i}": ParticipantRecord("trained", train_loss=float(i)) for i in range(400)})
    history = History([record])
    history.stopped_early = "no improvement"
    flow.on_fit_begin(run_info())
    flow.on_round_end(record, history)
    flow.on_fit_end(history)
    run, _, _ = read(flow)
    assert len(run.data.metrics) == len(metrics_of(record)) > 1000
    assert run.data.tags["stopped_early"] == "no improvement"


def test_safe_names_are_accepted_by_mlflow_and_never_collide():
    from llmchain_fed.tracking.mlflow import safe_name

    validation = pytest.importorskip("mlflow.utils.validation")
    who = [
        "a",
        "A",
        "a b",
        "a_b",
        "a/b",
        "a_x2f_b",
        "ä",
        "_xe4_",
        "__xe4_",
        "",
        "_x_",
        ".",
        "..",
        "../x",
        "a//b",
        "a\n",
    ]
    who += ["x" * 300, "x" * 299 + "y", "😀", "a:b", "a/", "_", "_x", "a.b", "org/ä b", "org/ä_b"]
    names = [safe_name(f"participant/{name}/train_loss") for name in who]
    assert len(set(names)) == len(who)
    for name in names:
        validation._validate_metric_name(name)
        assert len(name) <= 250
        assert name.isascii()


def test_nothing_leaves_while_mlflow_logs_locally(tmp_path):
    pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    code = (
        "import test_trackers, time\n"
        "from llmchain_fed.tracking.mlflow import MLflow\n"
        "flow = MLflow('sqlite:///runs.db')\n"
        "test_trackers.fit(flow, 1, 2)\n"
        "from mlflow.telemetry import get_telemetry_client\n"
        "print('telemetry', get_telemetry_client())\n"
        "time.sleep(1)\n"
    )
    assert outside_of_ci(code, tmp_path) == "telemetry None\n"


# --- trackio --------------------------------------------------------------------------------------------------------


def trackio_rows(folder):
    with sqlite3.connect(folder / "books.db") as connection:
        rows = connection.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    connection.close()
    return [(run, name, step, json.loads(metrics)) for run, name, step, metrics in rows]


def in_trackio(code, folder, **environment):
    pytest.importorskip("trackio")
    head = (
        "import test_trackers, sys\n"
        "from test_trackers import fit\n"
        "from llmchain_fed.tracking.trackio import Trackio\n"
        "from llmchain_fed.errors import ConfigError\n"
    )
    return outside_of_ci(head + code, folder, TRACKIO_DIR=str(folder), **environment)


def test_trackio_has_the_rounds_numbers_settings_and_samples(tmp_path):
    """With a hub login and a Space in the environment, which trackio.init would follow."""
    code = (
        "board = Trackio('books', name='first')\n"
        "fit(board, 1, 2)\n"
        "import trackio\n"
        "(run,) = trackio.Api().runs('books')\n"
        "assert run.config['learning_rate'] == 5e-4, run.config\n"
        f"assert run.config['participants'] == ['django', {ODD!r}]\n"
        "assert run.config['_Username'] is None\n"
        "assert run.id == board.run_id\n"
    )
    in_trackio(code, tmp_path, HF_TOKEN="hf_not_a_token", TRACKIO_SPACE_ID="someone/space")
    rows = trackio_rows(tmp_path)
    assert [(name, step) for _, name, step, _ in rows] == [("first", 1), ("first", 2)]
    for _, _, step, metrics in rows:
        record = make_record(step)
        assert {k: v for k, v in metrics.items() if not k.startswith("samples/")} == metrics_of(record)
        assert metrics[f"samples/{ODD}"]["_value"] == samples_of(record)[ODD]


def test_trackio_goes_on_with_the_same_run(tmp_path):
    code = (
        "board = Trackio('books', samples=False)\n"
        "fit(board, 4)\n"
        "fit(board, 5, error=RuntimeError())\n"
        "fit(Trackio('books', name=board.name, run_id=board.run_id, samples=False), 6)\n"
    )
    in_trackio(code, tmp_path)
    rows = trackio_rows(tmp_path)
    assert [step for _, _, step, _ in rows] == [4, 5, 6]
    assert len({(run, name) for run, name, _, _ in rows}) == 1
    assert rows[0][3] == metrics_of(make_record(4))


def test_what_trackio_only_warns_of_is_raised(tmp_path):
    code = (
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "board = Trackio('books')\n"
        "def fail(*args, **kwargs): raise OSError('disk full')\n"
        "SQLiteStorage.bulk_log = fail\n"
        "try: fit(board, 1)\n"
        "except OSError as error: print('RAISED', error)\n"
    )
    assert "RAISED trackio did not keep all of 'books': trackio failed to flush" in in_trackio(code, tmp_path)


def test_trackio_refuses_what_it_cannot_file(tmp_path):
    code = (
        "for options in ({'project': 'registry-x'}, {'project': 'books', 'run_id': 'abc'}):\n"
        "    try: Trackio(**options)\n"
        "    except ConfigError as error: print('REFUSED', error)\n"
    )
    assert in_trackio(code, tmp_path).count("REFUSED") == 2


# --- the console ----------------------------------------------------------------------------------------------------


@pytest.fixture
def table():
    pytest.importorskip("rich")
    from llmchain_fed.tracking.console import ConsoleTable

    return ConsoleTable


def test_the_console_shows_a_line_per_round_and_a_table(table):
    file = io.StringIO()
    fit(table(file), 3, 4)
    head, third, fourth, *rest = file.getvalue().splitlines()
    assert head == "rounds 3 to 4 with 2 participants"
    assert third.startswith(
        "round 3 · trained 1 of 2 · train loss 0.6667 · held-out loss – → 0.1111 · up / down 1.0 MB"
    )
    assert third.endswith(f"· notes {ODD}: failed (out of memory); {ODD}: [red] zero")
    assert fourth.startswith("round 4")
    text = "\n".join(rest)
    assert all(heading in text for heading in ("train loss", "held-out loss", "up / down", "gap"))
    assert [line.split("│")[1].strip() for line in rest if line.startswith("│") and line[1:9].strip()] == list("1234")
    assert "[red] zero" in text
    assert "\x1b" not in file.getvalue()


def test_the_console_shows_a_gap_and_an_early_stop(table):
    file = io.StringIO()
    history = History([RoundRecord(1, {})])
    history[0].aggregation_gap = 0.125
    history.stopped_early = "no improvement"
    table(file).on_round_end(history[0], history)
    table(file).on_fit_end(history)
    assert "gap 0.125" in file.getvalue()
    assert file.getvalue().endswith("stopped early: no improvement\n")


def test_the_console_shows_the_completed_rounds_of_a_failed_fit(table):
    file = io.StringIO()
    fit(table(file), 1, error=KeyboardInterrupt())
    assert "│     1 │" in file.getvalue()
    assert file.getvalue().endswith("ended by KeyboardInterrupt: \n")


def test_the_console_works_in_a_terminal_and_in_a_notebook(table):
    from rich.console import Console

    for options in ({"force_terminal": True, "width": 60}, {"force_jupyter": False, "width": 100}):
        console = Console(record=True, file=io.StringIO(), **options)
        fit(table(console=console), 1, 2)
        html = console.export_html()
        assert "round 2" in html
        assert "[red]" in html


def test_a_console_that_cannot_write_raises(table):
    file = io.StringIO()
    file.close()
    with pytest.raises(ValueError, match="closed file"):
        fit(table(file), 1)
