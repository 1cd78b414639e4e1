"""What a recipe may say: `PromptSpec` for a file of `prompts/`, `ChainSpec` for one of `chains/`.

Knows pydantic and f-strings. Knows nothing about files, LangChain or models. A recipe is data and nothing
more: no class paths, no jinja2, and no value whose type had to be guessed.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from string import Formatter
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, JsonValue, ValidationError, model_validator

from llmchain_fed._config import unknown_option
from llmchain_fed.errors import RecipeError
from llmchain_fed.untrusted import Strict, shown

if TYPE_CHECKING:
    from peft import LoraConfig

ParserName = Literal["text", "strip", "json", "comma_list"]


class LabelsData(Strict):
    """The parser of a closed set of answers."""

    labels: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(min_length=2, max_length=1000, fail_fast=True)
    ]


ParserData = ParserName | LabelsData
"""text: as generated; strip: without outer whitespace; json: the parsed value; comma_list: list of str"""

NAME = re.compile(r"[a-z0-9_]+")
_VARIABLE = re.compile(r"[a-z][a-z0-9_]*")
_LANGCHAINS = re.compile(r"[^.\[\]{}]+")
_FORMAT = re.compile(r"([^{}]?[<>=^])?[-+ ]?z?#?0?[0-9]{0,3}[,_]?(\.[0-9]{1,2})?[a-zA-Z%]?")
"""of a value within a text: at most 999 characters wide, of 99 digits"""
_RESERVED = frozenset({"stop", "prompt", "completion"})  # LangChain's own word; the keys of an example
_HUB_PART = r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*"
HUB_ID = f"^{_HUB_PART}(/{_HUB_PART})?$"
"""an embedded name or a hub id, never a path"""

Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$", max_length=200)]
Text = Annotated[str, Field(min_length=1)]
_MOST = 100_000  # parts of a prompt; a file has no room for more
_MOST_FORMATTED = 2**24  # characters of a prompt with its examples and defaults in it
_Texts = Annotated[dict[str, str], Field(max_length=_MOST)]
_Item = TypeVar("_Item")
# YAML has lists where a frozen spec has tuples
Several = Annotated[
    tuple[_Item, ...],
    Field(max_length=_MOST, fail_fast=True),
    BeforeValidator(lambda x: tuple(x) if type(x) is list else x),
]


class _Spec(Strict):
    @classmethod
    def from_data(cls, data: object) -> Self:
        """The spec in plain data, as `untrusted.parse_yaml` returns it.

        Raises:
            RecipeError: Anything that is unknown, missing, of another type or in contradiction.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            wrong = error.errors()
            more = [f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []
            raise RecipeError("; ".join([*(_sentence(item, cls) for item in wrong[:10]), *more])) from None


class PromptSpec(_Spec):
    """A prompt: an f-string template, what the user must give, and what stands in by default.

    >>> spec = PromptSpec(name="greet", description="Says hello.", template="Greet {who}.",
    ...                   input_variables=["who"], licence="Apache-2.0")
    >>> spec.input_variables
    ('who',)
    """

    name: Name
    description: Text
    template: Text
    """f-string with `{variable}` or `{variable:.2f}` fields; the part after the examples, if there are any"""
    input_variables: Annotated[Several[str], Field(min_length=1)]
    """what the user must give"""
    defaults: _Texts = Field(default_factory=dict)
    """variable → its text unless the user gives another (LangChain's partial variables)"""
    prefix: str = ""
    """f-string before the examples"""
    examples: Several[_Texts] = ()
    """few-shot examples; the values are text as it is, braces included"""
    example_template: str = ""
    """f-string over the keys of one example"""
    separator: str = "\n\n"
    """text between prefix, examples and template, as it is"""
    licence: Annotated[str, Field(pattern=r"^[A-Za-z0-9.+-]+$")]
    """SPDX identifier"""

    @model_validator(mode="after")
    def _variables_agree(self) -> Self:
        used = template_variables(self.prefix) | template_variables(self.template)
        given, fallback = set(self.input_variables), set(self.defaults)
        if len(given) < len(self.input_variables) or given & fallback:
            msg = "`input_variables` repeats a variable or shares one with `defaults`; name each once"
            raise ValueError(msg)
        if used != given | fallback:
            hint = "; {{x}} is literal text, {x} a variable" if "{{" in self.template else ""
            msg = (
                f"the template uses {sorted(used)}, but `input_variables` and `defaults` declare "
                f"{sorted(given | fallback)}; make the two equal{hint}"
            )
            raise ValueError(msg)
        if taken := sorted(used & _RESERVED):
            msg = f"a variable cannot be called {taken[0]!r}, a word chains and examples need; rename it"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _examples_agree(self) -> Self:
        idle = sorted({"prefix", "example_template", "separator"} & self.model_fields_set)
        if idle and not self.examples:
            msg = f"{idle} would do nothing without `examples`; add examples or leave them out"
            raise ValueError(msg)
        wanted = template_variables(self.example_template)
        if any(spec or conversion for _, _, spec, conversion in Formatter().parse(self.example_template)):
            msg = "`example_template` formats the values of `examples`; write them there as they are to be read"
            raise ValueError(msg)
        for number, example in enumerate(self.examples):
            if set(example) != wanted:
                msg = f"`examples.{number}` has {sorted(example)}; `example_template` uses {sorted(wanted)}"
                raise ValueError(msg)
        return self


def _modules(data: object) -> object:
    if data == "all-linear":
        return data
    if type(data) is list and data and all(isinstance(name, str) and name for name in data):
        return tuple(data)
    msg = f"`adapter.target_modules` is {_short(data)}; use all-linear or a list of layer names"
    raise ValueError(msg)


class AdapterSpec(_Spec):
    """The LoRA adapter of a chain; the fields are those of `peft.LoraConfig`."""

    r: Annotated[int, Field(ge=1, le=65_536)]
    lora_alpha: Annotated[int, Field(ge=1, le=65_536)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[
        str | Annotated[tuple[str, ...], Field(max_length=_MOST, fail_fast=True)], BeforeValidator(_modules)
    ] = "all-linear"
    """names of the layers that get an adapter; a pattern is not allowed"""

    def to_lora(self) -> LoraConfig:
        """The same as a `peft.LoraConfig`."""
        from peft import LoraConfig

        modules = self.target_modules
        return LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=modules if isinstance(modules, str) else list(modules),
        )


class GenerationSpec(_Spec):
    """The generation defaults a recipe may set; what it leaves out, the LLM's own defaults decide."""

    max_new_tokens: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """tokens"""
    temperature: Annotated[float, Field(ge=0)] | None = None
    """0 is greedy"""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    num_beams: Annotated[int, Field(ge=1, le=256)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    seed: int | None = None


class ChainSpec(_Spec):
    r"""A chain: a prompt recipe, the model it was written for, and how to generate and parse.

    >>> ChainSpec(name="greet", description="Says hello.", prompt="greet", stop=["\n"]).llm_kwargs()
    {'stop': ['\n']}
    """

    name: Name
    description: Text
    prompt: Name
    """name of a prompt recipe"""
    model: Annotated[str, Field(pattern=HUB_ID)] = "smollm2-135m-instruct"
    """embedded name or hub id, never a path"""
    adapter: AdapterSpec | None = None
    """null: no adapter, the whole model is trained"""
    generation: GenerationSpec = GenerationSpec()
    stop: Several[Text] = ()
    """the answer ends before the first of these"""
    parser: ParserData = "text"
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict, max_length=1000)
    """switches of the model's chat template; with any, the recipe is one for a chat model"""

    def llm_kwargs(self) -> dict[str, Any]:
        """Generation defaults and stop strings, as keyword arguments of a call to the model."""
        options = self.generation.model_dump(exclude_none=True)
        options |= {"stop": list(self.stop)} if self.stop else {}
        return options | (
            {"chat_template_kwargs": dict(self.chat_template_kwargs)} if self.chat_template_kwargs else {}
        )


class MessageData(Strict):
    """One message of a chat prompt: a role and a template, or a placeholder for messages."""

    role: Literal["system", "human", "ai", "placeholder"]
    template: str
    optional: bool = False


class PromptData(Strict):
    """A prompt template as plain data; which fields count depends on `kind`.

    Templates contain variables, with a short format perhaps: what LangChain also takes, such as a width of a thousand
    million, can take all of a machine's memory or look into objects.
    """

    kind: Literal["template", "few_shot", "chat"]
    template: str = ""
    defaults: _Texts = Field(default_factory=dict)
    prefix: str = ""
    examples: list[_Texts] = Field(default_factory=list, max_length=_MOST, fail_fast=True)
    example_template: str = ""
    separator: str = "\n\n"
    messages: list[MessageData] = Field(default_factory=list, max_length=_MOST, fail_fast=True)

    @model_validator(mode="after")
    def _fields_are_plain(self) -> Self:
        self._check_length()
        if self.kind == "few_shot":
            template_variables(self.example_template, _LANGCHAINS)
            try:
                examples = [self.example_template.format(**example) for example in self.examples]
            except (KeyError, IndexError, AttributeError) as error:
                msg = f"`example_template` uses {error}, which an example does not have"
                raise ValueError(msg) from None
            # LangChain formats the whole again, the examples' values included
            template_variables(self.separator.join([self.prefix, *examples, self.template]), _LANGCHAINS)
        if odd := [m.template for m in self.messages if m.role == "placeholder" and not m.template.isidentifier()]:
            msg = f"{_short(odd[0])} is no name of a placeholder for messages; use letters, digits and _"
            raise ValueError(msg)
        for template in (self.template, *(m.template for m in self.messages if m.role != "placeholder")):
            template_variables(template, _LANGCHAINS)
        return self

    def _check_length(self) -> None:
        """Before anything is formatted: a short file can name a long text many thousand times."""
        parts = [(self.example_template, example) for example in self.examples]
        parts += [(self.template, self.defaults), *((m.template, self.defaults) for m in self.messages)]
        if (length := sum(_length(template, values) for template, values in parts)) > _MOST_FORMATTED:
            msg = f"the prompt has some {length:,} characters once its values stand in it, at most {_MOST_FORMATTED:,}"
            raise ValueError(msg)


def _length(template: str, values: Mapping[str, str]) -> int:
    """Characters of a template with these values in it, each wherever its name occurs."""
    return len(template) + sum(template.count("{" + name) * len(value) for name, value in values.items() if value)


def template_variables(template: str, name: re.Pattern[str] = _VARIABLE) -> set[str]:
    """The variables of an f-string template.

    Raises:
        ValueError: A field that looks into an object or has a long or nested format, or unbalanced braces.

    >>> sorted(template_variables("{a} and {b:.2f}, {{literally}}"))
    ['a', 'b']
    """
    try:
        fields = list(Formatter().parse(template))
    except ValueError as error:
        msg = f"the braces of {_short(template)} do not match ({error}); use {{{{ }}}} for literal ones"
        raise ValueError(msg) from None
    variables = set()
    for _, field, spec, conversion in fields:
        if field is None:
            continue
        if not name.fullmatch(field) or not _FORMAT.fullmatch(spec or "") or conversion not in (None, "a", "r", "s"):
            tail = (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            msg = (
                f"{{{shown(field + tail, 60)}}} is not a plain {{variable}}, nor one with a short format such as "
                "{price:.2f}; attributes, indexes, long or nested formats and other template languages can run code, "
                "take all memory or fail later. Use a-z, 0-9, _, or {{ }} for literal braces"
            )
            raise ValueError(msg)
        variables.add(field)
    return variables


_PARTS: dict[str, type[BaseModel]] = {"adapter": AdapterSpec, "generation": GenerationSpec}
_FORMS = {
    "name": "use only a-z, 0-9 and _",
    "prompt": "use the name of a prompt recipe: only a-z, 0-9 and _",
    "model": "use an embedded name or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct, never a path",
    "licence": "use an SPDX identifier such as Apache-2.0",
}


def _sentence(item: Any, spec: type[BaseModel]) -> str:
    """One pydantic complaint as a sentence that says which key, what it contained and what to write instead."""
    path = [str(part) for part in item["loc"]]
    where, value = ".".join(path) or "the recipe", _short(item["input"])
    match item["type"]:
        case "extra_forbidden" if where == "template_format":
            return "`template_format` is no choice: only f-strings are read, others can run code. Remove it"
        case "extra_forbidden":
            owner = _PARTS.get(path[0], spec) if path[1:] else spec
            return unknown_option(path[-1], owner.model_fields)
        case "missing":
            return f"`{where}` is missing; add it"
        case "string_type" | "invalid_key":
            return f"`{where}` is {value}, not text. YAML guesses the type of what has no quotes: quote it"
        case "string_pattern_mismatch":
            return f"`{where}` is {value}; {_FORMS.get(where, item['msg'])}"
        case "tuple_type":
            return f"`{where}` is {value}; write a list"
        case "model_type" | "dict_type":
            return f"`{where}` is {value}; write keys with values"
        case "value_error":
            return str(item["msg"]).removeprefix("Value error, ")
        case _:
            return f"`{where}` is {value}: {item['msg']}"


def _short(value: object) -> str:
    quoted = repr(value[:200]) if isinstance(value, str) else shown(value, 200)
    return textwrap.shorten(quoted, 80, placeholder=" …")
