"""ComposedChain: any Runnable around one local model, as the `Prompt` of its examples.

What stands before the model runs once per example, in this process, with its own retriever and documents; the prompts
that reach the model are what it learns to answer. Knows Runnables, faces and recording. Knows nothing about training.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable

from llmchain_fed.chain.base_llm import LocalLanguageModel
from llmchain_fed.chain.messages import read
from llmchain_fed.chain.recording import recording
from llmchain_fed.chain.tracing.gold import GoldAnswers
from llmchain_fed.chain.tracing.running import Sessions, run
from llmchain_fed.chain.tracing.templates import templates_of
from llmchain_fed.data.dialogues import Dialogue
from llmchain_fed.data.prompt import Call
from llmchain_fed.errors import DataError, DialogueError, ExampleFailedError, LLMChainFedError, UnsupportedModelError
from llmchain_fed.model.local_model import LocalModel

_MOST_KEPT = 100_000  # runs: hold-out keys, encoding and previews ask for the same ones
_UNSEEN = (
    "Calls are seen where `invoke` of the model runs in the chain's own context: not from a thread pool of one's own, "
    "another process, or a server."
)


class ComposedChain:
    """A Runnable that holds one trainable local model somewhere: retrieval, branches, functions, a graph, an agent.

    Args:
        runnable: What `invoke` runs.
        faces: The faces of the trainable model that were found in it, or that the user named; at least one.

    Raises:
        UnsupportedModelError: Faces of two kinds share the model.
    """

    input_variables: ClassVar[None] = None
    optional_variables: ClassVar[tuple[str, ...]] = ()
    literals: ClassVar[tuple[str, ...]] = ()
    any_input: ClassVar[bool] = True

    def __init__(self, runnable: Runnable[Any, Any], faces: Sequence[LocalLanguageModel]) -> None:
        self.runnable, self._faces = runnable, list(faces)
        if len({face.adds_special_tokens for face in faces}) > 1:
            msg = (
                "the chain calls its model as a LocalLLM and as a LocalChatModel, which begin a prompt differently. "
                "Use one of the two in the whole chain."
            )
            raise UnsupportedModelError(msg)
        self._sessions = Sessions(runnable)
        self._kept: dict[str, tuple[Call, ...]] = {}
        self._lock = threading.Lock()

    @property
    def faces(self) -> Sequence[LocalLanguageModel]:
        """The faces of the trainable model, through which it is called."""
        return self._faces

    @property
    def model(self) -> LocalModel:
        """The `LocalModel` that answers and that a federation trains."""
        return self._faces[0].model

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer adds special tokens to the rendered text."""
        return self._faces[0].adds_special_tokens

    @property
    def completion_controls(self) -> frozenset[str]:
        """Control tokens, beside the model's own, that a completion cannot write."""
        return frozenset().union(*(face.own_controls for face in self._faces))

    def as_prompt(self) -> ComposedChain:
        """What makes calls of an example: the chain itself."""
        return self

    def calls(self, inputs: Any, completion: Any) -> tuple[Call, ...]:
        """Runs the chain over an example, and gives what its model reads and should answer, call by call.

        The same example is run once.

        Raises:
            DataError: A call has no completion, or a completion no call.
            ExampleFailedError: The chain itself raises.
        """
        key = _key(inputs, completion)
        with self._lock:
            if key is not None and key in self._kept:
                return self._kept[key]
        found = self._run(inputs, completion)
        with self._lock:
            if key is not None and len(self._kept) < _MOST_KEPT:
                self._kept[key] = found
        return found

    def dialogue_calls(self, dialogue: Dialogue) -> tuple[Call, ...]:
        """Runs the chain for each message of the user's, with all before it, and its answers as completions.

        What its own tools answer counts, not what the row says that they did.

        Raises:
            DialogueError: The chain takes no `messages`, or the row brings tools or variables.
            DataError: As `calls`.
        """
        try:
            taken = set(self.runnable.get_input_jsonschema().get("properties", ()))
        except Exception:  # a state of objects that no schema describes: then the chain itself says what it takes
            taken = {"messages"}
        if "messages" not in taken or dialogue.tools or dialogue.variables:
            extra = [*sorted(map(str, dialogue.variables)), *(["tools"] if dialogue.tools else [])]
            msg = (
                f"a row of messages is no input of this chain, which takes {sorted(taken) or 'something else'}"
                + (f"; its {', '.join(extra)} are the chain's own" if extra else "")
                + ". Pass (x, [answer, …]) with x what its invoke takes."
            )
            raise DialogueError(msg)
        messages = read(dialogue.messages)
        found: list[Call] = []
        for asked, answers in dialogue.exchanges:
            found += self.calls({"messages": messages[: asked + 1]}, [messages[at] for at in answers])
        return tuple(found)

    def _run(self, inputs: Any, completion: Any) -> tuple[Call, ...]:
        gold, failed = self._played(inputs, completion)
        if gold.error is not None:
            raise gold.error
        if failed is not None:
            raise _failure(gold, failed) from failed
        gold.check(_UNSEEN)
        if not gold.calls:
            msg = f"the chain does not call its model for {inputs!r:.80}, so there is nothing to learn. {_UNSEEN}"
            raise DataError(msg)
        return tuple(gold.calls)

    def render(self, inputs: Any) -> str:
        """The first text that the model reads for `inputs`.

        Raises:
            DataError: The chain does not call its model.
            ExampleFailedError: The chain itself raises before.
        """
        gold, failed = self._played(inputs, [])
        if gold.read:
            return gold.read[0]
        if failed is not None:
            raise _failure(gold, failed) from failed
        msg = f"the chain does not call its model for {inputs!r:.80}. {_UNSEEN}"
        raise DataError(msg)

    def _played(self, inputs: Any, completion: Any) -> tuple[GoldAnswers, Exception | None]:
        """The chain run with the completions for its model's answers, and what it raised.

        Raises:
            LLMChainFedError: What this package raises within the chain.
        """
        parts: list[GoldAnswers] = []

        @contextmanager
        def begin() -> Iterator[list[BaseCallbackHandler]]:
            parts.append(GoldAnswers(self.model.module, completion))
            with recording(parts[-1]):
                yield [parts[-1].names]

        try:
            run(self.runnable, inputs, self._sessions, begin)
        except LLMChainFedError:
            raise
        except Exception as error:  # whatever somebody's retriever, function or parser raises
            return parts[-1], error
        return parts[-1], None

    def answer(self, inputs: Any) -> str:
        """What the whole chain answers, as text; it leaves no trace anywhere.

        Raises:
            Exception: Whatever the chain raises.
        """
        return as_text(run(self.runnable, inputs, self._sessions))

    def generation_options(self) -> dict[str, Any]:
        """Keywords for `model.generate` that give the first face's answers; every face's stop strings end one."""
        options = self._faces[0].all_options(None, {})
        stops = dict.fromkeys(stop for face in self._faces for stop in face.stop or ())
        return options | {"stop": list(stops) or None}

    def parsed(self, text: str) -> str:
        """The text itself: what stands behind the model is run, not known."""
        return text

    def prompt_identity(self) -> list[Any]:
        """What two sides of a federation must share: the templates that reach the model, and how it reads them."""
        paths = {repr(face.path_identity()): face.path_identity() for face in self._faces}
        return [[paths[name] for name in sorted(paths)], templates_of(self.runnable)]

    def __repr__(self) -> str:
        return f"ComposedChain({type(self.runnable).__name__} over {self.model!r})"


def _failure(gold: GoldAnswers, failed: Exception) -> ExampleFailedError:
    where = f"after the step {gold.steps[-1].name!r} was answered" if gold.steps else "before its model was called"
    return ExampleFailedError(f"the chain raises {where}: {type(failed).__name__}: {failed!s:.300}")


def as_text(answer: Any) -> str:
    """A chain's result for a reader: a message's text, the last message of a graph's state, or the value as it is."""
    if isinstance(answer, dict) and isinstance(answer.get("messages"), list) and answer["messages"]:
        answer = answer["messages"][-1]
    if isinstance(answer, BaseMessage):
        return str(answer.text)
    return answer if isinstance(answer, str) else repr(answer)


def _key(inputs: Any, completion: Any) -> str | None:
    """An example as a key; None where it is made of objects, which may change or be others under the same number."""
    try:
        key = json.dumps([inputs, completion])
        return key if json.loads(key) == [inputs, completion] else None  # a tuple is no list, and 1 no "1"
    except (TypeError, ValueError):
        return None
