"""LocalChatModel: a LocalModel with a chat template as a LangChain chat model.

Knows langchain_core's BaseChatModel, LocalModel, and messages in LangChain's and in transformers' form, which chat
templates are written for. Knows nothing about prompts' templates or training.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

from langchain_core.caches import BaseCache
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models.base import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from pydantic import Field, PrivateAttr, model_validator
from typing_extensions import override

from llmchain_fed.chain.batching.chat_batch import ChatBatch
from llmchain_fed.chain.messages import answer_in, converted, dialogue_calls, read_tools, tools_of
from llmchain_fed.chain.recording import asking, is_recording
from llmchain_fed.chain.structured import StructuredAnswers
from llmchain_fed.data.dialogues import Dialogue
from llmchain_fed.data.prompt import Call
from llmchain_fed.errors import ChatTemplateError, ConfigError, DataError, UnsupportedModelError
from llmchain_fed.model import chat_answer, chat_template, tool_format
from llmchain_fed.model.answer_plan import AnswerPlan
from llmchain_fed.model.generation.answers import Completion
from llmchain_fed.model.generation.token_logprobs import AnswerForm, openai_logprobs


class LocalChatModel(StructuredAnswers, ChatBatch, BaseChatModel):
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
    rendering_options: ClassVar[frozenset[str]] = frozenset({"chat_template_kwargs", "tools"})
    form_options: ClassVar[frozenset[str]] = frozenset(AnswerForm.model_fields)
    _recorded_call: dict[str, Any] = PrivateAttr(default_factory=dict)
    """keywords of the call that a recorder is about to answer"""

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
        return self.render(value, **{k: v for k, v in call.items() if k in self.rendering_options})

    @override
    def written(self, completion: Any, call: Mapping[str, Any] | None = None) -> str:
        """A completion → the text that the model is to write for it.

        Text is taken as it is. A message of the assistant's, with its reasoning and its calls of tools, becomes what
        the chat template writes between the generation prompt and the end token. An object becomes JSON, or the call
        of a tool, as the keywords of the call want it.

        Args:
            completion: Text, an `AIMessage`, a mapping of the role `assistant`, or an object of the call's schema.
            call: Keywords of the call that it answers.

        Raises:
            DataError: It is nothing that this face could answer.
            SchemaError: It does not fit the schema or the tools of the call.
        """
        call = self._recorded_call if call is None else call
        plan = self.plan(call)
        self.check_room(plan, call)
        made = self.answer_object(completion, plan)
        if isinstance(made, str):
            return plan.kept(made)
        message = made or (None if isinstance(completion, str) else answer_in(completion))
        if message is not None:
            return plan.kept(self._written_message(message, call, plan))
        text = super().written(completion, call)
        # as the same answer is written in a conversation: behind what the template thinks, never within it
        if (plan.thinks or plan.opened) and chat_answer.CLOSE not in text:
            return plan.kept(self._written_message(AIMessage(text), call, plan))
        return plan.kept(text)

    def _written_message(self, message: AIMessage, call: Mapping[str, Any], plan: AnswerPlan) -> str:
        answer = self.checked_calls(converted(message, self.model.name), plan)
        given = self._switches(call.get("chat_template_kwargs"))
        calls, form = answer.get("tool_calls"), plan.form if plan.tools else self.form(given)
        if not calls or form.own or (form.shows and not plan.tools):
            text = chat_answer.answer_text(
                self.model.tokenizer, answer, given, controls=self.model.control_tokens(), name=self.model.name,
                tools=plan.tools if form.own else (),
            )  # fmt: skip
            if text is not None:
                return text
        (said,) = tool_format.told([{**answer, "content": message.text}], ())
        opened = chat_answer.opens_reasoning(self.model.tokenizer, given, name=self.model.name)
        return chat_answer.own_text(said["content"], answer.get("reasoning_content", ""), opened=opened)

    @override
    def dialogue_calls(self, dialogue: Dialogue, call: Mapping[str, Any]) -> Sequence[Call]:
        tools = tools_of(dialogue, call.get("tools"))
        call = {**call, "tools": tools} if tools else call
        return dialogue_calls(dialogue, tools, lambda m: self.text_of(m, call), lambda a: self.written(a, call))

    @classmethod
    def _tolerated(cls) -> frozenset[str]:
        """LangChain's standard parameters of remote models; a local one has no use for them."""
        return frozenset({"api_key", "base_url", "timeout", "max_retries", "model_kwargs", "streaming"})

    @property
    def _llm_type(self) -> str:
        return "llmchain_fed-local-chat"

    def render(
        self,
        messages: LanguageModelInput,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """Messages, or whatever else `invoke` takes → the text that the model sees, up to where its answer begins.

        A last message of the assistant's is a begun answer, which the model goes on from. Where a message's text
        spells a control token, the result is a `Rendered`, which `LocalModel.encode` keeps from becoming one. Switches
        of the template for this call go over the model's own. Tools go to the template, or into the system message.

        Raises:
            ChatTemplateError: The template refuses the messages.
            ConfigError: A switch that the template does not have.
            UnsupportedModelError: The model is seq2seq, its tokenizer has no chat template, or a message is not text.
        """
        model = self.model
        if model.kind != "causal":
            msg = f"{model.name!r} is seq2seq, and chat templates are for causal models. Use LocalLLM."
            raise UnsupportedModelError(msg)
        given = self._switches(chat_template_kwargs)
        try:
            conversation = [converted(m, model.name) for m in self._convert_input(messages).to_messages()]
        except (ValueError, TypeError, NotImplementedError) as error:
            msg = f"cannot read {messages!r:.80} as an input of LocalChatModel: {error}. Pass text or messages."
            raise DataError(msg) from None
        schemas = read_tools(tools or ())
        conversation, schemas = self._told(conversation, schemas, given)
        return chat_template.render(
            model.tokenizer, conversation, given, controls=model.control_tokens(), name=model.name, tools=schemas
        )

    def _told(
        self, conversation: list[dict[str, Any]], tools: list[dict[str, Any]], given: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The messages, and what the template is given of tools; where it cannot tell of them, messages do."""
        calls = any(m.get("tool_calls") or m["role"] == "tool" for m in conversation)
        if not tools and not calls:
            return conversation, tools
        form = self.form(given)
        if form.own or (form.shows and not tools):
            return conversation, tools
        told = tool_format.told(conversation, tools)
        if tools and not tool_format.takes_system(self.model.tokenizer, given):
            told = tool_format.told_to_user(told)
        return told, []

    def _switches(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """The template's switches for a call: its own over the model's."""
        return self.chat_template_kwargs | dict(given or {})

    @override
    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """tokens: what `invoke` would send for these messages, with all that the template puts around them.

        Messages that the template refuses, as a part of a conversation that LangChain counts may be, are counted one by
        one, as if the user had said each.
        """
        if not messages:
            return 0
        schemas = read_tools(tools or ())
        try:
            texts = [self.render(messages, tools=schemas)]
        except ChatTemplateError:
            texts = [self.render([HumanMessage(message.text)]) for message in messages]
            texts += [json.dumps(schemas)] if schemas else []
        return sum(map(len, self.model.encode(texts, add_special_tokens=False)))

    def asked(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: Mapping[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        """What a call asks of the model: the text that it reads, and the options for its answer.

        Raises:
            ConfigError: A keyword that is no option, or one out of range.
        """
        AnswerForm.of(kwargs)  # refuses what is none
        kwargs = {name: value for name, value in kwargs.items() if name not in self.form_options}
        switches = kwargs.get("chat_template_kwargs")
        if switches is not None and not isinstance(switches, Mapping):
            msg = f"chat_template_kwargs is a mapping of switches to values, got {switches!r:.80}."
            raise ConfigError(msg)
        options = self.options(stop, kwargs)
        return self.render(messages, chat_template_kwargs=switches, tools=kwargs.get("tools")), options

    def message(self, done: Completion, kwargs: Mapping[str, Any]) -> AIMessage:
        """The message that an answer is, for a call with these keywords; the one place where that is made of it."""
        return AIMessage(
            **self.message_fields(done.text, kwargs),
            usage_metadata=_usage(done),
            response_metadata=self._about(done),
        )

    @override
    def generate(self, messages: list[list[BaseMessage]], *args: Any, **kwargs: Any) -> LLMResult:
        return super(LocalChatModel, self._as_it_answers(kwargs)).generate(messages, *args, **kwargs)

    @override
    async def agenerate(self, messages: list[list[BaseMessage]], *args: Any, **kwargs: Any) -> LLMResult:
        return await super(LocalChatModel, self._as_it_answers(kwargs)).agenerate(messages, *args, **kwargs)

    def _as_it_answers(self, kwargs: Mapping[str, Any]) -> LocalChatModel:
        """This model; while a recorder answers for it, one without a cache, and with the call's switches for its own.

        What an answer is written like, the recorder asks this model without knowing the call.
        """
        if not is_recording():
            return self
        given = kwargs.get("chat_template_kwargs")
        switches = self._switches(given if isinstance(given, Mapping) else None)
        own = self.model_copy(update={"cache": False, "chat_template_kwargs": switches})
        own._recorded_call = dict(kwargs)
        return own

    @override
    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        text, options = self.asked(messages, stop, kwargs)
        with asking([run_manager]):
            done = self.complete([text] * AnswerForm.of(kwargs).n, options)
        return self._result(text, done, kwargs)

    @override
    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> ChatResult:
        text, options = self.asked(messages, stop, kwargs)
        form = AnswerForm.of(kwargs)
        with asking([run_manager]):
            done = await self.acomplete([text] * form.n, options)
        if form.logprobs:  # computed beside the loop
            return await asyncio.to_thread(self._result, text, done, kwargs)
        return self._result(text, done, kwargs)

    def _result(self, text: str, answers: list[Completion], kwargs: Mapping[str, Any]) -> ChatResult:
        messages = [self.message(done, kwargs) for done in answers]
        for message, logprobs in zip(messages, self._logprobs(text, answers, kwargs), strict=False):
            message.response_metadata["logprobs"] = logprobs
        generations = [ChatGeneration(message=message) for message in messages]
        return ChatResult(generations=generations, llm_output={"model_name": self.model.name})

    def _logprobs(self, text: str, answers: list[Completion], kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Of each answer's tokens, where the call asks for them; else none. A recorder's answers have no tokens."""
        form = AnswerForm.of(kwargs)
        if not form.logprobs or is_recording():
            return []
        return openai_logprobs(self.model, text, answers, top=form.top_logprobs or 0, add_special_tokens=False)

    @override
    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        if AnswerForm.of(kwargs).n > 1:
            msg = "a stream is one answer, and n asks for more. Call generate(…, n=…), or stream without n."
            raise ConfigError(msg)
        text, options = self.asked(messages, stop, kwargs)
        with asking([run_manager]):
            pieces = self._as_it_answers(kwargs).pieces(text, options)
        parts = self.pieces_of_message(kwargs)
        done: Completion | None = None
        while done is None:
            try:
                found = list(parts.feed(next(pieces)))
            except StopIteration as end:
                done, found = end.value, list(parts.end())
            for fields in found:
                chunk = ChatGenerationChunk(message=AIMessageChunk(**fields))
                if run_manager is not None:
                    run_manager.on_llm_new_token(fields["content"], chunk=chunk)
                yield chunk
        about = self._about(done)
        for logprobs in self._logprobs(text, [done], kwargs):
            about["logprobs"] = logprobs
        last = AIMessageChunk(content="", usage_metadata=_usage(done), response_metadata=about, chunk_position="last")
        yield ChatGenerationChunk(message=last)

    def _about(self, done: Completion) -> dict[str, Any]:
        return {"model_name": self.model.name, "finish_reason": done.finish_reason}


def _usage(done: Completion) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=done.prompt_tokens,
        output_tokens=done.completion_tokens,
        total_tokens=done.prompt_tokens + done.completion_tokens,
    )
