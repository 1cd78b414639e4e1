"""About: what of a federation a reader of its history should know beside the rounds, as plain bounded data.

Knows a server, its model and its options. Knows nothing of pages; never anything of an example's text.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from llmchain_fed.model.local_model import LocalModel
from llmchain_fed.untrusted import one_line

if TYPE_CHECKING:
    from llmchain_fed.federated.history import RoundRecord
    from llmchain_fed.federated.server.server import Server

_PACKAGES = ("llmchain-fed", "torch", "transformers", "peft", "langchain-core")
_LONGEST = 400  # characters of a value


def about_of(server: Server, record: RoundRecord, former: Mapping[str, Any]) -> dict[str, Any]:
    """What is known once a round has been recorded; of what was known before, the beginning and who has gone stay."""
    ended = time.time()
    data = dict(former.get("data", {}))
    for name, hello in server.client_manager.joined.items():
        counts = {key: count for key, count in (hello.report or {}).items() if count}
        counts |= {"used": hello.num_examples} if hello.num_examples else {}
        data[name] = counts | ({"held_out": hello.held_out_examples} if hello.held_out_examples else {})
    return {
        "began": former.get("began") or _clock(ended - record.seconds),
        "ended": _clock(ended),
        "versions": {"python": platform.python_version(), **_versions()},
        "model": _model(server.model),
        "options": options_of(server.settings.config.model_dump(mode="json")),
        "shares": _shares(server),
        "simulated": server.runtime.sequential,
        "data": data,
    }


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a federation, flat; what is neither a number nor a word stands there as JSON.

    Labels are completions: how many there are is said, not which.

    >>> options_of({"seed": 0, "training": {"batch_size": 8, "labels": ["ill", "well"]}})
    {'seed': 0, 'training.batch_size': 8, 'training.labels': '2 labels'}
    """
    found: dict[str, Any] = {}
    for name, value in config.items():
        nested = value if isinstance(value, Mapping) else {"": value}
        found |= {f"{name}.{key}" if key else name: each for key, each in nested.items()}
    labels = found.get("training.labels")
    found |= {"training.labels": f"{len(labels)} labels"} if labels else {}
    if isinstance(found.get("training.class_weight"), Mapping):  # its keys are labels
        found["training.class_weight"] = "by label"
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), _LONGEST)


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # pragma: no cover (ours, where it runs from a folder that was never installed)
            continue
    return found


def _model(model: LocalModel) -> dict[str, Any]:
    trained = list(model.trainable_parameters().values())
    return {
        "name": one_line(model.name, _LONGEST),
        "kind": model.kind,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in trained),
        "tensors": len(trained),
        "adapter": _adapter(model),
        "fingerprint": model.fingerprint(),
        "device": str(model.device),
    }


def _adapter(model: LocalModel) -> str | None:
    """The trained adapter in words; None where weights of the base are trained."""
    configs = getattr(model.module, "peft_config", {})
    config = configs.get(model.peft_names[0]) if model.peft_names else None
    if config is None:
        return None
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    rank, alpha = getattr(config, "r", None), getattr(config, "lora_alpha", None)
    return "LoRA" + f", rank {rank}, alpha {alpha:g}" if kind == "LORA" and rank and alpha else one_line(kind, 80)


def _shares(server: Server) -> str:
    """Which of the trained tensors leave a participant, over the rounds."""
    found = list(dict.fromkeys(server.settings.rule.shares(number) for number in range(4)))
    return found[0] if len(found) == 1 else "A and B in turn"
