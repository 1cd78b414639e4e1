"""Defects found by reading: each test names the mistake it keeps away."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from tiny import PAIRS, TEMPLATE, lora_config, tiny_module

from llmchain_fed import (
    ChainFileError,
    ConfigError,
    DataError,
    EmptyParticipantError,
    Example,
    FederatedAveraging,
    LLMChain,
    LocalModel,
    NonFiniteLossError,
    Participant,
    PromptTooLongError,
    RawText,
    TrainingConfig,
    UnsupportedModelError,
    train_locally,
)
from llmchain_fed.data.examples import prompt_text
from llmchain_fed.data.split import Split
from llmchain_fed.federated.history import RoundRecord
from llmchain_fed.federated.participant import hold_out


def test_a_participant_may_be_called_seconds(make_chain):
    fed = FederatedAveraging(
        make_chain(),
        participants={"seconds": PAIRS[:4], "b": PAIRS[4:8]},
        evaluation={"seconds": PAIRS[8:]},
        progress=False,
    )
    record = fed.fit(rounds=1)[0]
    assert record.participants["seconds"].held_out_after == pytest.approx(record.held_out_after)
    assert record.evaluation_seconds > 0


def test_an_overlong_held_out_example_costs_no_held_out_loss(make_chain):
    held_out = [("word " * 400, "x"), *PAIRS[6:9]]
    fed = FederatedAveraging(
        make_chain(), participants={"a": PAIRS[:6]}, evaluation={"a": iter(held_out)}, samples=2, progress=False
    )
    record = fed.fit(rounds=1)[0]
    assert record.participants["a"].held_out_after is not None
    assert record.participants["a"].notes == ["1 of 4 held-out examples are left out: 1 too long"]
    assert [s.reference for s in record.samples] == [PAIRS[6][1], PAIRS[7][1]], "from a generator, too"


def test_a_share_and_train_would_train_on_what_is_held_out(make_chain):
    fed = FederatedAveraging(make_chain(), participants={"a": PAIRS}, evaluation=0.2, progress=False)
    with pytest.raises(ConfigError, match="train\\(\\) brings its own") as caught:
        fed.train(PAIRS, "a")
    for advice, options in {
        "evaluation=examples, one set for all": {"evaluation": PAIRS[8:]},
        "both participants= and evaluation=": {"participants": {"a": PAIRS[:2]}, "evaluation": {"a": PAIRS[8:]}},
    }.items():
        assert advice in str(caught.value)
        followed = FederatedAveraging(make_chain(), progress=False, **options)
        followed.train(PAIRS[:8], "a")
        assert followed.step().held_out_after is not None


def test_the_same_question_in_two_forms_stands_on_one_side(make_chain):
    chain = make_chain()
    mixed = [(s, t) for s, t in PAIRS] + [({"text": s}, t) for s, t in PAIRS]
    mixed += [RawText(TEMPLATE.format(text=s), t) for s, t in PAIRS] + [
        {"prompt": s, "completion": t} for s, t in PAIRS
    ]
    divided = hold_out(Participant("a", mixed), Split(0.3), chain, seed=1)
    texts = [{prompt_text(e, chain) for e in side} for side in (divided.examples, divided.held_out)]
    assert not texts[0] & texts[1]
    assert len(texts[0] | texts[1]) == len(PAIRS)


def test_small_steps_add_up_to_no_improvement_only_against_the_last_counted_best(make_chain, monkeypatch):
    """With min_delta 0.05, progress of 0.04 a round counts every second round and never stops."""
    fed = FederatedAveraging(make_chain(), participants={"a": PAIRS}, evaluation=PAIRS, progress=False)
    losses = iter([1 - 0.04 * k for k in range(20)])
    previous = [next(losses)]

    def run_round(server, begins, ends):
        after = next(losses)
        record = RoundRecord(round=1, participants={}, held_out_before=previous[0], held_out_after=after)
        previous[0] = after
        fed.history.append(record)
        ends(record)
        return record

    monkeypatch.setattr("llmchain_fed.federated.fit.run_round", run_round)
    assert len(fed.fit(rounds=8, patience=2, min_delta=0.05)) == 8


def test_one_bad_prompt_does_not_cost_a_batch_its_answers(make_chain):
    chain = make_chain()
    answers = chain.batch(
        [{"text": "sign in"}, {"text": "word " * 400}, {"text": "new folder"}], return_exceptions=True
    )
    assert isinstance(answers[1], PromptTooLongError)
    assert answers[0] == chain.invoke("sign in")
    assert answers[2] == chain.invoke("new folder")


def test_two_chains_over_one_base_do_not_replace_each_others_adapter(make_chain, tokenizer, tmp_path):
    make_chain(lora=True).save(tmp_path / "a")
    base = LocalModel(tiny_module("causal", len(tokenizer)), tokenizer)
    first = LLMChain.load(tmp_path / "a", model=base)
    assert first.model._lock is base._lock, "one lock per module"
    before = first.model.trainable_state()
    with pytest.raises(ChainFileError, match="another adapter"):
        LLMChain.load(tmp_path / "a", model=base)
    assert all(torch.equal(before[n], t) for n, t in first.model.trainable_state().items())


def test_two_adapters_at_once_are_refused_not_merged(tokenizer):
    module = get_peft_model(tiny_module("causal", len(tokenizer)), lora_config(), adapter_name="one")
    module.add_adapter("two", lora_config())
    module.base_model.set_adapter(["one", "two"])
    with pytest.raises(UnsupportedModelError, match="more than one"):
        LocalModel(module, tokenizer).trainable_state()


def test_a_weight_that_breaks_in_the_last_step_is_an_error(make_model):
    """The loss before the step is finite, what the step leaves is not."""
    model = make_model()
    before = model.trainable_state()
    config = TrainingConfig(optimizer="sgd", learning_rate=math.inf, max_steps=1)
    with pytest.raises(NonFiniteLossError, match="not finite at the end"):
        train_locally(model, [{"prompt": s, "completion": t} for s, t in PAIRS], config)
    assert all(torch.equal(before[n], t) for n, t in model.trainable_state().items())


@pytest.mark.parametrize(
    ("example", "error"),
    [
        (({"text": None}, "x"), EmptyParticipantError),  # counted, and here nothing else is left
        (({"text": b"a"}, "x"), DataError),
        (({"text": "\ud83d"}, "x"), DataError),
        (("fine", "\ud83d"), DataError),
    ],
)
def test_values_that_are_no_text_are_named(make_chain, example, error):
    with pytest.raises(error):
        train_locally(make_chain(), [example])
    assert Example(inputs="ok", completion="ok")


def test_an_option_of_ones_own_goes_before_the_federations(make_chain):
    participants = [Participant("slow", PAIRS, training={"max_steps": 1}), Participant("fast", PAIRS)]
    config = TrainingConfig(epochs=2, batch_size=4)
    record = FederatedAveraging(make_chain(), participants=participants, training=config, progress=False).fit(rounds=1)[
        0
    ]
    assert (record.participants["slow"].steps, record.participants["fast"].steps) == (1, 6)


def test_contradictions_about_participants_are_named(make_chain):
    with pytest.raises(ConfigError, match="training is a mapping"):
        Participant("a", PAIRS, training=TrainingConfig(max_steps=1))
    with pytest.raises(ConfigError, match="stands under the name"):
        FederatedAveraging(make_chain(), participants={"a": Participant("b", PAIRS)})
    with pytest.raises(ConfigError, match="LBFGS"):
        TrainingConfig(optimizer=torch.optim.LBFGS)


def test_train_and_fit_go_together(make_chain):
    fed = FederatedAveraging(make_chain(), progress=False)
    fed.train(PAIRS[:6], 0)
    fed.train(PAIRS[6:], 1)
    fed.step()
    assert fed.fit(rounds=1)[-1].trained == ["0", "1"]
