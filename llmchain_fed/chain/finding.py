"""Finds the local model in whatever a user gives, and what makes calls of that model out of an example.

Knows chains of one call and composed ones. Knows nothing about training.
"""

from __future__ import annotations

from typing import Any

from langchain_core.runnables import Runnable

from llmchain_fed.chain.bare import Bare
from llmchain_fed.chain.base_llm import LocalLanguageModel
from llmchain_fed.chain.llm_chain import LLMChain
from llmchain_fed.chain.tracing.composed import ComposedChain
from llmchain_fed.chain.tracing.contents import faces_in, places_of
from llmchain_fed.chain.tracing.pipes import single_call
from llmchain_fed.errors import UnsupportedModelError
from llmchain_fed.model.local_model import LocalModel


def find_prompt(given: Any, llm: Any = None) -> LLMChain | Bare | ComposedChain | None:
    """What makes calls of its local model out of an example, as `invoke` of the given object would.

    An LLMChain, a face, and `prompt | llm | parser` whose model is called nowhere else make one call; everything else
    is a composed chain.

    Args:
        given: Any Runnable.
        llm: The model to train, where there are several, or it cannot be found; a face, or a chain over one.

    Raises:
        UnsupportedModelError: A Runnable without a local model, or with two.
    """
    if not isinstance(given, Runnable):
        return None
    faces = faces_in(given)
    if llm is not None:
        named = single_call(llm)
        if named is None:
            msg = (
                f"llm= names the model to train: a LocalLLM, a LocalChatModel or an LLMChain, got {type(llm).__name__}."
            )
            raise UnsupportedModelError(msg)
        module = named.model.module
        faces = [face for face in faces if face.model.module is module] or [named.face]
    elif len({id(face.model.module) for face in faces}) > 1:
        names = ", ".join(sorted({f"{type(face).__name__} over {face.model.name!r}" for face in faces}))
        msg = (
            f"{type(given).__name__} holds two trainable models ({names}), and one is trained. Say which: "
            "FederatedAveraging(chain, llm=model); the other answers as it is."
        )
        raise UnsupportedModelError(msg)
    single = single_call(given)
    # its face may be a copy, with fields of its own, over the same model
    wanted = single is not None and any(single.model is face.model for face in faces)
    if single is not None and (not faces or (_calls(given) <= 1 and wanted)):
        return single
    if not faces:
        return None
    return ComposedChain(given, faces)


def face_in(given: Any, model: LocalModel) -> LocalLanguageModel | None:
    """A face of this very model in a Runnable; None where there is none."""
    return next((face for face in faces_in(given) if face.model.module is model.module), None)


def _calls(given: Any) -> int:
    """In how many places of a Runnable a local model can be called."""
    return len(places_of((LLMChain, LocalLanguageModel), given))
