"""Real batches for the chat face: many conversations are answered in one go, each with its own run and callbacks.

LangChain's chat models answer a batch in a pool of threads, one conversation each, which a local model can only queue.
Here every input is still invoked by LangChain's own `invoke`, one after the other, so that callbacks, caches, retries
and errors are as everywhere; the first that reaches the model has the answers to all of them computed. Knows
LangChain's Runnables and what a call asks. Knows nothing about templates or messages.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

from langchain_core.globals import get_llm_cache
from langchain_core.runnables.config import get_config_list
from typing_extensions import override

from llmchain_fed.chain.base_llm import LocalLanguageModel
from llmchain_fed.chain.batching import gathering
from llmchain_fed.chain.batching.inputs import listed
from llmchain_fed.chain.recording import is_recording
from llmchain_fed.model.generation.answers import Completion

_OF_LANGCHAIN = frozenset({"ls_structured_output_format", "tags", "metadata", "run_name", "run_id", "callbacks"})
"""keywords that LangChain takes before a call reaches the model"""


class _Ahead:
    """The answers to all texts of a batch, computed when the first of them is asked for."""

    def __init__(self, face: Any, texts: Sequence[str], options: Mapping[str, Any], *, at_once: int) -> None:
        self._face, self._options, self._at_once = face, options, at_once
        self._open = deque(texts)
        self._done: defaultdict[str, deque[Completion]] = defaultdict(deque)

    def take(self, text: str, options: Mapping[str, Any]) -> Completion | None:
        """The answer to this text; None where it is to be computed by itself."""
        if options != self._options or (not self._done[text] and text not in self._open):
            return None
        while not self._done[text] and self._open:
            some = [self._open.popleft() for _ in range(min(self._at_once, len(self._open)))]
            token = _ahead.set(None)
            try:
                found = self._face.complete(some, self._options)
            except Exception:  # whose fault it is shows when each is asked by itself
                self._open.clear()
                return None
            finally:
                _ahead.reset(token)
            for each, done in zip(some, found, strict=True):
                self._done[each].append(done)
        return self._done[text].popleft() if self._done[text] else None


_ahead: ContextVar[_Ahead | None] = ContextVar("llmchain_fed_ahead", default=None)


class ChatBatch(LocalLanguageModel):
    """A chat face whose `batch` and `abatch` are one real batch; LangChain's class comes behind it."""

    def batch(
        self, inputs: list[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """The answers to all inputs, computed as one batch; `max_concurrency` bounds how many share one.

        With `return_exceptions` one bad input does not cost the others their answers.
        """
        inputs = listed(inputs, "batch")
        configs, answers, face = get_config_list(config, len(inputs)), [], cast(Any, self)
        for some in _in_parts(len(inputs), configs):
            with self._computing_ahead([inputs[i] for i in some], kwargs):
                for i in some:
                    try:
                        answers.append(face.invoke(inputs[i], configs[i], **kwargs))
                    except Exception as error:  # whatever it is, as LangChain's own batches keep it
                        if not return_exceptions:
                            raise
                        answers.append(error)
        return answers

    async def abatch(
        self, inputs: list[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """The async twin of `batch`."""
        inputs = listed(inputs, "abatch")
        configs, answers, face = get_config_list(config, len(inputs)), [], cast(Any, self)
        for some in _in_parts(len(inputs), configs):
            with self._computing_ahead([inputs[i] for i in some], kwargs):
                for i in some:
                    try:
                        answers.append(await face.ainvoke(inputs[i], configs[i], **kwargs))
                    except Exception as error:  # whatever it is, as LangChain's own batches keep it
                        if not return_exceptions:
                            raise
                        answers.append(error)
        return answers

    @override
    def complete(self, texts: Sequence[str], options: Mapping[str, Any]) -> list[Completion]:
        found = [_taken(text, options) for text in texts]
        open_ = [text for text, done in zip(texts, found, strict=True) if done is None]
        rest = iter(super().complete(open_, options) if open_ else ())
        return [done if done is not None else next(rest) for done in found]

    @override
    async def acomplete(self, texts: Sequence[str], options: Mapping[str, Any]) -> list[Completion]:
        if _ahead.get() is not None:  # they are together already
            return await gathering.alone(self, texts, options)
        return await super().acomplete(texts, options)

    @override
    def pieces(self, text: str, options: Mapping[str, Any]) -> Generator[str, None, Completion]:
        done = _taken(text, options)
        if done is None:
            return super().pieces(text, options)
        return _at_once(done)

    @contextmanager
    def _computing_ahead(self, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Calls within are answered together; what cannot be read raises in its own call."""
        if len(inputs) < 2 or is_recording():
            yield
            return
        face: Any = self
        own = {name: value for name, value in kwargs.items() if name not in _OF_LANGCHAIN}
        stop, count = own.pop("stop", None), own.get("n") or 1
        texts: list[str] = []
        options: dict[str, Any] = {}
        for each in inputs:
            try:
                text, options = face.asked(face._convert_input(each).to_messages(), stop, own)
            except Exception:  # noqa: S112 (it is raised by its own call, where callbacks hear of it)
                continue
            texts += [text] * (count if type(count) is int else 1)
        # with a cache who knows how many are asked at all
        cached = face.cache if face.cache is not None else get_llm_cache()
        ahead = _Ahead(self, texts, options, at_once=self.batch_size if cached else max(len(texts), 1))
        token = _ahead.set(ahead)
        try:
            yield
        finally:
            _ahead.reset(token)


def _taken(text: str, options: Mapping[str, Any]) -> Completion | None:
    ahead = _ahead.get()
    return ahead.take(text, options) if ahead is not None else None


def _at_once(done: Completion) -> Generator[str, None, Completion]:
    yield done.text
    return done


def _in_parts(count: int, configs: Sequence[Any]) -> list[range]:
    most = (configs[0].get("max_concurrency") if configs else None) or count
    return [range(at, min(at + most, count)) for at in range(0, count, max(most, 1))]
