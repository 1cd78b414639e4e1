"""Frames, heads and answers as nobody honest sends them: builders, each entry one form."""

import json

NONSENSE = [
    None, True, False, -1, 0, 1, 2**31, 2**48, 2**62, -(2**62), 0.5, -0.5, 1e308, "", "a", "x" * 65, "x" * 5000,
    "\x1b[2J", "\u202e", "\ud800", "\x00", "../../x", [], [1], [[]], {}, {"a": 1}, ["a"] * 100,
]  # fmt: skip
"""values that a field of a head does not have, or has at its edge"""


def framed(text, body=b""):
    """A frame whose head is these very bytes."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return len(data).to_bytes(4, "big") + data + body


def head(**fields):
    return framed(json.dumps(fields))


def no_frames():
    """What is no frame at all."""
    yield from (b"", b"\x00", b"\x00\x00\x00", b"\xff\xff\xff\xff", b"\x00\x00\x00\x02[]", b"\x00\x00\x00\x05{}")
    yield from (b"\x00\x00\x00\x03{,}", b"\x00\x00\x00\x00", b"\x00\x00\x00\x00rest", b"\x7f\xff\xff\xff{}")
    yield from (
        framed(t) for t in ("null", "1", '"do"', "[]", "[[]]", "true", "", " ", "{", "}", "{}}", "{'do': 'ping'}")
    )
    yield from (framed('{"do": "ping", "do": "stop"}'), framed('{"do": NaN}'), framed('{"do": -Infinity}'))
    yield framed('{"do": "ping"}'.encode("utf-16"))
    yield framed(b"\xef\xbb\xbf" + b'{"do": "ping"}')
    yield framed(b'{"do": "\xff\xfe"}')
    yield framed('{"do":' + "[" * 100_000 + "]" * 100_000 + "}")
    yield framed('{"do":' * 60_000)
    yield framed('{"do":' + "9" * 4300 + "}")
    yield framed('{"do":' + "9" * 5000 + "}")
    yield framed('{"do": 1' + "0" * 900_000 + "}")
    yield framed('{"do": 1e999}')
    yield framed(b"{" + b" " * (2**20) + b"}")
    yield framed(b"\x80\x04\x95\x1a\x00\x00\x00")  # a pickle
    yield b"PK\x03\x04" + bytes(200)
    yield framed('{"' + "k" * 500_000 + '": 1}')
    yield framed("{" + ",".join(f'"{n}": 1' for n in range(90_000)) + "}")
    yield b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def requests():
    """Frames whose heads a site does not answer as they are."""
    put = {"do": "put", "call": "c", "op": "train", "offset": 0, "total": 1}
    for field in put:
        yield head(**{key: value for key, value in put.items() if key != field})
        for value in NONSENSE:
            if not (field in ("call", "op") and value in ("a", "../../x", "\x1b[2J", "\u202e", "\x00", "\ud800", "")):
                yield head(**(put | {field: value}))
    yield head(**put, extra=1)
    yield head(**(put | {"offset": 2**47, "total": 2**47}))
    for do in NONSENSE:
        yield head(do=do)
    for do in ("poll", "get", "drop"):
        yield head(do=do)
        for value in NONSENSE:
            yield head(do=do, call=value, offset=0)
            yield head(do=do, call="c", wait=value, offset=value)
    for caller in NONSENSE:
        yield framed(json.dumps({"do": "carry", "caller": caller, "x": 1}), head(do="ping"))
    yield framed(json.dumps({"do": "carry", "caller": "server"}), b"")
    yield framed(json.dumps({"do": "carry", "caller": "server"}), b"\xff" * 40)
    inner = head(do="ping")
    for _ in range(50):
        inner = framed(json.dumps({"do": "carry", "caller": "server"}), inner)
    yield inner
    yield framed(json.dumps({"do": "carry", "caller": "server"}), head(do="refused", caller="b", bytes=1, count=1))
    for value in NONSENSE:
        yield head(do="refused", caller="b", bytes=value, count=value)
        yield head(do="ping", extra=value)


def replies():
    """What a site may answer to any frame, though it makes no sense: (head, body) as a frame."""
    yield from no_frames()
    for value in NONSENSE:
        yield head(state=value)
        yield head(state="done", total=value)
        yield head(error=value)
        yield head(error={"type": value, "message": value})
        yield head(state="done", total=1, extra=value)
    yield head()
    yield framed('{"state": "done", "total": ' + "9" * 4300 + "}")
    yield framed(json.dumps({"state": "done", "total": 5}), b"1234")
    yield framed(json.dumps({"state": "done", "total": 5}), b"123456")
    yield framed(json.dumps({"state": "done", "total": 2**19}), bytes(2**19))
    yield framed(json.dumps({"state": "working"}), bytes(1000))
    yield head(state="done", total=2**40)
    yield head(state="done", total=20 * 2**20)
    yield head(state="receiving")
    yield head(state="unknown")
    yield head(error={"type": "SystemExit", "message": "x" * 900_000})
    yield head(error={"type": "LLMChainFedError", "message": "\x1b]0;x\x07\x1b[2J\u202e\n\n"})
    yield head(error={"type": "PolicyError", "message": "policy.max_steps: no\x00"})
    yield head(error={"type": "DeadlineError", "message": ""})


def bridge_messages():
    """What a bridge may tell the driver, though nobody asked for it."""
    yield from no_frames()
    for value in NONSENSE:
        if value != "a":  # whose answer is empty, then
            yield head(node=value)
        yield head(node="a", error=value if value is not None else 3)
        yield head(do=value)
    yield head(node="b")
    yield head(node="a", do="done")
    yield head(do="done", extra=1)
    yield head(node="a", error={"type": "x", "message": "y", "more": 1})


def rank_heads():
    """Heads of a rank's answer, as text."""
    yield from (
        b"",
        b"null",
        b"[]",
        b"{}",
        b"{",
        b'{"error": 1}',
        b'{"error": {}}',
        b'{"error": null, "x": 1}',
        b"\xff",
    )
    yield from (b'{"names": 3}', b'{"names": [1]}', b'{"names": null}', b'{"names": [["a"]]}', b'{"names": {"a": 1}}')
    yield from (b'{"error": {"type": 1, "message": 2}}', b'{"error": NaN}', b'{"error": null, "error": null}')
    yield b'{"error":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    yield b'{"error":' + b"9" * 5000 + b"}"
    yield '{"error": null}'.encode("utf-16")
    yield b"\x80\x04\x95\x1a"
