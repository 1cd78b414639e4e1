"""A run that goes on with other members than its checkpoint's, because somebody said so.

Belongs here: who is gone, new, or has other data, and what of each state goes on. Does not: resuming with the same
members (test_resuming). What a round after the change must give is computed here from the checkpoint's files with plain
local training, never with a federation.
"""

import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from members import MORE, NOW, THEN
from resumed_runs import ADAM, KEPT, SGD, Elsewhere, Interrupt, assert_same, assert_tensors_equal, standing, weights_of
from safetensors.torch import load_file
from tiny import PAIRS, lora_config
from torchrun_script import tiny_chain

from llmchain_fed import FederatedAveraging, Participant, Split, train_locally
from llmchain_fed.errors import CheckpointError, ConfigError, DataError, TransportError
from llmchain_fed.federated.checkpoint import files, membership
from llmchain_fed.federated.client import state as private_state
from llmchain_fed.federated.client.state import Progress
from llmchain_fed.federated.options import Ditto
from llmchain_fed.updates import serialization
from llmchain_fed.updates.codecs import make_codec
from llmchain_fed.updates.server_optimizers import FedAdam

AT = 2


def begun(chain, directory, participants=THEN, rounds=AT, **options):
    options = {"training": SGD, "progress": False} | options
    fed = FederatedAveraging(chain, participants=participants, checkpoint_dir=directory, **options)
    fed.fit(rounds=rounds)
    return fed


def resumed(directory, chain, participants, members="changed", **options):
    options = {"progress": False} | options
    return FederatedAveraging.resume(directory, chain, participants=participants, members=members, **options)


def stored(directory, number=AT):
    """The checkpoint's global weights, the server's memory and participants' progress, read from its files alone."""
    folder = directory / f"round-{number:06d}"
    owners = json.loads((folder / "manifest.json").read_text().partition("\n")[2])["participants"]
    server = folder / "server.safetensors"
    found = {}
    for name, owner in owners.items():
        (found[owner],) = private_state.unpack((folder / name).read_bytes()).values()
    return load_file(folder / "global.safetensors"), load_file(server) if server.exists() else {}, found


def trained(chain, start, examples, name, config, number=AT, *, private=None, **place):
    """One participant's weights after a round from `start`, by plain local training on a chain of its own."""
    values = {n: start[n] for n in chain.model.trainable_state()}
    chain.model.load_state({**values, **(private or {})})
    result = train_locally(chain, examples, config, participant=name, round=number, **place)
    return chain.model.trainable_state(), result


def mean_of(updates, counts):
    """Σ n_k/n · w_k in float64."""
    total = sum(counts.values())
    names = next(iter(updates.values()))
    return {n: sum(w[n].double() * (counts[k] / total) for k, w in updates.items()) for n in names}


def assert_close(got, wanted, **tolerance):
    for name in wanted:
        torch.testing.assert_close(
            got[name].double(), wanted[name].double(), **({"rtol": 1e-5, "atol": 1e-7} | tolerance), msg=name
        )


def notes(fed, number=AT) -> str:
    (record,) = [r for r in fed.history if r.round == number + 1]
    return " | ".join(record.notes)


# --- one round equals what an outsider computes -----------------------------------------------------------------------


@pytest.mark.parametrize("case", NOW)
@pytest.mark.parametrize("rule", ["fedavg", "fedit"])
def test_a_round_is_the_mean_over_those_of_now(rule, case, make_chain, tmp_path):
    """w = Σ n_k/n · w_k from the checkpoint's weights, over the present members with their present examples."""

    def fresh():
        return make_chain(lora=rule == "fedit")

    begun(fresh(), tmp_path, aggregation=rule)
    start, _, _ = stored(tmp_path)
    fed = resumed(tmp_path, fresh(), NOW[case])
    assert fed.round == AT
    assert_tensors_equal(weights_of(fed), start)
    fed.fit(rounds=1)
    updates = {n: trained(fresh(), start, examples, n, SGD)[0] for n, examples in NOW[case].items()}
    assert_close(weights_of(fed), mean_of(updates, {n: len(e) for n, e in NOW[case].items()}))
    assert set(fed.history[-1].participants) == set(NOW[case])
    assert [r.round for r in fed.history] == [1, 2, 3]


@pytest.mark.parametrize("case", NOW)
def test_fedadam_goes_on_with_its_moments(case, make_chain, tmp_path):
    """m ← β₁m + (1 − β₁)Δ, v ← β₂v + (1 − β₂)Δ², w ← w + ηm/(√v + τ) (arXiv 2003.00295), from the checkpoint's."""
    rate, beta_1, beta_2, tau = 0.01, 0.9, 0.99, 1e-3
    adam = FedAdam(lr=rate)
    assert (adam.beta1, adam.beta2, adam.tau) == (beta_1, beta_2, tau)
    begun(make_chain(), tmp_path, server_optimizer=adam)
    start, memory, _ = stored(tmp_path)
    fed = resumed(tmp_path, make_chain(), NOW[case])
    assert_tensors_equal(fed._server.settings.server_optimizer.state_dict()[0], memory)
    fed.fit(rounds=1)
    updates = {n: trained(make_chain(), start, examples, n, SGD)[0] for n, examples in NOW[case].items()}
    mean = mean_of(updates, {n: len(e) for n, e in NOW[case].items()})
    wanted = {}
    for name, value in start.items():
        delta = mean[name] - value.double()
        m, v = memory[f"m/{name}"], memory[f"v/{name}"]
        m, v = beta_1 * m.double() + (1 - beta_1) * delta, beta_2 * v.double() + (1 - beta_2) * delta**2
        wanted[name] = value.double() + rate * m / (v.sqrt() + tau)
    assert_close(weights_of(fed), wanted, atol=1e-6)


def test_fedex_is_exact_over_those_of_now(make_chain, tmp_path):
    """mean(B)·mean(A) and the remainder together are mean(BA) of the present members (arXiv 2410.09432)."""
    begun(make_chain(lora=True), tmp_path, aggregation="fedex")
    chain = make_chain(lora=True)
    fed = resumed(tmp_path, chain, NOW["all three"])
    start = fed._server.publish()
    before = {n: t.clone() for n, t in start.values.items()}
    fed.fit(rounds=1)
    total = sum(len(e) for e in NOW["all three"].values())
    sums: dict[str, torch.Tensor] = {}
    layers = sorted({n.rpartition(".lora_")[0] for n in before})
    (suffix_a,) = {n.rpartition(".lora_")[2] for n in before if ".lora_A" in n}
    (suffix_b,) = {n.rpartition(".lora_")[2] for n in before if ".lora_B" in n}
    for name, examples in NOW["all three"].items():
        other = make_chain(lora=True)
        resumed(tmp_path, other, NOW["all three"], round=AT)  # the base with the checkpoint's remainder
        own, _ = trained(other, before, examples, name, SGD)
        for layer in layers:
            product = own[f"{layer}.lora_{suffix_b}"].double() @ own[f"{layer}.lora_{suffix_a}"].double()
            sums[layer] = sums.get(layer, 0) + product * len(examples) / total
    after, scaling = fed._server.publish(), chain.model.lora_scaling()
    for layer in layers:
        new = after.values[f"{layer}.lora_{suffix_b}"].double() @ after.values[f"{layer}.lora_{suffix_a}"].double()
        old, now = (s.remainder[layer] for s in (start, after))
        gained = now.b.double() @ now.a.double() - old.b.double() @ old.a.double()
        torch.testing.assert_close(scaling[layer] * new + gained, scaling[layer] * sums[layer], rtol=1e-4, atol=1e-6)


def test_under_fedsa_a_newcomer_begins_at_the_global_b(make_chain, tmp_path):
    begun(make_chain(lora=True), tmp_path, aggregation="fedsa")
    start, _, kept = stored(tmp_path)
    fed = resumed(tmp_path, make_chain(lora=True), NOW["all three"])
    fed.fit(rounds=1)
    updates = {}
    for name, examples in NOW["all three"].items():
        private = kept[name].private if name in kept else {}
        assert bool(private) == (name != "d")
        updates[name], _ = trained(make_chain(lora=True), start, examples, name, SGD, private=private)
    shared = [n for n in start if "lora_A" in n]
    mean = mean_of({k: {n: w[n] for n in shared} for k, w in updates.items()},
                   {n: len(e) for n, e in NOW["all three"].items()})  # fmt: skip
    assert_close(weights_of(fed), mean)
    for name, (_, tensors) in standing(fed).items():
        own = {n.split("/", 2)[2]: t for n, t in tensors.items() if "/private/" in n}
        assert_close(own, {n: t for n, t in updates[name].items() if n not in shared})


def test_residuals_of_those_who_stay_are_sent_and_newcomers_have_none(make_chain, tmp_path):
    """int8 with error feedback: what is averaged is decode(encode(Δ + residual))."""
    begun(make_chain(), tmp_path, codec="int8")
    start, _, kept = stored(tmp_path)
    fed = resumed(tmp_path, make_chain(), NOW["all three"])
    fed.fit(rounds=1)
    codec, decoded = make_codec("int8"), {}
    for name, examples in NOW["all three"].items():
        own, _ = trained(make_chain(), start, examples, name, SGD)
        carried = kept[name].carried if name in kept else {}
        residual = {n.removeprefix("residual/"): t for n, t in carried.items()}
        assert bool(residual) == (name != "d")
        delta = {n: t - start[n] + residual.get(n, 0) for n, t in own.items()}
        back = codec.decode(codec.encode(delta), serialization.describe(delta))
        decoded[name] = {n: start[n] + t for n, t in back.items()}
    counts = {n: len(e) for n, e in NOW["all three"].items()}
    assert_close(weights_of(fed), mean_of(decoded, counts), atol=1e-6)


def test_a_kept_optimizer_and_ditto_go_on_for_those_who_stay(make_chain, tmp_path):
    config = KEPT
    begun(make_chain(lora=True), tmp_path, training=config, personal=Ditto(lam=0.3), aggregation="fedit")
    start, _, kept = stored(tmp_path)
    now = {"d": MORE, "a": PAIRS[:5], "c": PAIRS[9:]}  # the same amounts: positions stay as they are
    fed = resumed(tmp_path, make_chain(lora=True), now)
    fed.fit(rounds=1)
    updates = {}
    for name, examples in now.items():
        progress = kept.get(name, Progress())
        assert (progress.optimizer_state is None) == (not progress.ditto) == (name == "d")
        place = {"first_step": progress.next_step}
        updates[name], result = trained(
            make_chain(lora=True), start, examples, name, config, optimizer_state=progress.optimizer_state, **place
        )
        personal, _ = trained(
            make_chain(lora=True), start, examples, name, config.replace(proximal_mu=0.3),
            private=progress.ditto, anchor=start, **place,
        )  # fmt: skip
        header, tensors = standing(fed)[name]
        assert header[str(AT + 1)]["next_step"] == result.next_step == progress.next_step + 2
        assert_close({n.split("/", 2)[2]: t for n, t in tensors.items() if "/ditto/" in n}, personal)
    assert_close(weights_of(fed), mean_of(updates, {n: len(e) for n, e in now.items()}))


@pytest.mark.parametrize("count", [1, 3, 5, 8, 9, 12])
def test_data_that_has_grown_is_walked_through_as_a_whole(count, make_chain, tmp_path):
    """The position is at the beginning of a pass: the batches of one pass have each example once, none is left out."""
    config = SGD.replace(max_steps=3, epochs=None, batch_size=2)
    begun(make_chain(), tmp_path, {"a": PAIRS[:5]}, rounds=1, training=config)  # at step 3 of passes of 3
    _, _, kept = stored(tmp_path, 1)
    assert kept["a"].next_step == 3
    examples = (PAIRS + MORE)[:count]
    fed = resumed(tmp_path, make_chain(), {"a": examples})
    per_pass = math.ceil(count / 2)
    begins = standing(fed)["a"][0]["1"]["next_step"]
    assert begins == (3 if count == 5 else math.ceil(3 / per_pass) * per_pass)
    start, _, _ = stored(tmp_path, 1)
    fed.fit(rounds=1)
    own, result = trained(make_chain(), start, examples, "a", config, 1, first_step=begins)
    assert_close(weights_of(fed), own)
    assert standing(fed)["a"][0]["2"]["next_step"] == result.next_step
    again = resumed(tmp_path, make_chain(), {"a": examples}, members="same")
    assert standing(again)["a"][0]["2"]["next_step"] == result.next_step


# --- what goes on, and what does not ----------------------------------------------------------------------------------


def test_the_first_record_says_what_happened(make_chain, tmp_path):
    begun(make_chain(), tmp_path)
    fed = resumed(tmp_path, make_chain(), NOW["all three"])
    fed.fit(rounds=2)
    said = notes(fed)
    assert f"members changed after round {AT}: left: b; joined: d; c changed: examples 3 then, 5 now, tokens" in said
    assert "not, bit for bit, the run that was interrupted" in said
    assert "asked in another order" not in said
    first, second = fed.history[AT], fed.history[AT + 1]
    assert (first.members_changed, second.members_changed, second.notes) == (True, False, [])
    assert "left: b" in str(first)
    assert set(second.participants) == {"a", "c", "d"}
    assert set(fed.history[0].participants) == {"a", "b", "c"}, "what was stays as it was"
    again = resumed(tmp_path, make_chain(), NOW["all three"], members="same")
    assert again.history.to_json() == fed.history.to_json()


def test_another_order_is_a_change_as_well(make_chain, tmp_path):
    begun(make_chain(), tmp_path)
    fed = resumed(tmp_path, make_chain(), {n: THEN[n] for n in "cab"})
    fed.fit(rounds=1)
    assert "asked in another order" in notes(fed)


def test_states_of_the_gone_are_nowhere_any_more(make_chain, tmp_path):
    options = {"training": KEPT, "codec": "int8", "personal": Ditto(), "keep_checkpoints": 1}
    begun(make_chain(lora=True), tmp_path, **options)
    assert set(stored(tmp_path)[2]) == {"a", "b", "c"}
    fed = resumed(tmp_path, make_chain(lora=True), NOW["gone"])
    fed.fit(rounds=1)
    assert set(stored(tmp_path, AT + 1)[2]) == {"a", "c"}
    about = files.read(tmp_path).about
    assert about["participants"] == ["a", "c"]
    assert set(about["declarations"]) == {"a", "c"}
    for path in (tmp_path / f"round-{AT + 1:06d}").rglob("*"):
        assert hashlib.sha256(b"b").hexdigest()[:32] not in path.name


def test_who_comes_back_begins_anew(make_chain, tmp_path):
    """What was dropped is not remembered, whatever the history knows of the name."""
    begun(make_chain(), tmp_path, training=KEPT, codec="int8")
    resumed(tmp_path, make_chain(), NOW["gone"]).fit(rounds=1)
    fed = resumed(tmp_path, make_chain(), THEN)
    header, tensors = standing(fed)["b"]
    assert [item["next_step"] for item in header.values()] == [0]
    assert not tensors
    fed.fit(rounds=1)
    assert "joined: b" in notes(fed, AT + 1)
    assert not any(
        "that its peer has" in note for record in fed.history[-1].participants.values() for note in record.notes
    )


def test_personal_adapters_of_the_gone_are_gone(make_chain, tmp_path):
    """In a chain that goes on in the same process they were residents."""
    chain = make_chain(lora=True)
    fed = begun(chain, tmp_path, personal=Ditto())
    fed.promote(1, "kept")
    assert set(chain.model.adapters[1:]) == {"a", "b", "c", "kept"}
    again = resumed(tmp_path, chain, NOW["all three"])
    assert set(chain.model.adapters[1:]) == {"a", "c", "kept"}
    again.fit(rounds=1)
    assert set(chain.model.adapters[1:]) == {"a", "c", "d", "kept"}


def test_other_options_of_ones_own_count_from_now_on(make_chain, tmp_path):
    """A kept optimizer would bring the old learning rate back, or be none of the new kind's."""
    begun(make_chain(), tmp_path, training=KEPT)
    start, _, kept = stored(tmp_path)
    own = {"optimizer": "sgd", "learning_rate": 0.02, "batch_size": 2}
    people = [Participant("a", PAIRS[:5], training=own), *(Participant(n, THEN[n]) for n in "bc")]
    fed = resumed(tmp_path, make_chain(), people)
    fed.fit(rounds=1)
    assert "a changed: training options of its own, a kept optimizer begins anew" in notes(fed)
    updates = {}
    for name in THEN:
        config = KEPT.replace(**own) if name == "a" else KEPT
        first = math.ceil(kept["a"].next_step / 3) * 3 if name == "a" else kept[name].next_step
        state = None if name == "a" else kept[name].optimizer_state
        updates[name], _ = trained(
            make_chain(), start, THEN[name], name, config, optimizer_state=state, first_step=first
        )
    assert_close(weights_of(fed), mean_of(updates, {n: len(e) for n, e in THEN.items()}))


def test_another_rank_begins_anew_what_had_the_old_shape(make_chain, tmp_path):
    def people(*ranks):
        return [Participant(n, THEN[n], rank=r) for n, r in zip("abc", ranks, strict=True)]

    options = {"aggregation": "flora", "training": ADAM, "codec": "int8"}
    begun(make_chain(lora=True), tmp_path, people(2, 4, 1), **options)
    fed = resumed(tmp_path, make_chain(lora=True), people(4, 4, 2))
    fed.fit(rounds=2)
    assert [r.status for r in fed.history[-1].participants.values()] == ["trained"] * 3
    said = notes(fed)
    assert "a changed: rank 2 then, 4 now" in said
    assert "c changed: rank 1 then, 2 now" in said
    assert "b changed" not in said


@pytest.mark.parametrize("options", [{}, {"broadcast_codec": "int8"}, {"codec": "int4"}], ids=str)
def test_newcomers_are_sent_everything_and_nobody_is_stale(options, make_chain, tmp_path):
    """Sites keep what an earlier hub sent them: neither they nor the newcomer may take that for the present weights."""
    sites = begun(make_chain(), tmp_path / "sites", {**THEN, "d": MORE}, rounds=1, **options)._peers
    first = {n: sites[n] for n in "abc"}
    begun(make_chain(), tmp_path / "hub", None, runtime=Elsewhere(first), **options)
    begun(make_chain(), tmp_path / "here", THEN, **options)
    now = {n: sites[n] for n in "acd"}
    fed = resumed(tmp_path / "hub", make_chain(), None, runtime=Elsewhere(now))
    twin = resumed(tmp_path / "here", make_chain(), {"a": THEN["a"], "c": THEN["c"], "d": MORE})
    for one in (fed, twin):
        one.fit(rounds=2)
        assert [r.status for r in one.history[-1].participants.values()] == ["trained"] * 3
    assert_tensors_equal(weights_of(fed), weights_of(twin))
    assert notes(fed) == notes(twin)


# --- nothing changed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elsewhere", [False, True])
def test_where_nothing_changed_it_is_the_same_run_and_says_so(elsewhere, make_chain, tmp_path):
    options = {"training": KEPT, "codec": "int8", "server_optimizer": FedAdam(lr=0.01), "participants_per_round": 2}
    begun(make_chain(lora=True), tmp_path, **options)
    straight = FederatedAveraging(make_chain(lora=True), participants=THEN, progress=False, **options)
    straight.fit(rounds=AT + 2)
    place = {"participants": THEN}
    if elsewhere:
        sites = FederatedAveraging(make_chain(lora=True), participants=THEN, progress=False, training=KEPT)._peers
        place = {"participants": None, "runtime": Elsewhere(sites)}
    fed = resumed(tmp_path, make_chain(lora=True), **place)
    fed.fit(rounds=2)
    (note,) = fed.history[AT].notes
    assert "nobody left or joined, and all have as many examples as then" in note
    assert not fed.history[AT].members_changed
    fed.history[AT].notes.clear()
    assert_same(fed, straight)


# --- elsewhere: what they have is known when they join ----------------------------------------------------------------


def test_sites_are_compared_when_they_join(make_chain, tmp_path):
    begun(make_chain(), tmp_path, training=KEPT)
    now = {"d": MORE[2:], "a": PAIRS[:5], "c": PAIRS[9:] + MORE[:2]}
    sites = FederatedAveraging(make_chain(), participants=now, progress=False, training=KEPT)._peers
    fed = resumed(tmp_path, make_chain(), None, runtime=Elsewhere(sites))
    fed.fit(rounds=1)
    assert "left: b; joined: d; c changed: examples 3 then, 5 now" in notes(fed)
    start, _, kept = stored(tmp_path)
    updates = {}
    for name, examples in now.items():
        progress = kept.get(name, Progress())
        per_pass = math.ceil(len(examples) / KEPT.batch_size)
        first = math.ceil(progress.next_step / per_pass) * per_pass if name == "c" else progress.next_step
        updates[name], _ = trained(
            make_chain(), start, examples, name, KEPT, optimizer_state=progress.optimizer_state, first_step=first
        )
    assert_close(weights_of(fed), mean_of(updates, {n: len(e) for n, e in now.items()}))


_RANK = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from members import NOW
from torchrun_script import tiny_chain
from llmchain_fed import FederatedAveraging, TorchDistributed
rank = int(os.environ["RANK"])
mine = {n: e for n, e in NOW["all three"].items() if (n == "a") == (rank == 0)}
chain = tiny_chain("causal", lora=True)
fed = FederatedAveraging.resume(
    sys.argv[1], chain, participants=mine, runtime=TorchDistributed(), members="changed", progress=False
)
fed.fit(2)
found = {"round": fed.round, "notes": fed.history[2].notes, "adapters": sorted(chain.model.adapters[1:])}
found["state"] = {n: t.tolist() for n, t in chain.model.trainable_state().items()}
Path(sys.argv[2], f"rank{rank}.json").write_text(json.dumps(found))
"""


def test_on_the_ranks_of_a_job(tmp_path):
    """Every rank goes on with its own, and ends where one process with all of them does."""
    options = {"training": KEPT, "codec": "int8", "server_optimizer": FedAdam(lr=0.01), "personal": Ditto()}
    begun(tiny_chain("causal", lora=True), tmp_path / "run", **options)
    shutil.copytree(tmp_path / "run", tmp_path / "here")
    now = {n: NOW["all three"][n] for n in "adc"}  # in the order of ranks
    chain = tiny_chain("causal", lora=True)
    twin = resumed(tmp_path / "here", chain, now)
    twin.fit(rounds=2)
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path / "run"), str(tmp_path), str(Path(__file__).parents[2] / "support")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank, own in ((0, ["a"]), (1, ["c", "d"])):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert (found["round"], found["notes"], found["adapters"]) == (AT + 2, twin.history[AT].notes, own)
        for name, tensor in chain.model.trainable_state().items():
            torch.testing.assert_close(torch.tensor(found["state"][name]), tensor, rtol=1e-5, atol=1e-6)


class Late(Elsewhere):
    """One participant cannot be reached at first."""

    def __init__(self, peers, late) -> None:
        super().__init__(peers)
        self.late = late

    def call(self, op, nodes, payload, timeout=None):
        for node in nodes:
            if node == self.late:
                yield node, TransportError("not there yet")
            else:
                yield from super().call(op, [node], payload, timeout)


def test_who_joins_later_is_compared_then(make_chain, tmp_path):
    begun(make_chain(), tmp_path)
    sites = FederatedAveraging(make_chain(), participants=NOW["grown"], progress=False, training=SGD)._peers
    runtime = Late(sites, "c")
    fed = resumed(tmp_path, make_chain(), None, runtime=runtime)
    fed.fit(rounds=1)
    assert "changed:" not in notes(fed)
    runtime.late = None
    fed.fit(rounds=2)
    said = notes(fed, AT + 1)
    assert "c changed: examples 3 then, 7 now" in said
    assert "not, bit for bit" in said
    assert fed.history[AT + 1].members_changed
    assert fed.history[AT + 2].notes == []


def test_notes_wait_for_a_record_also_through_a_checkpoint(make_chain, tmp_path):
    """A personal model made before the first round writes a checkpoint, in which the members are those of now."""
    begun(make_chain(lora=True), tmp_path)
    resumed(tmp_path, make_chain(lora=True), NOW["all three"]).personalize("a", steps=1)
    fed = resumed(tmp_path, make_chain(lora=True), NOW["all three"], members="same")
    fed.fit(rounds=1)
    assert "left: b; joined: d; c changed" in notes(fed)
    assert fed.history[AT].members_changed


# --- what is still refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "chain", "options"),
    [
        ("base weights", {"seed": 7}, {}),
        ("prompt", {"prompt": "En français : {text}\n"}, {}),
        ("adapter", {"lora": lora_config(r=2)}, {}),
        ("seed: 0 there, 1 here", {}, {"seed": 1}),
        ("training: ", {}, {"lr": 0.5}),
        ("aggregation", {}, {"aggregation": "fedit"}),
        ("codec: None there, 'int8' here", {}, {"codec": "int8"}),
    ],
)
def test_another_federation_is_refused_whoever_takes_part(what, chain, options, make_chain, tmp_path):
    begun(make_chain(lora=True), tmp_path)
    made = make_chain(**({"lora": True} | chain))
    before = made.model.trainable_state()
    with pytest.raises(CheckpointError, match=what) as caught:
        resumed(tmp_path, made, NOW["all three"], **options)
    assert "members=" not in str(caught.value), "which would not help"
    assert_tensors_equal(made.model.trainable_state(), before)
    assert files.rounds(tmp_path) == [1, 2]


@pytest.mark.parametrize("case", NOW)
def test_by_default_they_are_refused_and_the_remedy_named_works(case, make_chain, tmp_path):
    begun(make_chain(), tmp_path)
    with pytest.raises(CheckpointError, match=r'FederatedAveraging.resume\(…, round=2, members="changed"\)'):
        FederatedAveraging.resume(tmp_path, make_chain(), participants=NOW[case], progress=False)
    resumed(tmp_path, make_chain(), NOW[case], round=2).fit(rounds=1)


@pytest.mark.parametrize("choice", ["other", "", None, True, ["changed"]])
def test_what_is_none_of_both_is_refused(choice, make_chain, tmp_path):
    begun(make_chain(), tmp_path, rounds=1)
    with pytest.raises(ConfigError, match="members is 'same'"):
        resumed(tmp_path, make_chain(), THEN, members=choice)


def test_nobody_is_no_membership(make_chain, tmp_path):
    begun(make_chain(), tmp_path, rounds=1)
    chain = make_chain()
    before = chain.model.trainable_state()
    with pytest.raises(ConfigError, match="pass participants="):
        resumed(tmp_path, chain, None)
    assert_tensors_equal(chain.model.trainable_state(), before)


def test_a_newcomer_without_examples_is_refused_before_anything_is_restored(make_chain, tmp_path):
    begun(make_chain(), tmp_path)
    chain = make_chain()
    before = chain.model.trainable_state()
    with pytest.raises(DataError, match="'d'"):
        resumed(tmp_path, chain, {**THEN, "d": []})
    assert_tensors_equal(chain.model.trainable_state(), before)


def test_a_count_of_participants_that_are_no_longer_there(make_chain, tmp_path):
    begun(make_chain(), tmp_path, participants_per_round=3)
    with pytest.raises(ConfigError, match=r"participants_per_round .* a count up to 2, got 3"):
        resumed(tmp_path, make_chain(), NOW["gone"])
    fed = resumed(tmp_path, make_chain(), NOW["gone"], participants_per_round=1)
    fed.fit(rounds=1)
    assert "participants_per_round: 3 then, 1 now" in notes(fed)
    assert len(fed.history[-1].trained) == 1
    with pytest.raises(CheckpointError, match="participants_per_round"):
        resumed(tmp_path, make_chain(), NOW["gone"], members="same", participants_per_round=2)


def test_a_share_is_of_those_who_are_there(make_chain, tmp_path):
    begun(make_chain(), tmp_path, participants_per_round=0.67)
    fed = resumed(tmp_path, make_chain(), {**THEN, "d": MORE, "e": MORE[:2], "f": MORE[2:]})
    fed.fit(rounds=1)
    assert len(fed.history[-1].trained) == 4


def test_a_quorum_of_more_than_there_are(make_chain, tmp_path):
    begun(make_chain(), tmp_path, quorum=3)
    with pytest.raises(ConfigError, match="quorum of 3 can never be met by 2"):
        resumed(tmp_path, make_chain(), NOW["gone"])
    resumed(tmp_path, make_chain(), NOW["gone"], quorum=2).fit(rounds=1)


# --- rolling back beyond a change -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", NOW)
def test_rolling_back_beyond_a_change_is_refused_with_the_way(case, make_chain, tmp_path):
    begun(make_chain(), tmp_path, keep_checkpoints=None)
    fed = resumed(tmp_path, make_chain(), NOW[case])
    fed.fit(rounds=2)
    before, history = weights_of(fed), fed.history.to_json()
    with pytest.raises(CheckpointError, match=r'FederatedAveraging.resume\(…, round=1, members="changed"\)'):
        fed.roll_back(to=1)
    assert_tensors_equal(weights_of(fed), before)
    assert fed.history.to_json() == history
    fed.roll_back(to=3)  # after the change they are those of now
    assert fed.round == 3
    assert notes(fed)
    fed.fit(rounds=1)
    assert_tensors_equal(weights_of(fed), before)
    back = resumed(tmp_path, make_chain(), NOW[case], round=1)
    back.fit(rounds=1)
    assert back.round == 2
    assert "members changed after round 1" in notes(back, 1)


def test_also_where_sites_have_other_data_now(make_chain, tmp_path):
    """Told before anything is put back: they have joined, so what they have is known."""
    begun(make_chain(), tmp_path, keep_checkpoints=None)
    sites = FederatedAveraging(make_chain(), participants=NOW["grown"], progress=False, training=SGD)._peers
    fed = resumed(tmp_path, make_chain(), None, runtime=Elsewhere(sites))
    fed.fit(rounds=1)
    before = weights_of(fed)
    with pytest.raises(CheckpointError, match=r"'c' is not as it was \(examples: 3 then, 7 now"):
        fed.roll_back(to=1)
    assert_tensors_equal(weights_of(fed), before)
    assert fed.round == 3
    fed.fit(rounds=1)


# --- what goes on beside ----------------------------------------------------------------------------------------------


def test_patience_counts_on(make_chain, tmp_path):
    still = SGD.replace(learning_rate=1e-9)
    fed = FederatedAveraging(
        make_chain(), participants=THEN, training=still, evaluation=PAIRS[:3], progress=False,
        checkpoint_dir=tmp_path, callbacks=[Interrupt(2)],
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        fed.fit(rounds=9, patience=3, min_delta=0.1)
    again = resumed(tmp_path, make_chain(), NOW["gone"], evaluation=PAIRS[:3])
    again.fit(rounds=9, patience=3, min_delta=0.1)
    assert again.round == 3


def test_the_newest_share_of_grown_data_is_another_and_that_is_said(make_chain, tmp_path):
    """Of a split by a hash nothing moves: what was trained on before is never held out now."""

    def dated(participants):
        tables = {n: [{"text": x, "completion": y} for x, y in pairs] for n, pairs in participants.items()}
        return {n: pd.DataFrame(rows).assign(at=range(len(rows))) for n, rows in tables.items()}

    said = "some of them may have been trained on before"
    begun(make_chain(), tmp_path / "time", dated(THEN), evaluation=Split(0.2, time="at"))
    fed = resumed(tmp_path / "time", make_chain(), dated(NOW["grown"]))
    fed.fit(rounds=1)
    assert said in notes(fed)
    first = begun(make_chain(), tmp_path / "hash", evaluation=0.4)
    fed = resumed(tmp_path / "hash", make_chain(), NOW["grown"])
    fed.fit(rounds=1)
    assert said not in notes(fed)
    for name, peer in first._peers.items():
        assert set(peer.participant.examples) <= set(fed._peers[name].participant.examples)


def test_a_state_for_other_data_keeps_all_but_the_place_in_them():
    kinds = [{"w": torch.full((2,), float(k))} for k in range(4)]
    progress = Progress(5, {"state": {}, "param_groups": [{"lr": 0.1}]}, *kinds)
    state = private_state.pack({3: progress})

    def read(changes):
        data = membership.adapted(state, changes)
        header, _ = serialization.inspect(data, max_bytes=len(data))
        return header["new_pass"], private_state.unpack(data)[3]

    new_pass, kept = read({"examples"})
    assert new_pass
    assert kept.optimizer_state == progress.optimizer_state
    for kind, found in kept.kept().items():
        assert_tensors_equal(found, progress.kept()[kind])
    assert read({"options", "examples"})[1].optimizer_state is None
    assert read({"options"})[1].carried
    for what in ("rank", "alpha"):
        assert read({what})[1] == Progress(5)


def test_other_members_may_train_by_hand(make_chain, tmp_path):
    begun(make_chain(), tmp_path, training=ADAM)
    fed = resumed(tmp_path, make_chain(), NOW["all three"])
    start, _, _ = stored(tmp_path)
    for name, examples in NOW["all three"].items():
        fed.train(examples, name)
    record = fed.step()
    updates = {n: trained(make_chain(), start, e, n, ADAM)[0] for n, e in NOW["all three"].items()}
    assert_close(weights_of(fed), mean_of(updates, {n: len(e) for n, e in NOW["all three"].items()}))
    assert any("left: b" in note for note in record.notes)
    assert record.members_changed
