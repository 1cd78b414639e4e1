"""The open registry of operations, by one that lies outside the package: asked for, answered, refused.

Belongs here: what `register_task` promises. Does not: the package's own operations (test_averaging,
test_personalization, security/test_peer_messages).
"""

import threading

import pytest
from sites import SocketTransport, answering, audit
from statistics_operation import StatisticsAnswer, StatisticsTask, statistics
from tiny import PAIRS

from llmchain_fed import (
    ConfigError,
    DataError,
    FederatedAveraging,
    FederationError,
    Participant,
    PolicyError,
    Site,
    TrainingConfig,
)
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.client.limits import Limits
from llmchain_fed.federated.client.operations import operations, register_task, task_type
from llmchain_fed.federated.protocol import messages
from llmchain_fed.federated.protocol.tasks import (
    EvaluateTask,
    PersonalizeTask,
    StateHeader,
    StateTask,
    Task,
    TensorTask,
    TrainTask,
)
from llmchain_fed.federated.server.asking import ask
from llmchain_fed.federated.target import Target
from llmchain_fed.runtimes.site.policy import Policy, explain

TRAINING = TrainingConfig(learning_rate=5e-3, batch_size=4, epochs=1)
SHARES = {"a": PAIRS[:4], "b": PAIRS[4:9]}
EVERYTHING = Policy().operations


def by_hand(chain, pairs, at_least=0):
    """Counted by the tokenizer alone: a completion and its end token."""
    lengths = [len(chain.model.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for _, text in pairs]
    lengths = [length for length in lengths if length >= at_least]
    return StatisticsAnswer(examples=len(lengths), mean_tokens=sum(lengths) / max(1, len(lengths)))


@pytest.mark.parametrize("at_least", [0, 4])
def test_an_operation_of_ones_own_is_answered_in_this_process(at_least, make_chain):
    chain = make_chain()
    fed = FederatedAveraging(chain, participants=SHARES, training=TRAINING, progress=False)
    fed._server.join()
    found = dict(ask(fed._server, StatisticsTask(at_least=at_least), StatisticsAnswer))
    assert found == {name: by_hand(chain, pairs, at_least) for name, pairs in SHARES.items()}


@pytest.fixture
def sites(tmp_path, make_chain):
    """Two sites behind sockets: the policy of a names the operation, that of b does not."""
    policies = {"a": Policy(operations=(*EVERYTHING, "statistics")), "b": Policy()}
    paths = {}
    for name, policy in policies.items():
        site = Site(make_chain(), Participant(name, SHARES[name]), policy=policy, audit=tmp_path / f"{name}.jsonl")
        threading.Thread(target=site.serve, args=(tmp_path / name,), daemon=True).start()
        paths[name] = answering(tmp_path / name)
    return SocketTransport(paths)


def test_a_site_answers_it_if_its_policy_names_it_and_writes_it_down(sites, make_chain, tmp_path):
    chain = make_chain()
    fed = FederatedAveraging(chain, runtime=sites, training=TRAINING, progress=False)
    fed.fit(1)
    assert fed.history[0].trained == ["a", "b"]
    found = dict(ask(fed._server, StatisticsTask(), StatisticsAnswer))
    assert found["a"] == by_hand(chain, SHARES["a"])
    assert str(found["b"]).startswith("refused by site: policy.operations: this site does not answer 'statistics'")
    written = {name: [(line["op"], line["status"]) for line in audit(tmp_path, name)][-1] for name in SHARES}
    assert written == {"a": ("statistics", "answered"), "b": ("statistics", "refused")}


def test_a_policy_speaks_of_operations_by_name(sites, make_chain, tmp_path):
    (tmp_path / "policy.yaml").write_text("operations: [hello, train, statistics]\n")
    policy = Policy.from_file(tmp_path / "policy.yaml")
    said = explain(policy)[0]
    assert "it answers hello, train and statistics, and refuses personalize, evaluate, side_by_side" in said
    with pytest.raises(ConfigError, match=r"`operations\.1`: no operation is called 'shell'; there are hello, train"):
        Policy(operations=("hello", "shell"))


def test_a_cell_that_is_run_again_registers_its_class_anew():
    def cell():
        class Words(Task):
            operation = "words"
            counts_as_training, measured = False, 0

        register_task(Words, lambda client, task: b"")
        return Words

    class Words(Task):
        operation = "words"
        counts_as_training, measured = False, 0

    cell()
    again = cell()
    assert task_type("words").task is again
    with pytest.raises(ConfigError, match=r"'words' is taken, by Words\. Give Words another name"):
        register_task(Words, lambda client, task: b"")
    for task, work in ((object, print), ("words", print), (Words, 3)):
        with pytest.raises(ConfigError, match="a subclass of Task and a function"):
            register_task(task, work)


def test_what_it_is_asked_and_what_it_answers_is_read_within_bounds(make_chain, monkeypatch):
    fed = FederatedAveraging(make_chain(), participants=SHARES, training=TRAINING, progress=False)
    client = fed._peers["a"]
    for payload in (b"", b"[]", b'{"at_least": -1}', b'{"at_least": "1"}', b'{"more": 1}', b" " * 2**16 + b"{}"):
        with pytest.raises(FederationError, match="the statistics message"):
            client.handle("statistics", payload)
    fed._server.join()
    for lie in (
        b'{"examples": -1, "mean_tokens": 1.0}',
        b'{"examples": 1}',
        b'{"examples": 1, "text": "x"}',
        b" " * 999,
    ):
        monkeypatch.setattr(client, "handle", lambda op, payload, lie=lie: lie)
        (found,) = dict(ask(fed._server, StatisticsTask(), StatisticsAnswer, ["a"])).values()
        assert isinstance(found, Exception)
        assert len(str(found)) < 600


def test_a_name_is_given_once_and_is_one():
    class Odd(Task):
        operation = "train"
        counts_as_training, measured = True, 0

    class Unnamed(Task):
        operation = "Not a name"

    class Loose(TensorTask):
        operation = "loose"
        counts_as_training, measured = False, 0

    for task, why in ((Odd, "'train' is taken, by TrainTask"), (Unnamed, "small letters"), (Loose, "a StateTask")):
        with pytest.raises(ConfigError, match=why):
            register_task(task, statistics)
    register_task(StatisticsTask, statistics)  # again, as a module that is imported twice does
    assert operations().count("statistics") == 1
    assert task_type("train").task is TrainTask
    with pytest.raises(FederationError, match="unknown operation 'loose'"):
        task_type("loose")


def test_an_operation_says_what_of_it_a_policy_limits():
    class Amounts(Task):
        operation = "amounts"

    with pytest.raises(ConfigError, match="Amounts does not say counts_as_training, measured: a site's policy limits"):
        register_task(Amounts, statistics)
    Amounts.counts_as_training = True
    with pytest.raises(ConfigError, match="Amounts does not say measured"):
        register_task(Amounts, statistics)
    assert "amounts" not in operations()


def test_an_operation_on_the_global_state_is_given_it(make_chain, monkeypatch):
    from llmchain_fed.federated.client import operations as registry

    class NormTask(StateTask):
        operation = "norm"
        counts_as_training, measured = False, 0

    monkeypatch.setattr(registry, "_TYPES", dict(registry._TYPES))
    seen = []
    register_task(NormTask, lambda client, task, state: seen.append((client.name, task.round, state)) or b"done")
    chain = make_chain(lora=True)
    fed = FederatedAveraging(chain, participants=SHARES, training=TRAINING, progress=False)
    fed.fit(1)
    fed._server.publish()
    task = NormTask(round=2, base=chain.model.fingerprint())
    assert fed._peers["a"].handle("norm", fed._server.broadcast.message("a", task)) == b"done"
    ((name, number, state),) = seen
    assert (name, number) == ("a", 2)
    wanted = chain.model.trainable_state()
    assert all((state.values[n] == wanted[n]).all() for n in wanted)
    other = NormTask(round=2, base="another")
    with pytest.raises(FederationError, match="the norm message is about another base"):
        fed._peers["a"].handle("norm", messages.write(other, wanted))


def test_what_is_built_in_is_not_replaced(make_chain):
    with pytest.raises(ConfigError, match="the operation 'train' is taken"):
        register_task(TrainTask, lambda client, task, state: b"")


def test_a_check_that_nobody_would_call_is_refused():
    class Asked(Task):
        operation = "asked"
        counts_as_training, measured = False, 0

    with pytest.raises(ConfigError, match="Leave out check="):
        register_task(Asked, lambda client, task: b"", check=lambda *given: None)


def test_a_policy_of_no_evaluations_lets_one_personalise_that_holds_nothing_out(make_chain):
    client = Client(Target.of(make_chain(lora=True)), Participant("a", PAIRS[:4]), TrainingConfig(batch_size=2))
    client.obey(Limits(max_evaluations=0))
    task = PersonalizeTask.of(round=1, base=client.model.fingerprint(), steps=1)
    client.handle("personalize", messages.write(task, client.model.trainable_state(), StateHeader()))


def test_what_an_own_operation_measures_is_limited_also_where_nothing_is_held_out(make_chain):
    """What it tells a loss of is its own: only the package's personalisation is known to tell none then."""
    client = Client(Target.of(make_chain(lora=True)), Participant("a", PAIRS[:4]), TrainingConfig(batch_size=2))
    client.obey(Limits(max_evaluations=1))
    task = EvaluateTask.of(round=1, base=client.model.fingerprint())
    message = messages.write(task, client.model.trainable_state(), StateHeader())
    with pytest.raises(DataError):
        client.handle("evaluate", message)
    with pytest.raises(PolicyError, match="max_evaluations"):
        client.handle("evaluate", message)
