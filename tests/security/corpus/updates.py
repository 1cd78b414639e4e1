"""Updates as strangers might write them: builders of bytes, from an honest update or from nothing.

Knows the layout of safetensors. Knows nothing of llmchain_fed but the key that its header stands under.
"""

import json
import struct

KEY = "llmchain_fed"
HOSTILE = [
    None,
    True,
    False,
    -1,
    0,
    2**31,
    2**63 - 1,
    2**63,
    10**30,
    10**400,
    10**4299,
    0.5,
    -0.0,
    1e308,
    -1.7e308,
    "",
    "5",
    "\x1b[2J\x1b]0;owned\x07",
    "\ud800",
    "\u202egnp.exe",
    "x" * 5000,
    [],
    [1],
    [[[[[[[[[]]]]]]]]],
    {},
    {"a": 1},
    {"a": {"b": {"c": []}}},
]
"""values of every type that JSON has, where another one is expected"""


def parts(data):
    """Layout and body of an update's bytes."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def raw(header, body=b"", *, size=None):
    """The bytes of a header, as JSON or as it is, and a body; `size` is what it claims to have."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def with_field(data, name, value):
    """The same update whose own header says something else."""
    layout, body = parts(data)
    own = json.loads(layout["__metadata__"][KEY]) | {name: value}
    layout["__metadata__"][KEY] = json.dumps(own)
    return raw(layout, body)


def with_entry(data, index, **changes):
    """The same update, with another dtype, shape or data_offsets of one of its tensors."""
    layout, body = parts(data)
    name = sorted(layout.keys() - {"__metadata__"})[index]
    layout[name] = layout[name] | changes
    return raw(layout, body)


def renamed(data, name):
    """The same update, one of whose tensors is called otherwise."""
    layout, body = parts(data)
    former = sorted(layout.keys() - {"__metadata__"})[0]
    layout[name] = layout.pop(former)
    return raw(layout, body)


def with_metrics(data, metrics):
    """The same update with these metrics."""
    return with_field(data, "metrics", metrics)


def audited(data):
    """What an audit sent: name → bytes. Each once ended a federation, kept a hub busy, or was believed."""
    layout, body = parts(data)
    whole = json.dumps(layout)
    nines = "9" * 4300
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    shifted = [layout[next(n for n in layout if n != "__metadata__")]["data_offsets"][0] + 4, 10**6]
    found = {
        "a size whose sum has one digit more than Python converts": with_entry(
            data, 0, shape=[int(nines)], data_offsets=[0, int(nines)]
        ),
        "an end of 4,300 digits": with_entry(data, 0, data_offsets=[0, int(nines)]),
        "490,000 dimensions": with_entry(data, 0, shape=[1] * 490_000),
        "490,000 dimensions that end in zero": with_entry(data, 0, shape=[3] * 489_999 + [0]),
        "nine dimensions": with_entry(data, 0, shape=[1] * 8 + [3]),
        "half a surrogate for a name, and wrong offsets": renamed(with_entry(data, 0, data_offsets=shifted), "\ud800"),
        "a terminal's commands for a name": renamed(with_entry(data, 0, data_offsets=shifted), "\x1b[2J\x1b]0;x\x07"),
        "a name of many lines": renamed(data, "w\n\n\nok: trained\n"),
        "a name given twice within our header": raw(
            whole.replace('{\\"kind\\"', '{\\"round\\": 7, \\"kind\\"', 1).encode(), body
        ),
        "a tensor given twice": raw((whole[:-1] + f', "b": {json.dumps(entry)}' * 2 + "}").encode(), body),
        "UTF-16": raw(whole.encode("utf-16"), body),
        "UTF-8 with a mark": raw(b"\xef\xbb\xbf" + whole.encode(), body),
        "five thousand metrics": with_metrics(data, {f"m{i}": 1.0 for i in range(5000)}),
        "a loss far below zero": with_metrics(data, {"train_loss": -1e308}),
        "a training of 10^308 seconds": with_metrics(data, {"seconds": 1e308}),
        "a loss that is a word": with_metrics(data, {"train_loss": "nan"}),
        "metadata that is deep": raw(layout | {"__metadata__": {KEY: "[" * 100_000 + "]" * 100_000}}, body),
        "a layout that is deep": raw(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, body),
        "many lists": raw(b"[" + b"[]," * 30_000 + b"[]]", body),
        "many names": raw({f"t{i}": entry for i in range(2000)}, body),
        "nothing": b"",
        "eight bytes": b"\0" * 8,
        "a pickle": b"\x80\x05\x95\x1e\0\0\0\0\0\0\0\x8c\x08builtins\x94\x8c\x05print\x94\x93\x94.",
        "a zip": b"PK\x03\x04" + b"\0" * 60,
        "a header longer than the file": raw(whole.encode(), body, size=2**62),
    }
    found |= {f"a shape of {value!r:.20}": with_entry(data, 0, shape=value) for value in HOSTILE}
    found |= {f"a dtype of {value!r:.20}": with_entry(data, 0, dtype=value) for value in HOSTILE}
    found |= {f"offsets of {value!r:.20}": with_entry(data, 0, data_offsets=value) for value in HOSTILE}
    for field in ("kind", "participant", "round", "base", "num_examples", "num_tokens", "metrics", "codec", "more"):
        found |= {f"{field} is {value!r:.20} {i}": with_field(data, field, value) for i, value in enumerate(HOSTILE)}
    return found
