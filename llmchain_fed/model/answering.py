"""Text in, text out: the part of LocalModel that knows tokens and `generate`.

Knows tokenizers, transformers' `generate` and the lock. Knows nothing of weights, examples, training or LangChain.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from llmchain_fed.errors import ConfigError, PromptTooLongError
from llmchain_fed.model.generation import fields
from llmchain_fed.model.generation.answers import (
    Completion,
    GenerationOptions,
    Sharing,
    chunks,
    evaluating,
    seeded,
    sharing,
    stream_text,
)
from llmchain_fed.model.generation.grammar import Grammar, KeepsTo, check_beams
from llmchain_fed.model.generation.stop_strings import Settling, StopOnText, checked_stops, cut_at_stop
from llmchain_fed.model.generation.vocabulary import vocabulary_of
from llmchain_fed.model.tokens import Tokens, check_rows, input_rows, pad_rows


class Answering(Tokens):
    """What `LocalModel` can do with text: prompts to answers, ids to what they say."""

    _lock: threading.RLock
    _said: set[str]
    """what of the module's own generation settings was said to have no effect"""

    @abstractmethod
    def exclusive(self) -> AbstractContextManager[None]:
        """Takes the lock, with this model's adapter answering."""

    @abstractmethod
    def _activated(self) -> AbstractContextManager[None]:
        """This model's adapter answers inside; the lock must be taken."""

    @property
    def device(self) -> torch.device:
        """Where its inputs belong: the device of its first parameter."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    @property
    def context_length(self) -> int | None:
        """tokens: prompt and answer together; None when positions are not limited (T5)."""
        length = getattr(getattr(self.module, "config", None), "max_position_embeddings", None)
        return int(length) if length and length > 0 else None  # XLNet says -1

    def decoded(self, ids: Sequence[int]) -> str:
        """The text of an answer of these ids, up to the first end token."""
        return self._text(list(ids))

    def said(self, ids: Sequence[int], *, stop: Sequence[str] | str | None = None) -> str:
        """What an answer of these ids says: its text up to the first stop string, the model's own among them."""
        own = checked_stops(fields.stop_strings(self._shipped))
        return cut_at_stop(self.decoded(ids), (*checked_stops(stop), *own))

    def generate(
        self,
        prompts: Sequence[str],
        *,
        stop: Sequence[str] | None = None,
        add_special_tokens: bool = True,
        batch_size: int = 32,
        grammar: Grammar | None = None,
        **options: Any,
    ) -> list[str]:
        """The answers to `prompts`, in their order, without the prompts.

        Args:
            prompts: The rendered texts.
            stop: An answer ends before these strings.
            add_special_tokens: See `encode`.
            batch_size: So many prompts are computed together.
            grammar: What the answers may be; they keep to it and end within their budget.
            **options: Fields of `GenerationOptions`: `max_new_tokens=256`, `temperature=0.0`, `num_beams=1` …

        Raises:
            ConfigError: An option is unknown or a value out of range.
            MissingExtraError: A grammar needs the extra `structured`.
            PromptTooLongError: A prompt leaves no room in the context.
            SchemaError: The shortest answer that the grammar allows does not fit.
            UnsupportedModelError: A prompt contains a token that the model's embedding has no row for.
        """
        done = self.complete(
            prompts, stop=stop, add_special_tokens=add_special_tokens, batch_size=batch_size, grammar=grammar, **options
        )
        return [completion.text for completion in done]

    def complete(
        self,
        prompts: Sequence[str],
        *,
        stop: Sequence[str] | None = None,
        add_special_tokens: bool = True,
        batch_size: int = 32,
        grammar: Grammar | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Like `generate`, with token counts and the reason why each answer ended."""
        if isinstance(prompts, str):
            msg = f"`prompts` is a list of texts, got one text {prompts[:40]!r}. Pass [text]."
            raise ConfigError(msg)
        settings, stops = self._settled_options(stop, options)
        rows = self.encode(prompts, add_special_tokens=add_special_tokens)
        check_rows(self, rows)
        rooms = [self._room(row, settings.max_new_tokens) for row in rows]
        self._check_grammar(grammar, settings, rooms)
        # Neighbours in length share a batch; so do only prompts with the same room for their answers.
        order = sorted(range(len(rows)), key=lambda i: (-rooms[i], len(rows[i])))
        share: Sharing = self._sharing(rows) if batch_size > 1 else "any"
        reads = self.kind == "causal" and settings.reads_padding
        reads = reads or fields.reads_padding(self._shipped, seq2seq=self.kind == "seq2seq", pad=self.pad_id)
        if reads and share == "any":  # then only prompts of one length go together, without padding
            share = "equal"
        apart = [len(row) if share == "equal" else i if share == "none" else 0 for i, row in enumerate(rows)]
        keys = list(zip(rooms, apart, strict=True))
        done: dict[int, Completion] = {}
        for chunk in chunks(order, keys, batch_size):
            limited = settings.replace(max_new_tokens=rooms[chunk[0]])
            new_ids = self._generate_ids([rows[i] for i in chunk], limited, stops, grammar=grammar)
            done |= {i: self._completion(len(rows[i]), ids, stops) for i, ids in zip(chunk, new_ids, strict=True)}
        return [done[i] for i in range(len(rows))]

    def stream(
        self,
        prompt: str,
        *,
        stop: Sequence[str] | None = None,
        add_special_tokens: bool = True,
        grammar: Grammar | None = None,
        **options: Any,
    ) -> Generator[str, None, Completion]:
        """The answer piece by piece; joined it equals `generate([prompt])[0]`.

        What is wrong with the call is raised here, what goes wrong later by the iterator, both at once. Closing the
        iterator stops the computation at the next token. The generator's return value is the `Completion`.

        Raises:
            ConfigError: An option is unknown or a value out of range.
            PromptTooLongError: The prompt leaves no room in the context.
            SchemaError: The shortest answer that the grammar allows does not fit.
        """
        settings, stops = self._settled_options(stop, options)
        (row,) = self.encode([prompt], add_special_tokens=add_special_tokens)
        check_rows(self, [row])
        settings = settings.replace(max_new_tokens=self._room(row, settings.max_new_tokens))
        self._check_grammar(grammar, settings, [settings.max_new_tokens])
        return self._pieces(row, settings, stops, grammar)

    def _check_grammar(self, grammar: Grammar | None, settings: GenerationOptions, rooms: Sequence[int]) -> None:
        """Makes sure that answers of these lengths can keep to the grammar."""
        if grammar is None:
            return
        check_beams(settings.num_beams)
        grammar.check_budget(vocabulary_of(self.tokenizer, self.eos_ids, self.name), min(rooms, default=2**24))

    def _pieces(
        self, row: list[int], settings: GenerationOptions, stops: Sequence[str], grammar: Grammar | None
    ) -> Generator[str, None, Completion]:
        if settings.num_beams > 1:  # which beam wins is only known at the end
            whole = self._completion(len(row), self._generate_ids([row], settings, stops)[0], stops)
            yield whole.text
            return whole

        made: list[list[int]] = []

        def work(streamer: Any, abandoned: Any) -> None:
            made.extend(
                self._generate_ids([row], settings, stops, streamer=streamer, criteria=[abandoned], grammar=grammar)
            )

        ids = yield from stream_text(work, self._text, Settling(self.tokenizer, self._text), stops)
        if made and made[0] == ids[:-1]:  # the end token behind an answer that was cut
            ids = made[0]
        return self._completion(len(row), ids, stops)

    def _text(self, ids: list[int]) -> str:
        """All new ids of an answer → its text, before it is cut at a stop string."""
        return self._decode(self._until_end(ids))

    @property
    def _shipped(self) -> Any:
        """The module's own `generation_config`, or None."""
        return getattr(self.module, "generation_config", None)

    def _settled_options(
        self, stop: Sequence[str] | str | None, options: Mapping[str, Any]
    ) -> tuple[GenerationOptions, tuple[str, ...]]:
        """The options of a call and every stop string, the model's own behind the caller's.

        What the model ships and this call does not do is said in the log, each field once.
        """
        settings, stops = GenerationOptions(**options), checked_stops(stop)
        chosen = {name for name, value in options.items() if value is not None}
        fields.say(self.name, self._shipped, settings, chosen, said=self._said)
        own = checked_stops(fields.stop_strings(self._shipped))
        return settings, tuple(dict.fromkeys((*stops, *own)))

    def _sharing(self, rows: Sequence[Sequence[int]]) -> Sharing:
        """Which of these prompts may share a batch; asked of the module where there is more than one."""
        if len(rows) < 2:
            return "any"
        with self.exclusive():
            return sharing(self.module, rows, pad=self.pad_id, left=self.kind == "causal")

    def _room(self, row: Sequence[int], wanted: int) -> int:
        """How many tokens the answer to this prompt may have."""
        if not row:
            msg = "the prompt is empty: there is no token to go on from. Render some text first."
            raise ConfigError(msg)
        if self.context_length is None:
            return wanted
        room = self.context_length - (len(row) if self.kind == "causal" else 0)
        if room < 1 or len(row) > self.context_length:
            msg = (
                f"the prompt has {len(row)} tokens and the model's context takes {self.context_length}: there is no "
                "room for an answer. Shorten the input; nothing is cut silently."
            )
            raise PromptTooLongError(msg)
        return min(wanted, room)

    def _generate_ids(
        self,
        rows: Sequence[Sequence[int]],
        settings: GenerationOptions,
        stops: Sequence[str],
        *,
        streamer: Any = None,
        criteria: Sequence[Any] = (),
        grammar: Grammar | None = None,
    ) -> list[list[int]]:
        """Rows of prompt ids → rows of new ids as `generate` leaves them, with the end token and padding."""
        left = self.kind == "causal"  # a causal model goes on from the last column: that must be the prompt's end
        ids, mask = pad_rows(rows, self.pad_id, left=left)  # (B, T) both
        skip = ids.shape[1] if left else 1
        stop_on_text = None
        if stops:
            settled = Settling(self.tokenizer, self._text)
            stop_on_text = StopOnText(self._decode, settled, stops, skip)
            criteria = [*criteria, stop_on_text]
        processors, keeps = LogitsProcessorList(), None
        if grammar is not None:
            known = vocabulary_of(self.tokenizer, self.eos_ids, self.name)
            budget, greedy = settings.max_new_tokens, settings.temperature == 0
            keeps = KeepsTo(grammar, known, prompt_width=skip, budget=budget, greedy=greedy, pad=self.pad_id)
            processors.append(keeps)
        config = settings.to_transformers(self._shipped, eos=self.eos_ids, pad=self.pad_id, start=skip)
        fields.check_ids(vars(config), input_rows(self.module))
        with (
            self._lock,
            self._activated(),
            evaluating(self.module),
            torch.inference_mode(),
            seeded(settings.seed, self.device),
        ):
            output = self.module.generate(  # type: ignore[operator]
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList(criteria),
                streamer=streamer,
            )
        new: list[list[int]] = output[:, skip:].tolist()
        if settings.num_beams > 1:  # behind a beam's end stands -1 where the model has no end token
            return [row[: row.index(-1)] if -1 in row else row for row in new]
        # a row that ended goes on with the others' where the model has no end token
        ends = dict(stop_on_text.lengths) if stop_on_text else {}
        for i, cut in enumerate(keeps.cut() if keeps is not None else ()):
            if cut and i not in ends:  # its end token is none that the model chose
                ends[i] = len(self._until_end(new[i]))
        return [row[: ends.get(i)] for i, row in enumerate(new)]

    def _completion(self, prompt_tokens: int, ids: list[int], stops: Sequence[str]) -> Completion:
        answer = self._until_end(ids)
        text = self._decode(answer)
        cut = cut_at_stop(text, stops)
        ended = len(answer) < len(ids) or cut != text
        return Completion(cut, prompt_tokens, len(answer), "stop" if ended else "length", tuple(answer))
