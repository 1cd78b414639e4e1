"""What LangChain's bindings have been put around: the model within, its keywords, and the same around another one.

Knows LangChain's bindings and fallbacks. Knows nothing about prompts, parsers or training.
"""

from __future__ import annotations

from typing import Any

from langchain_core.runnables import RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase


def below_bindings(llm: Any) -> Any:
    """What `bind`, `with_config`, `with_retry` and `with_fallbacks` have been put around."""
    while isinstance(llm, (RunnableBindingBase, RunnableWithFallbacks)):
        # by class: RunnableWithFallbacks forwards unknown attributes, `bound` too, to what is within
        llm = llm.runnable if isinstance(llm, RunnableWithFallbacks) else llm.bound
    return llm


def with_face_fields(llm: Any, **fields: Any) -> Any:
    """The same model under the same bindings, with other fields of its face."""
    if isinstance(llm, RunnableWithFallbacks):
        return llm.model_copy(update={"runnable": with_face_fields(llm.runnable, **fields)})
    inner = isinstance(llm, RunnableBindingBase)
    return llm.model_copy(update={"bound": with_face_fields(llm.bound, **fields)} if inner else fields)


def bound_kwargs(llm: Any) -> dict[str, Any]:
    """The keywords that have been bound to the model; an outer binding's go before an inner one's."""
    kwargs: dict[str, Any] = {}
    while isinstance(llm, (RunnableBindingBase, RunnableWithFallbacks)):
        if isinstance(llm, RunnableWithFallbacks):
            llm = llm.runnable
            continue
        kwargs, llm = {**llm.kwargs, **kwargs}, llm.bound
    return kwargs
