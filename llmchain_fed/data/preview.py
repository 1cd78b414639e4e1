"""Preview: what is learnt of some examples, token by token, to be looked at.

Knows how it is drawn: as plain text, with a terminal's colours, and in a notebook. Knows nothing about tokenizers,
prompts or how examples become tokens.
"""

from __future__ import annotations

import html
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from llmchain_fed.untrusted import printable

_LONGEST = 2000  # characters of a line about tokens: names and errors come from elsewhere
LEARNT = "learnt"
"""the source of a token that the model learns to write"""
_COLOURS = ("#4269d0", "#a463f2", "#9c6b4e", "#3ca6a6", "#c2571a", "#7a7a7a")  # of sources, in the order they come
_GREEN = "#2e7d32"
_ANSI = ("\x1b[34m", "\x1b[35m", "\x1b[33m", "\x1b[36m", "\x1b[31m", "\x1b[90m")
_ANSI_LEARNT, _ANSI_END = "\x1b[30;42m", "\x1b[0m"
_BETWEEN = "·"  # between the tokens of a line


@dataclass(frozen=True)
class PreviewToken:
    """One token of a row: what it says, whether it is learnt, and where it came from."""

    id: int
    text: str
    """empty where a character takes several tokens, but for the last of them"""
    learnt: bool
    source: str


@dataclass(frozen=True)
class PreviewExample:
    """One example: its rows of tokens, or why it is left out."""

    title: str
    rows: tuple[tuple[PreviewToken, ...], ...]
    left_out: str = ""
    """why it is not trained on; empty where it is"""

    def runs(self) -> Iterator[tuple[int, str, list[PreviewToken]]]:
        """(row, source, tokens) of each run of tokens that came from one place, in order."""
        for number, row in enumerate(self.rows):
            for source, run in itertools.groupby(row, lambda token: LEARNT if token.learnt else token.source):
                yield number, source, list(run)


@dataclass(frozen=True)
class Preview:
    """What is learnt of some examples: each token, whether it is learnt, and where it came from.

    In a notebook it is drawn in colours, `show()` does so in a terminal, and `str` is plain text, whose lines each are
    a run of tokens that came from one place; what is learnt stands behind `>`.
    """

    examples: tuple[PreviewExample, ...]
    notes: tuple[str, ...] = ()
    """what else there is to know: a system prompt that the template adds, what became of all examples"""

    @property
    def text(self) -> str:
        """All that is read and learnt, row by row."""
        return "\n".join("".join(token.text for token in row) for e in self.examples for row in e.rows)

    @property
    def learnt(self) -> list[str]:
        """What the model learns to write: the text of each run of learnt tokens."""
        runs = (run for example in self.examples for _, source, run in example.runs() if source == LEARNT)
        return ["".join(token.text for token in run) for run in runs]

    @property
    def sources(self) -> list[str]:
        """Where tokens came from that are read, in the order in which they first come."""
        runs = (source for example in self.examples for _, source, _ in example.runs())
        return [source for source in dict.fromkeys(runs) if source != LEARNT]

    def show(self, file: IO[str] | None = None) -> None:
        """Prints it, in colours where the file is a terminal and the variable NO_COLOR is not set."""
        file = sys.stdout if file is None else file
        colours = file.isatty() and not os.environ.get("NO_COLOR")
        print("\n".join(self._lines(colours=colours)), file=file)

    def __str__(self) -> str:
        return "\n".join(self._lines(colours=False))

    __repr__ = __str__

    def _lines(self, *, colours: bool) -> Iterator[str]:
        width = max(map(len, (*self.sources, LEARNT)))
        ansi = dict(zip(self.sources, itertools.cycle(_ANSI), strict=False)) | {LEARNT: _ANSI_LEARNT}
        for example in self.examples:
            yield f"{printable(example.title, _LONGEST)}: {printable(_counts(example), _LONGEST)}"
            former = 0
            for number, source, run in example.runs():
                if number != former:
                    yield "    (another row: it does not read on from what stands before)"
                    former = number
                text = _BETWEEN.join(escaped for token in run if (escaped := _escaped(token.text)))
                text = f"{ansi[source]}{text}{_ANSI_END}" if colours else text
                where = printable(source, _LONGEST)
                yield f"  {'>' if source == LEARNT else ' '} {where:<{width}} {len(run):>5}  {text}"
        for note in self.notes:
            yield f"note: {printable(note, _LONGEST)}"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        colours = dict(zip(self.sources, itertools.cycle(_COLOURS), strict=False)) | {LEARNT: _GREEN}
        legend = " ".join(
            f'<span style="color:{colour};margin-right:1em">■ {html.escape(source)}</span>'
            for source, colour in colours.items()
        )
        parts = [f'<div style="font-size:90%">{legend}</div>']
        for example in self.examples:
            parts.append(f"<p><b>{html.escape(example.title)}</b>: {html.escape(_counts(example))}</p>")
            for row in example.rows:
                tokens = "".join(_span(token, colours[LEARNT if token.learnt else token.source]) for token in row)
                parts.append(f'<pre style="white-space:pre-wrap;line-height:1.7">{tokens}</pre>')
        parts += [f"<p><i>{html.escape(note)}</i></p>" for note in self.notes]
        return "\n".join(parts)


def _counts(example: PreviewExample) -> str:
    if example.left_out:
        return f"left out: {example.left_out}"
    tokens = [token for row in example.rows for token in row]
    rows = f"{len(example.rows)} rows, " if len(example.rows) > 1 else ""
    return f"{rows}{len(tokens):,} tokens, {sum(token.learnt for token in tokens):,} of them learnt"


def _escaped(text: str) -> str:
    """A text on one line of a terminal, which nothing in it can steer."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _span(token: PreviewToken, colour: str) -> str:
    learnt = f"background:{_GREEN}33;font-weight:bold;" if token.learnt else ""
    title = html.escape(f"{LEARNT if token.learnt else token.source} · {token.id}", quote=True)
    text = html.escape(token.text).replace("\n", "⏎\n")
    edge = f"{learnt}color:{colour};border-left:1px solid {colour}66"
    return f'<span title="{title}" style="{edge}">{text}</span>'


def joined(previews: Sequence[Preview], notes: Sequence[str] = ()) -> Preview:
    """Several previews as one; what each notes is said once."""
    kept = dict.fromkeys(itertools.chain.from_iterable((*(p.notes for p in previews), notes)))
    return Preview(tuple(example for p in previews for example in p.examples), tuple(kept))
