"""Several LoRA adapters on one base: switching between them, residents, the frozen remainder, another rank.

Knows PEFT's LoRA layers. Knows nothing about text, files or federation.
"""

from llmchain_fed.model.adapters.residents import (
    Factors,
    add,
    load_remainder,
    remainder,
    remove,
    resized,
    scalings,
    state,
)
from llmchain_fed.model.adapters.switching import (
    GLOBAL,
    REMAINDER,
    activated,
    changes,
    has_remainder,
    idle_parameters,
    keys_of,
    lora_layers,
    names,
    one,
    requiring_gradients,
)

__all__ = [
    "GLOBAL",
    "REMAINDER",
    "Factors",
    "activated",
    "add",
    "changes",
    "has_remainder",
    "idle_parameters",
    "keys_of",
    "load_remainder",
    "lora_layers",
    "names",
    "one",
    "remainder",
    "remove",
    "requiring_gradients",
    "resized",
    "scalings",
    "state",
]
