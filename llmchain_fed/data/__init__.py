"""Examples as people have them, as text, and as masked token ids."""

from llmchain_fed.data.encoding import collate, encode_examples
from llmchain_fed.data.examples import Example, RawText, read_examples
from llmchain_fed.data.report import DataReport

__all__ = ["DataReport", "Example", "RawText", "collate", "encode_examples", "read_examples"]
