"""Fields of what was parsed: each has a type and a range, by a strict model of whoever reads it.

Knows pydantic. Knows nothing of what the fields mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from llmchain_fed.untrusted.text import ErrorType, refusal, shown

ModelT = TypeVar("ModelT", bound=BaseModel)
_MOST_ERRORS = 100  # that are looked at one by one: each costs more than what it is about


class Strict(BaseModel):
    """Data from elsewhere: nothing unknown, nothing converted, no number that is not finite.

    Every list and mapping among the fields has a largest length, and of a list the first wrong item ends the reading.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def checked(model: type[ModelT], found: object, *, what: str, error: ErrorType, remedy: str = "") -> ModelT:
    """The strict model of what was parsed: each field has its type and its range, or is refused by name.

    A refusal quotes names and short values only, and ends with the remedy.
    """
    strict = model.model_config.get("extra") == "forbid"
    if strict and isinstance(found, dict) and len(found) > len(model.model_fields):
        # each unknown field would become an error object of its own
        strange = next(name for name in found if name not in model.model_fields)
        raise refusal(error, f"{what} makes no sense: `{shown(strange, 60)}` is unknown", remedy)
    try:
        return model.model_validate(found)
    except ValidationError as failed:
        if failed.error_count() > _MOST_ERRORS:
            why = f"{failed.error_count():,} of its values are unknown, of another type or out of range"
            raise refusal(error, f"{what} makes no sense: {why}", remedy) from None
        wrong: list[Any] = list(failed.errors(include_url=False, include_context=False))
    except (RecursionError, ValueError, TypeError) as failed:
        raise refusal(error, f"{what} makes no sense ({type(failed).__name__})", remedy) from None
    told = [
        f"`{'.'.join(shown(str(part), 60) for part in item['loc']) or 'all of it'}`: {_why(item)}" for item in wrong
    ]
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    raise refusal(error, f"{what} makes no sense: {'; '.join(told[:3])}{more}", remedy)


def _why(item: Mapping[str, Any]) -> str:
    message = shown(item["msg"].removeprefix("Value error, "), 200)
    given = "" if item["type"] == "missing" else f" (got {shown(item['input'])})"
    return message + given
