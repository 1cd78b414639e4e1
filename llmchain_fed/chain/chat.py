"""LocalChatModel: a LocalModel with a chat template as a LangChain chat model.

Knows langchain_core's BaseChatModel, LocalModel, and messages in LangChain's and in transformers' form, which chat
templates are written for. Knows nothing about prompts' templates or training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from langchain_core.caches import BaseCache
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models.base import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from pydantic import Field, model_validator
from typing_extensions import override

from llmchain_fed.chain.chat_batch import ChatBatch
from llmchain_fed.chain.messages import converted
from llmchain_fed.chain.recording import is_recording
from llmchain_fed.errors import ConfigError, DataError, UnsupportedModelError
from llmchain_fed.model import chat_template
from llmchain_fed.model.generation.answers import Completion


class LocalChatModel(ChatBatch, BaseChatModel):
    """A local causal model behind LangChain's chat interface; the tokenizer's chat template writes the prompt.

    `batch` and `abatch` are real batches, and so are calls that are awaited at the same time.

    Args:
        model: The `LocalModel`; its tokenizer needs a chat template.
        **options: Defaults for every call: `max_new_tokens` (or `max_tokens`), `temperature`, `stop` …
    """

    cache: BaseCache | bool | None = Field(default=False, exclude=True)
    """off, also under a global cache; True opts in, with the weights' version in the key"""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """switches of the chat template, such as `{"enable_thinking": False}`; a call may give others, which go first"""
    path_fields: ClassVar[frozenset[str]] = frozenset({"chat_template_kwargs"})
    rendering_options: ClassVar[frozenset[str]] = frozenset({"chat_template_kwargs"})

    @model_validator(mode="after")
    def _known_switches(self) -> Self:
        if self.chat_template_kwargs:
            name = self.model.name
            template = chat_template.template_of(self.model.tokenizer, name)
            chat_template.check_switches(self.chat_template_kwargs, template, name)
        return self

    @property
    def adds_special_tokens(self) -> bool:
        """False: a chat template writes its special tokens itself."""
        return False

    @property
    def switches(self) -> Mapping[str, Any]:
        """The chat template's switches that go along with every call."""
        return self.chat_template_kwargs

    @override
    def path_identity(self) -> list[Any]:
        template = str(getattr(self.model.tokenizer, "chat_template", None))
        digest = hashlib.sha256(template.encode()).hexdigest()[:16]
        return [*super().path_identity(), digest, sorted(self.chat_template_kwargs.items())]

    @override
    def text_of(self, value: Any, call: Mapping[str, Any]) -> str:
        return self.render(value, chat_template_kwargs=call.get("chat_template_kwargs"))

    @classmethod
    def _tolerated(cls) -> frozenset[str]:
        """LangChain's standard parameters of remote models; a local one has no use for them."""
        return frozenset({"api_key", "base_url", "timeout", "max_retries", "model_kwargs", "streaming"})

    @property
    def _llm_type(self) -> str:
        return "llmchain_fed-local-chat"

    def render(self, messages: LanguageModelInput, *, chat_template_kwargs: Mapping[str, Any] | None = None) -> str:
        """Messages, or whatever else `invoke` takes → the text that the model sees, up to where its answer begins.

        A last message of the assistant's is a begun answer, which the model goes on from. Where a message's text
        spells a control token, the result is a `Rendered`, which `LocalModel.encode` keeps from becoming one. Switches
        of the template for this call go over the model's own.

        Raises:
            ChatTemplateError: The template refuses the messages.
            ConfigError: A switch that the template does not have.
            UnsupportedModelError: The model is seq2seq, its tokenizer has no chat template, or a message is not text.
        """
        model = self.model
        if model.kind != "causal":
            msg = f"{model.name!r} is seq2seq, and chat templates are for causal models. Use LocalLLM."
            raise UnsupportedModelError(msg)
        given = self.chat_template_kwargs | dict(chat_template_kwargs or {})
        try:
            conversation = [converted(m, model.name) for m in self._convert_input(messages).to_messages()]
        except (ValueError, TypeError, NotImplementedError) as error:
            msg = f"cannot read {messages!r:.80} as an input of LocalChatModel: {error}. Pass text or messages."
            raise DataError(msg) from None
        return chat_template.render(
            model.tokenizer, conversation, given, controls=model.control_tokens(), name=model.name
        )

    def asked(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: Mapping[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        """What a call asks of the model: the text that it reads, and the options for its answer.

        Raises:
            ConfigError: A keyword that is no option, or one out of range.
        """
        kwargs = dict(kwargs)
        switches = kwargs.pop("chat_template_kwargs", None)
        if switches is not None and not isinstance(switches, Mapping):
            msg = f"chat_template_kwargs is a mapping of switches to values, got {switches!r:.80}."
            raise ConfigError(msg)
        return self.render(messages, chat_template_kwargs=switches), self.options(stop, kwargs)

    def message(self, done: Completion, kwargs: Mapping[str, Any]) -> AIMessage:
        """The message that an answer is, for a call with these keywords; the one place where that is made of it."""
        _ = kwargs
        return AIMessage(content=done.text, usage_metadata=_usage(done), response_metadata=self._about(done))

    @override
    def generate(self, messages: list[list[BaseMessage]], *args: Any, **kwargs: Any) -> LLMResult:
        return super(LocalChatModel, self._as_it_answers()).generate(messages, *args, **kwargs)

    @override
    async def agenerate(self, messages: list[list[BaseMessage]], *args: Any, **kwargs: Any) -> LLMResult:
        return await super(LocalChatModel, self._as_it_answers()).agenerate(messages, *args, **kwargs)

    def _as_it_answers(self) -> LocalChatModel:
        """This model; while a recorder answers for it, one without a cache."""
        return self.model_copy(update={"cache": False}) if is_recording() else self

    @override
    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        text, options = self.asked(messages, stop, kwargs)
        return self._result(self.complete([text], options), kwargs)

    @override
    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> ChatResult:
        text, options = self.asked(messages, stop, kwargs)
        return self._result(await self.acomplete([text], options), kwargs)

    def _result(self, answers: list[Completion], kwargs: Mapping[str, Any]) -> ChatResult:
        generations = [ChatGeneration(message=self.message(done, kwargs)) for done in answers]
        return ChatResult(generations=generations, llm_output={"model_name": self.model.name})

    @override
    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        pieces = self.pieces(*self.asked(messages, stop, kwargs))
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                done: Completion = end.value
                break
            chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
            if run_manager is not None:
                run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk
        yield ChatGenerationChunk(
            message=AIMessageChunk(
                content="",
                usage_metadata=_usage(done),
                response_metadata=self._about(done),
                chunk_position="last",
            )
        )

    def _about(self, done: Completion) -> dict[str, Any]:
        return {"model_name": self.model.name, "finish_reason": done.finish_reason}


def _usage(done: Completion) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=done.prompt_tokens,
        output_tokens=done.completion_tokens,
        total_tokens=done.prompt_tokens + done.completion_tokens,
    )
