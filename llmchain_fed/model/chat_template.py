"""A tokenizer's chat template: messages in transformers' form become the text that a causal model sees.

Knows chat templates, their switches, and what becomes of foreign text in them. Knows nothing of LangChain: messages
arrive as mappings with `role` and `content`.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import jinja2
import jinja2.meta
import jinja2.nodes

from llmchain_fed._config import unknown_option
from llmchain_fed.errors import ChatTemplateError, ConfigError, UnsupportedModelError
from llmchain_fed.model.control_tokens import Change, added_tokens, map_texts, mark_foreign, may_spell, texts_of

Message = dict[str, Any]

_RESERVED = frozenset(
    {
        *("messages", "conversation", "tools", "documents", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "chat_template", "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding"),
        *("truncation", "max_length", "tokenizer_kwargs", "sanitize_control_tokens", "raise_exception"),
        *("strftime_now", "range", "namespace", "dict", "lipsum", "cycler", "joiner"),
    }
)
"""names in a template that are not a caller's to set"""
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")  # transformers' own, unknown to jinja2
_FOREIGN = ("content", "name", "reasoning_content", "tool_calls", "tool_call_id")
"""fields of a message whose texts are not the template's"""
_known: WeakKeyDictionary[Any, dict[tuple[str, str], Facts]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Facts:
    """What trying a template out has shown."""

    content: Literal["text", "parts", "both"]
    """what it takes as a message's content: a text, a list of parts, or either"""
    written: frozenset[str]
    """the added tokens that it writes itself: control tokens beside begin, end and padding"""


def template_of(tokenizer: Any, name: str) -> str:
    """The template's source.

    Raises:
        UnsupportedModelError: The tokenizer has none, or several and no default.
    """
    if not getattr(tokenizer, "chat_template", None):
        msg = (
            f"{name!r} has no chat template, so messages cannot become a prompt. Use LocalLLM, or set "
            "tokenizer.chat_template."
        )
        raise UnsupportedModelError(msg)
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        msg = f"{name!r} has several chat templates: {error}. Set tokenizer.chat_template to one of them."
        raise UnsupportedModelError(msg) from None


@functools.lru_cache(maxsize=32)
def switches(template: str) -> frozenset[str]:
    """The names that a template reads and that are a caller's to set, such as `enable_thinking`.

    >>> sorted(switches("{% if enable_thinking %}<think>{% endif %}{{ messages[0].content }}"))
    ['enable_thinking']
    """
    try:
        parsed = _parsed(template)
    except jinja2.TemplateError:
        return frozenset()  # rendering says what is wrong with it
    read = jinja2.meta.find_undeclared_variables(parsed)
    asked = {test.node.name for test in parsed.find_all(jinja2.nodes.Test) if isinstance(test.node, jinja2.nodes.Name)}
    made = {name.name for name in parsed.find_all(jinja2.nodes.Name) if name.ctx in ("store", "param")}
    # what a template sets is its own, unless it asks whether somebody else has
    return frozenset(read - (made - asked)) - _RESERVED


def _parsed(template: str) -> jinja2.nodes.Template:
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"])  # noqa: S701 (never rendered)
    return environment.parse(_GENERATION_TAG.sub("", template))


def check_switches(given: Mapping[str, Any], template: str, name: str) -> None:
    """Makes sure that every switch is one of the template's, and data.

    Raises:
        ConfigError: A switch is none of the template's, so that it would have no effect, or is no data.
    """
    if not given:
        return
    known = switches(template)
    for key in given:
        if key in _RESERVED or key not in known:
            if key in ("tools", "documents"):
                msg = f"chat_template_kwargs: {key} are not given to a chat template here. Write them into a message."
            elif known:
                msg = f"chat_template_kwargs: {unknown_option(key, known)}. Another would have no effect on {name!r}."
            else:
                msg = f"chat_template_kwargs: the chat template of {name!r} has no switch, so {key!r} has no effect."
            raise ConfigError(msg)
    try:
        same = json.loads(json.dumps(given, allow_nan=False)) == dict(given)
    except (TypeError, ValueError):
        same = False
    if not same:
        msg = f"chat_template_kwargs contains more than JSON data ({given!r:.100}), which no file and no cache key can."
        raise ConfigError(msg)


@functools.lru_cache(maxsize=32)
def takes_tools(template: str) -> bool:
    """Whether a template has a place of its own for the tools that a model may call.

    >>> takes_tools("{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[0].content }}")
    True
    """
    try:
        return "tools" in jinja2.meta.find_undeclared_variables(_parsed(template))
    except jinja2.TemplateError:
        return False


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    given: Mapping[str, Any],
    *,
    controls: frozenset[str],
    name: str,
    tools: Sequence[Message] = (),
) -> str:
    """Messages → the text up to where the answer begins; a last message of the assistant's is a begun answer.

    Args:
        tokenizer: Its chat template writes the text.
        messages: In transformers' form.
        given: The template's switches.
        controls: The model's control tokens.
        name: The model's, for messages of errors.
        tools: JSON schemas of the tools that the model may call, for a template that takes some.

    Raises:
        ChatTemplateError: The template refuses the messages, or something in it fails.
        ConfigError: The template does not have such a switch.
        UnsupportedModelError: The tokenizer has no chat template.
    """
    template = template_of(tokenizer, name)
    check_switches(given, template, name)
    facts = facts_of(tokenizer, template, given)
    messages = [with_content(m, facts.content) for m in messages]
    begun = _begins_answer(messages)
    if messages and messages[-1]["role"] == "assistant" and not begun and not messages[-1].get("tool_calls"):
        messages = messages[:-1]  # an empty beginning is none

    def apply(some: Sequence[Message]) -> str:
        return applied(tokenizer, some, given, begun=begun, name=name, tools=tools)

    known = controls | facts.written
    check_tools(tools, known)
    for message in messages:
        if any(c in str(message["role"]) for c in known):
            msg = f"the role {message['role']!r} spells a control token, which would open or end a turn. Rename it."
            raise ChatTemplateError(msg)
    text = apply(messages)
    foreign = messages[:-1] if begun else messages  # whoever begins an answer writes as the model does
    if not any(may_spell(t, known) for m in foreign for key in _FOREIGN for t in texts_of(m.get(key))):
        return text

    def changing(whose: Callable[[Message], bool]) -> Callable[[Change], str]:
        which = [whose(m) for m in foreign] + [False] * (len(messages) - len(foreign))
        return lambda change: apply([changed(m, change) if c else m for m, c in zip(messages, which, strict=True)])

    # a template may look into former answers, for their reasoning say: then those are taken as they are
    others = changing(lambda m: m["role"] != "assistant")
    return mark_foreign(text, known, [changing(lambda _: True), others])


def check_tools(tools: Sequence[Message], controls: frozenset[str]) -> None:
    """Makes sure that what is told of tools writes no control token.

    Raises:
        ChatTemplateError: It does.
    """
    texts = texts_of(list(tools)) if tools else []
    if spelled := sorted(c for c in controls if any(c in text for text in texts)):
        msg = (
            f"the description of a tool spells the control token {spelled[0]!r}, which would open or end something. "
            "Take it out of the tool's name, description and parameters."
        )
        raise ChatTemplateError(msg)


def applied(
    tokenizer: Any,
    messages: Sequence[Message],
    given: Mapping[str, Any],
    *,
    begun: bool = False,
    finished: bool = False,
    name: str = "",
    tools: Sequence[Message] = (),
) -> str:
    """What the template makes of messages as they are: up to where the next answer begins, unless it is `finished`.

    Raises:
        ChatTemplateError: The template refuses the messages, or something in it fails.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            copy.deepcopy(list(messages)),
            tokenize=False,
            add_generation_prompt=not begun and not finished,
            continue_final_message=begun,
            **({"tools": copy.deepcopy(list(tools))} if tools else {}),
            **given,
        )
    except Exception as error:  # a template may raise anything at all
        roles = ", ".join(str(m.get("role")) for m in messages) or "none"
        msg = (
            f"the chat template of {name!r} refused the messages ({roles}): {type(error).__name__}: {error}. Give it "
            "the roles, order and content that it was written for, or set another tokenizer.chat_template."
        )
        raise ChatTemplateError(msg) from error
    return text


def _begins_answer(messages: Sequence[Message]) -> bool:
    """Whether the last message is an answer to go on from."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or last.get("tool_calls"):
        return False
    return any(text.strip() for part in [last.get("content")] for text in _texts(part))


def _texts(content: Any) -> list[str]:
    return [content] if isinstance(content, str) else [p.get("text", "") for p in content or [] if isinstance(p, dict)]


def with_content(message: Message, form: Literal["text", "parts", "both"]) -> Message:
    """The message with its content as the template takes it: a text or a list of parts."""
    content = message.get("content")
    if isinstance(content, list) and form == "text":
        return {**message, "content": "".join(_texts(content))}
    if isinstance(content, str) and form == "parts":
        return {**message, "content": [{"type": "text", "text": content}] if content else []}
    return message


def changed(message: Message, change: Change) -> Message:
    """The message with its foreign texts changed; what names a part's kind or a call is left alone."""
    found = dict(message)
    for key in _FOREIGN:
        if key not in message:
            continue
        if key == "tool_calls":
            found[key] = [_changed_call(call, change) for call in message[key]]
        elif key == "content" and isinstance(message[key], list):
            found[key] = [p | {"text": change(p["text"])} if "text" in p else p for p in message[key]]
        else:
            found[key] = map_texts(message[key], change)
    return found


def _changed_call(call: dict[str, Any], change: Change) -> dict[str, Any]:
    function = {key: map_texts(value, change) for key, value in call["function"].items()}
    return call | {"id": map_texts(call.get("id"), change), "function": function}


def facts_of(tokenizer: Any, template: str, given: Mapping[str, Any]) -> Facts:
    """What the template takes and writes, tried out once for these switches."""
    added = added_tokens(tokenizer).values()
    key = template, repr((sorted(given.items()), len(added)))
    kept = _known.setdefault(tokenizer, {})
    if key not in kept:
        content = _content_form(tokenizer, given)
        texts = [*_literals(template), *_trials(tokenizer, given, content)]
        # white space opens and ends nothing, though some tokenizers (Gemma's) have added tokens of it
        kept[key] = Facts(content, frozenset(t for t in added if t.strip() and any(t in text for text in texts)))
    return kept[key]


def _literals(template: str) -> list[str]:
    """The texts that a template's source spells: outside of its tags, and as quoted strings within them."""
    try:
        parsed = _parsed(template)
    except jinja2.TemplateError:
        return []
    texts = [data.data for data in parsed.find_all(jinja2.nodes.TemplateData)]
    return texts + [const.value for const in parsed.find_all(jinja2.nodes.Const) if isinstance(const.value, str)]


def _content_form(tokenizer: Any, given: Mapping[str, Any]) -> Literal["text", "parts", "both"]:
    """Tries a user's message as text and as parts: the template must show the word, and nothing of the mapping."""

    def shows(content: Any) -> bool:
        try:
            text = applied(tokenizer, [{"role": "user", "content": content}], given)
        except ChatTemplateError:
            return False
        return "probe" in text and "'type'" not in text and '"type"' not in text

    text, parts = shows("probe"), shows([{"type": "text", "text": "probe"}])
    return "both" if text and parts else "parts" if parts else "text"


def _trials(tokenizer: Any, given: Mapping[str, Any], form: Literal["text", "parts", "both"]) -> Iterator[str]:
    """Texts that the template makes of some conversations, whichever it takes."""
    call = {"type": "function", "id": "call00000", "function": {"name": "f", "arguments": {"a": "b"}}}
    asked: list[Message] = [{"role": "user", "content": "a"}]
    answered: list[Message] = [*asked, {"role": "assistant", "content": "b"}]
    called: list[Message] = [*asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
    returned: list[Message] = [*called, {"role": "tool", "tool_call_id": "call00000", "name": "f", "content": "c"}]
    system: list[Message] = [{"role": "system", "content": "s"}]
    for messages in (asked, [*system, *asked], [*answered, *asked], [*system, *answered, *asked], called, returned):
        try:
            yield applied(tokenizer, [with_content(m, form) for m in messages], given)
        except ChatTemplateError:
            continue  # no system role, no tools: then it writes nothing for them
