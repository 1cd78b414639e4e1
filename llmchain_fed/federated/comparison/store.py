"""Store: the finished trials of a comparison, a JSON file each, so that one that was killed goes on.

Knows files and a digest of what decides the results. Knows nothing about how a trial is run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.comparison.trials import Trial, TrialResult
from llmchain_fed.federated.history import finite
from llmchain_fed.storage import own_files
from llmchain_fed.untrusted import Strict, checked, read_file, read_json, reason, shown

_ABOUT = "compare.json"
_LOCK = ".lock"
_LARGEST = 2**26  # bytes of a file that is read back
_NOT_WORD = re.compile(r"[^A-Za-z0-9]+")
_Name = Annotated[str, Field(max_length=2**16)]
_Number = Annotated[float | int | None, Field()]
_OfMeasures = Annotated[dict[_Name, _Number], Field(max_length=1000)]
_OfTexts = Annotated[dict[_Name, _OfMeasures], Field(max_length=10**5)]


class _Kept(Strict):
    """A file of a finished trial."""

    digest: _Name
    trial: Annotated[dict[_Name, Any], Field(max_length=20)]
    values: Annotated[dict[_Name, _OfTexts], Field(max_length=10**5)]
    seconds: float
    diverged: _Name | None


class Store:
    """Where finished trials are kept.

    Args:
        out: The folder; None keeps them in memory alone.
        about: What decides the results, as JSON: a folder of another is refused.
    """

    def __init__(self, out: str | Path | None, about: Mapping[str, Any]) -> None:
        self.folder = Path(out) if out is not None else None
        text = json.dumps(dict(about), sort_keys=True, indent=1, default=str)
        self._about, self.digest = dict(about), hashlib.sha256(text.encode()).hexdigest()
        self._known: dict[Trial, TrialResult] = {}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Inside, the folder is this process's, and what it contains is known.

        Raises:
            ConfigError: It is of another comparison, damaged, used by another process, or cannot be made.
        """
        if self.folder is None:
            yield
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = (
                f"out={str(self.folder)!r:.300} cannot be made: {reason(error)}. Name a folder that can be written to."
            )
            raise ConfigError(msg) from error
        with own_files.lock(self.folder / _LOCK, f"the folder {shown(str(self.folder), 300)}"):
            self._check()
            yield

    def _check(self) -> None:
        assert self.folder is not None
        file = self.folder / _ABOUT
        if not file.exists():
            text = json.dumps({"digest": self.digest, "about": self._about}, indent=1, default=str)
            own_files.write_whole(file, text)
            return
        found = self._read(file)
        if found.get("digest") != self.digest:
            theirs = found.get("about")
            theirs = theirs if isinstance(theirs, dict) else {}
            ours = json.loads(json.dumps(self._about, default=str))
            names = sorted(k for k in {*theirs, *ours} if theirs.get(k) != ours.get(k))
            msg = (
                f"out={str(self.folder)!r:.300} has the results of another comparison (another {', '.join(names)}): "
                "they cannot stand in one table with these. Choose another folder."
            )
            raise ConfigError(msg)

    def get(self, trial: Trial) -> TrialResult | None:
        """What a trial gave, if it is finished.

        Raises:
            ConfigError: Its file is damaged, or of another comparison.
        """
        if trial not in self._known and self.folder is not None and (file := self._file(trial)).exists():
            what = f"the file {shown(str(file), 300)}"
            remedy = "Remove it to measure it again."
            kept = checked(_Kept, self._read(file), what=what, error=ConfigError, remedy=remedy)
            if kept.digest != self.digest or kept.trial != asdict(trial):
                msg = f"{what} is of another comparison. {remedy}"
                raise ConfigError(msg)
            values = {
                owner: {q: {k: float("nan") if v is None else float(v) for k, v in m.items()} for q, m in texts.items()}
                for owner, texts in kept.values.items()
            }
            self._known[trial] = TrialResult(values, kept.seconds, kept.diverged)
        return self._known.get(trial)

    def put(self, trial: Trial, outcome: TrialResult) -> None:
        """Keeps it, whole or not at all.

        Raises:
            OSError: It cannot be written.
        """
        if self.folder is not None:
            kept = {"digest": self.digest, "trial": asdict(trial), **finite(asdict(outcome))}
            own_files.write_whole(self._file(trial), json.dumps(kept, indent=1))
        self._known[trial] = outcome

    def write(self, name: str, text: str) -> None:
        """A further file beside them.

        Raises:
            OSError: It cannot be written.
        """
        if self.folder is not None:
            own_files.write_whole(self.folder / name, text)

    def _file(self, trial: Trial) -> Path:
        assert self.folder is not None
        parts = [trial.arm, trial.participant, f"batch {trial.batch_size}" if trial.batch_size else None]
        parts += [f"seed {trial.seed}", f"lr {trial.lr:g}" if trial.lr is not None else None]
        parts += ["choosing" if trial.choosing else None]
        words = "-".join(_NOT_WORD.sub("_", part)[:40] for part in parts if part is not None)
        exact = hashlib.sha256(repr(trial).encode()).hexdigest()[:8]  # two names may have the same letters
        return self.folder / f"{words}-{exact}.json"

    def _read(self, file: Path) -> dict[str, Any]:
        what = f"the file {shown(str(file), 300)}"
        data = read_file(file, most=_LARGEST, what=what, error=ConfigError)
        try:
            return read_json(data, most=_LARGEST, what=what, error=ConfigError)
        except ConfigError as error:
            msg = f"{error} Remove it to measure it again."
            raise ConfigError(msg) from error
