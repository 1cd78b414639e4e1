"""Savable: a chain's `save` and `load`, as data and weights.

Knows what a chain is made of. Knows nothing about how it renders, answers or learns; files are the other modules'.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from langchain_core.output_parsers import BaseOutputParser

from llmchain_fed.chain.bindings import bound_kwargs
from llmchain_fed.chain.chat import LocalChatModel
from llmchain_fed.chain.llm import LocalLLM
from llmchain_fed.chain.saving import directory as saving
from llmchain_fed.chain.saving import model as saved_model
from llmchain_fed.chain.saving.options import check_saved, saved_fields
from llmchain_fed.errors import ChainFileError, RecipeError
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.recipes.parsers import make_parser, parser_to_data
from llmchain_fed.recipes.prompts import prompt_from_data, prompt_to_data
from llmchain_fed.recipes.schema import ParserData


class Savable:
    """The part of an `LLMChain` that is written down."""

    if TYPE_CHECKING:
        prompt: Any
        llm: Any
        llm_kwargs: dict[str, Any]
        output_parser: Any
        face: Any
        model: Any

    def save(self, directory: str | Path) -> None:
        """Writes the chain with its weights as they are now: `chain.yaml` and safetensors, no pickle, no class paths.

        A LoRA chain over a model that others can load by name is saved as recipe, tokenizer and PEFT adapter folder,
        with what differs from the base that the name loads; otherwise the base's weights come along. The directory is
        replaced whole or not at all.

        Raises:
            ChainFileError: The directory contains something else or cannot be written, or the model cannot be stored;
                `check_savable` finds the latter before any training.
            RecipeError: The prompt or the parser cannot be written as data.
        """
        saving.write(Path(directory), self.model, **self._as_data())

    def check_savable(self) -> None:
        """Makes sure that `save` could write this chain and `load` would give the same one; writes no weights.

        Raises:
            ChainFileError: The model, or the options and keywords, cannot be stored.
            RecipeError: The prompt or the parser cannot be written as data.
        """
        saved_model.check(self.model)
        saving.check(**self._as_data())

    def encoding_identity(self) -> str | None:
        """All of the chain but its model, as text, by which ids of its examples may be kept; None of what is code."""
        if f"{type(self).__module__}.{type(self).__qualname__}" != "llmchain_fed.chain.llm_chain.LLMChain":
            return None  # somebody's own may render otherwise
        if type(self.face) not in (LocalLLM, LocalChatModel):
            return None
        try:
            data = self._as_data()
            saving.check(**data)
        except (ChainFileError, RecipeError):
            return None
        return repr([data, self.face.path_identity()])

    def _as_data(self) -> dict[str, Any]:
        """All of the chain but its model, as `chain.yaml` contains it."""
        face = self.face
        return {
            "face": "chat" if isinstance(face, LocalChatModel) else "llm",
            "options": {n: getattr(face, n) for n in sorted(saved_fields(type(face)) & face.model_fields_set)},
            # what LangChain's tracers are told of a schema may be a class, and decides nothing
            "llm_kwargs": {k: v for k, v in self._all_llm_kwargs().items() if k != "ls_structured_output_format"},
            "prompt": prompt_to_data(self.prompt),
            "parser": parser_to_data(cast(BaseOutputParser[Any], self.output_parser)),
        }

    def _all_llm_kwargs(self) -> dict[str, Any]:
        """Also those bound to the model before it came into the chain."""
        return {**bound_kwargs(self.llm), **self.llm_kwargs}

    @classmethod
    def load(cls, directory: str | Path, *, model: LocalModel | None = None) -> Self:
        """Reads back what `save` wrote; the answers are the same.

        Args:
            directory: What `save` wrote. Every file is checked against its SHA-256 first.
            model: The base to use instead of the one on record; needed for a quantised one. It must be what the chain
                was saved over, down to tokenizer and generation_config; without a tokenizer it gets the saved one.

        Raises:
            ChainFileError: Incomplete, altered, of another base, or not a saved chain.
        """
        path = Path(directory)
        file = saving.read(path)
        kind = LocalChatModel if file.face == "chat" else LocalLLM
        # everything that can be wrong with the data is found before the weights are read
        with saving.refusing():
            prompt, parser = prompt_from_data(file.prompt), make_parser(cast(ParserData, file.parser))
            check_saved(kind, file.options, file.llm_kwargs)
        loaded = saved_model.load(path, file.model, model)
        with saving.refusing():
            face = kind(model=loaded, **file.options)
        make: Any = cls  # the chain, whose parts these are
        return cast(Self, make(llm=face, prompt=prompt, output_parser=parser, llm_kwargs=file.llm_kwargs))
