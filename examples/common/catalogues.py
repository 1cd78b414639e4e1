"""Message catalogues of five open-source publishers, as the participants of a translation federation.

The wheels of django, wagtail, plone.app.locales, pretix and sphinx carry their translations. These are read
where pip put them, never copied, without importing the packages (whose dependencies may be missing).
Knows gettext and how to split without leaks. Knows nothing about models, chains or federation.

    python -m examples.common.catalogues fr de es        # what each publisher has, and what was left out and why
"""

import argparse
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

import polib

DISTRIBUTIONS = {
    "django": "django",
    "wagtail": "wagtail",
    "plone": "plone.app.locales",
    "pretix": "pretix",
    "sphinx": "sphinx",
}
PUBLISHERS = tuple(DISTRIBUTIONS)
INSTALL = f"pip install --no-deps {' '.join(DISTRIBUTIONS.values())}"
MIN_CHARACTERS, MAX_CHARACTERS = 8, 120

_CATALOGUE = re.compile(r"(?:^|/)locales?/(?P<language>[^/]+)/LC_MESSAGES/[^/]+\.(?:po|mo)$")
_MARKUP = re.compile(
    r"""%(?:\(\w*\))?[-+#0]*[\d.*]*[a-zA-Z%]   # %(name)s, %s, %.2f, %%
      | [{}]                                   # {name}, {{ name }}, {% tag %}, ${name}
      | \$\w                                   # $name
      | </?[a-zA-Z!]                           # <b>, </b>, <name>
      | &\#?\w+;                               # &nbsp;
      | \w://|\bwww\.|\bmailto: """,
    re.VERBOSE,
)
_IDENTIFIER = re.compile(r"\S*\w[_.]\w\S*")  # no_end_date, robots.txt
_QUOTED = r'"((?:[^"\\]|\\.)*)"'
_DEFAULT = re.compile(rf"^Default:\s*((?:{_QUOTED}\s*)+)", re.MULTILINE)


class CatalogueError(LookupError):
    """A publisher, wheel, language or number of messages that is not there; says what to do."""


class Message(NamedTuple):
    """One English source text and its translation."""

    source: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """One publisher's (source, target) pairs: what it trains on, and what nobody trains on."""

    train: list[tuple[str, str]]
    held_out: list[tuple[str, str]]

    def __repr__(self) -> str:
        return f"Split({len(self.train)} train, {len(self.held_out)} held out)"


def normalise(text: str) -> str:
    """The key under which two sources count as the same: letters and digits only, casefolded.

    >>> normalise("E-mail address:") == normalise("Email Address…")
    True
    """
    return "".join(character for character in text.casefold() if character.isalnum())


def why_dropped(source: str, target: str) -> str | None:
    """The reason why this pair is no example of plain translation, or None if it is one.

    >>> why_dropped("Delete the page", "Supprimer la page")
    >>> why_dropped("Delete %(name)s now", "Supprimer %(name)s maintenant")
    'placeholder, markup or URL'
    """
    if not target:
        return "not translated"
    if _IDENTIFIER.fullmatch(source):
        return "message id without English text"
    if not all(MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS for text in (source, target)):
        return f"not {MIN_CHARACTERS}–{MAX_CHARACTERS} characters"
    if _MARKUP.search(source) or _MARKUP.search(target):
        return "placeholder, markup or URL"
    if not any(map(str.isalpha, source)):
        return "no letters"
    if normalise(source) == normalise(target):
        return "same in both languages"  # a name, or copied by a translator: nothing to learn but copying
    return None


def available_languages(publisher: str) -> list[str]:
    """The language codes of the publisher's catalogues, as the wheel spells them ("fr", "pt_BR")."""
    return sorted({language for language, _ in _catalogue_files(publisher)})


def survey(publisher: str, language: str = "fr") -> tuple[list[Message], Counter[str]]:
    """Read one publisher's catalogues: the usable messages, and how many were dropped for which reason.

    A source that occurs several times counts once, case and punctuation aside; the first without a `msgctxt`
    wins. Where only contexts tell the translations apart, the source is dropped: a prompt does not carry the
    context. White space, no-break spaces included, becomes single spaces.

    Args:
        publisher: one of `PUBLISHERS`.
        language: a gettext code; case and "-" for "_" do not matter.

    Raises:
        CatalogueError: unknown publisher, wheel not installed, or no catalogue in that language.
    """
    wanted = language.casefold().replace("-", "_")
    files = [p for code, p in _catalogue_files(publisher) if code.casefold().replace("-", "_") == wanted]
    if not files:
        there = ", ".join(available_languages(publisher))
        raise CatalogueError(f"{publisher} has no catalogue in {language!r}. It has: {there}.")
    dropped: Counter[str] = Counter()
    found: dict[str, list[tuple[str | None, Message]]] = {}  # key → occurrences (context, message)
    for entry in _entries(files):
        message = Message(_clean(_english(entry)), _clean(entry.msgstr))
        if reason := _state(entry) or why_dropped(*message):
            dropped[reason] += 1
        else:
            found.setdefault(normalise(message.source), []).append((entry.msgctxt or None, message))
    messages = []
    for occurrences in found.values():
        plain = [message for context, message in occurrences if context is None]
        if not plain and len({message.target for _, message in occurrences}) > 1:
            dropped["translation depends on its context"] += len(occurrences)
            continue
        messages.append(plain[0] if plain else occurrences[0][1])
        dropped["repeated source"] += len(occurrences) - 1
    return messages, dropped


def read_catalogue(publisher: str, language: str = "fr") -> list[Message]:
    """The usable messages of one publisher, each source once; see `survey` for the rules and the errors."""
    return survey(publisher, language)[0]


def split_publishers(
    publishers: Iterable[str], language: str = "fr", *, train: int | None, test: int, seed: int = 0
) -> dict[str, Split]:
    """Give each publisher `train` and `test` pairs such that no source is both trained on and held out.

    Sources are compared by `normalise`. One that several of the publishers have goes to exactly one of them:
    the one with the lowest SHA-256 of (seed, publisher, key). Everyone who has it gets the same chance: none starves.
    A publisher's own sources are ordered by SHA-256 of (seed, key): the first `test` are held out, the next
    `train` are trained on. Neither the order of `publishers` nor PYTHONHASHSEED matters; which publishers are
    asked for does, as it decides who shares a source.

    Args:
        publishers: names from `PUBLISHERS`.
        language: a gettext code that each of them has.
        train: pairs per publisher; None takes all that are not held out.
        test: held-out pairs per publisher.
        seed: another seed, another split.

    Raises:
        CatalogueError: as `survey`, or a publisher has too few messages.
    """
    names = list(publishers)
    if len(set(names)) < len(names):
        raise CatalogueError(f"a publisher is named twice in {names}. Name each one once.")
    at_least = 1 if train is None else train
    if test < 0 or at_least < 1:
        raise ValueError(f"train={train}, test={test}: train must be positive and test not negative.")
    texts = {name: {normalise(m.source): m for m in read_catalogue(name, language)} for name in names}
    publishers_of: dict[str, list[str]] = {}
    for name, messages in texts.items():
        for key in messages:
            publishers_of.setdefault(key, []).append(name)
    owned: dict[str, list[str]] = {name: [] for name in names}
    for key, having in publishers_of.items():
        owned[min(having, key=lambda name: _digest(seed, name, key))].append(key)
    splits = {}
    for name, keys in owned.items():
        if len(keys) < test + at_least:
            raise CatalogueError(
                f"{name} has {len(keys)} messages of its own in {language!r}, but {at_least} to train on and "
                f"{test} to hold out were asked for. Ask for fewer or leave {name} out."
            )
        ordered = sorted(keys, key=lambda key: _digest(seed, key))
        pairs = [(texts[name][key].source, texts[name][key].target) for key in ordered]
        end = None if train is None else test + train
        splits[name] = Split(train=pairs[test:end], held_out=pairs[:test])
    return splits


def split_alone(publisher: str, language: str = "fr", *, train: int, test: int, seed: int = 0) -> Split:
    """One publisher's pairs, split without a look at anyone else's, and still without a leak between publishers.

    Whether a source is held out follows from its own SHA-256 (one in eight is), so one that several publishers have
    is held out by all of them or by none. Unlike `split_publishers`, two may train on the same source.

    Args:
        publisher: a name from `PUBLISHERS`.
        language: a gettext code that it has.
        train: pairs to train on.
        test: held-out pairs.
        seed: another seed, another split.

    Raises:
        CatalogueError: as `survey`, or the publisher has too few messages.
    """
    texts = {normalise(m.source): (m.source, m.target) for m in read_catalogue(publisher, language)}
    ordered = sorted((_digest(seed, key), pair) for key, pair in texts.items())
    held_out = [pair for digest, pair in ordered if digest[-1] % 8 == 0][:test]
    trained = [pair for digest, pair in ordered if digest[-1] % 8][:train]
    if len(held_out) < test or len(trained) < train:
        raise CatalogueError(
            f"{publisher} has {len(ordered)} messages in {language!r}: {len(trained)} of {train} to train on, "
            f"{len(held_out)} of {test} to hold out. Ask for fewer or leave it out."
        )
    return Split(train=trained, held_out=held_out)


def _catalogue_files(publisher: str) -> list[tuple[str, Path]]:
    """(language, file) of every catalogue in the wheel; a .mo only where its .po was not shipped."""
    if publisher not in DISTRIBUTIONS:
        raise CatalogueError(f"unknown publisher {publisher!r}. There are: {', '.join(PUBLISHERS)}.")
    wheel = DISTRIBUTIONS[publisher]
    try:
        listed = distribution(wheel).files or []
    except PackageNotFoundError:
        raise CatalogueError(f"the wheel {wheel} is not installed. Run: {INSTALL}") from None
    files: dict[Path, tuple[str, Path]] = {}
    for entry in sorted(listed, key=str):  # .mo sorts before .po, which then replaces it
        match = _CATALOGUE.search(entry.as_posix())
        if match and (path := Path(str(entry.locate()))).exists():
            files[path.with_suffix("")] = (match["language"], path)
    if not files:
        raise CatalogueError(f"{wheel} is installed without its catalogues. Run: {INSTALL}")
    return list(files.values())


def _entries(files: Sequence[Path]) -> Iterator[polib.POEntry]:
    for path in files:
        yield from polib.pofile(str(path)) if path.suffix == ".po" else polib.mofile(str(path))


def _english(entry: polib.POEntry) -> str:
    """The English text: Plone keeps it in a comment, Default: "…", and uses the msgid as a name."""
    default = _DEFAULT.search(entry.comment)
    if default is None:
        return str(entry.msgid)
    text = "".join(re.findall(_QUOTED, default[1]))
    return re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), text)


def _state(entry: polib.POEntry) -> str | None:
    """Why the catalogue itself does not vouch for this entry, or None."""
    if entry.obsolete:
        return "obsolete"
    return "fuzzy" if "fuzzy" in entry.flags else "plural" if entry.msgid_plural else None


def _clean(text: str) -> str:
    return " ".join(text.split())  # no-break spaces, too: publishers disagree on them


def _digest(*parts: str | int) -> bytes:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()


def main() -> None:
    parser = argparse.ArgumentParser(description="What each publisher's catalogues contain.")
    parser.add_argument("languages", nargs="*", default=["fr"])
    for language in parser.parse_args().languages:
        for publisher in PUBLISHERS:
            try:
                messages, dropped = survey(publisher, language)
            except CatalogueError as error:
                print(f"{language:6} {error}")
                continue
            reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.most_common() if n)
            print(f"{language:6} {publisher:8} {len(messages):5} kept; dropped: {reasons}")


if __name__ == "__main__":
    main()
