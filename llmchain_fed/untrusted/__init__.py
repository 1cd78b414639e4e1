"""Bounded readers of what comes from elsewhere: JSON, YAML, headers of safetensors, files, and text for people's eyes.

Knows limits, not meanings: what a field is for, and its range, stands in the strict model (`Strict`) of whoever reads
it. Every reader gives the documented type or raises the one error of our tree that it was told to raise, and its time
and memory follow from a size that is checked before anything is parsed.
"""

from llmchain_fed.untrusted.json_text import MAX_DEPTH, Strict, checked, parse_json, read_json
from llmchain_fed.untrusted.plain_yaml import MAX_YAML, dump_yaml, key_lines, parse_yaml, read_yaml
from llmchain_fed.untrusted.safetensors_header import MAX_NAME, TensorHeader, read_safetensors_header
from llmchain_fed.untrusted.text import (
    PanicError,
    decoding,
    machine_memory,
    no_panic,
    one_line,
    printable,
    read_file,
    reason,
    shown,
)

__all__ = [
    "MAX_DEPTH",
    "MAX_NAME",
    "MAX_YAML",
    "PanicError",
    "Strict",
    "TensorHeader",
    "checked",
    "decoding",
    "dump_yaml",
    "key_lines",
    "machine_memory",
    "no_panic",
    "one_line",
    "parse_json",
    "parse_yaml",
    "printable",
    "read_file",
    "read_json",
    "read_safetensors_header",
    "read_yaml",
    "reason",
    "shown",
]
