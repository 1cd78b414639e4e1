"""Examples as people have them, as text, and as masked token ids."""

from llmchain_fed.data.encoding import DataReport, collate, encode_examples
from llmchain_fed.data.examples import Example, RawText, read_examples

__all__ = ["DataReport", "Example", "RawText", "collate", "encode_examples", "read_examples"]
