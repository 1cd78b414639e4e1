"""FederationFile: what `llmchain-fed federate` reads. A federation's options as YAML, checked before anything starts.

Knows options and paths. Knows nothing of how a federation runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from llmchain_fed._config import FrozenConfig, read_options
from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.client.personalization import Ditto
from llmchain_fed.runtimes.names import check_name
from llmchain_fed.training.loop import TrainingConfig
from llmchain_fed.untrusted import decoding, shown
from llmchain_fed.updates.aggregation import Weighting, make_aggregation
from llmchain_fed.updates.aggregation.weight_share import Share
from llmchain_fed.updates.codecs import make_codec
from llmchain_fed.updates.server_optimizers import ServerOptimizer, from_settings

_LONGEST = 10.0**9  # seconds; some thirty years


def _bounded(path: Path) -> Path:
    if len(str(path)) > 4096 or "\0" in str(path):
        msg = "that is no path of a file"
        raise ValueError(msg)
    return path


Name = Annotated[str, Field(min_length=1, max_length=200)]
Place = Annotated[Path, AfterValidator(_bounded)]


class HubOptions(FrozenConfig):
    """Options of `NVFlare`."""

    admin: Place
    """folder of the administrator's kit, relative to the file"""
    sites: tuple[Name, ...] = Field(min_length=1, max_length=10_000)
    socket: Place | None = None
    """where the job finds this process; by default a path that follows from `admin`"""
    patience: float = Field(default=30.0, gt=0, le=_LONGEST)
    """seconds without a sign of life after which a site counts as absent"""
    recovery: float = Field(default=120.0, gt=0, le=_LONGEST)
    """seconds within which the engine must be back after it went away"""
    startup: float = Field(default=10.0, gt=0, le=_LONGEST)
    """seconds to wait for all sites before the first job; six times as long while nobody is there at all"""


class FederationFile(FrozenConfig):
    """A federation as a file; options that are left out are those of `FederatedAveraging`."""

    chain: str = Field(min_length=1, max_length=4096)
    """a recipe's name, or a folder that `chain.save` wrote, relative to the file"""
    hub: HubOptions
    out: Place
    """folder for the trained chain and the history, relative to the file"""
    rounds: int = Field(default=3, ge=1, le=10**9)
    """in all: those that a checkpoint holds already count"""
    checkpoint_dir: Place | None = None
    """where a checkpoint is written after each round, relative to the file; by default `checkpoints` in `out`. Started
    again, the federation goes on"""
    keep_checkpoints: int | None = Field(default=3, ge=1)
    aggregation: Name = "fedavg"
    codec: Name | None = None
    """what updates travel as: bf16, int8, int4, topk:<ratio>"""
    broadcast_codec: Name | None = None
    server_optimizer: dict[str, Any] | None = None
    """its class and options, such as {class: FedAdam, lr: 0.01}"""
    personal: Ditto | None = None
    """a personal model at every site, such as {lam: 0.1}"""
    training: TrainingConfig = TrainingConfig()
    participants_per_round: int | float | None = None
    quorum: int = Field(default=1, ge=1)
    deadline: float | None = Field(default=None, gt=0, le=_LONGEST)
    """seconds a round's training may take"""
    retries: int = Field(default=1, ge=0, le=1000)
    weighting: Weighting = "examples"
    max_weight_share: Share | None = None
    """the largest share of a round that one site's update may weigh"""
    samples: int = Field(default=0, ge=0, le=10_000)
    seed: int = 0

    @classmethod
    def read(cls, path: str | Path) -> FederationFile:
        """Reads a file; its relative paths start at its folder.

        Raises:
            ConfigError: No such file, an unknown option, or a value out of range.
        """
        options = read_options(path, "federation")
        with decoding(f"the federation file {shown(str(path), 300)}", ConfigError):
            return cls._of(options, Path(path).absolute().parent)

    @classmethod
    def _of(cls, options: dict[str, Any], here: Path) -> FederationFile:
        for name, kind in (("hub", HubOptions), ("training", TrainingConfig), ("personal", Ditto)):
            if isinstance(options.get(name), dict):
                options[name] = kind(**options[name])
        found = cls(**options)
        for site in found.hub.sites:
            check_name(site)
        chain = str(here / found.chain) if (here / found.chain / "chain.yaml").is_file() else found.chain
        moved: FederationFile = found.replace(
            hub=found.hub.replace(admin=here / found.hub.admin),
            out=here / found.out,
            chain=chain,
            checkpoint_dir=here / (found.checkpoint_dir or found.out / "checkpoints"),
        )
        make_aggregation(moved.aggregation)
        for choice in (moved.codec, moved.broadcast_codec):
            make_codec(choice)
        moved.loop_options()
        if moved.quorum > len(moved.hub.sites):
            msg = f"a quorum of {moved.quorum} can never be met by {len(moved.hub.sites)} sites."
            raise ConfigError(msg)
        return moved

    def loop_options(self) -> dict[str, Any]:
        """What `FederatedAveraging` is given."""
        names = ["training", "participants_per_round", "quorum", "deadline", "retries", "weighting", "samples", "seed"]
        names += ["max_weight_share", "aggregation", "codec", "broadcast_codec", "personal", "keep_checkpoints"]
        optimizer = _server_optimizer(self.server_optimizer) if self.server_optimizer is not None else None
        return {name: getattr(self, name) for name in names} | {"server_optimizer": optimizer}


def _server_optimizer(settings: dict[str, Any]) -> ServerOptimizer:
    """The optimizer that a file describes; what a user's own code may be, a file can not."""
    if not isinstance(settings.get("class"), str):
        msg = (
            f"server_optimizer: `class` is {shown(settings.get('class'))}. Write a name, such as "
            "{class: FedAdam, lr: 0.01}."
        )
        raise ConfigError(msg)
    return from_settings(settings)
