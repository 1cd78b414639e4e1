"""What others call the options of a training and of a federation, and where they are here.

Knows names of transformers' TrainingArguments, TRL's SFTConfig, Flower's strategies and apps. Knows nothing of what any
option does.
"""

from __future__ import annotations

from collections.abc import Mapping

_BATCH = "batch_size= (examples per optimizer step) and micro_batch_size= (examples per forward pass, to save memory)"
_SCHEDULE = 'lr_schedule="constant" | "linear" | "cosine"'
_WARMUP = "warmup=, a share of all steps such as 0.1, or a number of steps"
_HOW_LONG = "epochs= or max_steps=, of each round"
_ADAMS = "optimizer=torch.optim.AdamW([torch.zeros(1)], …), whose settings are taken as the template"
_EVALUATION = "evaluation= of FederatedAveraging: held-out loss is measured before and after each round"
_LORA = "lora=LoraConfig(…) of from_pretrained"
_LOADING = "dtype= and quantization_config= of from_pretrained"

OF_TRAINING: Mapping[str, str] = {
    # transformers and TRL
    "num_train_epochs": "epochs=, of each round",
    "num_epochs": "epochs=, of each round",
    "train_batch_size": _BATCH,
    "per_device_train_batch_size": _BATCH,
    "per_gpu_train_batch_size": _BATCH,
    "gradient_accumulation_steps": (
        "micro_batch_size=: an optimizer step of batch_size examples is accumulated over forward passes of so many, so "
        "4 steps of 8 are batch_size=32, micro_batch_size=8"
    ),
    "lr": "learning_rate= of TrainingConfig, lr= of FederatedAveraging",
    "lr_scheduler": _SCHEDULE,
    "lr_scheduler_type": _SCHEDULE,
    "scheduler": _SCHEDULE,
    "warmup_ratio": _WARMUP,
    "warmup_steps": _WARMUP,
    "num_warmup_steps": _WARMUP,
    "bf16": 'precision="bf16"',
    "fp16": 'precision="bf16": float16 needs a scaled loss, and is not offered',
    "mixed_precision": 'precision="bf16"',
    "activation_checkpointing": "gradient_checkpointing=True",
    "gradient_checkpointing_kwargs": "gradient_checkpointing=True, which is without reentrance",
    "max_seq_length": "max_length=, in tokens: longer examples are left out and counted",
    "model_max_length": "max_length=, in tokens: longer examples are left out and counted",
    "optim": 'optimizer="adamw" | "adam" | "sgd", a torch.optim class or an instance',
    "adam_beta1": _ADAMS,
    "adam_beta2": _ADAMS,
    "adam_epsilon": _ADAMS,
    "momentum": "optimizer=torch.optim.SGD([torch.zeros(1)], lr=…, momentum=…), taken as the template",
    "gradient_clipping": "max_grad_norm=",
    "max_norm": "max_grad_norm=",
    "data_seed": "seed=",
    "random_state": "seed=",
    "group_by_length": "nothing to set: batches are of similar length",
    "completion_only_loss": "nothing to set: the loss is over completions alone",
    "assistant_only_loss": "nothing to set: the loss is over answers alone",
    "packing": "nothing to set: batches are of similar length, and no example is cut",
    "peft_config": _LORA,
    "lora_config": _LORA,
    "load_in_4bit": _LOADING,
    "load_in_8bit": _LOADING,
    "output_dir": "checkpoint_dir= of FederatedAveraging",
    "logging_steps": "callbacks= of FederatedAveraging: TensorBoard, MLflow, Trackio, ConsoleTable",
    "report_to": "callbacks= of FederatedAveraging: TensorBoard, MLflow, Trackio, ConsoleTable",
    "save_total_limit": "keep_checkpoints= of FederatedAveraging",
    "save_strategy": "checkpoint_dir= of FederatedAveraging, which writes after each round",
    "eval_strategy": _EVALUATION,
    "evaluation_strategy": _EVALUATION,
    "eval_steps": _EVALUATION,
    "mu": "proximal_mu=",
    # Flower
    "local_epochs": "epochs=, of each round",
    "local_steps": "max_steps=, of each round",
    "learning_rate_max": "learning_rate=, the largest that is reached",
    "learning_rate_min": "lr_schedule=, which falls to 0",
}
OF_FEDERATION: Mapping[str, str] = {
    "num_rounds": "fit(rounds=…)",
    "num_server_rounds": "fit(rounds=…)",
    "rounds": "fit(rounds=…)",
    "epochs": "training=TrainingConfig(epochs=…), of each round",
    "fraction_fit": "participants_per_round=, a share as a float",
    "fraction_train": "participants_per_round=, a share as a float",
    "fraction_evaluate": _EVALUATION,
    "clients": "participants=",
    "num_clients": "participants=, who they are",
    "min_fit_clients": "quorum=",
    "min_train_nodes": "quorum=",
    "min_available_clients": "quorum=",
    "min_available_nodes": "quorum=",
    "strategy": 'aggregation="fedavg" …, with server_optimizer=FedAdam() … beside it',
    "timeout": "deadline=, in seconds",
    "round_timeout": "deadline=, in seconds",
    "client_resources": "nothing to set: participants of one process train one after the other on its device",
}
"""beside those of a training"""


def meant_in_training(name: str) -> str | None:
    """Where an option of somebody else's is, for who looked for it in a TrainingConfig; None of one that nobody knows.

    >>> meant_in_training("num_train_epochs")
    'here it is epochs=, of each round'
    """
    known = name.replace("-", "_").lower()
    if known in OF_TRAINING:
        return f"here it is {OF_TRAINING[known]}"
    return f"FederatedAveraging has it: {OF_FEDERATION[known]}" if known in OF_FEDERATION else None


def meant_in_federation(name: str) -> str | None:
    """The same for who looked for it at FederatedAveraging.

    >>> meant_in_federation("num-server-rounds"), meant_in_federation("bf16")
    ('here it is fit(rounds=…)', 'training=TrainingConfig(…) has it: precision="bf16"')
    """
    known = name.replace("-", "_").lower()
    if known in OF_FEDERATION:
        return f"here it is {OF_FEDERATION[known]}"
    return f"training=TrainingConfig(…) has it: {OF_TRAINING[known]}" if known in OF_TRAINING else None
