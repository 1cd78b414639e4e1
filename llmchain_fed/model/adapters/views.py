"""Views of one model, each answering with an adapter of its own; the part of LocalModel that knows of adapters.

Knows the lock, and PEFT's adapters by name. Knows nothing about text, files or federation.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Self

from torch import Tensor, nn

from llmchain_fed.errors import ConfigError
from llmchain_fed.model import weights
from llmchain_fed.model.adapters import residents, switching


class AdapterViews:
    """What `LocalModel` can do with several adapters on its module.

    A view is another object over the same module, lock and tokenizer. The ordinary model answers with the primary
    adapter, the one that was active when it was made, which is called `"global"`, and with the remainder.
    """

    module: nn.Module
    _lock: threading.RLock
    _primary: tuple[str, ...]
    """PEFT's names for the adapters that were active when the model was made"""
    _view: str | None = None
    _frozen: frozenset[str] = frozenset()
    """within `freezing`: what is not trained of a view's adapter"""

    @property
    def adapters(self) -> list[str]:
        """The adapters to choose from: `"global"`, the one that is trained, and the residents; none without LoRA."""
        return switching.names(self.module, self._primary)

    @property
    def adapter(self) -> str | None:
        """Which one a view answers with, `""` for the bare base; None for the ordinary model."""
        return self._view

    @property
    def _is_ordinary(self) -> bool:
        return self._view in (None, switching.GLOBAL)

    @property
    def peft_names(self) -> tuple[str, ...]:
        """PEFT's names for the adapters that answer, in `module.peft_config`: one as a rule, none without PEFT."""
        if self._is_ordinary:
            return self._primary
        return switching.keys_of(self.module, self._primary, self._view) if self._view else ()

    def with_adapter(self, name: str) -> Self:
        """The same module behind the same lock, answering with, and training, this adapter.

        The view's `module`, called directly, answers as the ordinary model's does: use `exclusive()`. The remainder
        goes along with `"global"` alone.

        Raises:
            ConfigError: There is no adapter of this name.
            UnsupportedModelError: The module has no LoRA adapter, or one is merged into the base.
        """
        if name in self._primary and name not in self.adapters:  # PEFT's own name for it
            name = switching.GLOBAL
        switching.keys_of(self.module, self._primary, name)
        switching.check_unmerged(switching.registry_of(self.module))
        return self._viewed(name)

    def without_adapter(self) -> Self:
        """The same module behind the same lock, answering as the bare base; it cannot be trained.

        Raises:
            UnsupportedModelError: The module has no LoRA adapter, or one is merged into the base.
        """
        switching.check_unmerged(switching.registry_of(self.module))
        return self._viewed("")

    def _viewed(self, name: str) -> Self:
        view = object.__new__(type(self))  # a copy would have a lock of its own
        view.__dict__ |= self.__dict__ | {"_view": name, "_loads": 0, "_hash": None, "_frozen": frozenset()}
        return view

    def add_adapter(
        self, name: str, state: Mapping[str, Tensor], *, scaling: Mapping[str, float] | float | None = None
    ) -> None:
        """Makes or overwrites a resident adapter, frozen and in float32; all of it or, if it does not fit, nothing.

        Args:
            name: The adapter's name may be any text but `"global"`.
            state: `<layer>.lora_A.weight` (r, n) and `<layer>.lora_B.weight` (m, r) for every layer of the trained
                adapter; ranks may differ from it and from layer to layer.
            scaling: B·A is multiplied by this, one number or one a layer; by default by the trained adapter's.

        Raises:
            ConfigError: The name is taken by the trained adapter, or is no text.
            WeightsMismatchError: Names or shapes differ, or values are not finite floats.
            UnsupportedModelError: It has no LoRA, one beyond two factors a layer (DoRA, embeddings) or a merged one.
        """
        with self._lock:
            residents.add(self.module, self._primary, name, state, scaling)

    def remove_adapter(self, name: str) -> None:
        """Takes a resident adapter away; views of it raise from now on.

        Raises:
            ConfigError: There is no adapter of this name, or it is the trained one.
        """
        with self._lock:
            residents.remove(self.module, self._primary, name)

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """Copies of an adapter's factors on the CPU by stable name; `"global"` is the trained one.

        Raises:
            ConfigError: There is no adapter of this name.
        """
        with self._lock:
            keys = switching.keys_of(self.module, self._primary, name)
            return residents.state(self.module, switching.one(self.module, keys))

    def lora_scaling(self) -> dict[str, float]:
        """Layer's stable name → what the product of this model's factors is multiplied by, alpha / rank as a rule."""
        return residents.scalings(self.module, self._name_in_peft)

    def remainder(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The frozen addition to the base: layer's stable name → (B (m, R), A (R, n)); empty without one.

        On the CPU, and where the module is there too, they are the factors that it answers with: do not write into
        them. `load_remainder` puts others in their place, so they keep their values.
        """
        with self._lock:
            return residents.remainder(self.module)

    def load_remainder(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Makes B·A, in float32 and frozen, part of what the trained adapter stands on; `{}` takes it away.

        It answers and is trained around with the ordinary model and `with_adapter("global")`, not with a resident
        adapter and not without one. Layers may have any rank or none.

        Raises:
            WeightsMismatchError: The adapter is not in some layer, a shape is another, or values are NaN or infinite.
            UnsupportedModelError: The model has no plain LoRA adapter, or it is merged.
        """
        with self._lock:
            residents.load_remainder(self.module, self._primary, factors)

    @contextmanager
    def resized(self, rank: int, scaling: Mapping[str, float]) -> Iterator[None]:
        """Locks the module; inside, this model's factors are zeros of another rank, with these scalings by layer.

        The former parameters, rank and scalings come back afterwards, whatever happens: copy the state inside.

        Raises:
            ConfigError: The rank is no whole number of at least 1.
            WeightsMismatchError: The scalings name other layers, or one is no finite number.
        """
        with self.exclusive(), residents.resized(self.module, self._name_in_peft, rank, scaling):
            yield

    @contextmanager
    def freezing(self, names: Collection[str]) -> Iterator[None]:
        """Locks the module; inside, the trainable parameters of these stable names are not trainable.

        Raises:
            ConfigError: There is no such trainable parameter.
        """
        with self.exclusive():
            parameters, former = self._own_parameters(), self._frozen
            unknown = sorted(set(names) - parameters.keys())
            if unknown:
                msg = f"{unknown[:3]} cannot be frozen: the trainable parameters are {sorted(parameters)[:3]} …"
                raise ConfigError(msg)
            with switching.requiring_gradients([parameters[n] for n in names], required=False):
                self._frozen = former | set(names)
                try:
                    yield
                finally:
                    self._frozen = former

    @property
    def _name_in_peft(self) -> str:
        return switching.one(self.module, self.peft_names)

    # --- for LocalModel -----------------------------------------------------------------------------------------------

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Takes the lock, so that no other thread generates with or trains this module meanwhile.

        The module answers with this model's adapter meanwhile, and a view's own adapter requires gradients. A stream
        computes in a thread of its own: do not read one inside.
        """
        with self._lock, self._activated():
            own = [] if self._is_ordinary else switching.parameters_of(self.module, self.peft_names)
            if self._frozen:
                own = list(self._own_parameters().values())
            with switching.requiring_gradients(own, required=True):
                yield

    @contextmanager
    def _activated(self) -> Iterator[None]:
        """This model's adapter answers inside; the lock must be taken."""
        with switching.activated(self.module, self.peft_names, ordinary=self._is_ordinary):
            yield

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        """Stable name → parameter: what training this model changes."""
        if self._is_ordinary:
            return weights.trainable_parameters(self.module, self._primary)
        found = weights.adapter_parameters(self.module, self.peft_names)
        return {name: p for name, p in found.items() if name not in self._frozen}

    def _deciding_parameters(self) -> dict[str, nn.Parameter]:
        """Stable name → parameter: what can differ over one base and decides this model's answers."""
        remainder = [switching.REMAINDER] if self._is_ordinary else []
        return weights.deciding_parameters(self.module, self.peft_names, with_others=remainder)

    @property
    def _changes(self) -> int:
        return switching.changes(
            self.module, [*self.peft_names, switching.REMAINDER] if self._is_ordinary else self.peft_names
        )
