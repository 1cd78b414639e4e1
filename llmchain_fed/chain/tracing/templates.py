"""The prompt templates of a composed chain that reach its model, by step: what the sides of a federation must share.

Knows LangChain's sequences. Functions that write prompts are not looked into: two sites may have other ones.
"""

from __future__ import annotations

import itertools
from typing import Any

from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import Runnable, RunnableSequence
from langchain_core.runnables.base import RunnableBindingBase

from llmchain_fed.chain.base_llm import LocalLanguageModel
from llmchain_fed.chain.bindings import below_bindings
from llmchain_fed.chain.llm_chain import LLMChain
from llmchain_fed.chain.tracing.contents import walk
from llmchain_fed.chain.tracing.pipes import piped


def templates_of(runnable: Any) -> list[tuple[str, list[Any]]]:
    """(step name, identity) of every template before the model, in the order of their names."""
    found: dict[str, list[Any]] = {}
    names: dict[int, str] = {}
    for place in walk(runnable):
        whole = place.found
        if isinstance(whole, RunnableBindingBase) and (named := whole.config.get("run_name")):
            names[id(whole.bound)] = str(named)
        name = names.get(id(whole)) or str(getattr(whole, "name", None) or "") or place.name
        if isinstance(whole, LLMChain):
            found.setdefault(name or "chain", whole.prompt_identity())
            names[id(whole.bound)] = name or "chain"
            continue
        steps = whole.steps if isinstance(whole, RunnableSequence) else _steps_of(whole)
        for first, second in itertools.pairwise(steps):
            prompt, face = below_bindings(first), below_bindings(second)
            if isinstance(prompt, BasePromptTemplate) and isinstance(face, LocalLanguageModel):
                found.setdefault(name or "chain", piped(prompt, second, ()).prompt_identity())
    return sorted(found.items())


def _steps_of(whole: Any) -> list[Any]:
    """The steps of another library's sequence, such as LangGraph's, which is a Runnable with a list of them."""
    steps = getattr(whole, "__dict__", {}).get("steps")
    return steps if isinstance(whole, Runnable) and isinstance(steps, list) else []
