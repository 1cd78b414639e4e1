"""Tools on the chat face: what a call binds, how its answer is kept to it, and the message that the answer becomes.

Knows LangChain's tools and messages, how a model writes calls, and grammars. Knows nothing about how a grammar is kept
to, or about training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar
from uuid import uuid4
from weakref import WeakKeyDictionary

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from typing_extensions import override

from llmchain_fed.chain.base_llm import ALIASES, LocalLanguageModel
from llmchain_fed.chain.messages import answer_in, as_data, read_tools
from llmchain_fed.data.messages import is_message
from llmchain_fed.errors import ConfigError, MissingExtraError, SchemaError, UnsupportedModelError
from llmchain_fed.model import chat_answer, tool_format
from llmchain_fed.model.answer_plan import AnswerPlan, chosen_tools, response_shape
from llmchain_fed.model.control_tokens import added_tokens
from llmchain_fed.model.generation.vocabulary import vocabulary_of
from llmchain_fed.model.tool_reading import Broken, CallReader, Said, read_calls

_KEYWORDS = frozenset({"tools", "tool_choice", "parallel_tool_calls", "strict", "response_format"})
_SILENT = frozenset({"chat_template_kwargs", "ls_structured_output_format"})
"""keywords that are no generation options, and have their place elsewhere"""


_plans: WeakKeyDictionary[Any, dict[str, AnswerPlan]] = WeakKeyDictionary()


class CallsTools(LocalLanguageModel):
    """The chat face's part that knows tools; LangChain's class comes behind it."""

    answer_options: ClassVar[frozenset[str]] = _KEYWORDS

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        parallel_tool_calls: bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The same model with tools that it may call; what it calls always exists, with arguments that fit.

        The tools are told by the model's chat template, and calls are written as it writes them. A template that has no
        place for tools gets them in the system message, and calls stand between `<tool_call>` tags: `render` shows it.
        A model that was not trained on either calls tools validly and senselessly, until it learns.

        Args:
            tools: Functions, LangChain tools, Pydantic or TypedDict classes, or JSON schemas of functions.
            tool_choice: `"auto"` (the default), `"none"`, `"any"` or `"required"`, or the name of a tool.
            parallel_tool_calls: False: an answer has one call at most.
            strict: False leaves the answer to the model, so that a call may be broken (then it is among the message's
                `invalid_tool_calls`), and does without the extra `structured`.
            **kwargs: Further keywords for every call.

        Raises:
            ConfigError: `tool_choice` names no tool.
            DataError: Something is no tool.
            SchemaError: A tool's parameters are no schema that is known here.
        """
        given: dict[str, Any] = {"tools": read_tools(tools)}
        options = {"tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls, "strict": strict}
        given |= {name: value for name, value in options.items() if value is not None}
        plan = self.plan(given)
        _ = plan.shapes if plan.strict else ()
        bound: Runnable[LanguageModelInput, AIMessage] = self.bind(**given, **kwargs)
        return bound

    def plan(self, kwargs: Mapping[str, Any]) -> AnswerPlan:
        """What a call with these keywords wants of its answer.

        Raises:
            ConfigError: A keyword that says nothing known.
            DataError: Something is no tool.
            SchemaError: A schema that is not known here.
        """
        switches = dict(self.switches) | dict(kwargs.get("chat_template_kwargs") or {})
        tools = read_tools(kwargs.get("tools") or ())
        own = {name: kwargs.get(name) for name in sorted(_KEYWORDS - {"tools"})}
        template = str(getattr(self.model.tokenizer, "chat_template", None))
        added = sorted(added_tokens(self.model.tokenizer).items())
        try:
            key = json.dumps([tools, own, sorted(switches.items(), key=repr), template, added], default=repr)
        except (RecursionError, ValueError, TypeError):
            msg = "tools, their choice or response_format are nested too deep, or no JSON. Give plain schemas."
            raise SchemaError(msg) from None
        kept = _plans.setdefault(self.model.tokenizer, {})
        if key not in kept:
            if len(kept) > 256:
                kept.clear()
            kept[key] = self._made(tools, own, switches, key)
        return kept[key]

    def _made(
        self, tools: list[dict[str, Any]], own: Mapping[str, Any], switches: Mapping[str, Any], key: str
    ) -> AnswerPlan:
        model = self.model
        form = tool_format.OURS
        if tools:
            form = self.form(switches)
        names = [str(tool["function"]["name"]) for tool in tools]
        choice, chosen = chosen_tools(own["tool_choice"], names)
        response = response_shape(own["response_format"])
        texts = (form.begin, form.middle, form.again, form.end) if tools else ()
        return AnswerPlan(
            form=form,
            tools=tuple(tools),
            choice=choice,
            chosen=chosen,
            several=own["parallel_tool_calls"] is not False,
            strict=own["strict"] is not False,
            response=response,
            opened=chat_answer.opens_reasoning(model.tokenizer, switches, name=model.name),
            thinks=chat_answer.writes_reasoning(model.tokenizer, switches, name=model.name),
            key=key,
            control_ids=tool_format.control_ids(model.tokenizer, *texts),
        )

    def form(self, switches: Mapping[str, Any]) -> tool_format.ToolFormat:
        """How the model writes calls.

        Raises:
            UnsupportedModelError: The tokenizer has no chat template.
        """
        model = self.model
        return tool_format.tool_format(model.tokenizer, switches, controls=model.control_tokens(), name=model.name)

    def tool_note(self) -> str:
        """What to say of a chat template that does not know tools; empty for one that does."""
        if self.form(self.switches).own:
            return ""
        return (
            f"the chat template of {self.model.name!r} has no place for tools, or writes calls in a way that cannot be "
            "read back: tools stand in the system message, calls between <tool_call> tags"
        )

    @override
    def options(self, stop: Sequence[str] | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
        rest = {name: value for name, value in overrides.items() if name not in self.answer_options | _SILENT}
        found = super().options(stop, rest)
        if not any(overrides.get(name) for name in ("tools", "response_format")):
            return found
        plan = self.plan(overrides)
        if found["stop"] and (plan.response is not None or (plan.tools and plan.choice == "any")):
            msg = (
                f"the stop strings {found['stop']!r:.80} would cut an answer that is to keep to a schema. Leave `stop` "
                "out: such an answer ends by itself."
            )
            raise ConfigError(msg)
        grammar = plan.grammar
        return found | ({"grammar": grammar} if grammar is not None else {})

    def check_room(self, plan: AnswerPlan, call: Mapping[str, Any]) -> None:
        """Makes sure that the shortest answer fits into `max_new_tokens`, as every call does.

        Raises:
            SchemaError: It does not; the message has the number of tokens that it needs.
        """
        grammar = plan.grammar
        if grammar is None or not grammar.node.shortest:
            return
        try:
            vocabulary = vocabulary_of(self.model.tokenizer, self.model.eos_ids, self.model.name)
        except (MissingExtraError, UnsupportedModelError):  # said by the call that answers; training needs neither
            return
        grammar.check_budget(vocabulary, int(_length(call) or self.max_new_tokens))

    # --- what training teaches --------------------------------------------------------------------------------------

    def answer_object(self, completion: Any, plan: AnswerPlan) -> str | AIMessage | None:
        """A completion that is no text and no message: an object's JSON, or the call of a tool with it for arguments.

        Raises:
            SchemaError: It does not fit its schema, or names no tool that may be called.
        """
        if plan.response is not None:
            return self._json_answer(completion, plan)
        data = as_data(completion)
        if not plan.tools or not isinstance(data, Mapping) or "role" in data:
            return None
        name = type(completion).__name__
        if isinstance(completion, Mapping) and len(plan.chosen) == 1:
            (name,) = plan.chosen
        arguments = json.loads(plan.checked(name, data))
        return AIMessage("", tool_calls=[tool_call(name=name, args=arguments, id=_new_id())])

    def _json_answer(self, completion: Any, plan: AnswerPlan) -> str:
        assert plan.response is not None
        thoughts = ""
        is_said = isinstance(completion, BaseMessage)
        if isinstance(completion, Mapping) and is_message(completion):
            try:
                return chat_answer.own_text(plan.response.write(completion), "", opened=plan.opened)
            except SchemaError:  # it is no such object, but a message that has one for its content
                is_said = True
        if is_said and (message := answer_in(completion)) is not None:
            thoughts, completion = message.additional_kwargs.get("reasoning_content", ""), message.text
        if isinstance(completion, str):
            try:
                completion = json.loads(completion)
            except (ValueError, RecursionError):
                msg = f"the completion {completion!r:.80} is no JSON, and the chain's answers are. Give the object."
                raise SchemaError(msg) from None
        text = plan.response.write(as_data(completion))
        return chat_answer.own_text(text, thoughts, opened=plan.opened)

    def checked_calls(self, answer: dict[str, Any], plan: AnswerPlan) -> dict[str, Any]:
        """An answer in transformers' form with its calls' arguments in the order of their tools' schemas.

        Raises:
            SchemaError: A call of no tool that may be called, or with arguments that do not fit.
        """
        if not plan.tools or not answer.get("tool_calls"):
            return answer
        calls = []
        for call in answer["tool_calls"]:
            function = call["function"]
            arguments = json.loads(plan.checked(function["name"], function["arguments"]))
            calls.append({**call, "function": {**function, "arguments": arguments}})
        return {**answer, "tool_calls": calls}

    # --- answers ----------------------------------------------------------------------------------------------------

    def message_fields(self, text: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """An answer's text → the fields of the message that it is: content, reasoning, calls and broken calls."""
        opened = self.plan({"chat_template_kwargs": kwargs.get("chat_template_kwargs")}).opened
        reasoning, content = chat_answer.parted(text, opened=opened)
        fields: dict[str, Any] = {"additional_kwargs": thought(reasoning), "content": content}
        plan = self.plan(kwargs) if kwargs.get("tools") else None
        if plan is None or plan.response is not None:
            return fields
        said, calls, broken = read_calls(content, plan.form)
        valid: list[Any] = []
        invalid: list[Any] = [invalid_tool_call(name=None, args=b, id=_new_id(), error=_BROKEN) for b in broken]
        for name, arguments in calls:
            try:
                given = json.loads(arguments)
                plan.checked(name, given)
                if valid and not plan.several:
                    msg = "parallel_tool_calls=False allows one call, and this is another."
                    raise SchemaError(msg)
                valid.append(tool_call(name=name, args=given, id=_new_id()))
            except (ValueError, RecursionError, SchemaError) as error:
                why = str(error) if isinstance(error, SchemaError) else _BROKEN
                invalid.append(invalid_tool_call(name=name, args=arguments, id=_new_id(), error=why))
        return fields | {"content": said, "tool_calls": valid, "invalid_tool_calls": invalid}

    def pieces_of_message(self, kwargs: Mapping[str, Any]) -> MessagePieces:
        """What makes the fields of chunks of an answer's pieces."""
        plan = self.plan(kwargs) if kwargs.get("tools") and not kwargs.get("response_format") else None
        opened = self.plan({"chat_template_kwargs": kwargs.get("chat_template_kwargs")}).opened
        return MessagePieces(chat_answer.Parting(opened=opened), plan.form if plan is not None else None)


_BROKEN = "the call is not written as calls are, or its arguments are no JSON."


class MessagePieces:
    """An answer's pieces → the fields of the chunks of its message.

    Args:
        parting: It takes reasoning and content apart.
        form: How calls are written; None where no tools are bound.
    """

    def __init__(self, parting: chat_answer.Parting, form: tool_format.ToolFormat | None) -> None:
        self._parting, self._reader = parting, CallReader(form) if form is not None else None

    def feed(self, piece: str) -> Iterator[dict[str, Any]]:
        """What a piece gives."""
        for kind, part in self._parting.feed(piece):
            yield from self._fields(kind, part)

    def end(self) -> Iterator[dict[str, Any]]:
        """What was held back."""
        for kind, part in self._parting.end():
            yield from self._fields(kind, part)
        if self._reader is not None:
            yield from map(self._chunk, self._reader.end())

    def _fields(self, kind: str, part: str) -> Iterator[dict[str, Any]]:
        if kind == "reasoning":
            yield {"content": "", "additional_kwargs": thought(part)}
        elif self._reader is None:
            yield {"content": part}
        else:
            yield from map(self._chunk, self._reader.feed(part))

    @staticmethod
    def _chunk(part: Any) -> dict[str, Any]:
        if isinstance(part, Said):
            return {"content": part.text}
        if isinstance(part, Broken):  # no JSON: LangChain counts it among the invalid calls
            return {"content": "", "tool_call_chunks": [tool_call_chunk(name=None, args=part.text, id=_new_id())]}
        made = _new_id() if part.name is not None else None
        chunk = tool_call_chunk(name=part.name, args=part.arguments, id=made, index=part.index)
        return {"content": "", "tool_call_chunks": [chunk]}


def _length(call: Mapping[str, Any]) -> int | None:
    given = next((v for k, v in call.items() if ALIASES.get(k, k) == "max_new_tokens" and v is not None), None)
    return given if isinstance(given, int) else None


def thought(reasoning: str) -> dict[str, str]:
    """Where a message keeps what was thought."""
    return {"reasoning_content": reasoning} if reasoning else {}


def _new_id() -> str:
    return uuid4().hex[:9]  # letters and digits, nine, which Mistral's templates insist on
