"""FixedOptions: a federation's options stay what they were made with; setting one later says what to do instead.

Knows names of options. Knows nothing about what they do.
"""

from __future__ import annotations

from typing import Any

from llmchain_fed._config import unknown_option
from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.options import FederationConfig, FederationOptions
from llmchain_fed.training.names import meant_in_federation

_BESIDE = ("model", "participants", "optimizer", "checkpoint_dir")


class FixedOptions:
    """The part of `FederatedAveraging` that refuses attributes it would never look at."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses options, what is read only, and names that nothing here has; a subclass may add its own.

        Raises:
            ConfigError: It is one of these; nothing has changed.
        """
        there = getattr(type(self), name, None)
        options = (*FederationOptions.__annotations__, *_BESIDE)
        if name in options:
            differ = FederationConfig.model_fields.keys() - FederationConfig().decisive().keys()
            again = f" A run with checkpoints goes on with another: resume(…, {name}=…)." if name in differ else ""
            msg = (
                f"{name} is decided when a federation is made, and setting it later would change nothing. Make another "
                f"over the same chain, which goes on from the weights it has: FederatedAveraging(chain, {name}=…)."
            )
            raise ConfigError(msg + again)
        if isinstance(there, property) and there.fset is None:
            msg = f"{name} can be read, and not set: rounds decide it."
            raise ConfigError(msg)
        known = there is not None or name.startswith("_") or type(self).__module__.partition(".")[0] != _OWN
        if not known:
            said = unknown_option(name, options, meant_in_federation(name))
            msg = f"FederatedAveraging has nothing of that name to set: {said}. All are given when it is made."
            raise ConfigError(msg)
        super().__setattr__(name, value)


_OWN = __name__.partition(".")[0]
