"""listed: several inputs as a list, and what only looks like several.

Knows forms of inputs. Knows nothing about chains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmchain_fed.errors import DataError


def listed(inputs: Any, what: str) -> list[Any]:
    """The inputs of a batch; a series or an array of them, too.

    A text would be one input per character, a mapping or a frame one per name of a column.

    Raises:
        DataError: It is one of these, or cannot be gone through.
    """
    if isinstance(inputs, list):
        return inputs
    if hasattr(inputs, "columns"):
        msg = (
            f"{what} takes a list of inputs, and of a {type(inputs).__name__} it has its columns' names. Pass its "
            "rows: frame.to_dict('records') of pandas, frame.to_dicts() of polars."
        )
        raise DataError(msg)
    if isinstance(inputs, (str, bytes, Mapping)):
        msg = f"{what} takes a list of inputs, got {inputs!r:.80}. Write [{inputs!r:.40}] for this one, or use invoke."
        raise DataError(msg)
    try:
        return list(inputs)
    except TypeError as error:
        msg = f"{what} takes a list of inputs, got {inputs!r:.80}."
        raise DataError(msg) from error
