"""Cache: token ids of large files, and sides of those, are kept on the disk, so that a second start makes none again.

Knows where they are kept, and everything that decides them: the file's bytes, its columns, the chain, the tokenizer,
the lengths, the split and the versions. Knows nothing of how examples become ids or find their sides. A file of the
cache that is damaged, another's or of anything else is left aside and written anew; what cannot be described exactly is
not kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmchain_fed.data.examples import Placed
from llmchain_fed.data.prompt import Prompt
from llmchain_fed.data.report import DataReport
from llmchain_fed.data.sources.columns import Mapped
from llmchain_fed.data.sources.files import identity
from llmchain_fed.data.split import Split
from llmchain_fed.model.loading import cache_folder
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.model.tokens import input_rows
from llmchain_fed.untrusted import shown

FORMAT = 2
SMALLEST = 2**20
"""bytes of a file from which on its ids are kept; of a smaller one they are made in a moment"""
SWITCH = "LLMCHAIN_FED_CACHE_EXAMPLES"
_UNUSED = 30 * 24 * 3600  # seconds, after which a file that nobody has read is removed
_LONGEST_HEAD = 2**20  # bytes
_IDS = (np.int32, np.int64, np.int64)  # tokens, bounds, starts
_MARKS = (np.uint8,)
_HERE = "(\0, "
"""what stands for the file's name in a place that is kept: the same bytes may have another one"""

Kept = tuple[tuple[Tensor, Tensor, Tensor], DataReport, str]
"""tokens, bounds and starts of `EncodedExamples`, its report, and the first that was left out"""


@dataclass(frozen=True)
class _KeptFile:
    """Where numbers about one source are kept, and what says that they are its own."""

    path: Path
    key: str
    source: Path
    before: tuple[int, ...]
    """what told the source from another file when its bytes were looked at"""

    def _read(self, kinds: Sequence[Any]) -> tuple[dict[str, Any], list[Any]] | None:
        """What is kept here; None where there is nothing, or nothing of this source."""
        try:
            with self.path.open("rb") as file:
                there = os.fstat(file.fileno())
                if there.st_uid != os.geteuid() or there.st_mode & 0o022:
                    return None
                head = json.loads(file.readline(_LONGEST_HEAD))
                if head["key"] != self.key:
                    return None
                counts = [int(count) for count in head["counts"]]
                sizes = [count * np.dtype(kind).itemsize for count, kind in zip(counts, kinds, strict=True)]
                if min(counts) < 0 or file.tell() + sum(sizes) != there.st_size:
                    return None
                arrays = [np.fromfile(file, kind, count) for count, kind in zip(counts, kinds, strict=True)]
            if _digest(arrays) != head["digest"]:
                return None
            with suppress(OSError):
                os.utime(self.path)
            return head, arrays
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def _write(self, arrays: Sequence[Any], said: dict[str, Any]) -> None:
        """Keeps arrays here, for this account alone; a disk that is full or cannot be written to changes nothing."""
        if identity(self.source) != self.before:
            return
        counts = [len(each) for each in arrays]
        line = json.dumps({"key": self.key, "counts": counts, "digest": _digest(arrays), **said}).encode() + b"\n"
        if len(line) > _LONGEST_HEAD:
            return
        scratch = self.path.with_name(f".{self.path.name}-{secrets.token_hex(8)}")
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _sweep(self.path.parent)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
            with os.fdopen(os.open(scratch, flags, 0o600), "wb") as file:
                file.write(line)
                for each in arrays:
                    each.tofile(file)
            scratch.replace(self.path)
        except OSError:
            with suppress(OSError):
                scratch.unlink()
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


class CachedIds(_KeptFile):
    """Where the ids of one source are kept."""

    def load(self) -> Kept | None:
        """What is kept here; None where there is nothing, or nothing of this source."""
        if (found := self._read(_IDS)) is None:
            return None
        head, arrays = found
        try:
            report = DataReport(**{str(name): int(count) for name, count in head["report"].items()})
            report.ignored_names = tuple(str(name) for name in head["ignored"])
            tokens, bounds, starts = (torch.from_numpy(each) for each in arrays)
            return (tokens, bounds, starts), report, str(head["first"]).replace(_HERE, self._place, 1)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def save(self, arrays: Sequence[Tensor], report: DataReport, first: str) -> None:
        """Keeps ids here, as far as that is possible."""
        first = first.replace(self._place, _HERE, 1)
        said = {"report": report.counts(), "ignored": list(report.ignored_names), "first": first}
        self._write([each.numpy() for each in arrays], said)

    @property
    def _place(self) -> str:
        return f"({shown(self.source.name, 255)}, "


class CachedMarks(_KeptFile):
    """Where it is kept which rows of one source are held out."""

    def load(self) -> tuple[bytes, float] | None:
        """The marks, and the time from which on rows are held out; None where there is nothing of this source."""
        if (found := self._read(_MARKS)) is None:
            return None
        try:
            return found[1][0].tobytes(), float(found[0]["start"])
        except (ValueError, KeyError, TypeError):
            return None

    def save(self, marks: bytes, start: float) -> None:
        """Keeps marks here, as far as that is possible."""
        self._write([np.frombuffer(marks, dtype=np.uint8)], {"start": start})


def place_of(source: Mapped, model: LocalModel, prompt: Prompt | None, max_length: int | None) -> CachedIds | None:
    """Where the ids of a source are kept; None where they are not.

    That is so where it is no large file, or something decides them that cannot be written down, such as a retriever of
    a composed chain; and everywhere with `LLMCHAIN_FED_CACHE_EXAMPLES=off`.
    """
    part, inner = "", source
    if isinstance(source.source, Placed):
        found = source.source.described()
        if found is None:
            return None
        inner, part = found
    chain, tokens = _chain_of(prompt), _tokenizer_of(model)
    if chain is None or tokens is None:
        return None
    place = _place(inner, [part, chain, tokens, max_length])
    return CachedIds(*place) if place is not None else None


def place_of_marks(source: Mapped, prompt: Prompt | None, split: Split, seed: int) -> CachedMarks | None:
    """Where it is kept which rows of a source a split holds out; None where it is not, for the reasons of `place_of`.

    Nor is it where the split's key is code.
    """
    model, chain = getattr(prompt, "model", None), _chain_of(prompt)
    tokens = "none" if prompt is None else _tokenizer_of(model) if isinstance(model, LocalModel) else None
    if callable(split.by) or chain is None or tokens is None:
        return None
    found = _place(source, ["sides", [(n, repr(v)) for n, v in split.to_plain().items()], seed, chain, tokens])
    return CachedMarks(*found) if found is not None else None


def _place(source: Mapped, deciding: list[Any]) -> tuple[Path, str, Path, tuple[int, ...]] | None:
    """Path, key, source and its identity of what is kept of a file; None where nothing is."""
    if not isinstance(source.source, (str, Path)) or os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false"):
        return None
    path = Path(source.source)
    before = identity(path)
    if before is None or before[2] < SMALLEST or not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
    if identity(path) != before:
        return None
    versions = [version(name) for name in ("llmchain-fed", "transformers", "tokenizers")]
    columns = sorted((source.columns or {}).items())
    parts = [FORMAT, versions, content, "".join(path.suffixes[-2:]).lower(), columns, *deciding]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return cache_folder() / "examples" / f"{key[:32]}.ids", key, path, before


def _chain_of(prompt: Prompt | None) -> str | None:
    """All of a chain that decides ids, as text; None where no text can say it."""
    if prompt is None:
        return "final text"
    described = getattr(prompt, "encoding_identity", None)
    return described() if described is not None else None


def _tokenizer_of(model: LocalModel) -> str | None:
    """Digest of what makes ids of a text, and of what a model lets be said; None of a tokenizer that is code."""
    tokenizer = model.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    generation = getattr(model.module, "generation_config", None)
    said = generation.to_dict() if generation is not None and hasattr(generation, "to_dict") else generation
    own = sorted((str(name), repr(value)) for name, value in getattr(tokenizer, "init_kwargs", {}).items())
    parts: list[Any] = [
        backend.to_str(),
        type(tokenizer).__qualname__,
        own,
        repr(getattr(tokenizer, "chat_template", None)),
        [model.kind, model.context_length, model.eos_ids, model.pad_id, input_rows(model.module)],
        sorted(model.control_tokens()),
        repr(sorted(said.items(), key=str)) if isinstance(said, dict) else repr(said),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digest(arrays: Sequence[Any]) -> str:
    found = hashlib.blake2b(digest_size=32)
    for each in arrays:
        found.update(memoryview(each).cast("B") if len(each) else b"")
    return found.hexdigest()


def _sweep(folder: Path) -> None:
    """Removes what nobody has used for long, and what killed processes have left."""
    now = time.time()
    for path in folder.iterdir():
        with suppress(OSError):
            if path.name.lstrip(".").partition(".")[2].startswith("ids") and now - path.lstat().st_mtime > _UNUSED:
                path.unlink()
