"""Structured answers: `with_structured_output` on the chat face, whose answers always parse.

Knows LangChain's parsers and schemas. Knows nothing about how an answer is kept to a schema, or about training.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from operator import itemgetter
from types import UnionType
from typing import Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints

from langchain_core.language_models import LanguageModelInput
from langchain_core.output_parsers import (
    JsonOutputKeyToolsParser,
    JsonOutputParser,
    PydanticOutputParser,
    PydanticToolsParser,
)
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel, TypeAdapter
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema
from typing_extensions import TypedDict, is_typeddict, override

from llmchain_fed.chain.tools import CallsTools
from llmchain_fed.errors import ConfigError, SchemaError
from llmchain_fed.model.generation.json_schema import shape_of

_BOUNDS = ("gt", "ge", "lt", "le", "now_op")
Method = Literal["json_schema", "function_calling", "json_mode"]


class StructuredAnswers(CallsTools):
    """The chat face's part that answers objects; LangChain's class comes behind it."""

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """The same model with answers that are objects of a schema, every one, inside `max_new_tokens`.

        Its tokens are chosen among those that the schema allows; from where only the shortest ending fits, that is
        written. The prompt says nothing of the schema: a model that was not trained on such answers fills it validly
        and senselessly. Completions to train on are the objects themselves.

        Args:
            schema: A Pydantic class (answers are its instances), a TypedDict or a JSON schema (answers are dicts), by
                itself or as OpenAI's `response_format` has it.
            method: `"json_schema"`: the answer is the object's JSON; `"function_calling"`: it is the call of a tool of
                the schema's name, which the model is told of; `"json_mode"`: as the first, or any JSON object without a
                schema.
            include_raw: If true, answers are dicts of `raw` (the message), `parsed` and `parsing_error`.
            strict: As in `bind_tools`, for `"function_calling"`.
            **kwargs: Further keywords for every call.

        Raises:
            ConfigError: No schema, or an unknown method.
            SchemaError: No text can keep to the schema, or something in it is not known here.
        """
        if schema is None and method != "json_mode":
            msg = "with_structured_output takes a Pydantic class, a TypedDict or a JSON schema. Pass one."
            raise ConfigError(msg)
        schema = _out_of_openais_form(schema)
        if is_typeddict(schema) and not _known_to_langchain(schema):
            schema = json_schema_of(schema)
        model = schema if isinstance(schema, type) and is_basemodel_subclass(schema) else None
        parser: Runnable[Any, Any]
        about: dict[str, Any] = {"kwargs": {"method": method}, "schema": schema}
        if method == "function_calling":
            assert schema is not None
            name = convert_to_openai_tool(schema)["function"]["name"]
            llm = self.bind_tools(
                [schema], tool_choice=name, parallel_tool_calls=False, strict=strict,
                ls_structured_output_format=about, **kwargs,
            )  # fmt: skip
            parser = (
                PydanticToolsParser(tools=[model], first_tool_only=True)
                if model is not None
                else JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
            )
        elif method in ("json_schema", "json_mode"):
            wanted = _response_format(schema)
            llm = self.bind(response_format=wanted, ls_structured_output_format=about, **kwargs)
            parser = PydanticOutputParser(pydantic_object=model) if model is not None else JsonOutputParser()
        else:
            msg = f"method is 'json_schema', 'function_calling' or 'json_mode', got {method!r:.80}."
            raise ConfigError(msg)
        if not include_raw:
            return llm | parser
        parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=llm) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def _response_format(schema: Any) -> dict[str, Any]:
    """A schema as `response_format` has it, in OpenAI's form; looked at here, so that what is wrong is said at once."""
    if schema is None:
        return {"type": "json_object"}
    found = json_schema_of(schema)
    shape_of(found)
    name = str(found.get("title") or getattr(schema, "__name__", "answer"))
    return {"type": "json_schema", "json_schema": {"name": name, "schema": found}}


def _out_of_openais_form(schema: Any) -> Any:
    """The JSON schema within `{"type": "json_schema", "json_schema": …}`; what is none of that as it is.

    Raises:
        ConfigError: It has that type, and no schema.
    """
    if not isinstance(schema, Mapping) or schema.get("type") != "json_schema":
        return schema
    inner = schema.get("json_schema")
    if not isinstance(inner, Mapping) or not isinstance(inner.get("schema"), Mapping):
        msg = f"a schema of the type 'json_schema' has 'json_schema': {{'name': …, 'schema': …}}, got {schema!r:.120}."
        raise ConfigError(msg)
    return {"title": str(inner.get("name") or "answer"), **inner["schema"]}


def _known_to_langchain(schema: Any) -> bool:
    """Whether LangChain's own reader, which traces and tools go through, takes it: it fails for `NotRequired`."""
    try:
        convert_to_json_schema(schema)
    except Exception:  # whatever Pydantic or typing raise there
        return False
    return True


class _Writable(GenerateJsonSchema):
    """Schemas of what Pydantic reads, which says more when it reads than in its own ones, and sometimes less.

    What it checks and no schema says is refused; times without an offset are among its times, and repeated items among
    those of a set, of which it drops them.
    """

    @staticmethod
    def _check(schema: Any, what: str, *bounds: str) -> None:
        found = [bound for bound in bounds if schema.get(bound) is not None]
        if found:
            msg = (
                f"a {what} with bounds ({', '.join(found)}) cannot be kept to: no JSON schema says so. Leave them out "
                "and check the answer behind the model."
            )
            raise SchemaError(msg)

    @override
    def date_schema(self, schema: Any) -> dict[str, Any]:
        self._check(schema, "date", *_BOUNDS)
        return super().date_schema(schema)

    @override
    def time_schema(self, schema: Any) -> dict[str, Any]:
        self._check(schema, "time", *_BOUNDS)
        return self._with_local(schema, super().time_schema(schema))

    @override
    def datetime_schema(self, schema: Any) -> dict[str, Any]:
        self._check(schema, "datetime", *_BOUNDS)
        return self._with_local(schema, super().datetime_schema(schema))

    @override
    def timedelta_schema(self, schema: Any) -> dict[str, Any]:
        self._check(schema, "timedelta", *_BOUNDS)
        return super().timedelta_schema(schema)

    def _with_local(self, schema: Any, found: dict[str, Any]) -> dict[str, Any]:
        """With the form without an offset, where the class reads it; its name is that of OpenAPI's registry."""
        constraint = schema.get("tz_constraint")
        if isinstance(constraint, int):
            self._check({"offset": constraint}, "time", "offset")
        if constraint == "aware" or found.get("format") not in ("time", "date-time"):
            return found
        local = {**found, "format": f"{found['format']}-local"}
        return local if constraint == "naive" else {"anyOf": [found, local]}

    @override
    def set_schema(self, schema: Any) -> dict[str, Any]:
        return self._as_list(schema, super().set_schema(schema))

    @override
    def frozenset_schema(self, schema: Any) -> dict[str, Any]:
        return self._as_list(schema, super().frozenset_schema(schema))

    def _as_list(self, schema: Any, found: dict[str, Any]) -> dict[str, Any]:
        if (schema.get("min_length") or 0) <= 1:
            found.pop("uniqueItems", None)
        return found

    @override
    def dict_schema(self, schema: Any) -> dict[str, Any]:
        """The keys are said, too: Pydantic's own schema says those of a pattern alone."""
        found = super().dict_schema(schema)
        keys = self.generate_inner(schema["keys_schema"]) if "keys_schema" in schema else {}
        if "pattern" in keys and "patternProperties" in found:
            found.pop("patternProperties")
            found["additionalProperties"] = self.generate_inner(schema["values_schema"])
        kind = keys.get("type")
        if kind == "integer" and not keys.keys() - {"type", "title"}:
            found["propertyNames"] = {"pattern": "^(?:0|-?[1-9][0-9]{0,17})$"}
        elif kind == "string" or "enum" in keys or "const" in keys:
            bounds = {key: value for key, value in keys.items() if key not in ("title", "type", "default")}
            found |= {"propertyNames": bounds} if bounds else {}
        elif keys and keys.keys() - {"title", "$ref"}:
            self._check({"keys": keys}, "mapping", "keys")
        return found

    @override
    def str_schema(self, schema: Any) -> dict[str, Any]:
        found = super().str_schema(schema)
        stripped = schema.get("strip_whitespace") or self._config.config_dict.get("str_strip_whitespace")
        if stripped and found.get("minLength") == 1 and not found.keys() & {"pattern", "maxLength"}:
            return {**{k: v for k, v in found.items() if k != "minLength"}, "pattern": "[!-~]"}
        if stripped and found.keys() & {"minLength", "pattern"}:
            self._check({"strip_whitespace": True}, "text", "strip_whitespace")
        return found

    @override
    def decimal_schema(self, schema: Any) -> dict[str, Any]:
        """A number: of a decimal as text Pydantic's schema takes any text, and Pydantic does not when it reads it."""
        self._check(schema, "decimal", "max_digits", "decimal_places")
        return next(
            (form for form in super().decimal_schema(schema).get("anyOf", ()) if form.get("type") == "number"),
            {"type": "number"},
        )


def _for_pydantic(kind: Any, within: tuple[Any, ...] = ()) -> Any:
    """The same type as Pydantic takes it below Python 3.12, where a TypedDict of `typing`'s says too little.

    Raises:
        TypeError: A TypedDict that contains itself.
    """
    if sys.version_info >= (3, 12):
        return kind
    if is_typeddict(kind) and type(kind).__module__ == "typing":
        if kind in within:
            msg = f"{kind.__name__} contains itself; that is known for typing_extensions.TypedDict alone"
            raise TypeError(msg)
        fields: dict[str, Any] = {}
        for name, given in get_type_hints(kind, include_extras=True).items():
            # said with the type: `__required_keys__` does not see it where annotations are texts
            said = get_origin(given) if get_origin(given) in (Required, NotRequired) else None
            field = _for_pydantic(get_args(given)[0] if said else given, (*within, kind))
            fields[name] = NotRequired[field] if said is NotRequired else field
            if said is None and name not in kind.__required_keys__:
                fields[name] = NotRequired[field]
        make: Any = TypedDict
        found = make(kind.__name__, fields)
        found.__doc__ = kind.__doc__
        return found
    origin, parts = get_origin(kind), get_args(kind)
    if origin is None or origin is Literal:
        return kind
    made = tuple(_for_pydantic(part, within) for part in parts)
    if made == parts:
        return kind
    if origin is Annotated:
        return Annotated[(made[0], *kind.__metadata__)]
    if origin in (Required, NotRequired):
        return origin[made[0]]
    return Union[made] if origin in (Union, UnionType) else origin[made]  # noqa: UP007 (made of what is found)


def json_schema_of(schema: Any) -> dict[str, Any]:
    """The JSON schema of a Pydantic class, a TypedDict or a tool's schema; a JSON schema as it is.

    Raises:
        SchemaError: It is nothing of that kind, or has no schema.
    """
    try:
        if isinstance(schema, type) and is_basemodel_subclass(schema):
            kind: Any = schema
            if not issubclass(kind, BaseModel):  # of Pydantic 1
                return dict(kind.schema())
            return dict(kind.model_json_schema(schema_generator=_Writable))
        if is_typeddict(schema):
            return TypeAdapter(_for_pydantic(schema)).json_schema(schema_generator=_Writable)
        if isinstance(schema, Mapping) and ("parameters" in schema or "function" in schema):
            return dict(convert_to_json_schema(dict(schema)))
    except SchemaError:
        raise
    except (PydanticUserError, ValueError, TypeError, KeyError, NameError, AttributeError, RecursionError) as error:
        msg = f"{schema!r:.80} has no JSON schema ({type(error).__name__}: {error!s:.200}). Give fields of plain types."
        raise SchemaError(msg) from None
    if not isinstance(schema, Mapping):
        msg = f"a schema is a Pydantic class, a TypedDict or a JSON schema, got {schema!r:.80}."
        raise ConfigError(msg)
    return dict(schema)
