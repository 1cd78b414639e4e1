"""A tokenizer as a folder of its own, and whether what is read back is the same one.

Knows transformers' tokenizers. Knows nothing about models or chains.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from transformers import AutoTokenizer

from llmchain_fed.errors import ChainFileError
from llmchain_fed.model.folder import files, settings
from llmchain_fed.model.folder.files import SAVE_AGAIN
from llmchain_fed.untrusted import no_panic, shown

FOLDER = "tokenizer"
# Merges, normalisation and what surrounds a text show in how these come out.
_PROBES = (
    "Save the page, naïve Café №5!",
    "  two  spaces\n\ttabs and 1234567890",
    "日本語 Ελληνικά 😀 don't { } <s>x</s>",
    "a",
    "",
)
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_CHECKED: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def write(tokenizer: Any, directory: Path) -> None:
    """Writes `tokenizer/`."""
    tokenizer.save_pretrained(directory / FOLDER)
    settings.without_origin(directory / FOLDER)


def check_folder(directory: Path) -> None:
    """Makes sure that `tokenizer/` contains what `write` writes: known files, and settings that are data.

    Raises:
        ChainFileError: It contains something else.
    """
    folder = directory / FOLDER
    names = files.plain_files(folder, error=ChainFileError) if folder.exists() else []
    files.check_written((f"{FOLDER}/{name}" for name in names), error=ChainFileError)
    settings.check_saved(directory, error=ChainFileError)
    settings.check_tokenizer(folder, remedy=SAVE_AGAIN, error=ChainFileError)


def load(directory: Path) -> Any:
    """Reads `tokenizer/` and nothing else; code of the folder's own is not run.

    Raises:
        ChainFileError: It contains no tokenizer that this transformers knows.
    """
    folder = directory / FOLDER
    try:
        with no_panic():
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception over a file that makes no sense
        msg = f"the tokenizer in {str(folder)!r} cannot be read: {shown(str(error), 300)}. {SAVE_AGAIN}"
        raise ChainFileError(msg) from None


def identity(tokenizer: Any) -> dict[str, str]:
    """What decides ids and text, by name and as short digests where it is long."""
    special = {n: str(t) for n in _SPECIAL if (t := getattr(tokenizer, n, None)) is not None}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    spelled = "".join(str(token) for token in added.values())
    ids = [list(tokenizer(text, add_special_tokens=s)["input_ids"]) for text in _PROBES for s in (True, False)]
    ids.append(list(tokenizer(spelled, add_special_tokens=False)["input_ids"]))
    texts = [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in ids]
    return {
        "vocabulary": _digest(sorted(tokenizer.get_vocab().items())),
        "added tokens": _digest(sorted(_settings(i, t, special.values()) for i, t in added.items())),
        "special tokens": repr(special),
        "chat template": _digest(getattr(tokenizer, "chat_template", None)),
        "the ids of some texts": _digest(ids),
        "the text of some ids": _digest(texts),
    }


def _settings(number: int, token: Any, named: Collection[str]) -> tuple[object, ...]:
    # a token that ends, pads or begins becomes a special one when it is read, whatever it was added as
    special = token.special or str(token) in named
    return number, str(token), special, token.lstrip, token.rstrip, token.normalized and not special


def differences(one: Any, other: Any) -> list[str]:
    """What two tokenizers differ in."""
    first, second = identity(one), identity(other)
    return [name for name, value in first.items() if second[name] != value]


def check(tokenizer: Any) -> None:
    """Makes sure that a tokenizer comes back as it is, by writing it and reading it once.

    Raises:
        ChainFileError: It cannot be written, or is another one when read.
    """
    now = _digest(sorted(identity(tokenizer).items()))
    if _CHECKED.get(tokenizer) == now:
        return
    with tempfile.TemporaryDirectory(prefix="llmchain-fed-") as scratch:
        try:
            write(tokenizer, Path(scratch))
            check_folder(Path(scratch))
            back = load(Path(scratch))
        except Exception as error:
            msg = (
                f"the tokenizer {type(tokenizer).__name__} cannot be saved ({shown(str(error), 500)}), so no chain "
                "with it could be loaded again. Use one without parts of your own."
            )
            raise ChainFileError(msg) from None
        if different := differences(tokenizer, back):
            msg = (
                f"the tokenizer {type(tokenizer).__name__} is another one once saved and loaded "
                f"({', '.join(different)} differ), so a saved chain would answer otherwise. Set it up with the options "
                "of its class."
            )
            raise ChainFileError(msg)
    _CHECKED[tokenizer] = now


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
