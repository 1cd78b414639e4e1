"""The loss over labels against cross-entropy written out here, and what it teaches.

Belongs here: the loss, its weights, gradients, refusals. Does not: scores (model/test_scoring), a federation's record.
"""

import math

import pytest
import torch
from tiny import PAIRS

from llmchain_fed import ConfigError, LabelError, TrainingConfig, evaluate_locally, train_locally
from llmchain_fed.data.encoding import Batch, encode_examples
from llmchain_fed.training.label_loss import LabelGradient, class_weights

LABELS = ["page", "page vide", "erreur"]
DATA = [(text, LABELS[at % 5 % 3]) for at, (text, _) in enumerate(PAIRS)]  # 5, 5, 2 of them


def by_hand(chain, data, weights):
    """Σ w[y]·(logsumexp over labels − score of y) / Σ w[y], a whole row of its own for each label, in float64."""
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for x, y in data:
        scores = []
        for label in LABELS:
            [prompt] = chain.model.encode([chain.render(x)])
            [answer] = chain.model.encode_completions([label])
            if chain.model.kind == "seq2seq":
                logits = chain.model.module(
                    input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *answer[:-1]]])
                ).logits[0]
            else:
                logits = chain.model.module(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            scores.append(torch.log_softmax(logits.double(), 1)[range(len(answer)), answer].sum())
        total = total + weights[y] * (torch.stack(scores).logsumexp(0) - scores[LABELS.index(y)])
        weight += weights[y]
    return total / weight


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro", [None, 5])
@pytest.mark.parametrize("choice", [None, "balanced", {"erreur": 3.0}])
def test_gradient_is_that_of_cross_entropy_over_labels(battery, choice, micro):
    chain = battery()
    data = encode_examples(DATA, chain.model, chain)
    config = TrainingConfig(loss="labels", labels=LABELS, class_weight=choice, micro_batch_size=micro)
    counts = {label: sum(y == label for _, y in DATA) for label in LABELS}
    weights = dict.fromkeys(LABELS, 1.0) | (choice if isinstance(choice, dict) else {})
    if choice == "balanced":
        weights = {label: len(DATA) / (3 * count) for label, count in counts.items()}
    wanted = by_hand(chain, DATA, weights)
    wanted.backward()
    expected = gradients(chain.model.module)
    chain.model.module.zero_grad()
    step = LabelGradient.of(data, chain.model, config, ())
    result = step(chain.model, Batch([data[i] for i in range(len(data))]), config)
    found = gradients(chain.model.module)
    assert math.isclose(result.loss, float(wanted.detach()), abs_tol=1e-4)
    assert (result.tokens, result.examples) == (len(DATA), len(DATA))
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # the floor's own name
def test_checkpointed_activations_give_the_same_gradient(battery):
    chain, found = battery(), []
    data = encode_examples(DATA, chain.model, chain)
    config = TrainingConfig(loss="labels", labels=LABELS)
    module = chain.model.module
    for switch in (module.gradient_checkpointing_disable, module.gradient_checkpointing_enable):
        module.train()
        module.zero_grad()
        switch()
        step = LabelGradient.of(data, chain.model, config, ())
        step(chain.model, Batch([data[i] for i in range(len(data))]), config)
        found.append(gradients(module))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_evaluation_is_the_same_loss_unweighted(battery):
    chain = battery()
    found = evaluate_locally(chain, DATA, loss="labels", labels=LABELS, batch_size=5)
    assert math.isclose(found.loss, float(by_hand(chain, DATA, dict.fromkeys(LABELS, 1.0)).detach()), abs_tol=1e-4)
    assert (found.tokens, found.examples) == (len(DATA), len(DATA))


def test_training_teaches_the_labels(make_chain):
    """Every label is told apart, also those that begin alike, and the chain says them."""
    chain = make_chain(lora=False)
    config = TrainingConfig(loss="labels", labels=LABELS, learning_rate=5e-3, epochs=25, batch_size=6)
    result = train_locally(chain, DATA, config)
    assert result.losses[-1] < 0.1
    assert [c.label for c in chain.classify_batch([x for x, _ in DATA], LABELS)] == [y for _, y in DATA]


def test_collapse_is_said_whatever_the_loss(make_chain):
    """All examples taken for one label: a constant answer, taught here as one; not where all have that label."""
    chain = make_chain()
    train_locally(chain, [(x, "page") for x, _ in DATA], TrainingConfig(learning_rate=1e-2, epochs=15))
    for loss in ("tokens", "labels"):
        assert evaluate_locally(chain, DATA, loss=loss, labels=LABELS).collapsed == "page"
    assert evaluate_locally(chain, [(x, "page") for x, _ in DATA], labels=LABELS).collapsed is None
    assert evaluate_locally(chain, DATA).collapsed is None
    assert evaluate_locally(chain, PAIRS, labels=LABELS).collapsed is None  # free texts: nothing to say


def test_class_weights_follow_sklearn():
    """n_samples / (n_classes · count), as scikit-learn's documentation has it."""
    assert class_weights("balanced", ["a", "b"], [0] * 6 + [1] * 2) == [8 / (2 * 6), 8 / (2 * 2)]
    assert class_weights({"b": 5.0}, ["a", "b"], [0, 1]) == [1.0, 5.0]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"labels": ["a", ""]}, LabelError, "empty"),
        ({"labels": ["a", "  "]}, LabelError, "empty"),
        ({"labels": ["a", "b", "a"]}, LabelError, "given twice"),
        ({"labels": ["a"]}, LabelError, "no choice"),
        ({"labels": "ab"}, LabelError, "list of texts"),
        ({"labels": ["a", 1]}, LabelError, "Give its words"),
        ({"labels": None}, ConfigError, "none are given"),
        ({"labels": ["a", "b"], "class_weight": {"c": 1.0}}, ConfigError, "none of the labels"),
        ({"labels": ["a", "b"], "class_weight": {"a": 0.0}}, ConfigError, "above 0"),
        ({"labels": ["a", "b"], "class_weight": {"a": float("nan")}}, ConfigError, "above 0"),
        ({"labels": ["a", "b"], "class_weight": "balanced", "loss": "tokens"}, ConfigError, "Choose that loss"),
    ],
)
def test_options_that_make_no_sense(options, error, says):
    with pytest.raises(error, match=says):
        TrainingConfig(**({"loss": "labels"} | options))


def test_a_completion_that_is_no_label(make_chain):
    chain = make_chain()
    before = chain.model.trainable_state()
    config = TrainingConfig(loss="labels", labels=LABELS)
    with pytest.raises(LabelError, match="exactly as the labels are"):
        train_locally(chain, [*DATA, ("sign in", "Erreur")], config)
    with pytest.raises(LabelError, match="exactly as the labels are"):
        evaluate_locally(chain, [("sign in", "page ")], loss="labels", labels=LABELS)
    with pytest.raises(LabelError, match="DataLoader"):
        train_locally(chain.model, torch.utils.data.DataLoader([{"labels": torch.zeros(2)}]), config)
    assert all(torch.equal(t, before[n]) for n, t in chain.model.trainable_state().items())
