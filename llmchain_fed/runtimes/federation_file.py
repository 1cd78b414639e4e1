"""FederationFile: what `llmchain-fed federate` reads. A federation's options as YAML, checked before anything starts.

Knows options and paths. Knows nothing of how a federation runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import AfterValidator, Field

from llmchain_fed._config import FrozenConfig, read_options
from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.fit import Keep
from llmchain_fed.federated.measures.monitor import LOSS
from llmchain_fed.federated.options import FederationConfig, FederationOptions
from llmchain_fed.federated.server.divergence import OnDivergence
from llmchain_fed.federated.settings import check_counts, config_of, training_of
from llmchain_fed.runtimes.names import check_name
from llmchain_fed.untrusted import decoding, shown
from llmchain_fed.updates.server_optimizers import ServerOptimizer, from_settings

_LONGEST = 10.0**9  # seconds; some thirty years


def _bounded(path: Path) -> Path:
    if len(str(path)) > 4096 or "\0" in str(path):
        msg = "that is no path of a file"
        raise ValueError(msg)
    return path


Name = Annotated[str, Field(min_length=1, max_length=200)]
Place = Annotated[Path, Field(strict=False), AfterValidator(_bounded)]


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


class FederationFile(FederationConfig):
    """A federation as a file: the options of `FederationConfig`, and what they are for."""

    chain: str = Field(min_length=1, max_length=4096)
    """a recipe's name, or a folder that `chain.save` wrote, relative to the file"""
    hub: HubOptions
    out: Place
    """folder for the trained chain and the history, relative to the file"""
    rounds: int = Field(default=3, ge=1, le=10**9)
    """in all: those that a checkpoint contains already count"""
    monitor: Name = LOSS
    """the pooled value that rounds are judged by: "held_out_loss", or a value of `metrics`"""
    keep: Keep = "last"
    """with which round's weights it ends: "last", or "best" by `monitor`"""
    patience: int | None = Field(default=None, ge=1, le=10**9)
    """ends early once that has not improved for so many rounds"""
    min_delta: float = Field(default=0.0, ge=0, le=1e9)
    """what counts as an improvement there"""
    on_divergence: OnDivergence = "warn"
    """"stop" ends it after a round that diverges"""
    checkpoint_dir: Place | None = None
    """where a checkpoint is written after each round, relative to the file; by default `checkpoints` in `out`. Started
    again, the federation goes on"""
    transforms: None = None
    gradient_step: None = None
    batch_sampler: None = None
    optimizer: None = None
    """no file stores code: `training: {optimizer: adamw}` names one"""
    evaluation: None = None
    """sites hold out examples of their own"""
    columns: None = None
    """and say themselves what their columns are called"""

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
        moved.written()
        check_counts(moved, len(moved.hub.sites))
        return moved

    def options(self) -> FederationOptions:
        """What `FederatedAveraging` is given."""
        code = {"optimizer", "transforms", "gradient_step", "batch_sampler"}
        names = FederationConfig.model_fields.keys() - code - {"evaluation", "columns"}
        given = {name: getattr(self, name) for name in sorted(names)}
        if self.server_optimizer is not None:
            given["server_optimizer"] = _server_optimizer(self.server_optimizer)
        return cast(FederationOptions, given)

    def fit_options(self) -> dict[str, Any]:
        """What `fit` is given beside its rounds."""
        return {name: getattr(self, name) for name in ("monitor", "keep", "patience", "min_delta", "on_divergence")}

    @property
    def may_end_early(self) -> bool:
        """Whether it may end before its last round."""
        return self.patience is not None or self.on_divergence == "stop"

    def written(self) -> FederationConfig:
        """The same as a checkpoint of it contains them.

        Raises:
            ConfigError: There is no such rule, codec or server optimizer.
        """
        options = self.options()
        return config_of(options, training_of(options))


def _server_optimizer(settings: dict[str, Any] | str) -> ServerOptimizer:
    """The optimizer that a file describes; what a user's own code may be, a file can not."""
    if not isinstance(settings, dict) or not isinstance(settings.get("class"), str):
        found = settings.get("class") if isinstance(settings, dict) else settings
        msg = f"server_optimizer: `class` is {shown(found)}. Write a name, such as {{class: FedAdam, lr: 0.01}}."
        raise ConfigError(msg)
    return from_settings(settings)
