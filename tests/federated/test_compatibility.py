"""Which options of a federation go together: every cell of the table, tried; and which adapters the LoRA rules refuse.

Belongs here: combinations, and what a rule asks of the model. Does not: what a rule computes (test_lora_rules).
"""

import json

import pytest
import torch
from peft import get_peft_model
from tiny import PAIRS, lora_config, tiny_module

from llmchain_fed import Ditto, FedAvgM, FederatedAveraging, LLMChain, LocalLLM, LocalModel, Participant, TrainingConfig
from llmchain_fed.errors import ConfigError
from llmchain_fed.federated.client.client import Client
from llmchain_fed.federated.runtime import InProcess
from llmchain_fed.federated.target import Target
from llmchain_fed.updates.aggregation import AGGREGATIONS

FAST = TrainingConfig(learning_rate=1e-2, batch_size=4)
SHARES = {"a": PAIRS[:3], "b": PAIRS[3:5]}
LORA_RULES = ["fedit", "ffa", "rolora", "fedsa", "fedsvd", "fedex", "flora", "flexlora"]


def federation(chain, rule, participants=SHARES, **options):
    options = {"training": FAST, "progress": False} | options
    return FederatedAveraging(chain, participants=participants, aggregation=rule, **options)


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[n], wanted[n]) for n in wanted)


# --- the table --------------------------------------------------------------------------------------------------------

OPTIONS = {
    "nothing": {},
    "mixed ranks": {"participants": [Participant("a", SHARES["a"], rank=2, alpha=3), Participant("b", SHARES["b"])]},
    **{f"codec {name}": {"codec": name} for name in ("bf16", "int8", "int4", "topk:0.5")},
    **{f"broadcast codec {name}": {"broadcast_codec": name} for name in ("int8", "topk:0.5")},
    "server optimizer": {"server_optimizer": FedAvgM(lr=0.5)},
    "kept optimizer": {"training": FAST.replace(keep_optimizer=True)},
    "one's kept optimizer": {
        "participants": [Participant("a", SHARES["a"], training={"keep_optimizer": True}), Participant("b", PAIRS[3:5])]
    },
    "Ditto": {"personal": Ditto(lam=0.5)},
}
CODECS = {name for name in OPTIONS if "codec" in name}
FINE = {"codec bf16", "codec int8"}
KEPT = {"kept optimizer", "one's kept optimizer"}
LINEAR = {"nothing", *CODECS, "server optimizer"}
TABLE = {
    ("fedavg", False): LINEAR | KEPT,
    ("fednova", False): LINEAR | KEPT,
    ("fedavg", True): LINEAR | KEPT | {"Ditto", "personalize"},
    ("fednova", True): LINEAR | KEPT | {"Ditto", "personalize"},
    ("fedit", True): LINEAR | KEPT | {"Ditto", "personalize"},
    ("ffa", True): LINEAR | KEPT | {"Ditto", "personalize"},
    ("rolora", True): LINEAR | {"Ditto", "personalize"},
    ("fedsa", True): LINEAR | KEPT,
    ("fedsvd", True): {"nothing", "personalize"} | FINE,
    ("fedex", True): {"nothing", "personalize"} | {o for o in CODECS if "broadcast" not in o} | KEPT,
    ("flora", True): {"nothing", "mixed ranks", "personalize"} | FINE,
    ("flexlora", True): {"nothing", "mixed ranks", "personalize"} | FINE,
}
CELLS = [(*row, option) for row, allowed in TABLE.items() for option in OPTIONS if option in allowed]


def test_the_table_knows_every_rule():
    assert {rule for rule, _ in TABLE} == set(AGGREGATIONS)
    assert {rule for rule, lora in TABLE if not lora} == {n for n, rule in AGGREGATIONS.items() if not rule.lora}


@pytest.mark.parametrize(("rule", "lora", "option"), CELLS)
def test_what_goes_together_runs(rule, lora, option, make_chain):
    """Two rounds, all participants' updates in use, finite weights that have moved."""
    chain = make_chain(lora=lora)
    start, base = chain.model.trainable_state(), chain.model.fingerprint()
    history = federation(chain, rule, **OPTIONS[option]).fit(rounds=2)
    assert [record.trained for record in history] == [["a", "b"]] * 2
    assert all(record.update_norm > 0 for record in history)
    end = chain.model.trainable_state()
    assert all(bool(torch.isfinite(t).all()) for t in end.values())
    assert any(not torch.equal(end[n], start[n]) for n in start)
    assert chain.model.fingerprint() == base


REASONS = {
    "mixed ranks": "needs one rank for all",
    "codec int4": "codec='int4' do not go together: it writes the factors anew",
    "codec topk:0.5": "codec='topk.*' do not go together: it writes the factors anew",
    **{name: "broadcast_codec=.* do not go together: it (writes|takes)" for name in CODECS if "broad" in name},
    "server optimizer": "do not go together: it (would move A and B apart|writes the factors anew)",
    **dict.fromkeys(KEPT, "keep_optimizer do not go together: the kept moments"),
    "Ditto": "do not go together: (personal models are LoRA adapters|its B is personal|it rewrites the global factors)",
}


@pytest.mark.parametrize(("rule", "lora"), TABLE)
def test_what_does_not_is_refused_before_anything_starts(rule, lora, make_chain):
    chain = make_chain(lora=lora)
    start = chain.model.trainable_state()
    for option in OPTIONS.keys() - TABLE[rule, lora]:
        reason = REASONS[option] if lora or option != "mixed ranks" else "the model has no plain LoRA adapter"
        with pytest.raises(ConfigError, match=reason):
            federation(chain, rule, **OPTIONS[option])
    assert_equal(chain.model.trainable_state(), start)


@pytest.mark.parametrize(("rule", "lora"), TABLE)
def test_personalizing(rule, lora, make_chain):
    chain = make_chain(lora=lora)
    fed = federation(chain, rule)
    fed.fit(rounds=1)
    start, remainder = chain.model.trainable_state(), chain.model.remainder()
    if "personalize" in TABLE[rule, lora]:
        found = fed.personalize("a", steps=2)
        assert (found.participant, found.steps) == ("a", 2)
        assert chain.adapters == ["global", "a"]
        assert isinstance(chain.with_adapter("a").invoke({"text": "sign in"}), str)
    else:
        with pytest.raises(ConfigError, match="personal"):
            fed.personalize("a", steps=2)
    assert_equal(chain.model.trainable_state(), start)
    assert chain.model.remainder().keys() == remainder.keys()


def test_a_refusal_says_what_to_do(make_chain):
    for rule, option, remedy in (
        ("fedex", "server optimizer", "use a rule that is linear"),
        ("flora", "codec int4", "Use bf16 or int8"),
        ("fedsvd", "broadcast codec int8", "Leave broadcast_codec out"),
        ("rolora", "kept optimizer", "Leave keep_optimizer out"),
        ("flexlora", "Ditto", "fed.personalize"),
        ("ffa", "mixed ranks", "Use 'flora' or 'flexlora'"),
    ):
        with pytest.raises(ConfigError, match=remedy):
            federation(make_chain(lora=True), rule, **OPTIONS[option])


# --- names ------------------------------------------------------------------------------------------------------------


def test_unknown_names_list_the_valid_ones(make_chain):
    chain = make_chain(lora=True)
    for rule in ("lora", "FedAvg", ""):
        with pytest.raises(ConfigError, match=f"unknown aggregation '{rule}'. Valid: ") as refused:
            federation(chain, rule)
        assert all(name in str(refused.value) for name in AGGREGATIONS)
    with pytest.raises(ConfigError) as refused:
        federation(chain, "fedit", codec="int7")
    assert all(name in str(refused.value) for name in ("int7", "bf16", "int8", "int4", "topk"))
    for options in ({"server_optimizer": "fedadam"}, {"server_optimizer": FedAvgM}, {"personal": "ditto"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            federation(chain, "fedit", **options)


# --- which models -----------------------------------------------------------------------------------------------------

BEYOND = {
    "DoRA": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    "lora_bias": {"lora_bias": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 2}},
    "trainable tensors that are no pair of LoRA matrices": {"target_modules": ["q_proj", "embed_tokens"]},
}


def chain_of(module, tokenizer):
    return LLMChain(llm=LocalLLM(model=LocalModel(module, tokenizer), max_new_tokens=4), prompt="Say: {text}\n")


def wrapped(tokenizer, **options):
    with torch.random.fork_rng():
        module = tiny_module("causal", len(tokenizer))
        module.config.tie_word_embeddings = False  # PEFT warns of a shared one; what is trained is the same
        module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach().clone())
        if "lora_bias" in options:
            module.config.attention_bias = module.config.mlp_bias = True
            module = type(module)(module.config)
        return get_peft_model(module, lora_config(**options)).eval()


@pytest.mark.parametrize("what", BEYOND)
def test_adapters_that_are_more_than_two_factors_a_layer_are_for_fedavg_alone(what, tokenizer):
    """Every trainable tensor ← its mean, whatever it is; what the factors leave out is then not measured."""
    chain = chain_of(wrapped(tokenizer, **BEYOND[what]), tokenizer)
    start = chain.model.trainable_state()
    for rule in LORA_RULES:
        with pytest.raises(ConfigError, match=f"aggregation='{rule}' does not handle .*{what}"):
            federation(chain, rule)
    assert_equal(chain.model.trainable_state(), start)
    record = federation(chain, "fedavg").fit(rounds=1)[0]
    assert record.trained == ["a", "b"]
    assert record.aggregation_gap is None
    assert any(not torch.equal(t, start[n]) for n, t in chain.model.trainable_state().items())


@pytest.mark.parametrize("part", ["A", "B"])
def test_factors_that_the_user_has_frozen(part, make_chain):
    """A LoRA rule counts on both; fedavg averages what is trained, and the frozen ones stay."""
    chain = make_chain(lora=True)
    for name, parameter in chain.model.module.named_parameters():
        if f"lora_{part}" in name:
            parameter.requires_grad_(False)
    start = chain.model.trainable_state()
    assert start
    for rule in LORA_RULES:
        with pytest.raises(ConfigError, match=f"'{rule}' does not handle"):
            federation(chain, rule)
    for rule in ("fedavg", "fednova"):
        record = federation(chain, rule).fit(rounds=1)[0]
        assert record.trained == ["a", "b"]
        assert record.aggregation_gap is None
        end = chain.model.trainable_state()
        assert end.keys() == start.keys()
        assert all(not torch.equal(end[n], start[n]) for n in start)
        start = end


def test_full_weights_have_no_factors(make_chain):
    chain = make_chain()
    start = chain.model.trainable_state()
    for rule in LORA_RULES:
        with pytest.raises(ConfigError, match=f"'{rule}' averages LoRA factors, and this model trains none"):
            federation(chain, rule)
    assert_equal(chain.model.trainable_state(), start)


def test_train_and_step_meet_the_same_refusal(make_chain):
    with pytest.raises(ConfigError, match="trains none"):
        federation(make_chain(), "ffa", None)


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["flora", "flexlora"])
def test_a_rank_is_at_most_the_chains(rule, make_chain):
    chain = make_chain(lora=True)
    federation(chain, rule, [Participant("a", SHARES["a"], rank=4)]).fit(rounds=1)
    with pytest.raises(ConfigError, match="'a' wants rank 5, and the model has rank 4"):
        federation(chain, rule, [Participant("a", SHARES["a"], rank=5)])


def test_a_rank_of_ones_own_is_for_the_rules_that_stack(make_chain):
    chain = make_chain(lora=True)
    for rule in AGGREGATIONS.keys() - {"flora", "flexlora"}:
        for rank in (2, 4):  # the chain's own as well: its alpha may differ
            people = [Participant("a", SHARES["a"], rank=rank), Participant("b", SHARES["b"])]
            with pytest.raises(ConfigError, match=f"'a' trains rank {rank}, and aggregation='{rule}' needs one rank"):
                federation(chain, rule, people)


def test_a_rank_of_a_model_without_factors(make_chain):
    with pytest.raises(ConfigError, match="wants rank 2, and the model has no plain LoRA adapter"):
        federation(make_chain(), "fedavg", [Participant("a", SHARES["a"], rank=2)])


@pytest.mark.parametrize("rank", [0, -1, 2.0, "4", True])
def test_a_rank_is_a_count(rank):
    with pytest.raises(ConfigError, match="rank is a count of at least 1"):
        Participant("a", PAIRS, rank=rank)


@pytest.mark.parametrize("alpha", [0, -8, float("nan"), float("inf"), "8", True])
def test_an_alpha_is_positive(alpha):
    with pytest.raises(ConfigError, match="alpha is positive"):
        Participant("a", PAIRS, rank=2, alpha=alpha)


def test_an_alpha_goes_with_a_rank():
    with pytest.raises(ConfigError, match="goes with a rank"):
        Participant("a", PAIRS, alpha=8)


class Elsewhere(InProcess):
    """Participants that the federation first hears of when they join; `says` is what they claim then."""

    def __init__(self, peers, says):
        super().__init__(peers)
        self.says = says

    def call(self, op, nodes, payload, timeout=None):
        for node, answer in super().call(op, nodes, payload, timeout):
            claims = self.says.get(node, {}) if op == "hello" and isinstance(answer, bytes) else {}
            yield node, json.dumps(json.loads(answer) | claims).encode() if claims else answer


def joined_from_elsewhere(chain, rule, people, says=None, **options):
    peers = {p.name: Client(Target.of(chain), p, FAST) for p in people}
    runtime = Elsewhere(peers, says or {})
    return FederatedAveraging(chain, runtime=runtime, aggregation=rule, training=FAST, progress=False, **options)


@pytest.mark.parametrize("rule", ["fedavg", "rolora", "fedsa", "fedex"])
def test_who_joins_with_a_rank_that_the_rule_cannot_take_is_absent_and_the_round_goes_on(rule, make_chain):
    people = [Participant("a", SHARES["a"]), Participant("small", SHARES["b"], rank=2), Participant("c", PAIRS[5:])]
    chain, without = make_chain(lora=True), make_chain(lora=True)
    history = joined_from_elsewhere(chain, rule, people).fit(rounds=2)
    for record in history:
        assert record.trained == ["a", "c"]
        assert record.participants["small"].status == "absent"
        assert record.participants["small"].reason.startswith("ParticipantError: ")
        assert "needs one rank for all" in record.participants["small"].reason
    federation(without, rule, {"a": SHARES["a"], "c": PAIRS[5:]}).fit(rounds=2)
    assert_equal(chain.model.trainable_state(), without.model.trainable_state())


def test_who_joins_with_a_rank_that_stacks_takes_part(make_chain):
    """As if it had been told of beforehand."""
    people = [Participant("a", SHARES["a"]), Participant("small", SHARES["b"], rank=2, alpha=7)]
    chain, known = make_chain(lora=True), make_chain(lora=True)
    history = joined_from_elsewhere(chain, "flexlora", people).fit(rounds=2)
    assert [record.trained for record in history] == [["a", "small"]] * 2
    federation(known, "flexlora", people).fit(rounds=2)
    assert_equal(chain.model.trainable_state(), known.model.trainable_state())


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"rank": 5}, "it must be the largest"),
        ({"rank": 0}, "makes no sense"),
        ({"rank": "2"}, "makes no sense"),
        ({"rank": 2, "alpha": -1.0}, "makes no sense"),
        ({"rank": 2, "alpha": 0}, "makes no sense"),
        ({"rank": 10**9}, "makes no sense"),
    ],
)
def test_claims_about_a_rank_are_checked(claims, reason, make_chain):
    people = [Participant("a", SHARES["a"]), Participant("odd", SHARES["b"])]
    history = joined_from_elsewhere(make_chain(lora=True), "flora", people, {"odd": claims}).fit(rounds=1)
    assert history[0].trained == ["a"]
    assert history[0].participants["odd"].status == "absent"
    assert reason in history[0].participants["odd"].reason


def test_an_update_of_another_rank_than_was_said_is_refused(make_chain):
    """It says 2 and trains the chain's 4: its factors are not those that were asked for."""
    people = [Participant("a", SHARES["a"]), Participant("odd", SHARES["b"], rank=3)]
    chain, honest = make_chain(lora=True), make_chain(lora=True)
    record = joined_from_elsewhere(chain, "flora", people, {"odd": {"rank": 2}}).fit(rounds=1)[0]
    assert record.trained == ["a"]
    assert record.participants["odd"].status in ("refused", "failed")
    federation(honest, "flora", {"a": SHARES["a"]}).fit(rounds=1)
    assert_equal(chain.model.trainable_state(), honest.model.trainable_state())
