"""Whose text is it: control tokens that foreign text happens to spell are encoded as the text they are.

A control token opens or ends something: begin, end, padding, and the added tokens that a template writes. The author's
text (a template's literals) may write one; text from elsewhere (a variable's value, a message, a completion) cannot.
A template is a black box: it is rendered a second time with other characters in the values' places, and where the two
texts differ, foreign text stands. Knows tokenizers, and templates as functions. Knows nothing about chains or weights.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

from llmchain_fed.errors import ChatTemplateError, DataError

Change = Callable[[str], str]
"""a value's text → a text of the same length"""

MASK = "ꙮ"  # a letter that is printable, so that repr() and JSON leave it alone, and hardly anybody writes
_LETTERS = "xqzjkvw"
_OPEN, _CLOSE = "\U0010fff0", "\U0010fff1"
"""around the name that a control token has in a disguised tokenizer: private-use characters that no text contains"""
_disguised: WeakKeyDictionary[Any, dict[frozenset[str], tuple[Any, Tokenizer]]] = WeakKeyDictionary()
_added: WeakKeyDictionary[Any, tuple[Any, dict[int, str]]] = WeakKeyDictionary()


class Rendered(str):
    """A text that spells control tokens in places where it may not write them; elsewhere a text is a plain `str`.

    Args:
        text: The whole text.
        foreign: (start, end) of each place where foreign text spells a control token, in order.
        controls: All control tokens; where one stands outside `foreign`, the author wrote it.
    """

    foreign: tuple[tuple[int, int], ...]
    controls: frozenset[str]

    def __new__(cls, text: str, foreign: Iterable[tuple[int, int]], controls: Iterable[str]) -> Rendered:
        """A `str` is made here, not in `__init__`."""
        made = super().__new__(cls, text)
        made.foreign, made.controls = tuple(foreign), frozenset(controls)
        return made

    def __getnewargs__(self) -> tuple[str, tuple[tuple[int, int], ...], frozenset[str]]:  # type: ignore[override]
        return str(self), self.foreign, self.controls


def added_tokens(tokenizer: Any) -> dict[int, str]:
    """Id → text of every token that was added to the vocabulary; kept, for a tokenizer makes it anew each time."""
    names = [getattr(tokenizer, f"{what}_token_id", None) for what in ("bos", "eos", "pad", "unk")]
    state = (len(tokenizer), *names) if hasattr(tokenizer, "__len__") else None
    known = _added.get(tokenizer) if state is not None else None
    if known is not None and known[0] == state:
        return known[1]
    found = {i: token.content for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    if state is not None:
        _added[tokenizer] = state, found
    return found


def occurrences(text: str, controls: Iterable[str]) -> list[tuple[int, int]]:
    """(start, end) of every control token spelled in `text`, leftmost and longest first, as tokenizers match them.

    >>> occurrences("a</s>b", ["</s>", "<s>"])
    [(1, 5)]
    """
    found = [c for c in sorted(controls, key=len, reverse=True) if c and c in text]
    return [m.span() for m in re.finditer("|".join(map(re.escape, found)), text)] if found else []


def foreign_text(text: str, controls: Iterable[str]) -> str:
    """A text that is foreign as a whole: as it is, or, where it spells a control token, as `Rendered`."""
    controls = frozenset(controls)
    places = occurrences(text, controls)
    return Rendered(text, places, controls) if places else text


def may_spell(text: str, controls: frozenset[str]) -> bool:
    """Whether `text` spells a control token, or could begin or end one together with the text around it.

    >>> [may_spell(text, frozenset({"<eos>"})) for text in ("1 < 2", "a <", "x<eos>")]
    [False, True, True]
    """
    return _spelling(controls).search(text) is not None


@functools.lru_cache(maxsize=64)
def _spelling(controls: frozenset[str]) -> re.Pattern[str]:
    """Matches a control token, the beginning of one at a text's end, and the end of one at a text's beginning."""
    cuts = [(c[:n], c[n:]) for c in sorted(controls) for n in range(1, len(c))]
    parts = [re.escape(c) for c in sorted(controls) if c]
    parts += [rf"{re.escape(head)}\Z" for head, _ in cuts] + [rf"\A{re.escape(tail)}" for _, tail in cuts]
    return re.compile("|".join(parts) or r"(?!)")


# --- which text is foreign -------------------------------------------------------------------------------------------


def mark_foreign(text: str, controls: Iterable[str], renders: Iterable[Callable[[Change], str]]) -> str:
    """`text`, as `Rendered` where foreign text spells a control token in it.

    Args:
        text: The template made this of the true values.
        controls: All control tokens of the model and its template.
        renders: Each renders the template anew with its foreign texts changed by the function that it is given; the
            first whose result has the shape of `text` counts. A template that looks into its values may make another
            shape of other values: the later ones change less.

    Raises:
        ChatTemplateError: No rendering has the shape of `text`.
    """
    controls = frozenset(controls)
    spelled = occurrences(text, controls)
    if not spelled:
        return text
    for render in renders:
        for change in (_masked(controls), _without(controls)):
            try:
                other = render(change)
            except Exception:  # noqa: S112 (a template that needs something of its values may raise anything)
                continue
            places = _foreign_places(text, other, spelled)
            if places is not None:
                return Rendered(text, places, controls) if places else text
    shown = sorted({text[start:end] for start, end in spelled})
    msg = (
        f"the text spells control tokens ({', '.join(map(repr, shown[:3]))}), and the template looks into its values, "
        "so which of them came from a value cannot be told. Take them out of the values."
    )
    raise ChatTemplateError(msg)


def _foreign_places(text: str, other: str, spelled: list[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """The spelled places that differ between the two texts; None where the template made another shape."""
    if len(other) != len(text):
        return None
    differ = [a != b for a, b in zip(text, other, strict=True)]
    if any(d and b not in MASK + _LETTERS + _LETTERS.upper() for d, b in zip(differ, other, strict=True)):
        return None
    return [place for place in spelled if any(differ[slice(*place)])]


def _masked(controls: frozenset[str]) -> Change:
    """Every letter is changed. White space stays, for templates trim it, but within a control token."""

    def change(text: str) -> str:
        found = list(re.sub(r"\S", MASK, text))
        for start, end in occurrences(text, controls):
            found[start:end] = MASK * (end - start)
        return "".join(found)

    return change


def _without(controls: frozenset[str]) -> Change:
    """Only what spells a control token is changed, to letters: for templates that look into their values."""

    def change(text: str) -> str:
        parts, at = [], 0
        for start, end in occurrences(text, controls):
            letter = next(c for c in [*_LETTERS, MASK] if c not in text[start:end].lower())
            parts += [text[at:start], letter * (end - start)]
            at = end
        return "".join([*parts, text[at:]])

    return change


class _Changed:
    """Stands for an object in a template: shows itself as the object does, changed."""

    def __init__(self, value: object, change: Change) -> None:
        self._value, self._change = value, change

    def __str__(self) -> str:
        return self._change(str(self._value))

    def __repr__(self) -> str:
        return self._change(repr(self._value))

    def __format__(self, spec: str) -> str:
        return self._change(format(self._value, spec))


def map_texts(value: object, change: Change) -> object:
    """The same data with every text in it changed; an object shows itself changed."""
    kind = type(value)
    if kind is str:
        return change(str(value))
    if kind is dict:
        return {map_texts(k, change): map_texts(v, change) for k, v in value.items()}  # type: ignore[attr-defined]
    if kind in (list, tuple):
        return kind(map_texts(v, change) for v in value)  # type: ignore[attr-defined]
    return value if value is None or kind in (bool, int, float) else _Changed(value, change)


def texts_of(value: object) -> list[str]:
    """Every text that a template could make of some data."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in texts_of(part)]
    if isinstance(value, (list, tuple)):
        return [text for part in value for text in texts_of(part)]
    return [] if value is None or isinstance(value, (bool, int, float)) else [str(value), repr(value)]


# --- ids -------------------------------------------------------------------------------------------------------------


def encode(tokenizer: Any, text: Rendered, **options: Any) -> list[int]:
    """Token ids in which no foreign place of `text` has become a control token; all else is as the tokenizer has it.

    Raises:
        DataError: The tokenizer knows no other way to write such a place.
    """
    if _OPEN in text or _CLOSE in text:
        msg = (
            f"a text spells a control token and contains the private-use character {_OPEN!r} too, so the two cannot be "
            "told apart. Remove that character."
        )
        raise DataError(msg)
    target, special = options.pop("text_target", False), options.pop("add_special_tokens", True)
    bare = getattr(tokenizer, "backend_tokenizer", None) is None
    ids = _encode_in_pieces(tokenizer, text) if bare else _disguise(tokenizer, text.controls).encode(_renamed(text)).ids
    if not special:
        return ids
    before, behind = _around(tokenizer, target=target)
    return [*before, *ids, *behind]


def _around(tokenizer: Any, *, target: bool) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind any text now."""
    for text in ("a", "1", "."):
        given = {"text_target": text} if target else {"text": text}
        dressed = list(tokenizer(**given, add_special_tokens=True, verbose=False)["input_ids"])
        plain = list(tokenizer(**given, add_special_tokens=False, verbose=False)["input_ids"])
        places = [k for k in range(len(dressed) - len(plain) + 1) if dressed[k : k + len(plain)] == plain]
        if plain and len(places) == 1:
            return dressed[: places[0]], dressed[places[0] + len(plain) :]
    msg = (
        f"a text spells a control token, and which special tokens {type(tokenizer).__name__} adds to a text cannot be "
        "told. Take it out of the text."
    )
    raise DataError(msg)


def _name(control: str, controls: frozenset[str]) -> str:
    return f"{_OPEN}{sorted(controls).index(control)}{_CLOSE}"


def _renamed(text: Rendered) -> str:
    """The text with the author's control tokens under their disguised names."""
    parts, at = [], 0
    foreign = set(text.foreign)
    for place in occurrences(text, text.controls):
        start, end = place
        if place in foreign:
            continue
        parts += [text[at:start], _name(text[start:end], text.controls)]
        at = end
    return "".join([*parts, text[at:]])


def _disguise(tokenizer: Any, controls: frozenset[str]) -> Tokenizer:
    """A copy of the tokenizer's backend that knows the control tokens, with their ids, by other names alone; kept.

    `split_special_tokens` would not do: it also takes labels apart that a user added, leaves added tokens whole that
    are not "special", and a vocabulary may contain a control token as an ordinary piece (T5's `</s>`).
    """
    backend = tokenizer.backend_tokenizer
    state = len(tokenizer), repr(backend.normalizer), repr(backend.pre_tokenizer)
    kept = _disguised.setdefault(tokenizer, {})
    known = kept.get(controls)
    if known is not None and known[0] == state:
        return known[1]
    data = json.loads(backend.to_str())
    names = {control: _name(control, controls) for control in controls}
    for token in data.get("added_tokens", ()):
        token["content"] = names.get(token["content"], token["content"])
    _rename_vocabulary(data["model"], names)
    data["truncation"] = data["padding"] = data["post_processor"] = None  # special tokens are added by the tokenizer
    twin = Tokenizer.from_str(json.dumps(data))
    kept[controls] = (state, twin)
    return twin


def _rename_vocabulary(model: dict[str, Any], names: dict[str, str]) -> None:
    """The model's own entries of these tokens, in place: an id keeps its place, the text loses it."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):  # BPE, WordPiece, WordLevel
        model["vocab"] = {names.get(token, token): id_ for token, id_ in vocabulary.items()}
    elif vocabulary:  # Unigram: (piece, score), the id is the position
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if "merges" in model:
        model["merges"] = [m for m in model["merges"] if not names.keys() & {*_halves(m), "".join(_halves(m))}]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]


def _halves(merge: Any) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def _encode_in_pieces(tokenizer: Any, text: Rendered) -> list[int]:
    """The way of tokenizers without a backend to copy (ByT5): foreign places apart, special tokens split in them."""
    ids: list[int] = []
    at = 0
    for start, end in [*text.foreign, (len(text), len(text))]:
        for piece, split in ((text[at:start], False), (text[start:end], True)):
            if piece:
                found = tokenizer(piece, add_special_tokens=False, split_special_tokens=split, verbose=False)
                ids += list(found["input_ids"])
                _check_split(tokenizer, found["input_ids"], piece, text.controls if split else ())
        at = end
    return ids


def _check_split(tokenizer: Any, ids: Sequence[int], piece: str, controls: Iterable[str]) -> None:
    written = set(ids) & set(tokenizer.convert_tokens_to_ids(sorted(controls))) if controls else set()
    if written:
        msg = (
            f"{piece!r} stands in foreign text, and {type(tokenizer).__name__} can only write it as a control token. "
            "Take it out of the text, or use a tokenizer with a Rust backend."
        )
        raise DataError(msg)
