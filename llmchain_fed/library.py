"""Loads recipes by name: `prompts/*.yaml` become LangChain prompts, `chains/*.yaml` become chains.

Knows recipes and chains. Knows nothing about training or federation. The model's code is imported only once a chain
is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmchain_fed.recipes.files import read_spec, recipe_folder, recipe_names
from llmchain_fed.recipes.parsers import make_parser
from llmchain_fed.recipes.prompts import make_prompt
from llmchain_fed.recipes.schema import ChainSpec, PromptSpec

if TYPE_CHECKING:
    from langchain_core.language_models import BaseLanguageModel
    from langchain_core.prompts import StringPromptTemplate

    from llmchain_fed.chain.llm_chain import LLMChain


def load_prompt(name: str) -> StringPromptTemplate:
    r"""The prompt recipe `name` as a LangChain prompt: few-shot where the recipe has examples.

    Raises:
        RecipeError: No recipe of that name, or one that is not allowed.

    >>> load_prompt("translate").format(text="Page locked")
    'Translate the following text to French: Page locked\n'
    >>> load_prompt("translate").format(text="Page locked", language="German")
    'Translate the following text to German: Page locked\n'
    """
    return make_prompt(read_spec(PromptSpec, name, recipe_folder("prompts")))


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
