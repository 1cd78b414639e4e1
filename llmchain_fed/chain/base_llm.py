"""What the string face and the chat face of a LocalModel share: fields, call-time options, identity.

Knows pydantic and LocalModel. Of LangChain it knows bindings alone: `llm` and `chat` add the rest.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmchain_fed._config import explain, unknown_option
from llmchain_fed.chain.bare import Bare, BoundFace
from llmchain_fed.chain.batching import gathering
from llmchain_fed.chain.labels import Classifies
from llmchain_fed.chain.recording import recorded
from llmchain_fed.chain.sources import Previews
from llmchain_fed.data.dialogues import Dialogue
from llmchain_fed.data.prompt import Call, plain_text
from llmchain_fed.errors import ConfigError, UnsupportedModelError
from llmchain_fed.model import chat_template, control_tokens
from llmchain_fed.model.folder.load_options import Dtype, unknown_of_face
from llmchain_fed.model.generation.answers import Completion, GenerationOptions
from llmchain_fed.model.local_model import LocalModel

OPTIONS = frozenset(GenerationOptions.model_fields)
"""Generation options that a face takes as a field and every call takes as a keyword."""

# LangChain's and OpenAI's names → transformers'
ALIASES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}


class LocalLanguageModel(Classifies, Previews, BaseModel):
    """The fields of `LocalLLM` and `LocalChatModel`. Constructors are cheap; only `from_pretrained` reads weights."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    path_fields: ClassVar[frozenset[str]] = frozenset()
    """fields of a kind of face alone, which decide how its input becomes text"""
    rendering_options: ClassVar[frozenset[str]] = frozenset()
    """call-time keywords that decide the prompt's text, not how the model answers it"""
    form_options: ClassVar[frozenset[str]] = frozenset()
    """call-time keywords that decide what is made of an answer, or of how many"""
    answer_options: ClassVar[frozenset[str]] = frozenset()
    """call-time keywords that decide what an answer may be: a schema, tools"""

    own_defaults: ClassVar[dict[str, dict[str, Any]]] = {}
    """name of a model → options that `from_pretrained` gives a face over it unless told otherwise"""

    model: LocalModel = Field(exclude=True, repr=False)
    """what answers; shared, never copied"""
    max_new_tokens: int = 256
    min_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int | None = None
    stop: list[str] | None = None
    """strings before which every answer ends, unless a call gives its own"""
    batch_size: int = Field(default=32, ge=1, le=2**16)
    """prompts computed together"""
    gather_ms: float = Field(default=5.0, ge=0, le=10)
    """milliseconds for which an awaited call waits for others of the same time, to be answered with them as one batch;
    0 answers each by itself"""

    def __init__(self, *args: Any, **options: Any) -> None:
        try:
            super().__init__(*args, **options)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self))) from None

    @model_validator(mode="before")
    @classmethod
    def _known_options(cls, values: Any) -> Any:
        return cls.check_options(values) if isinstance(values, Mapping) else values

    @classmethod
    def check_options(cls, values: Mapping[str, Any], *, loads: bool = False) -> dict[str, Any]:
        """Constructor options under their own names; with `loads`, what stands beside those of loading a model.

        Raises:
            ConfigError: An unknown option, or a generation option out of range.
        """
        values = {ALIASES.get(k, k): v for k, v in values.items()}
        known = set(cls.model_fields) | {f.alias for f in cls.model_fields.values() if f.alias}
        for name in values.keys() - known - cls._tolerated():
            raise unknown_of_face(cls.__name__, name, known, loads=loads)
        GenerationOptions(**{k: v for k, v in values.items() if k in OPTIONS})  # a bad value fails here, not at a call
        return values

    @classmethod
    def _tolerated(cls) -> frozenset[str]:
        """Names that are accepted and mean nothing here."""
        return frozenset()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        lora: LoraConfig | None = None,
        dtype: Dtype = None,
        device: str | torch.device | None = None,
        quantization_config: Any = None,
        revision: str | None = None,
        **options: Any,
    ) -> Self:
        """The short way: `LocalModel.from_pretrained`, which says what each of these is, and this face over it.

        Raises:
            ConfigError: An unknown option; other errors: see there.
        """
        options = cls.own_defaults.get(str(name_or_path), {}) | cls.check_options(options, loads=True)  # before loading
        how: dict[str, Any] = {"dtype": dtype, "device": device, "revision": revision}
        how |= {"lora": lora, "quantization_config": quantization_config}
        return cls(model=LocalModel.from_pretrained(name_or_path, **how), **options)

    def options(self, stop: Sequence[str] | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords for `LocalModel.complete` and `stream`: what was chosen here under a call's own.

        An option that nobody has chosen is left out: its default is the model's to know, and to say what it overrides.

        Raises:
            ConfigError: A keyword that is no generation option.
        """
        given = {ALIASES.get(k, k): v for k, v in overrides.items() if v is not None}
        for name in given.keys() - OPTIONS:
            apart = self.rendering_options | self.answer_options | self.form_options
            raise ConfigError(unknown_option(name, {*OPTIONS, "stop", *apart}))
        own = {name: getattr(self, name) for name in OPTIONS & self.model_fields_set}
        return own | given | {"stop": self.stop if stop is None else stop}

    def all_options(self, stop: Sequence[str] | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """`options` with a value for every one: also for those that nobody chose.

        Raises:
            ConfigError: A keyword that is no generation option.
        """
        return {name: getattr(self, name) for name in OPTIONS} | self.options(stop, overrides)

    def complete(self, texts: Sequence[str], options: Mapping[str, Any]) -> list[Completion]:
        """The answers to texts, as one batch: the one door from a face to its model.

        Args:
            texts: What the model sees.
            options: As `options` gives them.
        """
        found = [recorded(self, text, options, i) for i, text in enumerate(texts)]
        open_ = [i for i, done in enumerate(found) if done is None]
        if open_:
            done = self.model.complete(
                [texts[i] for i in open_],
                batch_size=self.batch_size,
                add_special_tokens=self.adds_special_tokens,
                **options,
            )
            for i, answer in zip(open_, done, strict=True):
                found[i] = answer
        return found  # type: ignore[return-value] # every None has been filled

    def pieces(self, text: str, options: Mapping[str, Any]) -> Generator[str, None, Completion]:
        """The answer to a text piece by piece; the generator returns the whole. The other door."""
        done = recorded(self, text, options)
        if done is None:
            return self.model.stream(text, add_special_tokens=self.adds_special_tokens, **options)
        return _at_once(done)

    async def acomplete(self, texts: Sequence[str], options: Mapping[str, Any]) -> list[Completion]:
        """`complete` for a coroutine, beside which the loop goes on; calls of the same time share a batch."""
        return await gathering.answers(self, texts, options)

    def written(self, completion: Any, call: Mapping[str, Any] | None = None) -> str:
        """A completion → the text that the model is to write for it, in a call with these keywords.

        Raises:
            DataError: It is nothing that this face could answer.
        """
        _ = call
        return plain_text(completion)

    @abstractmethod
    def dialogue_calls(self, dialogue: Dialogue, call: Mapping[str, Any]) -> Sequence[Call]:
        """What the model reads before each answer of a conversation, and that answer, in calls with these keywords.

        Raises:
            DataError: The face takes no messages, or its template refuses these.
        """

    def bind(self, **kwargs: Any) -> Any:
        """The same model with these keywords for every call; all that is asked of it has them, too."""
        return BoundFace(bound=self, kwargs=kwargs, config={})  # type: ignore[arg-type] # LangChain's half is a Runnable

    def as_prompt(self) -> Bare:
        """What makes text of this object's own input: with it, training sees what a call sends."""
        return Bare(self, {})

    @abstractmethod
    def text_of(self, value: Any, call: Mapping[str, Any]) -> str:
        """An input of this object's `invoke` → the text that the model sees.

        Raises:
            DataError: No input that `invoke` takes.
        """

    @property
    @abstractmethod
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer adds its special tokens to that text."""

    def all_controls(self) -> tuple[frozenset[str], frozenset[str]]:
        """Control tokens of any text, the model's and this face's, and all added tokens."""
        added = control_tokens.added_tokens(self.model.tokenizer).values()
        return self.model.control_tokens() | self.own_controls, frozenset(t for t in added if t.strip())

    @property
    def own_controls(self) -> frozenset[str]:
        """Control tokens beside the model's own: the added tokens that the tokenizer's chat template writes."""
        tokenizer = self.model.tokenizer
        if not isinstance(getattr(tokenizer, "chat_template", None), (str, dict)):
            return frozenset()
        try:
            template = chat_template.template_of(tokenizer, self.model.name)
        except UnsupportedModelError:  # several and no default: none of them is used
            return frozenset()
        return chat_template.facts_of(tokenizer, template, self.switches).written

    @property
    def switches(self) -> Mapping[str, Any]:
        """The chat template's switches that go along with every call."""
        return {}

    def path_identity(self) -> list[Any]:
        """What decides, beside the model and its tokenizer, which tokens an input becomes."""
        return [type(self).__name__]

    @property
    def model_name(self) -> str:
        """The model's name, where LangChain's own code looks for it."""
        return self.model.name

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """What decides an answer: base, weights as they are now, and options. The key of any answer cache."""
        return {
            "model_name": self.model.name,
            "base": self.model.fingerprint(),
            "adapter": self.model.adapter,
            "weights_version": self.model.weights_version,
            "batch_size": self.batch_size,
            "stop": self.stop,
            "path": self.path_identity(),
        } | {name: getattr(self, name) for name in sorted(OPTIONS)}

    def get_token_ids(self, text: str) -> list[int]:
        """The ids of a text by itself; LangChain counts tokens with it."""
        return self.model.encode([text], add_special_tokens=False)[0]

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        """LangSmith's standard parameters."""
        params: dict[str, Any] = super()._get_ls_params(stop=stop, **kwargs)  # type: ignore[misc] # the face's other half
        given = self.options(None, {k: v for k, v in kwargs.items() if k in OPTIONS | ALIASES.keys()})
        name = kwargs.get("model")
        return params | {
            "ls_provider": "llmchain_fed",
            "ls_model_name": name if isinstance(name, str) else self.model.name,
            "ls_temperature": given.get("temperature", self.temperature),
            "ls_max_tokens": given.get("max_new_tokens", self.max_new_tokens),
        }


def _at_once(done: Completion) -> Generator[str, None, Completion]:
    yield done.text
    return done
