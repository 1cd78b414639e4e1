"""Probabilities of labels through a chain and both faces, against whole rows; temperature; the parser.

Belongs here: what a user calls. Does not: scores of ids (model/test_scoring), training (training/test_label_loss).
"""

import asyncio
import math

import pytest
import torch
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import HumanMessage
from tiny import PAIRS

from llmchain_fed import (
    ChainFileError,
    ConfigError,
    DataError,
    LabelError,
    LabelParser,
    LLMChain,
    LocalChatModel,
    LocalLLM,
    PromptTooLongError,
    PromptVariablesError,
    TrainingConfig,
    evaluate_locally,
    train_locally,
)

LABELS = ["page", "page vide", "erreur", "page verrouillée"]  # three begin alike
INPUTS = ["page locked", "a", "the page is empty and unknown"]


def log_probability(model, text, completion, *, special):
    """One row by itself: the text's ids, the completion's, the end token; summed in float64."""
    [prompt] = model.encode([text], add_special_tokens=special)
    answer = [*model.tokenizer(completion, add_special_tokens=False)["input_ids"], model.tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model.module(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    return float(torch.log_softmax(logits, 1)[range(len(answer)), answer].sum())


def by_hand(model, text, labels, *, special=True, temperature=1.0):
    scores = [log_probability(model, text, label, special=special) / temperature for label in labels]
    total = sum(map(math.exp, scores))
    return {label: math.exp(s) / total for label, s in zip(labels, scores, strict=True)}


def assert_close(found, wanted):
    assert found.probabilities.keys() == wanted.keys()
    assert all(math.isclose(found.probabilities[k], wanted[k], abs_tol=1e-4) for k in wanted)
    assert math.isclose(sum(found.probabilities.values()), 1.0, abs_tol=1e-5)
    assert found.label == max(wanted, key=wanted.__getitem__)


def test_chain_classifies_as_whole_rows_do(make_chain):
    chain = make_chain(lora=True)
    for x, found in zip(INPUTS, chain.classify_batch(INPUTS, labels=LABELS), strict=True):
        assert_close(found, by_hand(chain.model, chain.render(x), LABELS))
        assert_close(chain.classify({"text": x}, labels=LABELS), by_hand(chain.model, chain.render(x), LABELS))
    hot = chain.classify(INPUTS[0], LABELS, temperature=3.0)
    assert_close(hot, by_hand(chain.model, chain.render(INPUTS[0]), LABELS, temperature=3.0))
    assert chain.classify_batch([], LABELS) == []


def test_both_faces_and_a_chain_over_chat(make_model):
    model = make_model()
    llm, chat = LocalLLM(model=model), LocalChatModel(model=model)
    assert_close(llm.classify("page locked", LABELS), by_hand(model, "page locked", LABELS))
    messages = [HumanMessage("page locked")]
    wanted = by_hand(model, "<|user|>page locked</s><|assistant|>", LABELS, special=False)
    assert_close(chat.classify(messages, LABELS), wanted)
    assert_close(LLMChain(llm=chat, prompt="{text}").classify("page locked", LABELS), wanted)
    assert_close(asyncio.run(chat.aclassify(messages, LABELS)), wanted)


def test_loglikelihood_is_what_training_counts(make_chain):
    """Σ over the completion's tokens and its end: the mean loss of the same example, times its tokens."""
    chain = make_chain()
    for x, completion in PAIRS[:4]:
        wanted = log_probability(chain.model, chain.render(x), completion, special=True)
        assert math.isclose(chain.loglikelihood(x, completion), wanted, abs_tol=1e-4)
        held_out = evaluate_locally(chain, [(x, completion)])
        assert math.isclose(-held_out.loss * held_out.tokens, wanted, abs_tol=1e-3)


def test_classify_follows_the_weights_and_leaves_them(make_chain):
    chain = make_chain()
    state = chain.model.trainable_state()
    before = chain.classify("sign in", LABELS)
    assert all(torch.equal(t, state[n]) for n, t in chain.model.trainable_state().items())
    config = TrainingConfig(loss="labels", labels=LABELS, learning_rate=1e-2, epochs=30)
    train_locally(chain, [("sign in", "erreur"), ("new folder", "page vide")], config)
    after = chain.classify("sign in", LABELS)
    assert after.label == "erreur"
    assert after.probabilities["erreur"] > max(before.probabilities["erreur"], 0.9)


def test_temperature_is_the_best_of_a_grid(make_chain):
    chain = make_chain()
    data = [(x, LABELS[at % 3]) for at, (x, _) in enumerate(PAIRS)]
    train_locally(chain, data, TrainingConfig(loss="labels", labels=LABELS, learning_rate=5e-3, epochs=4))
    held_out = [(x, LABELS[at % 2]) for at, (x, _) in enumerate(PAIRS)]  # partly otherwise: it is too sure

    def loss(temperature):
        found = chain.classify_batch([x for x, _ in held_out], LABELS, temperature=temperature)
        return -sum(math.log(c.probabilities[y]) for c, (_, y) in zip(found, held_out, strict=True)) / len(held_out)

    best = chain.fit_temperature(held_out, LABELS)
    grid = [0.05 * 1.1**k for k in range(63)]
    assert loss(best) <= min(map(loss, grid)) + 1e-4
    assert loss(best) < loss(1.0)


def test_bad_input_has_one_error_each(make_chain):
    chain = make_chain()
    for labels, says in [
        (["a", ""], "empty"),
        (["a", "b", "a"], "given twice"),
        (["a"], "no choice"),
        ("ab", "list of texts"),
        (["a", 3], "Give its words"),
    ]:
        with pytest.raises(LabelError, match=says):
            chain.classify("x", labels=labels)
    with pytest.raises(PromptVariablesError, match="missing"):
        chain.classify({"other": "x"}, labels=LABELS)
    with pytest.raises(PromptTooLongError, match="Shorten"):
        chain.classify("page " * 200, labels=LABELS)
    with pytest.raises(DataError, match="empty"):
        chain.loglikelihood("x", " ")
    with pytest.raises(ConfigError, match="above 0"):
        chain.classify("x", LABELS, temperature=0)
    with pytest.raises(LabelError, match="example 1"):
        chain.fit_temperature([("x", "page"), ("y", "Page")], LABELS)
    with pytest.raises(LabelError, match="no example"):
        chain.fit_temperature([], LABELS)


def test_parser_reads_one_label_or_refuses():
    parser = LabelParser(labels=["minor", "Major", "major"])
    assert parser.parse(" minor\n") == "minor"
    assert parser.parse("MINOR") == "minor"
    assert (parser.parse("Major"), parser.parse("major")) == ("Major", "major")
    for text in ("MAJOR", "", "minor, I think"):
        with pytest.raises(OutputParserException, match="none of the labels"):
            parser.parse(text)
    with pytest.raises(LabelError, match="given twice"):
        LabelParser(labels=["a", "a"])


def test_chain_with_a_label_parser_answers_and_is_saved(make_model, tmp_path):
    llm = LocalLLM(model=make_model(), max_new_tokens=8)
    chain = LLMChain(llm=llm, prompt="{text}\n", output_parser=LabelParser(labels=["page", "erreur"]))
    data = [("sign in", "erreur"), ("new folder", "page")]
    config = TrainingConfig(loss="labels", labels=["page", "erreur"], learning_rate=1e-2, epochs=5)
    train_locally(chain, data, config)
    train_locally(chain, data, TrainingConfig(learning_rate=5e-3, epochs=40))
    assert chain.batch([x for x, _ in data]) == [y for _, y in data]
    assert list(chain.stream("sign in")) == ["erreur"]
    chain.save(tmp_path / "saved")
    loaded = LLMChain.load(tmp_path / "saved")
    assert loaded.output_parser == chain.output_parser
    assert loaded.batch([x for x, _ in data]) == [y for _, y in data]


def test_a_saved_parser_is_checked(make_chain, tmp_path):
    from llmchain_fed.errors import RecipeError
    from llmchain_fed.recipes.parsers import make_parser
    from llmchain_fed.recipes.schema import LabelsData

    with pytest.raises(RecipeError, match="given twice"):
        make_parser(LabelsData(labels=["a", "a"]))
    chain = LLMChain(llm=make_chain().llm, prompt="{text}", output_parser=LabelParser(labels=["a", "b"]))
    chain.save(tmp_path / "saved")
    path = tmp_path / "saved" / "chain.yaml"
    path.write_text(path.read_text().replace("- b", "- a"))
    with pytest.raises(ChainFileError):
        LLMChain.load(tmp_path / "saved")
