"""What a validation part is made of, and how presentations are counted.

Belongs here: rows of encoded examples. Does not: what is trained on them (test_compare).
"""

import pytest
from tiny import PAIRS

from llmchain_fed import TrainingConfig
from llmchain_fed.data import encode_examples
from llmchain_fed.federated.comparison import rows
from llmchain_fed.training.batch_sampler import Place, length_buckets

MANY = [(f"{a} {b}", c) for a, _ in PAIRS for b, c in PAIRS]


@pytest.fixture
def encode(make_chain):
    chain = make_chain()
    return lambda pairs: encode_examples(pairs, chain.model, chain.as_prompt())


def asked(data):
    return [tuple(data[i][0]) for i in range(len(data))]


def test_the_validation_part_has_its_share_and_the_rest_the_others(encode):
    data = encode(MANY)
    rest, apart = rows.divided(data, 0.25)
    assert sorted(asked(rest) + asked(apart)) == sorted(asked(data))
    assert not set(asked(rest)) & set(asked(apart))
    assert len(apart) == pytest.approx(36, abs=12)
    assert rest.report.completion_tokens + apart.report.completion_tokens == data.report.completion_tokens


def test_one_more_example_moves_no_other_and_a_question_has_one_side_everywhere(encode):
    _, apart = rows.divided(encode(MANY), 0.25)
    _, fewer = rows.divided(encode(MANY[1:]), 0.25)
    _, elsewhere = rows.divided(encode([(text, "autre chose") for text, _ in MANY[:70]]), 0.25)
    assert set(asked(fewer)) == set(asked(apart)) - {asked(encode(MANY[:1]))[0]}
    assert set(asked(elsewhere)) == set(asked(apart)) & set(asked(encode(MANY[:70])))


def test_the_same_question_twice_stands_on_one_side_and_one_question_alone_is_not_divided(encode):
    data = encode([("sign in", "a"), ("sign in", "b"), ("user name", "c"), ("sign in", "d")])
    sides = [sorted(set(asked(side))) for side in rows.divided(data, 0.5)]
    assert [len(side) for side in sides] == [1, 1]
    assert rows.divided(encode([("sign in", "a"), ("sign in", "b")]), 0.5) is None


@pytest.mark.parametrize("options", [{}, {"epochs": 3}, {"max_steps": 9}, {"max_steps": 3}])
def test_presentations_are_what_the_sampler_draws(encode, options):
    data, config = encode(PAIRS), TrainingConfig(batch_size=5, **options)
    drawn = sum(
        len(batch)
        for number in range(3)
        for batch in length_buckets(data, config, Place("a", number, number * (config.max_steps or 0)))
    )
    assert rows.presented(len(data), config, 3) == drawn


def test_pooled_rows_are_all_rows_in_order(encode):
    both = rows.pooled([encode(PAIRS[:3]), encode(PAIRS[3:5])])
    alike = encode(PAIRS[:5])
    assert [both[i] for i in range(5)] == [alike[i] for i in range(5)]
    assert both.report.completion_tokens == alike.report.completion_tokens
    assert rows.digest_of(both) == rows.digest_of(alike) != rows.digest_of(encode(PAIRS[:4]))
