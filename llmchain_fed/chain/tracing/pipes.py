"""Chains of one call: what renders the prompts of a Runnable whose model is called once, at its beginning.

Knows LangChain's Runnables, chains and faces. Knows nothing about training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import Runnable, RunnablePassthrough, RunnableSequence, RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase

from llmchain_fed.chain.bare import Bare
from llmchain_fed.chain.base_llm import LocalLanguageModel
from llmchain_fed.chain.bindings import below_bindings, with_face_fields
from llmchain_fed.chain.llm import LocalLLM
from llmchain_fed.chain.llm_chain import LLMChain
from llmchain_fed.recipes.parsers import StripOutputParser


class PipedChain(LLMChain):
    """A chain made of somebody's `prompt | llm | parser`, for training alone: nobody keeps it, so nobody saves it."""


def single_call(runnable: Any) -> LLMChain | Bare | None:
    """What renders the prompts of a Runnable over a local model, so that training sees what its `invoke` sends.

    Finds an LLMChain or a face within `with_config`, `with_retry`, `with_fallbacks`, `bind`, `prompt | llm | parser`
    and `llm | parser`. LangChain's legacy chain found its model in the same way. None where there is none.
    """
    call: dict[str, Any] = {}
    strips = False
    while True:
        if isinstance(runnable, LLMChain):
            return runnable._with(call)
        if isinstance(runnable, LocalLanguageModel):
            return Bare(runnable, call, strips)
        if isinstance(runnable, RunnableSequence):
            first, second, *rest = runnable.steps
            if isinstance(prompt := below_bindings(first), BasePromptTemplate):
                return piped(prompt, second, rest) if isinstance(below_bindings(second), LocalLanguageModel) else None
            strips = strips or any(isinstance(step, StripOutputParser) for step in (second, *rest))
            runnable = first  # the first is what learns
        # by class: RunnableWithFallbacks forwards unknown attributes, `bound` too, to the chain within
        elif isinstance(runnable, RunnableBindingBase):
            runnable, call = runnable.bound, {**runnable.kwargs, **call}
        elif isinstance(runnable, RunnableWithFallbacks):
            runnable = runnable.runnable
        else:
            return None


def piped(prompt: BasePromptTemplate[Any], llm: Any, rest: Sequence[Runnable[Any, Any]]) -> LLMChain:
    """`prompt | llm | …` as a chain. LangChain hands a string model one text there, whose author is the caller."""
    parser = rest[0] if len(rest) == 1 else RunnableSequence(*rest) if rest else RunnablePassthrough()
    if isinstance(below_bindings(llm), LocalLLM):
        llm = with_face_fields(llm, control_tokens="template")
    return PipedChain(llm=llm, prompt=prompt, output_parser=parser)  # type: ignore[call-arg] # as LLMChain's
