"""Codecs by name: a delta as few, smaller tensors, and back.

Knows which codecs there are, and how a text names one. How they work stands in `quantization` and `sparsification`.
Lossy codecs go with error feedback: what one round leaves out, the next one adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmchain_fed.errors import ConfigError
from llmchain_fed.untrusted import shown
from llmchain_fed.updates.codecs.base import Codec
from llmchain_fed.updates.codecs.quantization import BF16, Int4, Int8
from llmchain_fed.updates.codecs.sparsification import TopK

_LONGEST = 40  # characters of a codec's name and option
CODECS: Mapping[str, Callable[[], Codec]] = {"bf16": BF16, "int8": Int8, "int4": Int4, "topk": TopK}
_WITH_OPTION: Mapping[str, Callable[[str], Codec]] = {
    "int8": lambda block: Int8(int(block)),
    "int4": lambda block: Int4(int(block)),
    "topk": lambda share: TopK(float(share)),
}
_VALID = f"Valid: {', '.join(CODECS)}, topk:<ratio> such as topk:0.01, int8:<block> and int4:<block> such as int8:64"


def make_codec(choice: str | Codec | None) -> Codec | None:
    """The codec of that name (`"topk:0.01"`, `"int8:64"`: with that option), or the object itself; None stays None.

    Raises:
        ConfigError: Unknown, or an option out of range; the valid names are listed.

    >>> make_codec("topk:0.01"), make_codec("int8:64")
    (TopK(ratio=0.01), Int8(block=64))
    """
    valid = f"{_VALID}, an object of these such as Int8(block=64), or None."
    if choice is None:
        return None
    if not isinstance(choice, str):
        methods = all(callable(getattr(choice, method, None)) for method in ("layout", "encode", "decode"))
        said = ("name", "lossy_feedback", "needs_feedback")
        if isinstance(choice, type) or not methods or not all(hasattr(choice, each) for each in said):
            msg = f"{choice!r:.80} is no object with {', '.join(said)}, layout, encode and decode. {valid}"
            raise ConfigError(msg)
        return choice
    name, colon, option = choice.partition(":")
    if len(choice) > _LONGEST or name not in CODECS or (colon and name not in _WITH_OPTION):
        msg = f"unknown codec '{shown(choice)}'. {valid}"
        raise ConfigError(msg)
    try:
        return _WITH_OPTION[name](option) if colon else CODECS[name]()
    except ValueError:
        msg = f"codec '{shown(choice)}': '{shown(option)}' is no number. {valid}"
        raise ConfigError(msg) from None


def spec(codec: Codec | None) -> str | None:
    """The text from which `make_codec` makes an equal codec elsewhere; None stays None.

    Raises:
        ConfigError: A codec of one's own: no code travels.

    >>> spec(TopK(ratio=0.01)), spec(Int8(block=64)), spec(Int8())
    ('topk:0.01', 'int8:64', 'int8')
    """
    if codec is None:
        return None
    found = str(codec.name)
    if isinstance(codec, TopK):
        found = f"topk:{codec.ratio!r}"
    elif isinstance(codec, Int8) and codec.block != type(codec).block:
        found = f"{found}:{codec.block}"
    if found.partition(":")[0] not in CODECS or make_codec(found) != codec:
        msg = f"{codec!r:.80} is code of your own, and no code travels to participants. {_VALID}."
        raise ConfigError(msg)
    return found
