"""A composed chain is federated as a whole: each participant's own documents, one model, the same object answers."""

import pytest
import torch
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough

from llmchain_fed import FederatedAveraging, LLMChain, LocalLLM, Participant, Site, Split, TrainingConfig
from llmchain_fed.errors import ConfigError, ContractError, ExampleFailedError, UnsupportedModelError
from llmchain_fed.federated.target import Target

TRAINING = TrainingConfig(learning_rate=3e-2, batch_size=2, epochs=4)
PROMPT = "Context: {context}\nQ: {question}\nA:"


def rag(llm, documents, prompt=PROMPT):
    found = {"context": RunnableLambda(documents.__getitem__), "question": RunnablePassthrough()}
    return found | PromptTemplate.from_template(prompt) | llm | StrOutputParser()


A, B = {"red": "apples are red"}, {"fly": "bees fly"}
PAIRS = {"a": [("red", "re")] * 4, "b": [("fly", "ye")] * 4}
BOTH = {**A, **B}


@pytest.fixture
def llm(make_chain):
    return LocalLLM(model=make_chain("causal", lora=True).model, max_new_tokens=4)


def members():
    return [Participant(name, pairs) for name, pairs in PAIRS.items()]


def test_it_is_what_the_chain_of_one_call_learns_over_the_same_prompts(llm, make_chain):
    whole, inner = rag(llm, BOTH), make_chain("causal", lora=True)
    chain = LLMChain(llm=LocalLLM(model=inner.model, max_new_tokens=4), prompt=PROMPT)
    pairs = {n: [({"context": BOTH[q], "question": q}, c) for q, c in rows] for n, rows in PAIRS.items()}
    FederatedAveraging(whole, participants=PAIRS, training=TRAINING, progress=False).fit(2)
    FederatedAveraging(chain, participants=pairs, training=TRAINING, progress=False).fit(2)
    ours, theirs = llm.model.trainable_state(), chain.model.trainable_state()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for question, _ in (*PAIRS["a"], *PAIRS["b"]):
        assert whole.invoke(question) == chain.invoke({"context": BOTH[question], "question": question})


def test_a_share_is_held_out_by_what_the_model_reads(llm):
    documents = {str(i): f"fact {i}" for i in range(4)}
    rows = [(name, "yes") for name in documents] + [("missing", "x")]
    own = [Participant("a", rows, chain=rag(llm, documents), training={"tolerance": 0.4})]
    fed = FederatedAveraging(
        rag(llm, {}), participants=own, training=TRAINING, progress=False,
        evaluation=Split(0.5, seed=1),
    )  # fmt: skip
    fed.fit(1)
    held_out = fed._server.client_manager.joined["a"].held_out_examples
    assert held_out in (1, 2, 3)
    assert (fed.data_reports["a"].used, fed.data_reports["a"].failed) == (4 - held_out, 1)
    assert fed.history[-1].participants["a"].held_out_after is not None


def test_own_chains_learn_what_one_chain_over_all_documents_learns(llm, make_chain):
    other = LocalLLM(model=make_chain("causal", lora=True).model, max_new_tokens=4)
    own = [Participant(n, PAIRS[n], chain=rag(llm, documents)) for n, documents in (("a", A), ("b", B))]
    fed = FederatedAveraging(rag(llm, BOTH), participants=own, training=TRAINING, evaluation=PAIRS, progress=False)
    fed.fit(2)
    one = FederatedAveraging(rag(other, BOTH), participants=PAIRS, training=TRAINING, progress=False)
    one.fit(2)
    ours, theirs = llm.model.trainable_state(), other.model.trainable_state()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    (sample, *_) = fed.history[-1].samples
    assert (sample.prompt, sample.reference) == ("Context: apples are red\nQ: red\nA:", "re")
    assert sample.after == rag(llm, A).invoke("red")


def test_it_goes_on_from_a_checkpoint(llm, make_chain, tmp_path):
    twin = LocalLLM(model=make_chain("causal", lora=True).model, max_new_tokens=4)
    FederatedAveraging(rag(llm, BOTH), participants=PAIRS, training=TRAINING, progress=False).fit(2)
    chain = rag(twin, BOTH)
    FederatedAveraging(chain, participants=PAIRS, training=TRAINING, progress=False, checkpoint_dir=tmp_path).fit(1)
    FederatedAveraging.resume(tmp_path, chain, participants=PAIRS, progress=False, llm=twin).fit(1)
    ours, theirs = llm.model.trainable_state(), twin.model.trainable_state()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_participants_chain_is_around_the_same_model_with_the_same_prompts(llm, make_chain):
    stranger = rag(LocalLLM(model=make_chain("causal", lora=True).model), A)
    with pytest.raises(ConfigError, match="'a' is around another model"):
        FederatedAveraging(rag(llm, BOTH), participants=[Participant("a", PAIRS["a"], chain=stranger)])
    other = rag(llm, A, "Read {context} and tell {question}:")
    with pytest.raises(ContractError, match=r"another contract \(prompt"):
        FederatedAveraging(rag(llm, BOTH), participants=[Participant("a", PAIRS["a"], chain=other)])


def test_the_contract_has_the_templates_and_not_the_documents(llm):
    contract = Target.of(rag(llm, A)).contract()
    assert contract == Target.of(rag(llm, B)).contract()
    assert contract["prompt"] != Target.of(rag(llm, A, "{context} {question}")).contract()["prompt"]


def test_a_site_has_a_chain_of_its_own(llm):
    site = Site(rag(llm, A), Participant("a", PAIRS["a"]))
    assert site.examples.startswith("trains on 4 examples")
    assert site.client.target.contract() == Target.of(rag(llm, BOTH)).contract()


def test_what_fails_is_left_out_as_far_as_the_tolerance_goes(llm):
    rows = [*PAIRS["a"], ("missing", "x")]
    with pytest.raises(ExampleFailedError, match=r"participant 'a': the chain fails for 1 of 5 .*KeyError: 'missing'"):
        FederatedAveraging(rag(llm, BOTH), participants={"a": rows}, training=TRAINING, progress=False).fit(1)
    tolerant = TRAINING.replace(tolerance=0.2)
    fed = FederatedAveraging(rag(llm, BOTH), participants={"a": rows}, training=tolerant, progress=False)
    fed.fit(1)
    assert (fed.data_reports["a"].used, fed.data_reports["a"].failed) == (4, 1)


def test_nothing_to_train_is_said(make_chain):
    with pytest.raises(UnsupportedModelError, match=r"no trainable local model was found .*chain, llm=model"):
        FederatedAveraging(RunnableLambda(str), participants=PAIRS)
    with pytest.raises(UnsupportedModelError, match="llm= names the model to train"):
        FederatedAveraging(RunnableLambda(str), participants=PAIRS, llm="smollm2")
