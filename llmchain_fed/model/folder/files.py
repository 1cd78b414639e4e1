"""Which files of a folder that somebody else made are read: regular ones of known names, and none outside of it.

Knows the file system and the names that are written for a model, an adapter and a tokenizer. Knows nothing of what
the files say.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from llmchain_fed.untrusted import shown
from llmchain_fed.untrusted.text import ErrorType, refusal

_MOST_FILES, _DEEPEST = 4096, 3
SAVE_AGAIN = "Only save() writes these folders: remove it, or save the chain again where it was trained."
_WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors"
_VOCABULARIES = (
    *("added_tokens.json", "byte_maps.json", "emoji.json", "entity_vocab.json", "normalizer.json"),
    *("special_tokens_map.json", "target_vocab.json", "tokenizer.json", "tokenizer_config.json", "vocab-src.json"),
    *("vocab-tgt.json", "vocab.json", "word_pronunciation.json", "word_shape.json", "dict.txt", "merges.txt"),
    *("vocab.txt", "bpe.codes", "prophetnet.tokenizer", "sentencepiece.bpe.model", "sentencepiece.model"),
    *("source.spm", "target.spm", "spiece.model", "spm.model", "spm_char.model", "tokenizer.model"),
    *("tokenizer.model.v3", "chat_template.jinja"),
)
WRITTEN = {
    "base": re.compile(rf"config\.json|generation_config\.json|{_WEIGHTS}|model\.safetensors\.index\.json"),
    "adapter": re.compile(r"README\.md|adapter_config\.json|adapter_model\.safetensors"),
    "tokenizer": re.compile(
        "|".join(map(re.escape, _VOCABULARIES)) + r"|additional_chat_templates/[A-Za-z0-9_-]{1,100}\.jinja"
    ),
}
"""folder of a saved chain → the names of all files that `save` may write into it"""


def plain_files(folder: Path, *, error: ErrorType) -> list[str]:
    """Paths within a folder, sorted; every entry is a regular file or a folder of them.

    Raises:
        ErrorType: There is a link, a pipe or a device, or more files and levels than a saved chain has.
    """
    found: list[str] = []
    folders = [(folder, 0)]
    while folders:
        here, depth = folders.pop()
        if here.is_symlink():  # the folder itself
            raise refusal(error, f"{shown(str(here), 300)} is a link, and links are not followed", SAVE_AGAIN)
        with os.scandir(here) as entries:
            for entry in entries:
                path = Path(entry.path)
                mode = entry.stat(follow_symlinks=False).st_mode
                name = shown(path.relative_to(folder.parent).as_posix(), 200)
                if stat.S_ISLNK(mode):
                    raise refusal(error, f"'{name}' is a link, and links are not followed", SAVE_AGAIN)
                if stat.S_ISDIR(mode) and depth < _DEEPEST:
                    folders.append((path, depth + 1))
                elif stat.S_ISREG(mode):
                    found.append(path.relative_to(folder).as_posix())
                else:
                    raise refusal(error, f"'{name}' is no regular file", SAVE_AGAIN)
                if len(found) + len(folders) > _MOST_FILES:
                    raise refusal(error, f"{shown(str(folder), 300)} has more than {_MOST_FILES} files", SAVE_AGAIN)
    return sorted(found)


def check_written(names: Iterable[str], *, error: ErrorType) -> None:
    """Makes sure that `save` could have written every file, going by its name alone."""
    for name in names:
        part, _, rest = name.partition("/")
        if part not in WRITTEN or not WRITTEN[part].fullmatch(rest):
            raise refusal(
                error, f"'{shown(name, 200)}' has no place in a saved chain, so nothing is loaded", SAVE_AGAIN
            )


def check_own(folder: Path, *, error: ErrorType) -> None:
    """Makes sure that transformers, asked for the model in a folder, reads that model and nothing else.

    What is in the folder beside a model's own files is not looked at.
    """
    if os.path.lexists(adapter := folder / "adapter_config.json"):
        raise refusal(
            error,
            f"{shown(str(adapter), 300)} is not read, so nothing is loaded: transformers would read it by itself, and "
            "it can name another base and code",
            "Put the adapter into a folder of its own and load it over the base: "
            "LocalModel(PeftModel.from_pretrained(base, folder), tokenizer)",
        )
    real = folder.resolve()
    roots = [real]
    if real.parent.name == "snapshots":
        roots.append(real.parents[1] / "blobs")
    for path in [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]:
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in roots):
            raise refusal(
                error,
                f"{shown(str(path), 300)} links out of the folder, so nothing is loaded",
                "Copy the file there instead.",
            )
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe, which is waited for, or a device
            why = f"{shown(str(path), 300)} is no regular file, so nothing is loaded"
            raise refusal(error, why, "Take the folder from another source.")
