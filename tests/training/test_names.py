"""Options by the names that others give them: each is refused, and the remedy is an option that there is."""

import inspect
import re

import pytest
from tiny import PAIRS

from llmchain_fed import ConfigError, FederatedAveraging, Participant, TrainingConfig
from llmchain_fed.federated.options import FederationOptions
from llmchain_fed.training.names import OF_FEDERATION, OF_TRAINING

KNOWN = {
    *TrainingConfig.model_fields, *FederationOptions.__annotations__, "participants", "checkpoint_dir", "optimizer",
    "rounds", "training", "lora", "dtype", "quantization_config", "lr",
}  # fmt: skip
OF_TORCH = {"momentum"}


@pytest.mark.parametrize(
    ("table", "own"), [(OF_TRAINING, TrainingConfig.model_fields), (OF_FEDERATION, FederationOptions.__annotations__)]
)
def test_the_tables_name_options_that_there_are_and_none_that_is_known_here_anyway(table, own):
    assert not table.keys() & own.keys()
    for name, meant in table.items():
        said = set(re.findall(r"\b([a-z_]+)=", meant))
        assert said <= KNOWN | OF_TORCH, name
        assert said or "nothing to set" in meant


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("num_train_epochs", "here it is epochs="), ("lr_scheduler_type", "here it is lr_schedule="),
        ("gradient_accumulation_steps", "batch_size=32, micro_batch_size=8"),
        ("per_device_train_batch_size", "here it is batch_size="), ("warmup_ratio", "here it is warmup=, a share"),
        ("bf16", 'here it is precision="bf16"'), ("fraction_fit", "FederatedAveraging has it: participants_per_round"),
        ("local-epochs", "here it is epochs="), ("batchsize", "did you mean `batch_size`?"),
    ],
)  # fmt: skip
def test_a_training_option_by_another_name_is_refused_with_its_own(name, remedy):
    for make in (lambda **o: TrainingConfig(**o), lambda **o: TrainingConfig().replace(**o)):
        with pytest.raises(ConfigError, match=rf"^TrainingConfig: unknown option `{name}`; ") as found:
            make(**{name: 1})
        assert remedy in str(found.value)
        assert "Valid: batch_size, " in str(found.value)


def test_the_names_of_transformers_and_trl_are_those_in_their_own_signature():
    transformers = pytest.importorskip("transformers")
    theirs = inspect.signature(transformers.TrainingArguments).parameters.keys()
    used = {
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "lr_scheduler_type",
        "bf16",
        "optim",
        "output_dir",
        "save_total_limit",
        "report_to",
        "data_seed",
    }
    assert used <= theirs & OF_TRAINING.keys()


def test_a_federation_says_where_an_option_is(make_chain):
    for name, remedy in (
        ("num_train_epochs", r"training=TrainingConfig\(…\) has it: epochs="),
        ("num_rounds", r"here it is fit\(rounds=…\)"),
        ("strategy", r'here it is aggregation="fedavg"'),
        ("max_steps", r"It is one of training's: training=TrainingConfig\(max_steps=…\)"),
    ):
        with pytest.raises(
            ConfigError, match=rf"unknown option `{name}`; .*{remedy}|unknown option `{name}`.*{remedy}"
        ):
            FederatedAveraging(make_chain(), **{name: 1})
    with pytest.raises(
        ConfigError, match=r"participant 'a': TrainingConfig: unknown option `num_train_epochs`; here it"
    ):
        FederatedAveraging(make_chain(), participants=[Participant("a", PAIRS, training={"num_train_epochs": 2})])


def test_fit_refuses_what_it_does_not_have_and_runs_no_round(make_chain):
    fed = FederatedAveraging(make_chain(), participants={"a": PAIRS}, progress=False)
    with pytest.raises(
        ConfigError, match=r"fit: unknown option `epochs`; here it is training=TrainingConfig\(epochs=…\)"
    ):
        fed.fit(epochs=2)
    with pytest.raises(ConfigError, match=r"fit: unknown option `patiance`; did you mean `patience`\?"):
        fed.fit(2, patiance=1)
    assert fed.round == 0
    assert "patience" in inspect.signature(fed.fit).parameters
