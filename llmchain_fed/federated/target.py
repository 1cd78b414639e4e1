"""Target: what a federation trains, a model and the chain that renders its prompts, and what all sides must share.

Knows chains, models and digests. Knows nothing about participants, rounds or how a digest travels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any, NamedTuple
from weakref import WeakKeyDictionary

from pydantic import Field

from llmchain_fed.chain.bare import Bare
from llmchain_fed.chain.finding import face_in, find_prompt
from llmchain_fed.chain.labels import Classification, classified
from llmchain_fed.chain.llm_chain import LLMChain
from llmchain_fed.chain.tracing.composed import ComposedChain
from llmchain_fed.chain.tracing.pipes import PipedChain
from llmchain_fed.data.examples import DialogueRow, Example, RawText, calls_of, prompt_text
from llmchain_fed.errors import ConfigError, ContractError, UnsupportedModelError
from llmchain_fed.federated.participant import Participant
from llmchain_fed.model.adapters.resolved import resolve
from llmchain_fed.model.generation.answers import GenerationOptions
from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.untrusted import Strict, shown

_MEANING = {
    "base": "base weights",
    "adapter": "adapter",
    "prompt": "prompt",
    "tokenizer": "tokenizer",
    "version": "version",
}

_PROBES = ("Save the page, naïve Café №5!", "  two  spaces\n\ttabs and 1234567890", "日本語 Ελληνικά 😀 don't")
_VOCABULARIES: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()

Digest = Annotated[str, Field(max_length=128)]


class ContractData(Strict):
    """What `Target.contract` gives, as it comes back from elsewhere."""

    base: Digest
    adapter: Digest
    prompt: Digest
    tokenizer: Digest
    version: Digest


class ChainAnswer(NamedTuple):
    """What a chain answered to an example."""

    prompt: str
    text: str
    failed: bool = False
    """whether the chain raised; then the text says what"""


@dataclass(frozen=True)
class Target:
    """What is trained: a LocalModel, and what makes the text of its examples' inputs, as `invoke` would.

    Args:
        prompt: A chain, a composed one, or a face; None for a bare `LocalModel` or module, whose examples contain
            final text.
    """

    model: LocalModel
    prompt: LLMChain | Bare | ComposedChain | None = None

    @classmethod
    def of(cls, given: Any, llm: Any = None) -> Target:
        """Finds the model in a chain, an LLM, any Runnable around one, a LocalModel or a bare module.

        Args:
            given: What is trained.
            llm: Which model of it, where there are several, or where it cannot be found.

        Raises:
            UnsupportedModelError: None of these, or a Runnable with no trainable model or with two.
        """
        if isinstance(given, LocalModel):
            return cls(given)
        prompt = find_prompt(given, llm)
        if prompt is not None:
            return cls(prompt.model, prompt)
        if hasattr(given, "named_parameters"):
            return cls(LocalModel(given))
        found = "no trainable local model was found in it. " if hasattr(given, "invoke") else ""
        msg = (
            f"cannot train {type(given).__name__}: {found}Pass an LLMChain, any Runnable around a LocalLLM or a "
            "LocalChatModel, a LocalModel or a torch module; where the model is built within a function, name it: "
            "FederatedAveraging(chain, llm=model)."
        )
        raise UnsupportedModelError(msg)

    def of_participant(self, participant: Participant) -> Target:
        """What this participant trains: its own composed chain around the same model, where it has one.

        Raises:
            ConfigError: Its chain is around another model.
            ContractError: Its chain's prompts are others.
            UnsupportedModelError: It is nothing that can be trained.
        """
        if participant.chain is None:
            return self
        own = Target.of(participant.chain, face_in(participant.chain, self.model))
        if own.model.module is not self.model.module:
            msg = (
                f"the chain of participant {participant.name!r} is around another model than the federation's. Build "
                "both around one LocalLLM or LocalChatModel: it is what they train together."
            )
            raise ConfigError(msg)
        check_contract(participant.name, site=own.contract(), server=self.contract())
        return own

    def check_savable(self) -> None:
        """Makes sure, before training, that what a chain learns can be saved; pipes and faces have no `save`.

        Raises:
            ChainFileError: No file can store the model, its tokenizer, its adapter or the options.
            RecipeError: No file can store the prompt or the parser.
        """
        if isinstance(self.prompt, LLMChain) and not isinstance(self.prompt, PipedChain):
            self.prompt.check_savable()

    def answer(self, examples: Sequence[Example | RawText], max_new_tokens: int | None = None) -> list[ChainAnswer]:
        """What the chain answers to examples; generated without callbacks, so that they reach no tracer.

        The answers are greedy, and as long as the chain's own, or `max_new_tokens` where that is less; a composed chain
        is run as it is.
        """
        texts = [prompt_text(e, self.prompt) for e in examples]
        if isinstance(self.prompt, ComposedChain):
            return [self._answered(text, e, max_new_tokens) for text, e in zip(texts, examples, strict=True)]
        options: dict[str, Any] = {}
        if self.prompt is not None:
            options = dict(self.prompt.generation_options(), add_special_tokens=self.prompt.adds_special_tokens)
        found = self.model.generate(texts, **_measured(options, max_new_tokens))
        parsed = self.prompt.parsed if self.prompt is not None else str
        return [ChainAnswer(text, parsed(answer)) for text, answer in zip(texts, found, strict=True)]

    def _answered(self, text: str, example: Example | RawText, max_new_tokens: int | None) -> ChainAnswer:
        """The whole chain's answer to an example; what it raises on the way is part of what a reader should see."""
        assert isinstance(self.prompt, ComposedChain)
        if isinstance(example, RawText):
            options = _measured(self.prompt.generation_options(), max_new_tokens)
            special = self.prompt.adds_special_tokens
            return ChainAnswer(text, self.model.generate([example.prompt], add_special_tokens=special, **options)[0])
        try:
            return ChainAnswer(text, self.prompt.answer(example.inputs))
        except Exception as error:  # whatever somebody's function or parser makes of this model's answer
            return ChainAnswer(text, f"({type(error).__name__}: {error!s:.200})", failed=True)

    def classify(self, examples: Sequence[Example | RawText], labels: Sequence[str]) -> list[Classification]:
        """How probable each label is as the answer to an example, where the chain makes several calls to the last one.

        Raises:
            LabelError: The labels are none; see `LLMChain.classify`.
            PromptTooLongError: A prompt with the longest label exceeds the model's context.
        """
        texts = [calls_of(e, self.prompt)[0 if isinstance(e, DialogueRow) else -1].text for e in examples]
        return classified(self.prompt if self.prompt is not None else _Plain(self.model), texts, labels)

    def contract(self) -> dict[str, Any]:
        """What all sides of a federation must share, as digests."""
        layout = {n: (str(p.dtype), tuple(p.shape)) for n, p in sorted(self.model.trainable_parameters().items())}
        own = self.prompt
        prompt = (own.prompt_identity(), own.adds_special_tokens) if own is not None else None
        return {
            "base": self.model.fingerprint(),
            "adapter": _digest((layout, _adapter_settings(self.model))),
            "prompt": _digest(prompt),
            "tokenizer": _digest(_tokenizer_identity(self.model)),
            "version": version("llmchain-fed"),
        }


def _measured(options: dict[str, Any], max_new_tokens: int | None) -> dict[str, Any]:
    """The same options, greedy and with an end; what keeps to a schema is no answer before it ends."""
    if max_new_tokens is not None and "grammar" not in options:
        longest = options.get("max_new_tokens", GenerationOptions().max_new_tokens)
        options = options | {"max_new_tokens": min(longest, max_new_tokens)}
    return options | {"temperature": 0.0}


@dataclass(frozen=True)
class _Plain:
    """A model without a chain, as what reads prompts."""

    model: LocalModel
    adds_special_tokens: bool = True
    completion_controls: frozenset[str] = frozenset()


def check_contract(name: str, *, site: Any, server: Any) -> None:
    """Makes sure that a participant trains what the server does; both sides check, and say it in the same words.

    Each compares its own `contract()` with the other's as it arrived.

    Raises:
        ContractError: What differs, by name.
    """
    at_site, at_hub = (said if isinstance(said, Mapping) else {} for said in (site, server))
    different = [k for k in _MEANING if at_site.get(k) != at_hub.get(k)]
    if different:  # what differs comes first: in a list of sites a line has room for no more
        kinds = ", ".join(_MEANING[k] for k in different)
        there, here = (", ".join(shown(said.get(k), 12) for k in different) for said in (at_site, at_hub))
        msg = (
            f"another contract ({kinds}: {there} at {shown(name, 80)}, {here} at the hub). Averaged weights would mean "
            "nothing: start both sides from the same model, adapter (names, types, shapes and settings), prompt, "
            "tokenizer and version."
        )
        raise ContractError(msg)


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _adapter_settings(model: LocalModel) -> list[object]:
    """What the trained adapter means, however its configuration spells it: ranks, scalings, what else is trained."""
    found: list[object] = []
    for name in model.peft_names:
        adapter = resolve(model.module, name)
        # nine digits: a scaling set by hand comes back from a file through α with an error in the last place
        layers = sorted((n, layer.rank, f"{layer.scaling:.9g}") for n, layer in adapter.layers.items())
        copies = (adapter.modules_to_save, adapter.tied, sorted(adapter.tokens.items()), adapter.tied_tokens)
        switches = (adapter.dropout, adapter.use_rslora, adapter.use_dora, adapter.lora_bias)
        found.append((layers, copies, switches))
    return found


def _tokenizer_identity(model: LocalModel) -> object:
    """Vocabulary, end and padding ids, and how some texts come out, which merges and normalisation decide."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return None
    probes = [list(tokenizer(text)["input_ids"]) for text in _PROBES]
    return _vocabulary(tokenizer), model.eos_ids, model.pad_id, probes


def _vocabulary(tokenizer: Any) -> str:
    """Digest of all tokens and their ids; kept until tokens are added, for it takes a tenth of a second."""
    known = _VOCABULARIES.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        known = len(tokenizer), _digest(sorted(tokenizer.get_vocab().items()))
        _VOCABULARIES[tokenizer] = known
    return known[1]
