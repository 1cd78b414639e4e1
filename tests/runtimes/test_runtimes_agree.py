"""One federation, three runtimes, the same weights after three rounds: real ranks, real sites, tiny models and SmolLM2.

Belongs here: equality across runtimes (invariant 9 of docs/architecture.md). Does not: what a runtime does besides
(test_torch_distributed, test_nvflare).
"""

import json

import pytest
import torch
from federation_processes import Federation, difference
from ranks import torchrun
from torchrun_script import (
    HELD_OUT,
    REAL_TRAINING,
    SHARES,
    TRAINING,
    VARIANTS,
    federate,
    hashes,
    options_of,
    real_chain,
    tiny_chain,
)

from llmchain_fed import FederatedAveraging

pytestmark = pytest.mark.federation
KINDS = [
    pytest.param("causal", False, id="causal-full"),
    pytest.param("causal", True, id="causal-lora"),
    pytest.param("seq2seq", False, id="seq2seq-full"),
    pytest.param("seq2seq", True, id="seq2seq-lora"),
]


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """One engine and one job for all; the peers are started anew for each chain."""
    found = Federation(tmp_path_factory.mktemp("f"), sites=list(SHARES))
    try:
        found.start()
        with found.runtime() as runtime:
            yield found, runtime
    finally:
        found.stop()


def in_three_runtimes(chain, sites, folder, training, *options):
    """`chain()` federated in each: the trainable weights by runtime, and the histories."""
    here = chain()
    fed = federate(here, SHARES, training=training, samples=0)
    status, output, reports = torchrun(folder, *options, seconds=400)
    assert status == 0, output
    federation, runtime = sites
    federation.change_chain(chain())
    there = chain()
    across = federation.federate(runtime, chain=there, training=training, samples=0)
    states = {f"rank {rank}": report["state"] for rank, report in reports.items()}
    states["nvflare"] = there.model.trainable_state()
    return here.model.trainable_state(), states, fed.history, across.history


def check(found):
    reference, states, ours, theirs = found
    for name, state in states.items():
        apart = difference(reference, {n: torch.as_tensor(values) for n, values in state.items()})
        print(f"\n{name}: {apart:.1e} from the weights in one process", end="")
        assert apart < 1e-5, name
    assert len(states) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert a.trained == b.trained == list(SHARES)
        assert a.held_out_after == pytest.approx(b.held_out_after, rel=1e-5)
        for name in HELD_OUT:
            before, after = (r.participants[name].held_out_after for r in (a, b))
            assert before == pytest.approx(after, rel=1e-4)


@pytest.mark.parametrize(("kind", "lora"), KINDS)
def test_tiny_models(kind, lora, sites, tmp_path):
    options = ["--kind", kind, *(["--lora"] if lora else [])]
    check(in_three_runtimes(lambda: tiny_chain(kind, lora=lora), sites, tmp_path, TRAINING, *options))


def test_rules_codecs_server_optimizers_and_personal_models(sites, tmp_path):
    """The same weights hash after three rounds, in one process, on three ranks and at four sites; also when resumed."""
    wanted, losses = {}, {}
    for variant in VARIANTS:
        chain = tiny_chain("causal", lora=True)
        fed = federate(chain, SHARES, **options_of(variant))
        wanted[variant], losses[variant] = hashes(chain, SHARES), [r.held_out_after for r in fed.history]
    status, output, _ = torchrun(tmp_path, "--variants", seconds=400)
    assert status == 0, output
    reports = [json.loads((tmp_path / f"rank{rank}.variants.json").read_text()) for rank in range(3)]
    for report in reports:
        for variant in VARIANTS:
            assert report[variant]["global"] == wanted[variant]["global"], variant
            assert report[variant]["losses"] == pytest.approx(losses[variant], rel=1e-5), variant
        assert set(report["compared"]["d"]) == {"base", "global", "personal"}
        assert report["personalized"]["losses"] == report["compared"]["d"]
        asked = ("compared", "curve", "planned")  # on every rank the same answers
        assert [report[what] for what in asked] == [reports[0][what] for what in asked]
        assert report["resumed"]["global"] == wanted["rolora, int4, FedAdam"]["global"]
    for variant in ("fedsa", "Ditto"):  # a personal model is where its participant is, and the same there
        personal = {n: found for report in reports for n, found in report[variant]["personal"].items()}
        assert personal == wanted[variant]["personal"]
    federation, runtime = sites
    federation.change_chain(tiny_chain("causal", lora=True))
    for variant in VARIANTS:
        chain = tiny_chain("causal", lora=True)
        across = federation.federate(runtime, chain=chain, training=TRAINING, **options_of(variant))
        assert chain.model.weights_hash == wanted[variant]["global"], variant
        assert [r.held_out_after for r in across.history] == pytest.approx(losses[variant], rel=1e-5), variant
        if variant == "fedsa":  # its peers never share what they kept then: the next federation has new ones
            federation.change_chain(tiny_chain("causal", lora=True))
    table = across.side_by_side()  # the last variant is Ditto's: personal models at the sites, measured there
    assert {n: set(found) for n, found in table.items()} == {n: {"base", "global", "personal"} for n in HELD_OUT}
    found = across.personalize("b", steps=2)
    assert set(found.losses) == {"base", "global", "personal"}
    assert list(across.adaptation_curve("d", steps=(0, 2))) == [0, 2]
    chain = tiny_chain("causal", lora=True)
    options = options_of("rolora, int4, FedAdam")
    folder = tmp_path / "across"
    federation.federate(runtime, rounds=2, chain=chain, training=TRAINING, checkpoint_dir=folder, **options)
    chain = tiny_chain("causal", lora=True)
    FederatedAveraging.resume(folder, chain, runtime=runtime, progress=False).fit(1)
    assert chain.model.weights_hash == wanted["rolora, int4, FedAdam"]["global"]


@pytest.mark.real_model
def test_smollm2(sites, tmp_path):
    check(in_three_runtimes(real_chain, sites, tmp_path, REAL_TRAINING, "--real"))
