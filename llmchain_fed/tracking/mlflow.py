"""MLflow: a federation's settings, rounds and history as one run.

Knows MLflow's client, its limits on names and its stores. Knows nothing of how rounds come about.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmchain_fed.errors import MissingExtraError, install
from llmchain_fed.federated.callbacks import Callback, RunInfo, metrics_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from llmchain_fed.federated.history import History, RoundRecord

# mlflow.utils.validation: what MLflow accepts in one call, and in one name or value
_METRICS_A_CALL, _PARAMS_A_CALL = 1000, 100
_NAME_LENGTH, _PARAM_LENGTH = 250, 6000


class MLflow(Callback):
    """One MLflow run: settings as params, metrics with step = round, `federation.json`, `history.json` at the end.

    A second fit on the same object goes on with the same run; a setting that has changed by then becomes the param
    `<name>.from_round_<n>`, since MLflow never changes one. The run always ends, as FINISHED or as FAILED with a tag
    `error`. `history.json` contains the samples' held-out texts: who can read the store can read them.

    Nothing is sent anywhere but to `tracking_uri`: MLflow's own telemetry is turned off where MLFLOW_DISABLE_TELEMETRY
    does not say otherwise and mlflow has not been imported before.

    Args:
        tracking_uri: Of the store, such as "sqlite:///runs.db" or a server's address; None takes MLflow's own choice
            (MLFLOW_TRACKING_URI, else `mlflow.db` in the working directory).
        experiment: Made when it does not exist.
        run_name: None lets MLflow make one up.
        run_id: An existing run to go on with, as after a restored checkpoint.

    Raises:
        MissingExtraError: mlflow is not installed.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        *,
        experiment: str = "llmchain-fed",
        run_name: str | None = None,
        run_id: str | None = None,
    ) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            import alembic  # noqa: F401  (mlflow-skinny leaves out what its database store needs)
            import sqlalchemy  # noqa: F401
            from mlflow import MlflowClient
        except ImportError as error:
            msg = f"MLflow needs mlflow, which is not fully installed: {install('mlflow', 'mlflow')}"
            raise MissingExtraError(msg) from error
        with warnings.catch_warnings():
            # MLflow 3.17 uses a loader option that SQLAlchemy 2.1 deprecates; no upstream report found. The code is in
            # https://github.com/mlflow/mlflow/blob/master/mlflow/store/tracking/dbmodels/models.py
            warnings.filterwarnings("ignore", message="The ``noload`` loader strategy is deprecated")
            self._client: MlflowClient = MlflowClient(tracking_uri=tracking_uri)
        self._experiment, self._run_name = experiment, run_name
        self.run_id = run_id
        """of the MLflow run, once there is one"""
        self._history: History | None = None

    def __repr__(self) -> str:
        return f"MLflow({self._client.tracking_uri!r}, experiment={self._experiment!r}, run_id={self.run_id!r})"

    def on_fit_begin(self, run: RunInfo) -> None:
        """Starts the run, or goes on with it, and logs the settings."""
        run_id = self._start()
        given = {"participants": len(run.participants), **run.options}
        self._log_params(run_id, {safe_name(name): _value(value) for name, value in given.items()}, run.start_round)
        whole = {
            "options": dict(run.options),
            "participants": list(run.participants),
            "start_round": run.start_round,
            "rounds": run.rounds,
        }
        self._client.log_dict(run_id, whole, "federation.json")  # params may be cut, this is not

    def on_round_end(self, record: RoundRecord, history: History) -> None:
        """Logs the round's numbers under its own number as step."""
        from mlflow.entities import Metric

        run_id = self.run_id or self._start()
        self._history = history
        now = int(time.time() * 1000)
        metrics = [Metric(safe_name(name), value, now, record.round) for name, value in metrics_of(record).items()]
        for first in range(0, len(metrics), _METRICS_A_CALL):
            self._client.log_batch(run_id, metrics=metrics[first : first + _METRICS_A_CALL])

    def on_fit_end(self, history: History) -> None:
        """Stores `history.json` and ends the run as FINISHED, or as FAILED where storing fails."""
        run_id = self.run_id or self._start()
        status = "FAILED"
        try:
            self._client.log_text(run_id, history.to_json(), "history.json")
            if history.stopped_early:
                self._client.set_tag(run_id, "stopped_early", history.stopped_early)
            status = "FINISHED"
        finally:
            self._client.set_terminated(run_id, status)

    def on_error(self, error: BaseException) -> None:
        """Stores the history of the rounds that were completed and ends the run as FAILED."""
        if self.run_id is None:  # the error came before there was a run
            return
        try:
            self._client.set_tag(self.run_id, "error", f"{type(error).__name__}: {error}"[:1000])
            if self._history is not None:
                self._client.log_text(self.run_id, self._history.to_json(), "history.json")
        finally:
            self._client.set_terminated(self.run_id, "FAILED")

    def _start(self) -> str:
        if self.run_id is not None:
            self._client.update_run(self.run_id, status="RUNNING")
            return self.run_id
        found = self._client.get_experiment_by_name(self._experiment)
        experiment_id = found.experiment_id if found else self._client.create_experiment(self._experiment)
        self.run_id = str(self._client.create_run(experiment_id, run_name=self._run_name).info.run_id)
        return self.run_id

    def _log_params(self, run_id: str, given: Mapping[str, str], start_round: int) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(run_id).data.params
        named = {
            n if known.get(n, v) == v else safe_name(f"{n}.from_round_{start_round + 1}"): v for n, v in given.items()
        }
        params = [Param(name, value) for name, value in named.items() if name not in known]
        for first in range(0, len(params), _PARAMS_A_CALL):
            self._client.log_batch(run_id, params=params[first : first + _PARAMS_A_CALL])


def safe_name(name: str) -> str:
    """The name with what MLflow refuses written as `_x<code point>_`; two names never become one.

    MLflow takes letters, digits, `_ - . /` and spaces, and reads a name as a path: a participant's own slashes, and
    dots that begin a part of the path, are escaped as well. Beyond 250 characters the end becomes a hash.

    >>> safe_name("held_out/after"), safe_name("participant/org/ä b/train_loss")
    ('held_out/after', 'participant/org_x2f__xe4_ b/train_loss')
    """
    if name.startswith("participant/"):
        head, _, rest = name.partition("/")
        who, _, field = rest.rpartition("/")
        parts = [head, who, field]
    else:
        parts = name.split("/")
    safe = "/".join(re.sub(r"[^A-Za-z0-9_. -]|_(?=x)|^\.|^$", _escape, part) for part in parts)
    if len(safe) <= _NAME_LENGTH:
        return safe
    digest = hashlib.sha256(safe.encode()).hexdigest()[:16]
    return f"{safe[: _NAME_LENGTH - 17]}-{digest}"


def _escape(match: re.Match[str]) -> str:
    return f"_x{ord(match[0]):x}_" if match[0] else "_x_"


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    note = " … (whole in federation.json)"
    return text if len(text) <= _PARAM_LENGTH else text[: _PARAM_LENGTH - len(note)] + note
