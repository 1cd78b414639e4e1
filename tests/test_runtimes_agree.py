"""One federation, three runtimes, the same weights after three rounds: real ranks, real sites, tiny models and SmolLM2.

Belongs here: equality across runtimes (DESIGN §5.9). Does not: what a runtime does besides (test_torch_distributed,
test_nvflare).
"""

import pytest
import torch
from federation_processes import Federation, difference
from test_torch_distributed import torchrun
from torchrun_script import HELD_OUT, REAL_TRAINING, SHARES, TRAINING, federate, real_chain, tiny_chain

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


@pytest.mark.real_model
def test_smollm2(sites, tmp_path):
    check(in_three_runtimes(real_chain, sites, tmp_path, REAL_TRAINING, "--real"))
