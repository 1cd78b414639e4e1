"""The learning rate's schedule against transformers.get_scheduler, alone and over the rounds of a federation.

Belongs here: which rate each step has. Does not: what a site's policy makes of it (security/test_policy), resuming
(federated/checkpoint/test_resuming).
"""

import copy
import itertools
import math

import pytest
import torch
import transformers
from tiny import PAIRS
from torch.utils.data import DataLoader, IterableDataset

from llmchain_fed import (
    ConfigError,
    FederatedAveraging,
    FederatedLearning,
    LocalModel,
    NonFiniteLossError,
    Participant,
    TrainingConfig,
    train_locally,
)
from llmchain_fed.data.encoding import collate, encode_examples
from llmchain_fed.training.loop import mean_loss_gradient
from llmchain_fed.training.schedule import Schedule

NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def theirs(kind, total, warmup, lr=1.0):
    """Learning rates of transformers' own schedule, step by step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = transformers.get_scheduler(NAMES[kind], optimizer, num_warmup_steps=warmup, num_training_steps=total)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


class Rates(torch.optim.SGD):
    """SGD that notes the rate of every step."""

    seen: list[float] = []  # noqa: RUF012 (cleared by each test)

    def step(self, closure=None):
        Rates.seen.append(self.param_groups[0]["lr"])
        return super().step(closure)


@pytest.fixture(autouse=True)
def _forget():
    Rates.seen = []


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(
    ("total", "warmup"), [(1, 0), (7, 0), (10, 3), (10, 0.25), (9, 0.1), (4, 4), (3, 5), (100, 0.07)]
)
def test_every_step_of_one_training_has_the_rate_that_transformers_gives_it(kind, total, warmup, make_chain):
    config = TrainingConfig(
        optimizer=Rates, learning_rate=0.03, batch_size=4, max_steps=total, lr_schedule=kind, warmup=warmup
    )
    train_locally(make_chain(lora=True), PAIRS[:4], config)
    steps = math.ceil(total * warmup) if isinstance(warmup, float) else warmup  # TrainingArguments.get_warmup_steps
    assert Rates.seen == pytest.approx(theirs(kind, total, steps, 0.03), rel=1e-12, abs=1e-15)


def test_a_cosine_without_warmup_is_torchs_own():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    schedule = Schedule("cosine", total=12)
    for step in range(12):
        assert 0.3 * schedule.share(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        torchs.step()


def test_training_with_a_schedule_follows_a_plain_loop_with_transformers_own(make_chain):
    """AdamW, four steps over all examples, linear with one step of warm-up."""
    ours, plain = make_chain(lora=True), make_chain(lora=True)
    config = TrainingConfig(learning_rate=2e-3, batch_size=12, epochs=4, lr_schedule="linear", warmup=1)
    train_locally(ours, PAIRS, config)
    encoded = encode_examples(PAIRS, plain.model, plain)
    batch = collate([encoded[i] for i in range(len(encoded))], plain.model)
    parameters = [p for p in plain.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    schedule = transformers.get_scheduler("linear", optimizer, num_warmup_steps=1, num_training_steps=4)
    for _ in range(4):
        optimizer.zero_grad()
        plain.model.module(**batch).loss.backward()
        optimizer.step()
        schedule.step()
    wanted = plain.model.trainable_state()
    for name, value in ours.model.trainable_state().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_over_a_federation_rounds_are_parts_of_one_training(kind, make_chain):
    """Three rounds of two epochs over 12 examples in batches of 4: 18 steps, a tenth of them warm-up."""
    training = TrainingConfig(optimizer=Rates, learning_rate=0.01, batch_size=4, epochs=2, lr_schedule=kind, warmup=0.1)
    FederatedAveraging(make_chain(lora=True), participants={"a": PAIRS}, training=training, progress=False).fit(3)
    assert Rates.seen == pytest.approx(theirs(kind, 18, 2, 0.01))


def test_one_participant_with_a_schedule_is_plain_fine_tuning_bit_for_bit(make_chain):
    training = TrainingConfig(
        learning_rate=1e-2, batch_size=4, max_steps=2, lr_schedule="cosine", warmup=1, keep_optimizer=True
    )
    federated, plain = make_chain(), make_chain()
    FederatedAveraging(federated, participants={"a": PAIRS}, training=training, progress=False).fit(3)
    state, at = None, 0
    for number in range(3):
        done = train_locally(
            plain, PAIRS, training, participant="a", round=number, rounds=3, first_step=at, optimizer_state=state
        )
        state, at = done.optimizer_state, done.next_step
    assert federated.model.weights_hash == plain.model.weights_hash
    once = make_chain()  # and the same as one training of six steps, whose schedule knows of no rounds
    train_locally(once, PAIRS, training.replace(max_steps=6), participant="a")
    assert once.model.weights_hash == plain.model.weights_hash


def test_over_rounds_every_round_begins_anew(make_chain):
    training = TrainingConfig(
        optimizer=Rates, learning_rate=0.01, batch_size=4, lr_schedule="linear", lr_schedule_over="round"
    )
    fed = FederatedAveraging(make_chain(), participants={"a": PAIRS}, training=training, progress=False)
    fed.fit(2)
    assert Rates.seen == pytest.approx(2 * theirs("linear", 3, 0, 0.01))
    fed.train(PAIRS, "b")  # rounds by hand need no plan then
    fed.step()
    assert Rates.seen == pytest.approx(3 * theirs("linear", 3, 0, 0.01))


def test_a_second_fit_has_the_later_part_of_a_longer_schedule_unless_the_first_knew_of_it(make_chain):
    training = TrainingConfig(optimizer=Rates, learning_rate=1.0, batch_size=12, lr_schedule="linear")

    def fitted(*calls):
        Rates.seen = []
        fed = FederatedAveraging(make_chain(), participants={"a": PAIRS}, training=training, progress=False)
        for rounds, of in calls:
            fed.fit(rounds, of=of)
        return Rates.seen

    training = training.replace(learning_rate=1e-3)
    long, short = theirs("linear", 4, 0, 1e-3), theirs("linear", 2, 0, 1e-3)
    assert fitted((2, None), (2, None)) == pytest.approx(short + long[2:])
    assert fitted((2, 4), (2, 4)) == pytest.approx(long)
    assert fitted((1, 4), (3, None)) == pytest.approx(long)
    assert fitted((4, 2)) == pytest.approx(long)  # it has as many rounds as there are


def test_each_participant_has_the_rates_of_its_own_steps_and_options(make_chain):
    training = TrainingConfig(optimizer=Rates, learning_rate=1e-2, batch_size=2, lr_schedule="linear")
    people = [
        Participant("few", PAIRS[:4]),  # two steps a round
        Participant("many", PAIRS[4:]),  # four
        Participant("even", PAIRS[:4], training={"lr_schedule": "constant"}),
    ]
    FederatedAveraging(make_chain(), participants=people, training=training, progress=False).fit(2)
    few, many = theirs("linear", 4, 0, 1e-2), theirs("linear", 8, 0, 1e-2)
    rounds = [few[:2] + many[:4] + [1e-2] * 2, few[2:] + many[4:] + [1e-2] * 2]
    assert Rates.seen == pytest.approx([*itertools.chain(*rounds)])


def test_a_kept_optimizer_has_its_own_rate_between_trainings(make_chain):
    config = TrainingConfig(learning_rate=5e-3, batch_size=4, lr_schedule="linear", warmup=1, keep_optimizer=True)
    done = train_locally(make_chain(lora=True), PAIRS, config)
    assert done.optimizer_state["param_groups"][0]["lr"] == 5e-3
    assert "initial_lr" not in done.optimizer_state["param_groups"][0]


def test_a_personal_model_has_the_constant_rate(make_chain):
    training = TrainingConfig(optimizer=Rates, learning_rate=1e-2, batch_size=4, lr_schedule="cosine", warmup=0.5)
    fed = FederatedAveraging(make_chain(lora=True), participants={"a": PAIRS}, training=training, progress=False)
    fed.fit(1)
    Rates.seen = []
    fed.personalize("a", steps=3)
    assert Rates.seen == [1e-2] * 3


class Endless(IterableDataset):
    """Batches without a length."""

    def __init__(self, chain):
        encoded = encode_examples(PAIRS, chain.model, chain)
        self.rows = [encoded[i] for i in range(len(encoded))]
        self.model = chain.model

    def __iter__(self):
        return iter([collate(self.rows[at : at + 4], self.model) for at in (0, 4, 8)])


def test_a_loader_without_a_length_needs_max_steps(make_chain):
    chain = make_chain()
    config = TrainingConfig(optimizer=Rates, learning_rate=1e-2, lr_schedule="linear")
    loader = DataLoader(Endless(chain), batch_size=None)
    before = chain.model.weights_hash
    with pytest.raises(ConfigError, match="Set max_steps, or give its dataset a length"):
        train_locally(chain, loader, config)
    assert chain.model.weights_hash == before
    train_locally(chain, loader, config.replace(max_steps=5))
    assert Rates.seen == pytest.approx(theirs("linear", 5, 0, 1e-2))


def test_where_nobody_knows_how_many_rounds_there_are_the_remedy_is_said(make_chain):
    training = TrainingConfig(learning_rate=1e-2, batch_size=4, lr_schedule="linear")
    with pytest.raises(ConfigError, match=r"FederatedLearning does not know .*lr_schedule_over=.round"):
        FederatedLearning(make_chain(), [PAIRS], training=training)
    fed = FederatedAveraging(make_chain(), training=training, progress=False)
    with pytest.raises(ConfigError, match=r"train\(\) does not know how many those are\. Use .*fit\(rounds\)"):
        fed.train(PAIRS, "a")
    assert fed.round == 0
    FederatedAveraging(make_chain(), participants={"a": PAIRS}, training=training, progress=False).fit(1)


@pytest.mark.parametrize("wrong", [1.0, 1.5, -1, -0.1, True, "0.1", float("nan"), 2**60])
def test_a_warmup_is_a_share_below_one_or_a_count(wrong):
    with pytest.raises(ConfigError, match="`warmup"):
        TrainingConfig(warmup=wrong)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "3", 2**40])
def test_the_planned_number_of_rounds_is_a_count(wrong, make_chain):
    fed = FederatedAveraging(make_chain(), participants={"a": PAIRS}, progress=False)
    with pytest.raises(ConfigError, match="of= is how many rounds"):
        fed.fit(1, of=wrong)
    assert fed.round == 0


def test_no_share_exceeds_one_and_what_counts_is_near_the_largest():
    for kind, total, warmup, first, steps in itertools.product(NAMES, (1, 7, 40), (0, 3, 90), (0, 5), (1, 4)):
        schedule = Schedule(kind, total, warmup, first, steps)
        shares = [schedule.share(step) for step in range(steps)]
        assert all(0.0 <= share <= 1.0 for share in shares)
        # where no step moves anything, none is another's better
        wanted = [share > 0.1 * max(shares) or max(shares) == 0 for share in shares]
        assert [schedule.counts(step) for step in range(steps)] == wanted


def test_steps_are_told_as_they_are_done_and_nothing_else_changes(make_chain):
    told, silent = make_chain(), make_chain()
    config, seen = TrainingConfig(learning_rate=1e-2, batch_size=5, epochs=2), []
    train_locally(told, PAIRS, config, after_step=lambda done, of: seen.append((done, of)))
    train_locally(silent, PAIRS, config)
    assert seen == [(i + 1, 6) for i in range(6)]
    assert told.model.weights_hash == silent.model.weights_hash


# --- gradient checkpointing ------------------------------------------------------------------------------------------


def is_checkpointing(module):
    return any(getattr(part, "gradient_checkpointing", False) for part in module.modules())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointed_gradients_are_the_same_and_answers_afterwards_too(precision, battery):
    """Dropout on, which is drawn again alike in the backward pass."""
    gradients, answers, counts = [], [], []
    for wanted in (False, True):
        chain, found = battery(), {}
        for part in chain.model.module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.2
        before = chain.invoke({"text": "new folder"})
        passes = []
        layers = next(p for p in chain.model.module.modules() if isinstance(p, torch.nn.ModuleList))
        inner = next(m for m in layers[0].modules() if isinstance(m, torch.nn.Linear))
        inner.register_forward_hook(lambda *_, passes=passes: passes.append(1))

        def step(model, batch, config, found=found, passes=passes):
            passes.clear()  # of the trial and of the check at the head, there are others
            result = mean_loss_gradient(model, batch, config)
            found |= {n: p.grad.clone() for n, p in model.trainable_parameters().items() if p.grad is not None}
            return result

        config = TrainingConfig(
            optimizer="sgd", learning_rate=1e-9, batch_size=12, max_steps=2, precision=precision,
            gradient_checkpointing=wanted,
        )  # fmt: skip
        train_locally(chain, PAIRS, config, gradient_step=step)
        counts.append(len(passes))
        gradients.append(copy.deepcopy(found))
        answers.append((before, chain.invoke({"text": "new folder"})))
        model = chain.model.module
        assert not is_checkpointing(model)
    assert counts == [1, 2]  # the layer is computed anew
    for name, value in gradients[0].items():
        if precision == "fp32":
            torch.testing.assert_close(gradients[1][name], value, rtol=1e-6, atol=1e-6)
        else:  # states that several layers read have gradients summed in another order: bfloat16's own error is 3 %
            assert float((gradients[1][name] - value).norm()) < 0.06 * float(value.norm()) + 1e-6
    assert answers[0] == answers[1]


def test_a_module_that_its_owner_set_to_checkpoint_stays_so(make_chain):
    chain = make_chain()
    module = chain.model.module
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable()
    train_locally(chain, PAIRS, TrainingConfig(max_steps=1, gradient_checkpointing=True))
    assert is_checkpointing(module)


def test_checkpointing_ends_with_a_training_that_fails(make_chain):
    chain = make_chain()
    config = TrainingConfig(learning_rate=1e30, optimizer="sgd", epochs=3, gradient_checkpointing=True)
    with pytest.raises(NonFiniteLossError):
        train_locally(chain, PAIRS, config)
    assert not is_checkpointing(chain.model.module)


class Own(torch.nn.Module):
    """No transformers model."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return transformers.utils.ModelOutput(loss=(self.weight - 1) ** 2)


def test_what_cannot_checkpoint_is_refused_before_anything_is_trained():
    for make in (
        lambda config: train_locally(LocalModel(Own()), [{"labels": torch.ones(1, 2)}], config),
        lambda config: FederatedAveraging(Own(), training=config, progress=False),
    ):
        with pytest.raises(ConfigError, match=r"Own has no gradient checkpointing.*micro_batch_size"):
            make(TrainingConfig(gradient_checkpointing=True))
    with pytest.raises(ConfigError, match="reads a prompt once for all labels"):
        TrainingConfig(loss="labels", labels=["a", "b"], gradient_checkpointing=True)
