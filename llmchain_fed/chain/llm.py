"""LocalLLM: a LocalModel as a LangChain string LLM.

Knows langchain_core's BaseLLM and LocalModel. Knows nothing about prompts' templates or training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from langchain_core.caches import BaseCache
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.globals import get_llm_cache
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.runnables.config import get_config_list
from pydantic import Field
from typing_extensions import override

from llmchain_fed.chain.base_llm import LocalLanguageModel
from llmchain_fed.chain.batching.inputs import listed
from llmchain_fed.chain.recording import asking, is_recording
from llmchain_fed.data.dialogues import Dialogue
from llmchain_fed.data.prompt import Call
from llmchain_fed.errors import DataError
from llmchain_fed.model.control_tokens import Rendered
from llmchain_fed.model.folder.load_options import EMBEDDED, HUB_ID
from llmchain_fed.model.generation.answers import Completion, GenerationOptions

_PLAIN_TEXT = 64  # tokens of an answer that nothing else may end
_OF_THE_RUN = frozenset({"tags", "metadata", "run_name", "run_id"})  # LangChain's keywords, not the model's


class LocalLLM(LocalLanguageModel, BaseLLM):
    """A local Hugging Face model, causal or seq2seq, behind LangChain's LLM interface.

    `batch` is one real batch, `stop` means the same in invoke, batch and stream, the prompt is never echoed, and every
    call-time keyword reaches the model or raises `ConfigError`.

    Plain text is answered until the model ends it. The embedded model, which was taught to end its turns in a chat,
    seldom ends plain text before it is trained on some: `from_pretrained` gives it `max_new_tokens=64` unless told
    otherwise. `LocalChatModel` renders its chat template, and so has its ends.

    Args:
        model: The `LocalModel`.
        **options: Defaults for every call: `max_new_tokens`, `temperature`, `stop` … (see `GenerationOptions`).
    """

    cache: BaseCache | bool | None = Field(default=False, exclude=True)
    """off, also under a global cache; True opts in, with the weights' version in the key"""
    control_tokens: Literal["text", "template"] = "text"
    """what becomes of control tokens that a chain's variables spell: "text" encodes them as the text they are, so that
    no value can end or open anything; "template" takes them for the template's own"""
    path_fields: ClassVar[frozenset[str]] = frozenset({"control_tokens"})
    own_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        name: {"max_new_tokens": _PLAIN_TEXT} for name in (EMBEDDED, HUB_ID)
    }

    @property
    def adds_special_tokens(self) -> bool:
        """True: the text is bare."""
        return True

    @override
    def path_identity(self) -> list[Any]:
        return [*super().path_identity(), self.control_tokens]

    @override
    def text_of(self, value: Any, call: Mapping[str, Any]) -> str:
        """The text itself; a caller who hands over text is its author."""
        try:
            return str(self._convert_input(value).to_string())
        except ValueError as error:
            msg = f"cannot read {value!r:.80} as an input of LocalLLM: {error}. Pass text."
            raise DataError(msg) from None

    @override
    def dialogue_calls(self, dialogue: Dialogue, call: Mapping[str, Any]) -> Sequence[Call]:
        """Refuses: it takes text."""
        msg = (
            "LocalLLM takes text, and a row of messages is a conversation. Use LocalChatModel(model=llm.model), or "
            "pass (prompt, completion)."
        )
        raise DataError(msg)

    @property
    def _llm_type(self) -> str:
        return "llmchain_fed-local"

    @override
    def generate(
        self, prompts: list[str], stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        face, rest = self._keyed_by_options(prompts, kwargs)
        return super(LocalLLM, face).generate(prompts, stop, callbacks, **rest)

    @override
    async def agenerate(
        self, prompts: list[str], stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        face, rest = self._keyed_by_options(prompts, kwargs)
        return await super(LocalLLM, face).agenerate(prompts, stop, callbacks, **rest)

    def _keyed_by_options(self, prompts: list[str], kwargs: dict[str, Any]) -> tuple[LocalLLM, dict[str, Any]]:
        """With a cache, call-time options become fields, because BaseLLM's cache key contains only those.

        Upstream: https://github.com/langchain-ai/langchain/issues/39598
        """
        # a key has a prompt's text, not whose it is
        if is_recording() or any(isinstance(prompt, Rendered) for prompt in prompts):
            return self.model_copy(update={"cache": False}), kwargs
        cached = self.cache if self.cache is not None else get_llm_cache()
        given = {k: v for k, v in kwargs.items() if k not in _OF_THE_RUN}
        if not cached or not given:
            return self, kwargs
        options = self.options(None, given)
        del options["stop"]  # has a place in the key of its own
        GenerationOptions(**options)  # an answer in the cache does not excuse a bad value
        return self.model_copy(update=options), {k: v for k, v in kwargs.items() if k in _OF_THE_RUN}

    @override
    def batch(
        self, inputs: list[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """One real batch; with `return_exceptions` one bad prompt does not cost the others their answers."""
        inputs = listed(inputs, "batch")
        answers = super().batch(inputs, config, return_exceptions=return_exceptions, **kwargs)
        if len(inputs) < 2 or not any(isinstance(answer, Exception) for answer in answers):
            return answers
        configs = get_config_list(config, len(inputs))  # BaseLLM gives everyone the same exception: ask one by one
        one = super().batch
        return [one([x], c, return_exceptions=True, **kwargs)[0] for x, c in zip(inputs, configs, strict=True)]

    @override
    async def abatch(
        self, inputs: list[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """The async twin of `batch`."""
        inputs = listed(inputs, "abatch")
        answers = await super().abatch(inputs, config, return_exceptions=return_exceptions, **kwargs)
        if len(inputs) < 2 or not any(isinstance(answer, Exception) for answer in answers):
            return answers
        configs = get_config_list(config, len(inputs))
        one = super().abatch
        return [(await one([x], c, return_exceptions=True, **kwargs))[0] for x, c in zip(inputs, configs, strict=True)]

    @override
    def _generate_helper(
        self, prompts: list[str], stop: list[str] | None, run_managers: list[Any], **kwargs: Any
    ) -> LLMResult:
        with asking(run_managers):  # `_generate` is told of the first run alone
            return super()._generate_helper(prompts, stop, run_managers, **kwargs)

    @override
    async def _agenerate_helper(
        self, prompts: list[str], stop: list[str] | None, run_managers: list[Any], **kwargs: Any
    ) -> LLMResult:
        with asking(run_managers):
            return await super()._agenerate_helper(prompts, stop, run_managers, **kwargs)

    @override
    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return self._result(self.complete(prompts, self.options(stop, kwargs)))

    @override
    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> LLMResult:
        return self._result(await self.acomplete(prompts, self.options(stop, kwargs)))

    def _result(self, done: list[Completion]) -> LLMResult:
        usage = {
            "prompt_tokens": sum(c.prompt_tokens for c in done),
            "completion_tokens": sum(c.completion_tokens for c in done),
        }
        return LLMResult(
            generations=[[Generation(text=c.text, generation_info={"finish_reason": c.finish_reason})] for c in done],
            llm_output={
                "token_usage": usage | {"total_tokens": sum(usage.values())},
                "model_name": self.model.name,
            },
        )

    @override
    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with asking([run_manager]):
            pieces = self.pieces(prompt, self.options(stop, kwargs))
        for piece in pieces:
            chunk = GenerationChunk(text=piece)
            if run_manager is not None:
                run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk
