"""Gold answers: while a composed chain runs over an example, its model's part is played by the example's completions.

Knows completions and steps. Knows nothing about how a chain is run, or about tokens. It never raises within the chain,
where `with_fallbacks` or a retry would take that for a failure of the model: what is wrong is kept and told at the end.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from llmchain_fed.chain.base_llm import OPTIONS, LocalLanguageModel
from llmchain_fed.chain.tracing.steps import Step, StepNames
from llmchain_fed.data.prompt import Call
from llmchain_fed.errors import DataError
from llmchain_fed.model.generation.answers import Completion

_FORMS = (
    "Write (x, completion) for one call, (x, [completion, …]) in the order of the calls, or (x, {step: completion})."
)


class GoldAnswers:
    """A recorder that answers with what an example wants answered.

    Args:
        module: The trainable module; other models answer by themselves.
        completion: One completion, a list in the order of the calls, or a mapping of step names to one or a list.
    """

    def __init__(self, module: Any, completion: Any) -> None:
        self._module, self._lock = module, threading.Lock()
        self.names = StepNames()
        """follows the run in which it answers"""
        self._given = completion
        self._by_step: dict[Any, list[Any]] | None = None
        self._in_order: list[Any] = []
        self._taken: dict[Any, list[UUID]] = {}
        """name of a step (None: of all) → the runs that have had one of its completions"""
        if isinstance(completion, list):
            self._in_order = list(completion)
        elif isinstance(completion, Mapping):
            self._by_step = {k: list(v) if isinstance(v, list) else [v] for k, v in completion.items()}
        else:
            self._in_order = [completion]
        self.read: list[str] = []
        """the texts of all calls, answered or not"""
        self.calls: list[Call] = []
        self.steps: list[Step] = []
        self.error: DataError | None = None

    def answer(self, face: Any, text: str, run: UUID, options: Mapping[str, Any]) -> Completion | None:
        """The next completion of the step that calls, as the face writes it; None for another model."""
        if face.model.module is not self._module:
            return None
        with self._lock:
            step = self.names.step(run)
            self.steps.append(step)
            self.read.append(text)
            written = ""
            try:
                written = self._written(face, step, run)
                ways = face.all_options(options.get("stop"), {k: v for k, v in options.items() if k in OPTIONS})
                self.calls.append(Call(text, written, step.name, ways))
            except DataError as error:
                self.error = self.error or error
            return Completion(written, 0, 0, "stop")

    def _written(self, face: LocalLanguageModel, step: Step, run: UUID) -> str:
        if self._by_step is None:
            return face.written(self._next(None, self._in_order, step, run))
        names = [name for name in self._by_step if step.is_called(name)]
        # a key over several calls does not say which of them a list's completions are for
        names = names or [name for name, given in self._by_step.items() if step.stands_under(name) and len(given) <= 1]
        for name in names:
            if self._by_step[name]:
                return face.written(self._next(name, self._by_step[name], step, run))
        has = ", ".join(repr(str(name)) for name in self._by_step)
        msg = f"the step {step.name!r} calls the model, and there is no completion for it, but for {has}. {_FORMS}"
        if names or len(self.steps) > 1:
            raise DataError(msg)
        try:
            whole = face.written(self._given)  # one object that the model is to write, not one per step
        except DataError:
            raise DataError(msg) from None
        self._by_step = None
        return whole

    def _next(self, name: Any, left: list[Any], step: Step, run: UUID) -> Any:
        """The next completion, as it is: it may know whose its control tokens are."""
        former = self._taken.setdefault(name, [])
        if any(not self.names.follows(run, one) for one in former):
            once = f"{{{step.name!r}: completion, …}}" if name is None else "steps with names of their own, run_name=…"
            msg = (
                f"the step {step.name!r} runs beside others, in an order that nobody sets, so a list does not say "
                f"which completion is whose. Name them: {once}."
            )
            raise DataError(msg)
        if not left:
            count = len(self.calls)
            msg = (
                f"the chain calls its model {len(self.steps)} times, at last in the step {step.name!r}, and the "
                f"example has {count} completion{'' if count == 1 else 's'}. {_FORMS}"
            )
            raise DataError(msg)
        former.append(run)
        return left.pop(0)

    def check(self, steps: str) -> None:
        """Makes sure that every call had its completion and every completion its call.

        Raises:
            DataError: Not so, or a completion is none that the model can write.
        """
        if self.error is not None:
            raise self.error
        left = dict(self._by_step) if self._by_step is not None else {"": self._in_order}
        names = [repr(str(name)) for name, rest in left.items() if rest and name != ""]
        count = sum(map(len, left.values()))
        if count:
            called = f"The steps that called: {', '.join(s.name for s in self.steps) or 'none'}."
            msg = (
                f"{count} completion{'s are' if count > 1 else ' is'} left over"
                f"{' for ' + ', '.join(names) if names else ''}: the chain did not call its model for "
                f"{'them' if count > 1 else 'it'}. {called} {steps}"
            )
            raise DataError(msg)
