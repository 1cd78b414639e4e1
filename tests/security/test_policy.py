"""A site's policy against a hub that asks for more: nothing private leaves, and each refusal names its option.

Belongs here: what a `SiteServer` with a policy refuses of well-formed messages, its counters, its files. Does not:
messages that are malformed (test_peer_messages), frames and sockets (test_server).
"""

import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from bounded import within
from corpus import messages
from test_peer_messages import make_target
from tiny import PAIRS
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from llmchain_fed import ConfigError, Participant, TrainingConfig
from llmchain_fed.cli import __main__ as cli
from llmchain_fed.data.encoding import collate, encode_examples, encoded
from llmchain_fed.errors import DeadlineError, PolicyError
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.client.limits import Limits
from llmchain_fed.federated.protocol.global_state import STALE
from llmchain_fed.runtimes.messaging import frames
from llmchain_fed.runtimes.site.policy import Audit, Policy, explain
from llmchain_fed.runtimes.site.server import SiteServer
from llmchain_fed.training.batch_sampler import Place
from llmchain_fed.training.schedule import Schedule
from llmchain_fed.untrusted import printable
from llmchain_fed.updates import serialization

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Asker:
    """Speaks to a site as a hub does, and keeps every byte that leaves it."""

    def __init__(self, target, policy=None, *, participant=None, audit=None):
        self.target, self.model = target, target.model
        participant = participant or Participant("a", PAIRS[:8], held_out=PAIRS[8:])
        self.peer = Client(target, participant, None)
        self.site = SiteServer(self.peer, policy or Policy(), Audit(audit))
        self.left, self.calls = [], 0

    def __call__(self, op, payload):
        """The answer's bytes, or the error's type and message."""
        self.calls += 1
        head = {"do": "put", "call": f"c{self.calls}", "op": op, "offset": 0, "total": len(payload)}
        found, body = self._frame(frames.pack(head, payload))
        until = time.monotonic() + 20
        while "error" not in found and time.monotonic() < until:
            found, body = self._frame(frames.pack({"do": "poll", "call": head["call"], "wait": 5}))
            if found.get("state") == "done":
                return body
        return found["error"]["type"], found["error"]["message"]

    def _frame(self, frame):
        answer = self.site.answer(frame)
        self.left.append(answer)
        found, body = frames.read(answer)
        return found, bytes(body)

    def hello(self, **changes):
        training = messages.TRAINING | changes.pop("training", {})
        return self("hello", messages.hello(self.target, training=training, **changes))

    def train(self, **header):
        return self("train", messages.task(self.model, **header))

    def on_state(self, op, **fields):
        return self(op, messages.task(self.model, **fields))

    def evaluate(self, **header):
        return self("evaluate", messages.evaluation(self.model, **header))

    @property
    def private(self):
        return {n: t for p in self.peer.progress.rounds.values() for n, t in p.private.items()}


def tensors_of(update):
    return serialization.values(update, serialization.inspect(update, max_bytes=10**8)[1])


@pytest.fixture(scope="module")
def target():
    return make_target()


# --- what is private ------------------------------------------------------------------------------------------------


def leaked(private, left):
    """Whether a private tensor's bytes are in what left."""
    return any(t.numpy().tobytes() in answer for t in private.values() if t.any() for answer in left)


def three_rounds_of_a(target, policy=None):
    """A site that has kept its own B for three rounds."""
    ask = Asker(target, policy)
    assert isinstance(ask.hello(aggregation="fedsa"), bytes)
    for number in range(3):
        assert isinstance(ask.train(round=number + 1, shares="A"), bytes)
    private = ask.private
    assert len(private) == 6
    assert not leaked(private, ask.left)
    return ask, private


@pytest.mark.parametrize("shares", ["all", "B"])
@pytest.mark.parametrize("name", ["fedsa", "fedavg", "a rule of its own", None])
def test_what_a_participant_kept_for_itself_does_not_leave_when_it_is_asked_for_later(shares, name, target):
    ask, private = three_rounds_of_a(target)
    assert isinstance(ask.hello(aggregation=name, training={"learning_rate": 1e-30}), bytes)
    kind, message = ask.train(round=4, shares=shares)
    assert kind == "PolicyError"
    assert "policy.aggregations: " in message or "what is private never leaves" in message
    for extra in ({"trains": "B", "shares": "B"}, {"codec": "int8"}, {"codec": "bf16"}, {"round": 1}, {"round": 9}):
        ask.train(**({"round": 4, "shares": shares} | extra))
    assert not leaked(private, ask.left)
    assert ask.peer.progress.before()[1].private.keys() == private.keys()


def test_another_federation_a_stop_or_a_round_of_before_makes_nothing_that_was_private_anew(target):
    """Training is deterministic: the same rounds under another name would give the same values again."""
    ways = (
        lambda ask: ask.hello(federation="another"),
        lambda ask: (ask("stop", b"{}"), ask.hello()),
        lambda ask: ask.train(round=1, trains="A", shares="A"),
    )
    for forget in ways:
        ask, private = three_rounds_of_a(target)
        forget(ask)
        for number in range(3):
            for federation in ("another", "a third"):
                ask.hello(federation=federation)
                kind, message = ask.train(round=number + 1, shares="all")
                assert kind == "PolicyError"
                assert "Start its peer anew" in message
        assert not leaked(private, ask.left)
        ask.hello(aggregation="fedsa")
        assert isinstance(ask.train(round=1, shares="A"), bytes)


@pytest.mark.parametrize(
    "training",
    [
        {"optimizer": "sgd", "learning_rate": 1e-4, "proximal_mu": 1e4},
        {"optimizer": "sgd", "learning_rate": 1e-2, "weight_decay": 100.0},
        {"optimizer": "adamw", "learning_rate": 0.5, "weight_decay": 1.0},
        {"optimizer": "sgd", "proximal_mu": 1e6},
    ],
)
def test_no_step_undoes_those_before_it_so_that_the_last_examples_alone_were_the_update(training, target):
    ask = Asker(target, Policy())
    kind, message = ask.hello(training={"batch_size": len(PAIRS) - 1, "epochs": 1} | training)
    assert kind == "PolicyError"
    assert message.startswith("policy.min_examples_per_update: proximal_mu or weight_decay times the learning rate is ")
    honest = {"proximal_mu": 1.0, "weight_decay": 0.1, "learning_rate": 1e-3, "batch_size": 2}
    assert isinstance(ask.hello(training=honest), bytes)
    assert isinstance(ask.train(), bytes)


@pytest.mark.parametrize("loader", [False, True])
def test_a_schedule_cannot_leave_a_single_steps_examples_to_make_the_update(loader, target):
    """With one step of warm-up the first of two steps has the rate 0; with none both count."""
    participant = None
    if loader:
        rows = encode_examples(PAIRS[:4], target.model, target.prompt)
        batches = [collate([rows[i], rows[i + 1]], target.model) for i in (0, 2)]
        participant = Participant("a", DataLoader(batches, batch_size=None))
    for warmup, enough in ((1, False), (0, True)):
        ask = Asker(target, Policy(min_examples_per_update=3), **({"participant": participant} if loader else {}))
        training = {"batch_size": 2, "max_steps": 2, "epochs": None, "lr_schedule": "linear", "warmup": warmup}
        assert isinstance(ask.hello(training=training), bytes)
        found = ask.train(rounds=1)
        assert isinstance(found, bytes) is enough
        assert enough or found[1].startswith("policy.min_examples_per_update: ")


def test_a_long_warm_up_is_no_update_of_nothing(target):
    """Its first passes hardly move the weights, its later ones do: all examples are in those."""
    data = encode_examples(PAIRS[:6], target.model, target.prompt)
    config = TrainingConfig(batch_size=2, epochs=40, lr_schedule="cosine", warmup=0.1)
    schedule = Schedule.of(config, 120, 0, 30)  # of 3,600 steps 360 are warm-up: the round's rates rise from 0
    assert not any(schedule.counts(step) for step in range(12))
    Limits(min_examples_per_update=6).check_update(data, config, Place(), None, schedule)
    with pytest.raises(PolicyError, match="6 different examples, at least 7"):
        Limits(min_examples_per_update=7).check_update(data, config, Place(), None, schedule)


def test_a_hub_that_does_not_say_how_many_rounds_there_are_trains_no_schedule_over_them(target):
    ask = Asker(target)
    ask.hello(training={"lr_schedule": "linear"})
    kind, message = ask.train()
    assert kind == "ConfigError"
    assert "nobody said how many those are" in message
    assert isinstance(ask.train(rounds=2**31), bytes)


def test_a_personal_models_training_loss_is_of_enough_examples_too(target):
    ask = Asker(target, Policy(min_examples_per_update=4))
    assert isinstance(ask.hello(training={"batch_size": 2}), bytes)
    kind, message = ask.on_state("personalize", steps=1)
    assert kind == "PolicyError"
    assert message.startswith("policy.min_examples_per_update: ")
    assert isinstance(ask.on_state("personalize", steps=2), bytes)


def test_other_answers_tell_numbers_alone(target):
    ask, private = three_rounds_of_a(target)
    answers = [
        ask.evaluate(round=4), ask.on_state("side_by_side", round=4), ask.evaluate(samples=3, round=4),
        ask.on_state("curve", round=4, steps=[0, 1]), ask.on_state("personalize", round=4, steps=1),
        ask.on_state("time_step", round=4),
    ]  # fmt: skip
    for answer in answers:
        said = json.loads(answer)
        assert not {"samples"} & said.keys() or said["samples"] == []
        assert len(answer) < 400
    assert ask("personal_state", serialization.pack({}, {}))[0] == "PolicyError"
    assert not leaked(private, ask.left)
    assert not any(text.encode() in b"".join(ask.left) for pair in PAIRS for text in pair)


def test_dittos_model_does_not_leave(target):
    ask = Asker(target)
    ask.hello()
    ask.train(ditto={"lam": 0.1})
    kept = dict(ask.peer.progress.before()[1].ditto)
    ask.hello(training={"learning_rate": 1e-30})
    ask.train(round=2)
    assert kept
    assert not leaked(kept, ask.left)


# --- limits ---------------------------------------------------------------------------------------------------------

LR = {"learning_rate": 1e-3}
REFUSED = {
    "endless training": ({}, {"max_steps": 10**12, "epochs": None}, {}, "max_steps"),
    "endless passes": ({}, {"epochs": 10**9}, {}, "max_steps"),
    "steps of all passes": ({"max_steps": 3}, {"epochs": 2}, {}, "max_steps"),
    "a single example": ({}, {"batch_size": 1, "max_steps": 1, "epochs": None}, {}, "min_batch_size"),
    "one by one": ({}, {"batch_size": 1}, {}, "min_batch_size"),
    "two of three": ({"min_examples_per_update": 3}, {"batch_size": 2, "max_steps": 1, "epochs": None}, {},
                     "min_examples_per_update"),
    "more than there are": ({"min_examples_per_update": 9}, {}, {}, "min_examples_per_update"),
    "an optimizer": ({"optimizers": ("adamw",)}, {"optimizer": "sgd"}, {}, "optimizers"),
    "the default optimizer": ({"optimizers": ("sgd",)}, {}, {}, "optimizers"),
    "a learning rate": ({"max_learning_rate": 1e-3}, {"learning_rate": 2e-3}, {}, "max_learning_rate"),
    "the largest of a schedule": ({"max_learning_rate": 1e-3},
                                 {"learning_rate": 2e-3, "lr_schedule": "cosine", "warmup": 99},
                                 {"rounds": 100}, "max_learning_rate"),
    "a schedule that leaves one step": ({"min_examples_per_update": 3},
                                        {"warmup": 1, "batch_size": 2, "max_steps": 2, "epochs": None},
                                        {"rounds": 1}, "min_examples_per_update"),
    "a huge learning rate": ({}, {"learning_rate": 1e300}, {}, "max_learning_rate"),
    "a rule": ({"aggregations": ("fedsa", "ffa")}, {}, {}, "aggregations"),
    "another part than the rule's": ({}, {}, {"shares": "A"}, "aggregations"),
    "another part than it trains": ({}, {}, {"trains": "B", "shares": "B"}, "aggregations"),
    "a codec": ({"codecs": ("none",)}, {}, {"codec": "int8"}, "codecs"),
    "no codec": ({"codecs": ("int8",)}, {}, {}, "codecs"),
    "a codec with an option": ({"codecs": ("none",)}, {}, {"codec": "topk:0.1"}, "codecs"),
    "a personal model's steps": ({"max_steps": 3}, {}, {"op": "personalize", "steps": 4}, "max_steps"),
    "a personal model's rate": ({"max_learning_rate": 0.1}, {}, {"op": "personalize", "steps": 1, "lr": 0.2},
                                "max_learning_rate"),
    "a curve's steps": ({"max_steps": 3}, {}, {"op": "curve", "steps": [0, 4]}, "max_steps"),
    "a curve's rate": ({"max_learning_rate": 0.1}, {}, {"op": "curve", "steps": [0, 1], "lr": 0.2},
                       "max_learning_rate"),
    "a curve's losses": ({"max_evaluations": 2}, {}, {"op": "curve", "steps": [0, 1, 2]}, "max_evaluations"),
    "trial steps": ({"max_steps": 2, "optimizers": ("sgd",)}, {}, {"op": "time_step"}, "optimizers"),
    "steps beside the training": ({"max_steps": 3}, {}, {"ditto": {"lam": 0.1, "max_steps": 2}}, "max_steps"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_its_option_and_changes_nothing(case, target):
    policy, training, header, option = REFUSED[case]
    ask = Asker(target, Policy(**policy))
    before = target.model.weights_hash
    found = ask.hello(training=training)
    if isinstance(found, bytes):
        found = ask.on_state(**({"op": "train"} | header))
    kind, message = found
    assert kind == "PolicyError"
    assert message.startswith(f"policy.{option}: ")
    assert len(message) < 300
    assert target.model.weights_hash == before
    assert list(ask.peer.progress.rounds) == [0]
    assert ask.peer.global_states._states == {}


def test_operations_bytes_and_rounds_are_named_too(target):
    ask = Asker(target, Policy(max_rounds=1, max_payload_bytes=20_000, max_evaluations=1))
    assert ask("shell", b"id")[1].startswith("policy.operations: ")
    assert ask("personal_state", b"")[1].startswith("policy.operations: ")
    assert ask("hello", bytes(20_001))[1].startswith("policy.max_payload_bytes: 20,001 bytes are sent, at most 20,000")
    ask.hello()
    assert isinstance(ask.train(), bytes)
    assert ask.train()[1].startswith("policy.max_rounds: this site has trained 1 times, at most 1 are allowed")
    assert isinstance(ask.evaluate(), bytes)
    assert ask.evaluate()[1].startswith("policy.max_evaluations: ")


def test_by_default_single_examples_unlimited_evaluation_and_endless_training_are_refused():
    policy = Policy()
    assert policy.min_batch_size > 1
    assert policy.min_examples_per_update > 1
    for option in ("max_steps", "max_seconds", "max_evaluations", "max_rounds", "max_learning_rate", "max_states"):
        assert getattr(policy, option) is not None
    assert "personal_state" not in policy.operations
    assert policy.samples == 0


@pytest.mark.parametrize("few", [PAIRS[:1], [PAIRS[0]] * 5])
def test_a_participant_with_one_example_trains_nobodys_model(few, target):
    """Also one whose examples are one and the same."""
    ask = Asker(target, participant=Participant("a", few))
    assert ask.hello()[1].startswith("policy.min_examples_per_update: ")


def test_a_step_on_what_is_left_of_a_pass_is_an_update_of_too_few(target):
    """Three examples in steps of two: every second step of one round each would be a single example's gradient."""
    ask = Asker(target, participant=Participant("a", PAIRS[:3]))
    ask.hello(training={"batch_size": 2, "max_steps": 1, "epochs": None})
    assert isinstance(ask.train(round=1), bytes)
    assert ask.train(round=2)[1].startswith("policy.min_examples_per_update: an update would be made of 1 different")
    ask.hello(training={"batch_size": 2, "max_steps": 2, "epochs": None})
    assert isinstance(ask.train(round=2), bytes)


def test_a_length_that_leaves_one_example_is_refused(target):
    pairs = [("a " * n, "b " * n) for n in range(1, 9)]
    lengths = sorted(encoded(pairs, target.model, target.prompt, None).lengths())
    ask = Asker(target, participant=Participant("a", pairs))
    assert lengths[0] < lengths[1]
    assert ask.hello(training={"max_length": lengths[0]})[1].startswith("policy.min_examples_per_update: ")
    assert isinstance(ask.hello(training={"max_length": lengths[1], "tolerance": 1.0}), bytes)


def test_a_participants_own_options_go_first_and_count(target):
    small = Participant("a", PAIRS[:8], training={"batch_size": 1})
    assert Asker(target, participant=small).hello()[1].startswith("policy.min_batch_size: 1 examples a step")
    slow = Asker(target, participant=Participant("a", PAIRS[:8], training={"max_steps": 2, "learning_rate": 1e-3}))
    assert isinstance(slow.hello(training={"max_steps": 10**12, "epochs": None, "learning_rate": 50.0}), bytes)
    update = slow.train()
    assert serialization.inspect(update, max_bytes=10**7)[0]["metrics"]["steps"] == 2


def rows_of(pairs, target):
    data = encoded(pairs, target.model, target.prompt, None)
    return [data[i] for i in range(len(data))]


@pytest.mark.parametrize(
    ("batch_size", "examples", "option"),
    [(1, 6, "min_batch_size"), (2, 1, "min_batch_size"), (4, 4, None), (3, 2, "min_examples_per_update")],
)
def test_a_dataloaders_examples_are_counted_before_an_update_leaves(batch_size, examples, option, target):
    rows = rows_of(PAIRS[:examples], target)
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=lambda found: collate(found, target.model))
    policy = Policy(min_examples_per_update=3)
    ask = Asker(target, policy, participant=Participant("a", loader))
    assert isinstance(ask.hello(), bytes)
    found = ask.train()
    if option is None:
        assert isinstance(found, bytes)
    else:
        assert found[1].startswith(f"policy.{option}: ")
        assert list(ask.peer.progress.rounds) == [0]


def test_a_dataloader_without_end_is_ended(target):
    rows = rows_of(PAIRS[:4], target)

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield from rows

    loader = DataLoader(Endless(), batch_size=2, collate_fn=lambda found: collate(found, target.model))
    ask = Asker(target, Policy(max_steps=5), participant=Participant("a", loader))
    ask.hello()
    with within(20):
        assert ask.train()[1].startswith("policy.max_steps: 6 optimizer steps")


def test_training_ends_after_the_policys_seconds_without_any_deadline(target):
    ask = Asker(target, Policy(max_seconds=0.2))
    ask.hello(training={"max_steps": 9_000, "epochs": None})
    started = time.monotonic()
    for op, fields in (("train", {}), ("personalize", {"steps": 9_000}), ("curve", {"steps": [0, 9_000]})):
        assert ask.on_state(op, seconds=None, **fields)[1].startswith(
            "policy.max_seconds: training takes more than the 0.2 s"
        )
    assert time.monotonic() - started < 10
    assert ask.train(seconds=0.01)[0] == "DeadlineError"


# --- counting -------------------------------------------------------------------------------------------------------


def test_nothing_a_hub_sends_gives_evaluations_back(target):
    ask = Asker(target, Policy(max_evaluations=6))
    ask.hello()
    assert isinstance(ask.evaluate(), bytes)
    assert isinstance(ask.on_state("side_by_side"), bytes)
    assert isinstance(ask.on_state("curve", steps=[0, 1]), bytes)
    assert isinstance(ask.on_state("personalize", steps=1), bytes)
    ask("stop", b"{}")
    ask.hello(federation="another")
    assert ask.on_state("curve", steps=[0, 1])[1].startswith(
        "policy.max_evaluations: 2 more held-out losses are asked for after 5"
    )
    assert isinstance(ask.evaluate(), bytes)
    ask("stop", b"{}")
    ask.hello(federation="a-third")
    assert ask.evaluate()[1].startswith("policy.max_evaluations: ")
    assert isinstance(ask.train(), bytes)


def test_evaluations_follow_the_rounds_unless_they_are_given():
    few = Policy(max_rounds=3)
    assert (few.max_evaluations, few.replace(max_rounds=20).max_evaluations) == (8, 42)
    assert Policy(max_rounds=3, max_evaluations=5).replace(max_rounds=20).max_evaluations == 5
    assert Policy(max_rounds=10**6).max_evaluations == Policy().max_evaluations == 2_000


def test_a_curve_where_nothing_is_held_out_costs_no_evaluations(target):
    ask = Asker(target, Policy(max_evaluations=3), participant=Participant("a", PAIRS[:8]))
    ask.hello()
    assert ask.on_state("curve", steps=[0, 1, 2])[0] == "DataError"
    assert ask.peer._evaluations == 0


class Slow:
    """A peer that works until it is told to stop, and counts."""

    def __init__(self):
        self.began, self.stop = 0, threading.Event()

    def handle(self, op, payload):
        self.began += op == "train"
        for _ in range(200):
            if self.stop.is_set():
                raise DeadlineError("nobody waits")
            time.sleep(0.005)
        return b""

    def give_up(self):
        self.stop.set()

    def take_up(self):
        self.stop.clear()

    def obey(self, limits):
        pass


def test_a_peer_that_keeps_to_no_limits_is_not_served():
    class Unlimited(Slow):
        obey = None

    with pytest.raises(ConfigError, match=r"Unlimited has no `obey\(limits\)`: nothing would hold it to the policy"):
        SiteServer(Unlimited(), Policy(), Audit(None))


def test_a_difference_to_what_is_not_kept_tells_no_loss_and_costs_none(target):
    """The site once counted requests and the peer what it told: honest repetitions used up what is allowed."""
    ask = Asker(target, Policy(max_evaluations=2))
    ask.hello()
    unknown = {"version": "hub/5/", "against": "hub/4/"}
    for _ in range(4):
        assert ask("evaluate", messages.evaluation(ask.model, tensors={}, **unknown)) == STALE
    assert [isinstance(ask.evaluate(), bytes) for _ in range(3)] == [True, True, False]


def test_no_race_gets_more_than_is_allowed_and_what_is_replaced_counts():
    op, peer = "train", Slow()
    site = SiteServer(peer, Policy(max_rounds=5), Audit(None))
    began, inner = [], peer.handle
    peer.handle = lambda asked, payload: began.append(asked) or inner(asked, payload)

    def ask(number):
        for i in range(20):
            head = {"do": "put", "call": f"{number}-{i}", "op": op, "offset": 0, "total": 1}
            site.answer(frames.pack(head, b"x"))
            time.sleep(0.002)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for i in range(100):  # on a busy machine few of them were begun before another took their place
        head = {"do": "put", "call": f"last-{i}", "op": op, "offset": 0, "total": 1}
        found, _ = frames.read(site.answer(frames.pack(head, b"x")))
        if "error" in found:
            break
        time.sleep(0.05)
    assert found["error"]["message"].startswith("policy.max_")
    assert len(began) == 5


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((HERE / "corpus" / "policies").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_policy_file_that_is_wrong_starts_no_peer_and_says_which_line(path, tmp_path):
    line, _, words = path.read_text().splitlines()[0].removeprefix("# line ").partition(": ")
    with within(5), pytest.raises(ConfigError) as error:
        Policy.from_file(path)
    text = str(error.value)
    assert words in text
    assert str(path) in text
    assert line == "0" or f"line {line}" in text
    assert len(text) < 1500
    assert printable(text) == text
    data = tmp_path / "data.jsonl"
    data.write_text("")
    started = ["peer", "--chain", "translate", "--data", str(data), "--socket", str(tmp_path / "s")]
    started += ["--policy", str(path)]
    for command in (["policy", "explain", str(path)], started):
        done = CliRunner().invoke(cli.app, command)
        assert isinstance(done.exception, ConfigError)
        assert words in str(done.exception)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("content", ["", "# nothing\n", "null\n", "{}"])
def test_an_empty_policy_file_is_the_default_policy(content, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(content)
    assert Policy.from_file(path) == Policy()


def test_policy_explain_says_every_option_in_a_sentence(tmp_path):
    done = CliRunner().invoke(cli.app, ["policy", "explain"])
    assert done.exit_code == 0
    told, _, limitations = done.output.partition("\n\n")
    sentences = dict(line.split(": ", 1) for line in told.splitlines())
    assert sentences.keys() == Policy.model_fields.keys()
    assert all(text.endswith(". (default)") for text in sentences.values())
    assert "What no policy prevents" in limitations
    path = tmp_path / "policy.yaml"
    path.write_text("max_steps: 7\nsamples: 2\nmin_examples_per_update: 1\nmax_rounds: null\naggregations: [ffa]\n")
    changed = dict(line.split(": ", 1) for line in explain(Policy.from_file(path)))
    assert "7 optimizer steps at most" in changed["max_steps"]
    assert "2 held-out examples at most may leave" in changed["samples"]
    assert "the gradient of one" in changed["min_examples_per_update"]
    assert "as often as it is asked" in changed["max_rounds"]
    assert "under ffa alone" in changed["aggregations"]
    assert {n for n, text in changed.items() if "(default)" not in text} == {
        "max_steps", "samples", "min_examples_per_update", "max_rounds", "aggregations",
    }  # fmt: skip


def test_the_federations_own_example_passes_its_own_policy(target):
    """What run.py's federation file says of training, with as many examples as its policy asks for."""
    policy = Policy.from_file(ROOT / "examples" / "federation" / "policy.yaml")
    source = (ROOT / "examples" / "federation" / "run.py").read_text(encoding="utf-8")
    (batch_size,) = re.findall(r"training: \{\{.*batch_size: (\d+)\}\}", source)
    (rate,) = re.findall(r'"--lr", type=float, default=([0-9.e-]+)', source)
    pairs = [(f"text {n}", f"texte {n}") for n in range(policy.min_examples_per_update)]
    training = {"learning_rate": float(rate), "batch_size": int(batch_size)}
    ask = Asker(target, policy, participant=Participant("a", pairs))
    assert isinstance(ask.hello(training=training), bytes)
    assert isinstance(ask.train(), bytes)
    ask = Asker(target, policy, participant=Participant("a", pairs[1:]))
    assert "policy.min_examples_per_update" in str(ask.hello(training=training))


# --- the audit file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link", "two names"])
def test_an_audit_file_that_is_none_of_ours_is_not_waited_for_or_written_through(kind, tmp_path):
    path, other = tmp_path / "audit.jsonl", tmp_path / "other"
    other.write_text("mine\n")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(other)
    elif kind == "two names":
        os.link(other, path)
    with within(5), pytest.raises(ConfigError, match=r"the audit file .* cannot be written"):
        Audit("/dev/null" if kind == "device" else path)
    assert other.read_text() == "mine\n"


def test_a_pipe_in_place_of_the_audit_file_stops_the_answers_and_hangs_nothing(target, tmp_path):
    path = tmp_path / "audit.jsonl"
    ask = Asker(target, audit=path)
    ask.hello()
    path.unlink()
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # somebody who would read what is written
    with within(10):
        assert "the audit file cannot be written" in ask.train()[1]
    assert os.read(reader, 100) == b""
    os.close(reader)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_an_audit_file_of_another_account_is_refused(tmp_path):
    path = tmp_path / "audit.jsonl"
    path.touch()
    os.chown(path, 65534, 65534)
    with pytest.raises(ConfigError, match="no regular file of this account's"):
        Audit(path)


def test_a_round_of_many_nines_leaves_its_lines_and_is_answered(target, tmp_path):
    path = tmp_path / "audit.jsonl"
    ask = Asker(target, audit=path)
    ask.hello()
    for op in ("evaluate", "train"):
        kind, _ = ask(op, messages.RAW["a round of 4,300 nines"])
        assert kind in ("FederationError", "UpdateRefusedError")
    ask.train(round=2**31)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [e["status"] for e in lines] == ["began", "answered"] + ["began", "failed"] * 2 + ["began", "answered"]
    assert lines[-1]["round"] == 2**31


def test_what_a_policy_refuses_stands_in_the_audit_file_and_text_in_it_is_short_and_printable(target, tmp_path):
    path = tmp_path / "audit.jsonl"
    ask = Asker(target, Policy(codecs=("none",)), audit=path)
    ask.hello()
    ask.train(codec="int8")
    ask("\x1b[2J" * 4, b"")
    lines = path.read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [e["status"] for e in entries] == ["began", "answered", "began", "refused", "refused"]
    assert entries[3]["error"].startswith("PolicyError: policy.codecs: ")
    assert max(map(len, lines)) < 3000
    assert all(printable(e.get("error", "")) == e.get("error", "") for e in entries)
    Audit(path).write(op="\x1b[2J", error="\ud800" + "x" * 10_000, bytes_in=10**5000, other={"a": [1]})
    entry = json.loads(path.read_text().splitlines()[-1])
    assert entry["op"] == r"\x1b[2J"
    assert len(entry["error"]) < 2100


def test_a_refusal_says_what_was_asked_and_what_is_allowed():
    with pytest.raises(PolicyError, match=r"^policy\.max_steps: 11 optimizer steps are asked for, at most 10 are"):
        Limits(max_steps=10).check_steps(11)


def test_a_payload_takes_memory_as_it_comes_keeps_its_length_and_leaves_a_line_where_it_does_not_end(target, tmp_path):
    path = tmp_path / "audit.jsonl"
    ask = Asker(target, audit=path)
    big = {"do": "put", "call": "x", "op": "hello", "offset": 0, "total": 2**30}
    assert ask._frame(frames.pack(big, b"1"))[0]["state"] == "receiving"
    assert len(ask.site._call.payload) == 1
    longer = big | {"offset": 1, "total": 2**31}
    assert ask._frame(frames.pack(longer, b"2"))[0]["error"]["type"] == "TransportError"
    assert len(ask.site._call.payload) == 1
    assert isinstance(ask.hello(), bytes)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [e["status"] for e in entries] == ["malformed", "abandoned", "began", "answered"]


def test_few_rounds_allow_few_evaluations(target):
    ask = Asker(target, Policy(max_rounds=1))
    ask.hello()
    answers = [ask.evaluate() for _ in range(6)]
    assert [isinstance(a, bytes) for a in answers] == [True] * 4 + [False] * 2
    assert "policy.max_evaluations: " in answers[-1][1]
    assert Policy(max_rounds=1, max_evaluations=9).max_evaluations == 9
    assert Policy(max_rounds=None).max_evaluations == Policy(max_rounds=10**6).max_evaluations == 2000


def test_what_cannot_be_read_does_not_fill_the_disk(target, tmp_path):
    path = tmp_path / "audit.jsonl"
    ask = Asker(target, audit=path)
    for _ in range(1100):
        ask.site.answer(b"no frame")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(entries) == 101
    assert "1000 so far" in entries[-1]["error"]
