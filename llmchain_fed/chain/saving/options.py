"""The options of a saved chain: which fields of a face it has, and whether they are what they were when it was saved.

Knows faces and generation options. Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmchain_fed._config import unknown_option
from llmchain_fed.chain.base_llm import ALIASES, OPTIONS, LocalLanguageModel
from llmchain_fed.errors import ConfigError
from llmchain_fed.model.generation.answers import GenerationOptions
from llmchain_fed.model.generation.stop_strings import checked_stops
from llmchain_fed.model.generation.token_logprobs import AnswerForm

_FORMS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "chat_template_kwargs": (Mapping, "mapping"),
    "tools": (list, "list"),
    "response_format": (Mapping, "mapping"),
    "tool_choice": ((str, bool, Mapping), "name, a truth value or a mapping"),
    "parallel_tool_calls": (bool, "truth value"),
    "strict": (bool, "truth value"),
}


def saved_fields(kind: type[LocalLanguageModel]) -> frozenset[str]:
    """The fields of a face that a saved chain has."""
    return frozenset({*LocalLanguageModel.model_fields, *kind.path_fields} - {"model"})


def check_saved(kind: type[LocalLanguageModel], options: Mapping[str, Any], llm_kwargs: Mapping[str, Any]) -> None:
    """Makes sure that a saved chain's fields and call-time keywords are what they were when they were saved.

    Raises:
        ConfigError: An unknown option, or one out of range.
    """
    saved = saved_fields(kind)
    for name in options.keys() - saved:
        raise ConfigError(unknown_option(name, saved))
    kwargs = {ALIASES.get(k, k): v for k, v in llm_kwargs.items() if v is not None}
    for name in (kind.rendering_options | kind.answer_options) & kwargs.keys():
        form, what = _FORMS[name]
        if not isinstance(kwargs.pop(name), form):
            raise ConfigError(f"{name} is a {what}, got {llm_kwargs[name]!r:.80}.")  # noqa: EM102
    AnswerForm.of({name: kwargs.pop(name) for name in kind.form_options & kwargs.keys()})
    checked_stops(kwargs.pop("stop", None))
    GenerationOptions(**kwargs)
    GenerationOptions(**{k: v for k, v in options.items() if k in OPTIONS})
