"""LocalChatModel: a LocalModel with a chat template as a LangChain chat model.

Knows langchain_core's BaseChatModel, messages and LocalModel. Knows nothing about prompts' templates or training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from langchain_core.caches import BaseCache
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, convert_to_openai_messages
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import Field
from typing_extensions import override

from llmchain_fed.errors import UnsupportedModelError
from llmchain_fed.face import LocalFace
from llmchain_fed.generation import Completion


class LocalChatModel(LocalFace, BaseChatModel):
    """A local causal model behind LangChain's chat interface; the tokenizer's chat template writes the prompt.

    `batch` answers message lists one by one (LangChain's chat models run a thread pool); for true batches use
    `LocalLLM`. No tools and no structured output are claimed: a parser behind the model does that for local models.

    Args:
        model: The `LocalModel`; its tokenizer needs a chat template.
        **options: Defaults for every call: `max_new_tokens` (or `max_tokens`), `temperature`, `stop` …
    """

    cache: BaseCache | bool | None = Field(default=False, exclude=True)
    """off, also under a global cache; True opts in, with the weights' version in the key"""

    @classmethod
    def _tolerated(cls) -> frozenset[str]:
        """LangChain's standard parameters of remote models; a local one has no use for them."""
        return frozenset({"api_key", "base_url", "timeout", "max_retries", "model_kwargs", "streaming"})

    @property
    def _llm_type(self) -> str:
        return "llmchain_fed-local-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return self.identity()

    @override
    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params.update(self.standard_params(kwargs))  # type: ignore[typeddict-item]
        return params

    @override
    def get_token_ids(self, text: str) -> list[int]:
        return self.model.encode([text], add_special_tokens=False)[0]

    def render(self, messages: Sequence[BaseMessage]) -> str:
        """Messages → the text that the model sees, up to where its answer begins.

        Raises:
            UnsupportedModelError: The model is seq2seq, its tokenizer has no chat template, or a message is not text.
        """
        tokenizer = self.model.tokenizer
        if self.model.kind != "causal" or not getattr(tokenizer, "chat_template", None):
            msg = (
                f"{self.model.name!r} has no chat template, so messages cannot become a prompt. Use LocalLLM, or set "
                "tokenizer.chat_template."
            )
            raise UnsupportedModelError(msg)
        conversation = convert_to_openai_messages(messages, text_format="string")
        for message in conversation:
            if not isinstance(message.get("content") or "", str):
                msg = (
                    f"a {message['role']} message holds more than text, which {self.model.name!r} cannot "
                    "read. Send text only."
                )
                raise UnsupportedModelError(msg)
        text: str = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        return text

    @override
    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        options = self.options(stop, kwargs)
        (done,) = self.model.complete([self.render(messages)], add_special_tokens=False, **options)
        message = AIMessage(content=done.text, usage_metadata=_usage(done), response_metadata=self._about(done))
        return ChatResult(generations=[ChatGeneration(message=message)], llm_output={"model_name": self.model.name})

    @override
    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        options = self.options(stop, kwargs)
        pieces = self.model.stream(self.render(messages), add_special_tokens=False, **options)
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
