"""Trackio: a federation's rounds in trackio's local store, for its dashboard.

Knows trackio's Run. Knows nothing of how rounds come about, and nothing of a hub.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmchain_fed.errors import ConfigError, MissingExtraError, install
from llmchain_fed.federated.callbacks import Callback, RunInfo, metrics_of, samples_of

if TYPE_CHECKING:
    import trackio

    from llmchain_fed.federated.history import History, RoundRecord


class Trackio(Callback):
    """Logs to this machine's trackio folder; step is the round's number. `trackio show --project …` shows it.

    Always local, whatever TRACKIO_SPACE_ID, TRACKIO_SERVER_URL or a hub login say: to publish a project, run
    `trackio sync` on it. (When a run finishes, trackio itself prints "Uploading logs": it means this folder.) The
    folder is TRACKIO_DIR as it stands when trackio is first imported, else `trackio` in the hub's cache. Sample texts
    are held-out examples: who can read the folder can read them.

    Where `trackio.log` would only warn that numbers were lost, this raises: at the next round, or at the end.

    Args:
        project: Made when it does not exist.
        name: Of the run; None lets trackio make one up.
        run_id: An existing run of that name to go on with, as after a restored checkpoint.
        samples: Also logs the rounds' sample texts.

    Raises:
        MissingExtraError: trackio is not installed.
        ConfigError: A project name trackio does not allow, or a `run_id` without its `name`.
    """

    def __init__(
        self, project: str = "llmchain-fed", *, name: str | None = None, run_id: str | None = None, samples: bool = True
    ) -> None:
        try:
            from trackio.sqlite_storage import SQLiteStorage
        except ImportError as error:
            msg = f"Trackio needs trackio, which is not installed: {install('trackio', 'trackio')}"
            raise MissingExtraError(msg) from error
        try:
            SQLiteStorage.validate_project_name(project)
        except ValueError as error:
            msg = f"trackio refuses project={project!r}: {error}. Choose another name."
            raise ConfigError(msg) from error
        if run_id is not None and name is None:
            msg = f"run_id={run_id!r} came without a name, and trackio files a run under both. Pass that run's name."
            raise ConfigError(msg)
        self.project, self.name, self.run_id = project, name, run_id
        self._samples = samples
        self._run: trackio.Run | None = None
        self._problems: list[str] = []

    def __repr__(self) -> str:
        return f"Trackio({self.project!r}, name={self.name!r}, run_id={self.run_id!r})"

    def on_fit_begin(self, run: RunInfo) -> None:
        """Starts the run, or goes on with it; the settings become its config."""
        self._finish()
        self._open({**run.options, "participants": list(run.participants), "rounds": run.rounds})

    def on_round_end(self, record: RoundRecord, history: History) -> None:  # noqa: ARG002
        """Logs the round's numbers and samples.

        Raises:
            OSError: trackio could not write an earlier round.
        """
        from trackio import Markdown

        run = self._run or self._open({})
        texts = samples_of(record) if self._samples else {}
        logged = {**metrics_of(record), **{f"samples/{name}": Markdown(text) for name, text in texts.items()}}
        with _heard(self._problems):
            run.log(logged, step=record.round)
        self._check()

    def on_fit_end(self, history: History) -> None:  # noqa: ARG002
        """Waits until all is written.

        Raises:
            OSError: trackio could not write it.
        """
        self._finish()

    def on_error(self, error: BaseException) -> None:  # noqa: ARG002
        """Waits until the completed rounds are written."""
        self._finish()

    def _open(self, config: dict[str, Any]) -> trackio.Run:
        self._run = _local_run(self._problems, self.project, self.name, self.run_id, config)
        self.name, self.run_id = self._run.name, self._run.id
        return self._run

    def _finish(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            with _heard(self._problems):
                run.finish()
            self._check()

    def _check(self) -> None:
        if self._problems:
            problems = "; ".join(self._problems)
            self._problems.clear()
            msg = f"trackio did not keep all of {self.project!r}: {problems} See to its folder, or drop this callback."
            raise OSError(msg)


@contextlib.contextmanager
def _heard(problems: list[str]) -> Iterator[None]:
    """Takes trackio's own warnings as problems; other people's pass."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if "trackio" in Path(warning.filename).parts:
            problems.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _local_run(
    problems: list[str], project: str, name: str | None, run_id: str | None, config: dict[str, Any]
) -> trackio.Run:
    """A run made without `trackio.init`, which follows TRACKIO_SPACE_ID to the hub and starts hardware monitors."""
    from trackio import Run
    from trackio.sqlite_storage import SQLiteStorage

    class LocalRun(Run):  # type: ignore[misc]  # mypy sees Any
        def _get_username(self) -> None:
            """Nobody: trackio 0.43 would ask the hub who is logged in (trackio/run.py)."""

        def _warn_once(self, key: str, message: str) -> None:  # noqa: ARG002
            problems.append(message)

    SQLiteStorage.init_db(project)
    return LocalRun(url=None, project=project, client=None, name=name, run_id=run_id, config=config)
