"""llmchain_fed: a LangChain chain that several parties improve together without showing each other their data.

    chain.invoke(x)  →  FederatedAveraging(chain, participants=…).fit(rounds=3)  →  chain.invoke(x)

The public names. torch, transformers and langchain_core load on first use of one that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmchain_fed.errors import (
    ChainFileError,
    ChatTemplateError,
    CheckpointError,
    ConfigError,
    ContractError,
    DataError,
    DeadlineError,
    DialogueError,
    DuplicateParticipantError,
    EmptyParticipantError,
    ExampleFailedError,
    FederationError,
    LabelError,
    LLMChainFedError,
    MissingExtraError,
    ModelError,
    NonFiniteLossError,
    NothingTrainedError,
    NotTrainableError,
    ParticipantError,
    PolicyError,
    PromptTooLongError,
    PromptVariablesError,
    QuorumError,
    RecipeError,
    SchemaError,
    TemplatedTwiceError,
    TrainingError,
    TransportError,
    UnsayableError,
    UnsupportedModelError,
    UpdateRefusedError,
    WeightsMismatchError,
)

if TYPE_CHECKING:
    from llmchain_fed.chain.chat import LocalChatModel
    from llmchain_fed.chain.labels import Classification
    from llmchain_fed.chain.llm import LocalLLM
    from llmchain_fed.chain.llm_chain import LLMChain
    from llmchain_fed.data.examples import Example, RawText
    from llmchain_fed.data.report import DataReport
    from llmchain_fed.data.split import Split
    from llmchain_fed.federated.averaging import FederatedAveraging
    from llmchain_fed.federated.callbacks import Callback, Stop
    from llmchain_fed.federated.client.operations import register_task
    from llmchain_fed.federated.comparison.arms import Arm
    from llmchain_fed.federated.comparison.results import Comparison
    from llmchain_fed.federated.history import History
    from llmchain_fed.federated.learning import FederatedLearning
    from llmchain_fed.federated.options import Ditto, FederationConfig
    from llmchain_fed.federated.participant import Participant
    from llmchain_fed.federated.runtime import Runtime
    from llmchain_fed.library import list_chains, list_prompts, load_chain, load_prompt
    from llmchain_fed.model.local_model import LocalModel
    from llmchain_fed.recipes.parsers import LabelParser
    from llmchain_fed.runtimes.nvflare.runtime import NVFlare
    from llmchain_fed.runtimes.site.policy import Policy
    from llmchain_fed.runtimes.site.site import Site
    from llmchain_fed.runtimes.torch_distributed import TorchDistributed
    from llmchain_fed.tracking.console import ConsoleTable
    from llmchain_fed.tracking.mlflow import MLflow
    from llmchain_fed.tracking.tensorboard import TensorBoard
    from llmchain_fed.tracking.trackio import Trackio
    from llmchain_fed.training.config import TrainingConfig
    from llmchain_fed.training.evaluation import evaluate_locally
    from llmchain_fed.training.loop import train_locally
    from llmchain_fed.training.metrics import Metric
    from llmchain_fed.updates.aggregation.base import Rule
    from llmchain_fed.updates.collection import Collection, Combined
    from llmchain_fed.updates.server_optimizers.adaptive import FedAdagrad, FedAdam, FedAvgM, FedYogi, Reptile
    from llmchain_fed.updates.server_optimizers.torch_optimizers import DiLoCo, TorchServerOptimizer
    from llmchain_fed.updates.transforms.base import UpdateTransform

__version__ = "0.1.0"

_HOMES = {
    "Arm": "federated.comparison.arms",
    "Callback": "federated.callbacks",
    "Classification": "chain.labels",
    "Collection": "updates.collection",
    "Combined": "updates.collection",
    "Comparison": "federated.comparison.results",
    "ConsoleTable": "tracking.console",
    "DataReport": "data.report",
    "DiLoCo": "updates.server_optimizers.torch_optimizers",
    "Ditto": "federated.options",
    "Example": "data.examples",
    "FedAdagrad": "updates.server_optimizers.adaptive",
    "FedAdam": "updates.server_optimizers.adaptive",
    "FedAvgM": "updates.server_optimizers.adaptive",
    "FedYogi": "updates.server_optimizers.adaptive",
    "FederatedAveraging": "federated.averaging",
    "FederatedLearning": "federated.learning",
    "FederationConfig": "federated.options",
    "History": "federated.history",
    "LLMChain": "chain.llm_chain",
    "LabelParser": "recipes.parsers",
    "LocalChatModel": "chain.chat",
    "LocalLLM": "chain.llm",
    "LocalModel": "model.local_model",
    "MLflow": "tracking.mlflow",
    "Metric": "training.metrics",
    "NVFlare": "runtimes.nvflare.runtime",
    "Participant": "federated.participant",
    "Policy": "runtimes.site.policy",
    "RawText": "data.examples",
    "Reptile": "updates.server_optimizers.adaptive",
    "Rule": "updates.aggregation.base",
    "Runtime": "federated.runtime",
    "Site": "runtimes.site.site",
    "Split": "data.split",
    "Stop": "federated.callbacks",
    "TensorBoard": "tracking.tensorboard",
    "TorchDistributed": "runtimes.torch_distributed",
    "TorchServerOptimizer": "updates.server_optimizers.torch_optimizers",
    "Trackio": "tracking.trackio",
    "TrainingConfig": "training.config",
    "UpdateTransform": "updates.transforms.base",
    "evaluate_locally": "training.evaluation",
    "list_chains": "library",
    "list_prompts": "library",
    "load_chain": "library",
    "load_prompt": "library",
    "register_task": "federated.client.operations",
    "train_locally": "training.loop",
}

__all__ = [
    "Arm",
    "Callback",
    "ChainFileError",
    "ChatTemplateError",
    "CheckpointError",
    "Classification",
    "Collection",
    "Combined",
    "Comparison",
    "ConfigError",
    "ConsoleTable",
    "ContractError",
    "DataError",
    "DataReport",
    "DeadlineError",
    "DiLoCo",
    "DialogueError",
    "Ditto",
    "DuplicateParticipantError",
    "EmptyParticipantError",
    "Example",
    "ExampleFailedError",
    "FedAdagrad",
    "FedAdam",
    "FedAvgM",
    "FedYogi",
    "FederatedAveraging",
    "FederatedLearning",
    "FederationConfig",
    "FederationError",
    "History",
    "LLMChain",
    "LLMChainFedError",
    "LabelError",
    "LabelParser",
    "LocalChatModel",
    "LocalLLM",
    "LocalModel",
    "MLflow",
    "Metric",
    "MissingExtraError",
    "ModelError",
    "NVFlare",
    "NonFiniteLossError",
    "NotTrainableError",
    "NothingTrainedError",
    "Participant",
    "ParticipantError",
    "Policy",
    "PolicyError",
    "PromptTooLongError",
    "PromptVariablesError",
    "QuorumError",
    "RawText",
    "RecipeError",
    "Reptile",
    "Rule",
    "Runtime",
    "SchemaError",
    "Site",
    "Split",
    "Stop",
    "TemplatedTwiceError",
    "TensorBoard",
    "TorchDistributed",
    "TorchServerOptimizer",
    "Trackio",
    "TrainingConfig",
    "TrainingError",
    "TransportError",
    "UnsayableError",
    "UnsupportedModelError",
    "UpdateRefusedError",
    "UpdateTransform",
    "WeightsMismatchError",
    "__version__",
    "evaluate_locally",
    "list_chains",
    "list_prompts",
    "load_chain",
    "load_prompt",
    "register_task",
    "train_locally",
]


def __getattr__(name: str) -> Any:
    """Loads a public name from its module on first use (PEP 562)."""
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
