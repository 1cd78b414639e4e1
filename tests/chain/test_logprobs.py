"""`logprobs`, `top_logprobs` and `n` of the chat face, against a plain forward pass of the module."""

import asyncio
from functools import reduce
from operator import add

import pytest
import torch
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.prompts import ChatPromptTemplate

from llmchain_fed import LLMChain, LocalChatModel, LocalModel
from llmchain_fed.errors import ConfigError
from tests.support.tiny import tiny_module, train_tokenizer


@pytest.fixture
def chat():
    tokenizer = train_tokenizer()
    return LocalChatModel(model=LocalModel(tiny_module("causal", len(tokenizer)), tokenizer), max_new_tokens=6)


def by_hand(chat, question, answer_ids):
    """(tokens, vocabulary) log-probabilities, from one forward pass a token without padding or cache."""
    (read,) = chat.model.encode([chat.render(question)], add_special_tokens=False)
    rows, ids = [], list(read)
    with torch.no_grad():
        for token in answer_ids:
            rows.append(chat.model.module(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1))
            ids.append(token)
    return torch.stack(rows)


def answer_ids(chat, question):
    (done,) = chat.model.complete([chat.render(question)], add_special_tokens=False, max_new_tokens=6)
    return done.ids


def test_each_token_has_the_log_probability_of_a_plain_forward_pass(chat):
    message = chat.invoke("save the page", logprobs=True, top_logprobs=3)
    content = message.response_metadata["logprobs"]["content"]
    ids = answer_ids(chat, "save the page")
    expected = by_hand(chat, "save the page", ids)
    assert len(content) == len(ids) == message.usage_metadata["output_tokens"]
    assert "".join(entry["token"] for entry in content) == message.content
    assert bytes(b for entry in content for b in entry["bytes"]).decode() == message.content
    for entry, token, row in zip(content, ids, expected, strict=True):
        assert entry["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(3).values.tolist()
        assert [other["logprob"] for other in entry["top_logprobs"]] == pytest.approx(best, abs=1e-4)
        assert entry["logprob"] == pytest.approx(entry["top_logprobs"][0]["logprob"], abs=1e-4)  # greedy


def test_batch_async_and_stream_have_the_same(chat):
    texts = ["save", "open the file", "x"]
    alone = [chat.invoke(text, logprobs=True).response_metadata["logprobs"] for text in texts]

    def same(others):
        for ours, theirs in zip(alone, others, strict=True):
            found, expected = (
                [entry["logprob"] for entry in logprobs["content"]]
                for logprobs in (theirs.response_metadata["logprobs"], ours)
            )
            assert found == pytest.approx(expected, abs=1e-4)

    same(chat.batch(texts, logprobs=True))
    same(asyncio.run(chat.abatch(texts, logprobs=True)))

    async def together():
        return await asyncio.gather(*(chat.ainvoke(text, logprobs=True) for text in texts))

    same(asyncio.run(together()))
    same([reduce(add, chat.stream(text, logprobs=True)) for text in texts])


def test_a_stop_strings_tokens_are_left_out(chat):
    whole = chat.invoke("save the page").content
    stop = whole[len(whole) // 2]
    message = chat.invoke("save the page", stop=[stop], logprobs=True)
    tokens = [entry["token"] for entry in message.response_metadata["logprobs"]["content"]]
    assert stop not in message.content
    assert "".join(tokens).startswith(message.content)
    assert len("".join(tokens[:-1])) < max(len(message.content), 1)


def test_without_asking_there_are_none(chat):
    assert "logprobs" not in chat.invoke("save").response_metadata
    assert "logprobs" not in chat.invoke("save", logprobs=False).response_metadata


def test_n_answers_from_one_batch(chat, monkeypatch):
    passes, whole = [], type(chat.model).complete

    def complete(self, prompts, **options):
        passes.append(len(prompts))
        return whole(self, prompts, **options)

    monkeypatch.setattr(type(chat.model), "complete", complete)
    result = chat.generate([chat._convert_input("save").to_messages()], n=4, temperature=2.0, seed=1, logprobs=True)
    (answers,) = result.generations
    assert passes == [4]
    assert len(answers) == 4
    assert len({answer.text for answer in answers}) > 1
    assert all(answer.message.response_metadata["logprobs"]["content"] for answer in answers)
    assert chat.invoke("save", n=2).content == chat.invoke("save").content
    passes.clear()
    assert len(chat.batch(["save", "open"], n=2)) == 2
    assert passes == [4]


def test_a_callback_hears_of_all_of_them(chat):
    class Ended(BaseCallbackHandler):
        def on_llm_end(self, response, **kwargs):
            self.answers = response.generations[0]

    ended = Ended()
    asyncio.run(chat.ainvoke("save", {"callbacks": [ended]}, n=3))
    assert len(ended.answers) == 3


def test_a_chain_and_a_binding_take_them_and_can_be_trained_on(chat):
    prompt = ChatPromptTemplate.from_messages([("human", "{text}")])
    chain = LLMChain(llm=chat, prompt=prompt, llm_kwargs={"logprobs": True})
    assert "logprobs" not in chain.generation_options()
    assert chain.preview(("save", "oui")).learnt == ["oui</s>"]
    assert isinstance(chain.invoke("save"), str)
    bound = prompt | chat.bind(logprobs=True, top_logprobs=1)
    entry = bound.invoke("save").response_metadata["logprobs"]["content"][0]
    assert len(entry["top_logprobs"]) == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "Pass logprobs=True"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprob": True}, "logprobs"),
    ],
)
def test_what_is_out_of_range_is_refused(chat, options, error):
    with pytest.raises(ConfigError, match=error):
        chat.invoke("save", **options)


def test_a_stream_is_one_answer(chat):
    with pytest.raises(ConfigError, match="one answer"):
        list(chat.stream("save", n=2))


def test_a_saved_chain_asks_for_them_again(chat, tmp_path):
    prompt = ChatPromptTemplate.from_messages([("human", "{text}")])
    LLMChain(llm=chat, prompt=prompt, llm_kwargs={"logprobs": True, "top_logprobs": 2}).save(tmp_path / "saved")
    loaded = LLMChain.load(tmp_path / "saved")
    assert loaded.llm_kwargs == {"logprobs": True, "top_logprobs": 2}
    assert isinstance(loaded.invoke("save"), str)
