"""YAML that its reader did not write: what hangs, swells or has a type that nobody expects."""

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12)
)
WHOLE = {
    "billion laughs": LAUGHS,
    "a list within itself": "&a [*a]",
    "a mapping within itself": "&a {b: *a}",
    "20,000 levels": "a: " + "[" * 20_000,
    "20,000 levels of blocks": "- " * 20_000,
    "33 levels": "a: " + "[" * 33 + "]" * 33,
    "over a megabyte": "#" + "x" * 2**20,
    "a key twice": "a: 1\na: 2",
    "a value a byte or two": "a: [" + "x," * 300_000 + "x]",
    "no mapping": "- a",
    "a text": "a",
    "a merge": "<<: {a: 1}",
    "two documents": "a: 1\n---\nb: 2",
    "a tag": "a: !!python/object/apply:os.system [ls]",
    "no UTF-8": b"\xff\xfe\x00",
    "UTF-16": "a: 1".encode("utf-16"),
    "a NUL byte": "a: \x00",
    "a bell": "a: \x07",
    "nothing": "",
    "a key that is a list": "? [a]\n: 1",
    "keys without names": "1: 2",
}
"""name → the whole of a file"""

VALUES = {
    "a date": "2020-99-99",
    "a good date": "2020-01-01",
    "5,000 digits": "9" * 5000,
    "4,299 digits": "9" * 4299,
    "an octal of a thousand": "0o" + "7" * 1000,
    "base 60": ":".join(["59"] * 1000),
    "2⁶³": str(2**63),
    "an infinity": ".inf",
    "no number": ".nan",
    "a boolean": "yes",
    "a list": "[a, [b]]",
    "a mapping": "{a: {b: c}}",
    "null": "null",
    "below zero": "-1",
    "a large number": str(2**62),
    "a small number": "5.0e-324",
    "a large float": "1.7e+308",
    "a text that moves a terminal": '"\\e[2J\\e]0;x\\a"',
    "half a pair": '"\\ud800"',
    "a text of NUL": '"\\0"',
    "a path": "/etc/passwd",
    "a path upwards": "../../../../etc/passwd",
}
"""name → a value as it stands in the file"""

LARGE = {
    "a long text": "x" * 200_000,
    "many items": "[" + "x, " * 20_000 + "x]",
    "many names": "{" + ", ".join(f"a{i}: 1" for i in range(10_000)) + "}",
}
