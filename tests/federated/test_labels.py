"""A federation over labels: what it learns, what its record says, and what travels.

Belongs here: rounds with the loss over labels. Does not: the loss itself (training/test_label_loss).
"""

import json

import pytest
from tiny import PAIRS

from llmchain_fed import ConfigError, FederatedAveraging, History, Participant, TrainingConfig, evaluate_locally
from llmchain_fed.errors import FederationError, LabelError, ParticipantError
from llmchain_fed.federated.protocol.tasks import TrainingOptions
from llmchain_fed.untrusted import checked

LABELS = ["page", "page vide", "erreur"]
DATA = [(x, LABELS[at % 3]) for at, (x, _) in enumerate(PAIRS)]


def training(**options):
    return TrainingConfig(**({"loss": "labels", "labels": LABELS, "learning_rate": 5e-3, "batch_size": 3} | options))


def test_federation_learns_labels_and_says_what_its_losses_are(make_chain):
    chain = make_chain(lora=False)
    parts = [Participant(n, DATA[at::2], held_out=DATA[at::2]) for at, n in enumerate("ab")]
    # Halves of twelve random labels pull apart: at a constant rate the last round is right by luck of rounding (8 to 12
    # of 12 over six seeds). A rate that falls to 0 ends above 0.93 for each label, whatever the seed.
    how = training(epochs=4, lr_schedule="linear", warmup=0.1)
    fed = FederatedAveraging(chain, participants=parts, training=how, progress=False)
    history = fed.fit(rounds=12)
    assert [c.label for c in chain.classify_batch([x for x, _ in DATA], LABELS)] == [y for _, y in DATA]
    last = history[-1]
    assert last.loss == "labels"
    for name, at in (("a", 0), ("b", 1)):  # what an outsider measures with the same weights
        wanted = evaluate_locally(chain, DATA[at::2], loss="labels", labels=LABELS).loss
        assert last.participants[name].held_out_after == pytest.approx(wanted, abs=1e-5)
    assert fed.evaluate(DATA).loss == pytest.approx(last.held_out_after, abs=1e-5)
    assert {axes.get_ylabel() for axes in history.plot().axes} == {"nats per example"}
    again = History.from_dict(json.loads(history.to_json()))
    assert again[-1].loss == "labels"


def test_one_participant_is_plain_training_over_labels(make_chain):
    from llmchain_fed import train_locally

    plain, chain = make_chain(), make_chain()
    config = training(epochs=2)
    FederatedAveraging(chain, participants={"a": DATA}, training=config, progress=False).fit(rounds=1)
    train_locally(plain, DATA, config, participant="a", round=0)
    found, wanted = chain.model.trainable_state(), plain.model.trainable_state()
    assert all((found[n] - wanted[n]).abs().max() == 0 for n in wanted)


@pytest.mark.parametrize("loss", ["tokens", "labels"])
def test_collapse_stands_in_the_record(make_chain, loss):
    """Participants whose examples are nearly all of one label: the loss falls, and the record says what happened."""
    chain = make_chain()
    skewed = [(x, "page") for x, _ in PAIRS]
    held_out = [("sign in", "erreur"), ("new folder", "page")]
    parts = [Participant("a", skewed, held_out=held_out)]
    how = training(loss=loss, learning_rate=1e-2, epochs=10)
    record = FederatedAveraging(chain, participants=parts, training=how, progress=False).fit(rounds=1)[-1]
    [note] = [note for note in record.participants["a"].notes if "taken for the label" in note]
    assert "'page'" in note
    assert ("balanced" in note) == (loss == "labels")
    shared = FederatedAveraging(
        chain, participants={"a": skewed}, training=how, evaluation=held_out, progress=False
    ).fit(rounds=1)[-1]
    assert any("taken for the label 'page'" in note for note in shared.notes)


def test_options_travel_whole_and_within_bounds():
    plain = training(class_weight={"page": 2.0}).to_plain()
    options = TrainingOptions(**json.loads(json.dumps(plain)))
    assert TrainingConfig(**options.model_dump(exclude_unset=True)) == training(class_weight={"page": 2.0})
    for bad in ({"labels": ["a"] * 1001}, {"labels": ["a", ""]}, {"class_weight": {"a": -1.0}}, {"loss": "own"}):
        with pytest.raises(FederationError):
            checked(TrainingOptions, plain | bad, what="the options", error=FederationError)


def test_a_participant_keeps_the_federations_loss_and_may_weigh_its_own(make_chain):
    own = Participant("a", DATA, training={"class_weight": "balanced"})
    FederatedAveraging(make_chain(), participants=[own], training=training(), progress=False).fit(rounds=1)
    other = Participant("a", DATA, training={"loss": "tokens"})
    with pytest.raises(ConfigError, match="federation's"):
        FederatedAveraging(make_chain(), participants=[other], training=training(), progress=False).fit(rounds=1)


def test_a_run_over_labels_goes_on_from_its_checkpoint(make_chain, tmp_path):
    how, part = training(class_weight={"page": 2.0}, epochs=2), Participant("a", DATA, held_out=DATA[:4])
    options = {"participants": [part], "training": how, "progress": False}
    wanted = FederatedAveraging(make_chain(), **options).fit(rounds=2)
    FederatedAveraging(make_chain(), **options, checkpoint_dir=tmp_path).fit(rounds=1)
    history = FederatedAveraging.resume(tmp_path, make_chain(), **options).fit(rounds=1)
    assert [record.loss for record in history] == ["labels", "labels"]
    assert history[-1].held_out_after == wanted[-1].held_out_after


@pytest.mark.parametrize("wrong", ["examples", "held_out"])
def test_a_completion_that_is_no_label_is_found_before_any_round(make_chain, wrong):
    chain, bad = make_chain(), [*DATA, ("sign in", "Page")]
    before = chain.model.weights_hash
    part = Participant("a", **({"examples": DATA, "held_out": DATA[:2]} | {wrong: bad}))
    fed = FederatedAveraging(chain, participants=[part, Participant("b", DATA)], training=training(), progress=False)
    with pytest.raises((LabelError, ParticipantError), match="none of the labels"):
        fed.fit(rounds=1)
    assert chain.model.weights_hash == before
    assert len(fed.history) == 0
