"""Loads recipes by name: `prompts/*.yaml` become LangChain prompts, `chains/*.yaml` become chains.

Knows where recipes lie and how their files are read: YAML as plain data, then a spec. Knows nothing about training or
federation. LangChain is imported only once a prompt is asked for, and the model's code once a chain is.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from llmchain_fed.errors import RecipeError
from llmchain_fed.recipes.schema import NAME, ChainSpec, PromptSpec
from llmchain_fed.untrusted import printable, read_yaml

if TYPE_CHECKING:
    from langchain_core.language_models import BaseLanguageModel
    from langchain_core.prompts import StringPromptTemplate

    from llmchain_fed.chain.llm_chain import LLMChain

_SpecT = TypeVar("_SpecT", PromptSpec, ChainSpec)


def load_prompt(name: str) -> StringPromptTemplate:
    r"""The prompt recipe `name` as a LangChain prompt: few-shot where the recipe has examples.

    Raises:
        RecipeError: No recipe of that name, or one that is not allowed.

    >>> load_prompt("translate").format(text="Page locked")
    'Translate the following text to French: Page locked\n'
    >>> load_prompt("translate").format(text="Page locked", language="German")
    'Translate the following text to German: Page locked\n'
    """
    spec = read_spec(PromptSpec, name, recipe_folder("prompts"))
    from llmchain_fed.recipes.prompts import make_prompt

    return make_prompt(spec)


def load_chain(name: str, *, llm: BaseLanguageModel[Any] | None = None) -> LLMChain:
    """The chain recipe `name`, ready to invoke.

    Args:
        name: One of `list_chains()`.
        llm: The model to use as it is, whatever adapter it has. None loads the recipe's model and puts the
            recipe's LoRA adapter on it. Either way the recipe's generation defaults and stop strings go along
            with every call, so a model from elsewhere must understand them.

    Raises:
        RecipeError: No recipe of that name, or one that is not allowed.
    """
    spec = read_spec(ChainSpec, name, recipe_folder("chains"))
    prompt = load_prompt(spec.prompt)

    from llmchain_fed.chain.llm_chain import LLMChain
    from llmchain_fed.recipes.parsers import make_parser

    if llm is None:
        from llmchain_fed.chain.chat import LocalChatModel
        from llmchain_fed.chain.llm import LocalLLM

        face = LocalChatModel if spec.chat_template_kwargs else LocalLLM
        llm = face.from_pretrained(spec.model, lora=spec.adapter.to_lora() if spec.adapter else None)
    return LLMChain(llm=llm, prompt=prompt, output_parser=make_parser(spec.parser), llm_kwargs=spec.llm_kwargs())


def list_prompts() -> list[str]:
    """Names of the prompt recipes, sorted.

    >>> "translate" in list_prompts()
    True
    """
    return recipe_names(recipe_folder("prompts"))


def list_chains() -> list[str]:
    """Names of the chain recipes, sorted.

    >>> "translate" in list_chains()
    True
    """
    return recipe_names(recipe_folder("chains"))


def recipe_folder(kind: Literal["prompts", "chains"]) -> Traversable:
    """Where the recipes are: within an installed package, or beside it in a checkout."""
    packaged = files("llmchain_fed") / "_library" / kind
    if packaged.is_dir():
        return packaged
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file() and (checkout / kind).is_dir():
        return checkout / kind
    here = Path(__file__).parent
    msg = f"no {kind} lie in or beside {here}, so the installation is incomplete. Reinstall llmchain-fed."
    raise RecipeError(msg)


def recipe_names(folder: Traversable) -> list[str]:
    """Names of the recipes in a folder, sorted."""
    stems = (entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return sorted(stem for stem in stems if NAME.fullmatch(stem))


def read_spec(kind: type[_SpecT], name: str, folder: Traversable) -> _SpecT:
    """The spec in `folder/name.yaml`, or a `RecipeError` that names the file and the remedy."""
    noun = "prompt" if kind is PromptSpec else "chain"
    if not isinstance(name, str) or not NAME.fullmatch(name):
        msg = f"{name!r} cannot be the name of a {noun}, so no file was looked for. Use only a-z, 0-9 and _."
        raise RecipeError(msg)
    known = recipe_names(folder)
    if name not in known:
        msg = f"there is no {noun} called {name!r}. Use one of: {', '.join(known)}."
        raise RecipeError(msg)
    try:
        with as_file(folder / f"{name}.yaml") as path:
            spec = kind.from_data(read_yaml(path, what="the file", error=RecipeError, remedy=""))
        if spec.name != name:
            msg = f"`name` is {spec.name!r}, but the file is called {name!r}; make the two equal"
            raise RecipeError(msg)
    except RecipeError as error:
        why = printable(str(error), 2000).rstrip(".")
        msg = f"{noun} recipe {name}.yaml is refused, nothing was loaded: {why}. Correct the file."
        raise RecipeError(msg) from None
    return spec
