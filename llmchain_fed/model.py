"""LocalModel: a Hugging Face module and its tokenizer, asked for text and for named weights.

Knows torch, transformers and PEFT. Knows nothing of LangChain, examples, training or federation.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import StoppingCriteriaList

from llmchain_fed import padding, pretrained, weights
from llmchain_fed.adapters import REMAINDER
from llmchain_fed.adapters.views import AdapterViews
from llmchain_fed.errors import ConfigError, NotTrainableError, PromptTooLongError, UnsupportedModelError
from llmchain_fed.generation import (
    Completion,
    GenerationOptions,
    StopOnText,
    checked_stops,
    chunks,
    cut_at_stop,
    evaluating,
    pad_rows,
    seeded,
    stream_text,
)
from llmchain_fed.tokens import Tokens

Kind = Literal["causal", "seq2seq"]


class LocalModel(AdapterViews):
    """A trainable local model: text in, text out, and its weights as named tensors.

    Wraps any causal or sequence-to-sequence Hugging Face module, plain, PEFT-wrapped or quantised, and never moves
    it: a module stays on the device where it is. One lock keeps generation and training on it apart, so that chains
    in several threads may share it.

    Args:
        module: The module. Its trainable parameters (those that require a gradient) are what a federation learns.
        tokenizer: Its tokenizer; without one only ready tensors can be used.
        name: What to call it in logs and saved chains; by default the module's own name.
        reference: Hub id or embedded name under which anybody finds the same base; None: a saved chain brings it along.

    Raises:
        UnsupportedModelError: `module` is not an `nn.Module`.
    """

    def __init__(
        self, module: nn.Module, tokenizer: Any = None, *, name: str | None = None, reference: str | None = None
    ) -> None:
        if not isinstance(module, nn.Module):
            msg = (
                f"LocalModel wraps a torch nn.Module, got {type(module).__name__}. Use "
                "LocalModel.from_pretrained for a name."
            )
            raise UnsupportedModelError(msg)
        self.module = module
        self._tokens = Tokens(tokenizer, module)
        self.name = name or getattr(getattr(module, "config", None), "name_or_path", "") or type(module).__name__
        self.reference = reference
        self._lock = threading.RLock()
        self._primary = tuple(name for name in weights.adapter_names(module) if name != REMAINDER)
        self._fingerprint = weights.base_fingerprint(module)
        self._loads = 0
        self._hash: tuple[tuple[int, bytes], str] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        lora: LoraConfig | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> LocalModel:
        """Loads a model by hub id, folder, or the embedded name `"smollm2-135m-instruct"`.

        Args:
            name_or_path: What to load. Weights are read from safetensors only.
            lora: Adds this adapter and trains it alone. Its random start is drawn from a fixed seed, so that every
                participant and every rerun starts from the same one.
            dtype: Of the base; float32 by default. An adapter is kept in float32.
            device: Where to put it; by default CUDA or MPS when there is one, else the CPU.

        Raises:
            MissingExtraError: The embedded model needs the extra `gguf`.
            UnsupportedModelError: There is no such model, or none with safetensors weights and a tokenizer.
        """
        module, tokenizer = pretrained.load(name_or_path, lora=lora, dtype=dtype, device=device)
        reference = None if Path(name_or_path).exists() else name_or_path
        return cls(module, tokenizer, name=Path(name_or_path).name, reference=reference)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the lock, so that copies and pickles work; a copy has a lock of its own."""
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        return (
            f"LocalModel({self.name!r}, {self.kind}, {trainable:,} of {total:,} parameters trainable, on {self.device})"
        )

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None."""
        return self._tokens.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokens.tokenizer = tokenizer

    @property
    def kind(self) -> Kind:
        """`"seq2seq"` for an encoder-decoder, else `"causal"`."""
        return "seq2seq" if self._tokens.seq2seq else "causal"

    @property
    def device(self) -> torch.device:
        """Where its inputs belong: the device of its first parameter."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    @property
    def context_length(self) -> int | None:
        """tokens: prompt and answer together; None when positions are not limited (T5)."""
        length = getattr(self._config, "max_position_embeddings", None)
        return int(length) if length and length > 0 else None  # XLNet says -1

    @property
    def pad_id(self) -> int:
        """The padding token's id; models without one pad with their end token, behind an attention mask."""
        return self._tokens.pad_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer; the tokenizer's own, which training appends, comes first."""
        return self._tokens.eos_ids

    @property
    def _config(self) -> Any:
        return getattr(self.module, "config", None)

    def fingerprint(self) -> str:
        """Which base weights these are, as hex: taken when the object was made, adapters left out."""
        return self._fingerprint

    def wrapped(self, module: nn.Module) -> LocalModel:
        """The same model under another wrapping of its module, behind the same lock."""
        other = LocalModel(module, self.tokenizer, name=self.name, reference=self.reference)
        other._lock = self._lock
        return other

    # --- weights ----------------------------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters, as for an optimizer: `torch.optim.Adam(model.parameters())`."""
        return self.module.parameters()

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Stable name → the module's own parameter.

        Raises:
            NotTrainableError: No parameter requires a gradient.
        """
        found = self._own_parameters()
        if not found:
            msg = (
                f"no parameter of {self.name!r} requires a gradient, so nothing can be learnt. Pass "
                "lora=LoraConfig(...) "
                "to from_pretrained, or unfreeze the parameters to train."
            )
            raise NotTrainableError(msg)
        return found

    def trainable_state(self) -> dict[str, Tensor]:
        """Copies of the trainable tensors on the CPU by stable name; tied ones once.

        Raises:
            NotTrainableError: No parameter requires a gradient.
        """
        with self._lock:
            return weights.copy_state(self.trainable_parameters())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Makes `state` the trainable weights; all of it or, if it does not fit, nothing.

        Raises:
            WeightsMismatchError: Other names, other shapes, not floating point, NaN or infinite values.
        """
        with self._lock:
            parameters = self.trainable_parameters()
            weights.check_state(parameters, state)
            weights.write_state(parameters, state)
            self._loads += 1

    @property
    def weights_version(self) -> str:
        """`"{loads}-{hash}"`: changes with every load and with every optimizer step on the module."""
        return f"{self._loads + self._changes}-{self.weights_hash}"

    @property
    def weights_hash(self) -> str:
        """64 bits over the trainable values and any adapter's as they are now, as hex."""
        # Without the lock: LangChain asks on the event loop before every call, where waiting would stall all tasks.
        found = self._deciding_parameters()
        stamp = (self._loads + self._changes, weights.change_stamp(found))
        known = self._hash
        if known is None or known[0] != stamp:
            self._hash = known = (stamp, weights.content_hash(found))
        return known[1]

    # --- text -------------------------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Prompt texts → token ids, the one way for training and for generation.

        A causal prompt never ends in an end token, which some tokenizers append: the answer has yet to come.

        Args:
            texts: Prompts as text.
            add_special_tokens: False for text that carries its special tokens already (a rendered chat template).

        Raises:
            UnsupportedModelError: There is no tokenizer.
        """
        return self._tokens.encode(texts, add_special_tokens=add_special_tokens)

    def encode_completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Completions → token ids with the end token behind each, so that the model learns to stop."""
        return self._tokens.encode_completions(texts)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        stop: Sequence[str] | None = None,
        add_special_tokens: bool = True,
        batch_size: int = 32,
        **options: Any,
    ) -> list[str]:
        """The answers to `prompts`, in their order, without the prompts.

        Args:
            prompts: Rendered texts.
            stop: Strings before which an answer ends.
            add_special_tokens: See `encode`.
            batch_size: Prompts computed together.
            **options: Fields of `GenerationOptions`: `max_new_tokens=256`, `temperature=0.0`, `num_beams=1` …

        Raises:
            ConfigError: An unknown option or a value out of range.
            PromptTooLongError: A prompt leaves no room in the context.
        """
        done = self.complete(
            prompts, stop=stop, add_special_tokens=add_special_tokens, batch_size=batch_size, **options
        )
        return [completion.text for completion in done]

    def complete(
        self,
        prompts: Sequence[str],
        *,
        stop: Sequence[str] | None = None,
        add_special_tokens: bool = True,
        batch_size: int = 32,
        **options: Any,
    ) -> list[Completion]:
        """Like `generate`, with token counts and the reason why each answer ended."""
        if isinstance(prompts, str):
            msg = f"`prompts` is a list of texts, got one text {prompts[:40]!r}. Pass [text]."
            raise ConfigError(msg)
        settings, stops = GenerationOptions(**options), checked_stops(stop)
        rows = self.encode(prompts, add_special_tokens=add_special_tokens)
        rooms = [self._room(row, settings.max_new_tokens) for row in rows]
        # Neighbours in length share a batch; so do only prompts with the same room for their answers.
        order = sorted(range(len(rows)), key=lambda i: (-rooms[i], len(rows[i])))
        share: padding.Sharing = self._sharing(rows) if batch_size > 1 else "any"
        if self.kind == "causal" and settings.reads_padding and share == "any":
            share = "equal"
        apart = [len(row) if share == "equal" else i if share == "none" else 0 for i, row in enumerate(rows)]
        keys = list(zip(rooms, apart, strict=True))
        done: dict[int, Completion] = {}
        for chunk in chunks(order, keys, batch_size):
            limited = settings.replace(max_new_tokens=rooms[chunk[0]])
            new_ids = self._generate_ids([rows[i] for i in chunk], limited, stops)
            done |= {i: self._completion(len(rows[i]), ids, stops) for i, ids in zip(chunk, new_ids, strict=True)}
        return [done[i] for i in range(len(rows))]

    def stream(
        self, prompt: str, *, stop: Sequence[str] | None = None, add_special_tokens: bool = True, **options: Any
    ) -> Generator[str, None, Completion]:
        """The answer piece by piece; joined it equals `generate([prompt])[0]`.

        What is wrong with the call is raised here, what goes wrong later by the iterator, both at once. Closing the
        iterator stops the computation at the next token. The generator's return value is the `Completion`.

        Raises:
            ConfigError: An unknown option or a value out of range.
            PromptTooLongError: The prompt leaves no room in the context.
        """
        settings, stops = GenerationOptions(**options), checked_stops(stop)
        (row,) = self.encode([prompt], add_special_tokens=add_special_tokens)
        settings = settings.replace(max_new_tokens=self._room(row, settings.max_new_tokens))
        return self._pieces(row, settings, stops)

    def _pieces(
        self, row: list[int], settings: GenerationOptions, stops: Sequence[str]
    ) -> Generator[str, None, Completion]:
        if settings.num_beams > 1:  # which beam wins is only known at the end
            whole = self._completion(len(row), self._generate_ids([row], settings, stops)[0], stops)
            yield whole.text
            return whole

        def work(streamer: Any, abandoned: Any) -> None:
            self._generate_ids([row], settings, stops, streamer=streamer, criteria=[abandoned])

        ids = yield from stream_text(work, lambda ids: self._tokens.decode(self._tokens.until_end(ids)), stops)
        return self._completion(len(row), ids, stops)

    def _sharing(self, rows: Sequence[Sequence[int]]) -> padding.Sharing:
        """Which of these prompts may share a batch; asked of the module where there is more than one."""
        if len(rows) < 2:
            return "any"
        with self.exclusive():
            return padding.sharing(self.module, rows, pad=self.pad_id, left=self.kind == "causal")

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
                f"the prompt has {len(row)} tokens and the model's context holds "
                f"{self.context_length}: there is no room "
                "for an answer. Shorten the input; nothing is cut silently."
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
    ) -> list[list[int]]:
        """Rows of prompt ids → rows of new ids as `generate` leaves them, with the end token and padding."""
        left = self.kind == "causal"  # a causal model goes on from the last column: that must be the prompt's end
        ids, mask = pad_rows(rows, self.pad_id, left=left)  # (B, T) both
        skip = ids.shape[1] if left else 1
        if stops:
            criteria = [*criteria, StopOnText(self._tokens.decode_rows, stops, skip)]
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
                generation_config=settings.to_transformers(eos=self.eos_ids, pad=self.pad_id),
                stopping_criteria=StoppingCriteriaList(criteria),
                streamer=streamer,
            )
        new: list[list[int]] = output[:, skip:].tolist()
        return new

    def _completion(self, prompt_tokens: int, ids: list[int], stops: Sequence[str]) -> Completion:
        answer = self._tokens.until_end(ids)
        text = self._tokens.decode(answer)
        cut = cut_at_stop(text, stops)
        ended = len(answer) < len(ids) or cut != text
        return Completion(cut, prompt_tokens, len(answer), "stop" if ended else "length")
