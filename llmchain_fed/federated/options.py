"""Options: frozen types of a federation's options that have options of their own. Data without code.

Knows pydantic. Knows nothing of what does as they say, so that whoever writes options down need not know it either.
"""

from __future__ import annotations

from pydantic import Field

from llmchain_fed._config import FrozenConfig


class Ditto(FrozenConfig):
    """Every participant also trains a personal model, which is pulled to the global one (arXiv 2012.04221).

    The personal model minimises its own loss + λ/2·‖v − w‖², with w the global weights of the round; the global model
    is trained as without it. λ = 0 is local training alone. With SGD a step needs lr·λ < 2. All of the personal adapter
    is trained, also under `ffa` and `rolora`, which train one factor of the global one.

    >>> Ditto(lam=0.5)
    Ditto(lam=0.5)
    """

    lam: float = Field(default=0.1, ge=0.0, le=1e6, allow_inf_nan=False)
    """λ; 0.1 is NVFlare's default"""
    max_steps: int | None = Field(default=None, ge=1)
    """optimizer steps of the personal model a round; as many as the global training's by default"""
