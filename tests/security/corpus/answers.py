"""Hellos and other answers as strangers might write them: builders of JSON, from an honest one or from nothing."""

import json

from corpus.updates import HOSTILE


def said(plain, **changes):
    """An answer with some fields that say something else."""
    return json.dumps(plain | changes).encode()


def varied(plain):
    """Name → bytes: every field in turn replaced by a value of every type, left out, and given twice."""
    text = json.dumps(plain)
    found = {
        "nothing": b"",
        "a list": b"[1]",
        "a number": b"5",
        "null": b"null",
        "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "long digits": b'{"a":' + b"9" * 5000 + b"}",
        "NaN": b'{"loss": NaN, "tokens": 3}',
        "infinite": b'{"loss": 1e999, "tokens": 3, "seconds": 1e999, "steps": 1}',
        "UTF-16": text.encode("utf-16"),
        "half": text.encode()[: len(text) // 2],
        "large": b'{"participant":"' + b"x" * 2**21 + b'"}',
        "bytes": bytes(range(256)),
        "more": json.dumps(plain | {"more": 1}).encode(),
    }
    for field in plain:
        found |= {f"{field} is {value!r:.20} {i}": said(plain, **{field: value}) for i, value in enumerate(HOSTILE)}
        found[f"no {field}"] = json.dumps({k: v for k, v in plain.items() if k != field}).encode()
        found[f"{field} twice"] = (text[:-1] + f', "{field}": 5' + "}").encode()
    return found
