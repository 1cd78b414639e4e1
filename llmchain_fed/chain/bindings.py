"""LangChain's bindings: what they have been put around, and one whose call-time keywords reach the model within it.

Knows LangChain's Runnables and fallbacks. Knows nothing about prompts, parsers, models or training.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Self

from langchain_core.language_models import BaseLanguageModel
from langchain_core.runnables import RunnableConfig, RunnableSequence, RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase
from typing_extensions import override

from llmchain_fed.chain.batching.inputs import listed

ChainInput = dict[str, Any] | str


def below_bindings(llm: Any) -> Any:
    """What `bind`, `with_config`, `with_retry` and `with_fallbacks` have been put around."""
    while isinstance(llm, (RunnableBindingBase, RunnableWithFallbacks)):
        # by class: RunnableWithFallbacks forwards unknown attributes, `bound` too, to what is within
        llm = llm.runnable if isinstance(llm, RunnableWithFallbacks) else llm.bound
    return llm


def apart(llm: Any, parser: Any) -> tuple[Any, Any]:
    """A model and a parser, where what was given as the model is both: `chat.with_structured_output(…)`."""
    if not isinstance(llm, RunnableSequence) or not isinstance(below_bindings(llm.first), BaseLanguageModel):
        return llm, parser
    own = llm.steps[1] if len(llm.steps) == 2 else RunnableSequence(*llm.steps[1:])
    return llm.first, own if parser is None else own | parser


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


class RunnableWithCallKwargs(RunnableBindingBase[ChainInput, Any]):
    """A binding that hands a call's keywords to the model; a plain `prompt | llm` would give them to the prompt."""

    @abstractmethod
    def _with(self, kwargs: dict[str, Any]) -> Self:
        """The same Runnable with a call's keywords bound to its model; modules are shared, so this is cheap."""

    @override
    def bind(self, **kwargs: Any) -> Self:
        """The same with these keywords for every call to its model; what it renders and saves has them, too."""
        return self._with(kwargs)

    @override
    def invoke(self, input: ChainInput, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return super(RunnableWithCallKwargs, self._with(kwargs)).invoke(input, config)

    @override
    async def ainvoke(self, input: ChainInput, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return await super(RunnableWithCallKwargs, self._with(kwargs)).ainvoke(input, config)

    @override
    def batch(
        self, inputs: list[ChainInput], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        return super(RunnableWithCallKwargs, self._with(kwargs)).batch(
            listed(inputs, "batch"), config, return_exceptions=return_exceptions
        )

    @override
    async def abatch(
        self, inputs: list[ChainInput], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        return await super(RunnableWithCallKwargs, self._with(kwargs)).abatch(
            listed(inputs, "abatch"), config, return_exceptions=return_exceptions
        )

    @override
    def batch_as_completed(self, inputs: Sequence[ChainInput], config: Any = None, **kwargs: Any) -> Iterator[Any]:
        exceptions = {k: kwargs.pop(k) for k in ("return_exceptions",) if k in kwargs}
        yield from super(RunnableWithCallKwargs, self._with(kwargs)).batch_as_completed(inputs, config, **exceptions)

    @override
    async def abatch_as_completed(
        self, inputs: Sequence[ChainInput], config: Any = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        exceptions = {k: kwargs.pop(k) for k in ("return_exceptions",) if k in kwargs}
        async for item in super(RunnableWithCallKwargs, self._with(kwargs)).abatch_as_completed(
            inputs, config, **exceptions
        ):
            yield item

    @override
    def stream(self, input: ChainInput, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        yield from super(RunnableWithCallKwargs, self._with(kwargs)).stream(input, config)

    @override
    async def astream(
        self, input: ChainInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        async for item in super(RunnableWithCallKwargs, self._with(kwargs)).astream(input, config):
            yield item

    @override
    def transform(
        self, input: Iterator[ChainInput], config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[Any]:
        yield from super(RunnableWithCallKwargs, self._with(kwargs)).transform(input, config)

    @override
    async def atransform(
        self, input: AsyncIterator[ChainInput], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        async for item in super(RunnableWithCallKwargs, self._with(kwargs)).atransform(input, config):
            yield item

    @override
    def stream_events(self, input: ChainInput, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        chain, own = self._with_events(kwargs)
        return super(RunnableWithCallKwargs, chain).stream_events(input, config, **own)

    @override
    def astream_events(self, input: ChainInput, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        chain, own = self._with_events(kwargs)
        return super(RunnableWithCallKwargs, chain).astream_events(input, config, **own)

    def _with_events(self, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """`_with`, but the keywords that select events are not the model's."""
        own = {k: v for k, v in kwargs.items() if k == "version" or k.startswith(("include_", "exclude_"))}
        return self._with({k: v for k, v in kwargs.items() if k not in own}), own
