"""Several LoRA adapters on one base: views that answer and learn apart, residents, the remainder, another rank.

Belongs here: with_adapter, add_adapter, load_remainder, resized, freezing, and how they are saved.
Does not: one adapter alone (test_local_model, test_saving).
"""

import contextlib
import copy
import gc
import pickle
import statistics
import threading
import time

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from taught import ANSWERS, PROMPTS, taught_model
from tiny import PAIRS, TEMPLATE, lora_config, tiny_module, with_lora

from llmchain_fed import (
    LLMChain,
    LocalChatModel,
    LocalLLM,
    LocalModel,
    TrainingConfig,
    evaluate_locally,
    train_locally,
)
from llmchain_fed.errors import (
    ChainFileError,
    ConfigError,
    NotTrainableError,
    UnsupportedModelError,
    WeightsMismatchError,
)
from llmchain_fed.model.adapters.switching import GLOBAL, REMAINDER, lora_layers

EXAMPLES = [{"prompt": TEMPLATE.format(text=a), "completion": b} for a, b in PAIRS]
INPUTS = {
    "causal": {"input_ids": torch.arange(2, 20)[None]},
    "seq2seq": {"input_ids": torch.arange(2, 20)[None], "decoder_input_ids": torch.arange(5, 9)[None]},
}
KINDS = ["causal", "seq2seq"]


def logits(model):
    with model.exclusive(), torch.no_grad():
        return model.module(**INPUTS[model.kind]).logits


def at_rest(model):
    """What the module gives to whoever calls it directly."""
    with torch.no_grad():
        return model.module(**INPUTS[model.kind]).logits


def shaken(state, seed=1, std=0.1):
    generator = torch.Generator().manual_seed(seed)
    return {n: t + std * torch.randn(t.shape, generator=generator) for n, t in state.items()}


def factors(model, rank=3, seed=5, std=0.1, layers=None):
    generator = torch.Generator().manual_seed(seed)
    state, found = model.adapter_state(GLOBAL), {}
    for i, name in enumerate(model.lora_scaling()):
        r = rank + i % 2
        m, n = state[f"{name}.lora_B.weight"].shape[0], state[f"{name}.lora_A.weight"].shape[1]
        pair = (std * torch.randn(m, r, generator=generator), std * torch.randn(r, n, generator=generator))
        if layers is None or i in layers:
            found[name] = pair
    return found


def stacked(pairs):
    """(B, A) by layer → a state under stable names."""
    return {f"{n}.lora_{part}.weight": t for n, (b, a) in pairs.items() for part, t in (("B", b), ("A", a))}


def merged_by_hand(kind, terms):
    """The taught base with Σ scaling · B·A added to its weights; terms: layer → [(scaling, B, A)]."""
    module = taught_model(kind).module
    parts = dict(module.named_modules())
    with torch.no_grad():
        for name, added in terms.items():
            for scaling, b, a in added:
                parts[name].weight += scaling * b @ a
    return module(**INPUTS[kind]).logits.detach()


def terms(state, scaling):
    return {
        n: [(s, state[f"{n}.lora_B.weight"], state[f"{n}.lora_A.weight"])]
        for n, s in (scaling if isinstance(scaling, dict) else dict.fromkeys(layers_of(state), scaling)).items()
    }


def layers_of(state):
    return sorted({n.rpartition(".lora_")[0] for n in state})


def unchanged(model, state):
    return all(torch.equal(t, state[n]) for n, t in model.trainable_state().items())


@pytest.fixture(params=KINDS)
def model(request):
    """A taught LoRA model with the residents a and b."""
    model = taught_model(request.param, lora=True)
    state = model.trainable_state()
    model.add_adapter("a", shaken(state, 1))
    model.add_adapter("b", shaken(state, 2), scaling=1.0)
    return model


@pytest.fixture
def causal():
    model = taught_model("causal", lora=True)
    model.load_state(shaken(model.trainable_state(), 3, 0.1))
    model.add_adapter("a", shaken(model.trainable_state(), 1, 0.3))
    model.add_adapter("b", shaken(model.trainable_state(), 2, 0.3))
    return model


@pytest.fixture
def chain(causal):
    return LLMChain(llm=LocalLLM(model=causal, max_new_tokens=16), prompt=TEMPLATE)


# --- views ----------------------------------------------------------------------------------------------------------


def test_a_view_answers_as_an_independent_peft_model_with_that_adapter_alone(model):
    for name, seed in (("a", 1), ("b", 2)):
        state = shaken(model.trainable_state(), seed)
        config = lora_config(model.kind, **({} if name == "a" else {"lora_alpha": 4}))
        alone = with_lora(taught_model(model.kind).module, config)
        set_peft_model_state_dict(alone, {f"base_model.model.{n}": t for n, t in state.items()})
        with torch.no_grad():
            expected = alone(**INPUTS[model.kind]).logits
        assert torch.allclose(logits(model.with_adapter(name)), expected, atol=1e-6)
    assert not torch.allclose(logits(model.with_adapter("a")), logits(model), atol=1e-3)


def test_without_an_adapter_the_base_answers(model):
    base = taught_model(model.kind)
    assert torch.equal(logits(model.without_adapter()), at_rest(base))
    assert model.without_adapter().generate(PROMPTS[:4]) == base.generate(PROMPTS[:4]) == ANSWERS[:4]


def test_the_module_is_left_as_it_was(model):
    before, flags = at_rest(model), {n: p.requires_grad for n, p in model.module.named_parameters()}
    for view in (model.with_adapter("a"), model.without_adapter(), model.with_adapter(GLOBAL)):
        logits(view)
        with pytest.raises(KeyError), view.exclusive(), model.exclusive(), model.with_adapter("b").exclusive():
            raise KeyError
    assert torch.equal(at_rest(model), before)
    assert flags == {n: p.requires_grad for n, p in model.module.named_parameters()}


def test_views_within_each_other_each_answer_for_themselves(model):
    views = [model, model.with_adapter("a"), model.without_adapter(), model.with_adapter("b")]
    alone = [logits(view) for view in views]
    with views[1].exclusive(), views[2].exclusive():
        assert all(torch.equal(logits(v), expected) for v, expected in zip(views, alone, strict=True))


def test_a_module_that_the_user_switched_off_stays_off(model):
    base = at_rest(taught_model(model.kind))
    own = logits(model.with_adapter("a"))
    with model.module.disable_adapter():
        assert torch.equal(logits(model), base)
        assert torch.equal(logits(model.with_adapter("a")), own)


def test_the_names_are_listed_and_unknown_ones_are_refused(model):
    assert model.adapters == [GLOBAL, "a", "b"]
    assert (model.adapter, model.with_adapter("a").adapter, model.without_adapter().adapter) == (None, "a", "")
    for name in ("c", REMAINDER, "llmchain_fed_0"):
        with pytest.raises(ConfigError, match=r"\['global', 'a', 'b'\]"):
            model.with_adapter(name)
    assert torch.equal(logits(model.with_adapter("default")), logits(model)), "PEFT's own name for the trained one"


def test_without_lora_there_is_nothing_to_choose():
    model = taught_model("causal")
    chain = LLMChain(llm=LocalLLM(model=model), prompt=TEMPLATE)
    assert chain.adapters == model.adapters == []
    for call in (
        lambda: chain.with_adapter(GLOBAL),
        lambda: chain.with_adapter("a"),
        chain.without_adapter,
        lambda: model.add_adapter("a", {}),
        lambda: model.load_remainder({"x": (torch.ones(1, 1), torch.ones(1, 1))}),
    ):
        with pytest.raises(UnsupportedModelError, match="no LoRA adapter"):
            call()
    model.load_remainder({})
    assert model.remainder() == {}


def test_a_merged_adapter_is_named(model):
    model.module.merge_adapter()
    for call in (
        lambda: model.with_adapter("a"),
        model.without_adapter,
        lambda: model.add_adapter("c", model.trainable_state()),
        lambda: model.load_remainder(factors(model)),
    ):
        with pytest.raises(UnsupportedModelError, match="merged"):
            call()


def test_adapters_made_by_peft_itself_can_be_chosen():
    module = get_peft_model(tiny_module("causal", 300), lora_config(), adapter_name="fr")
    module.add_adapter("de", lora_config(r=2))
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    module.eval()
    model = LocalModel(module)
    french = at_rest(model)
    module.set_adapter("de")
    german = at_rest(model)
    assert model.adapters == [GLOBAL, "de"]
    assert torch.equal(logits(model), french), "it answers with what was active when it was made"
    assert torch.equal(logits(model.with_adapter("de")), german)
    assert torch.equal(logits(model.with_adapter("fr")), french)
    with pytest.raises(ConfigError, match="PEFT's active adapter"):
        model.remove_adapter("de")
    module.set_adapter("fr")
    model.add_adapter("de", model.trainable_state(), scaling=model.lora_scaling())
    assert torch.equal(logits(model.with_adapter("de")), french)
    model.remove_adapter("de")
    assert list(module.peft_config) == ["fr"]
    assert torch.equal(at_rest(model), french)


def test_modules_saved_whole_go_with_their_adapter():
    module = with_lora(tiny_module("causal", 300), lora_config(modules_to_save=["norm"]))
    base = at_rest(LocalModel(tiny_module("causal", 300)))
    model = LocalModel(module)
    model.load_state(shaken(model.trainable_state()))
    own = at_rest(model)
    lora = {n: t for n, t in model.trainable_state().items() if "lora_" in n}
    model.add_adapter("a", {n: torch.zeros_like(t) for n, t in lora.items()})
    model.load_remainder(factors(model, std=0.0))
    assert torch.equal(logits(model.with_adapter("a")), base)
    assert torch.equal(logits(model.without_adapter()), base)
    assert torch.allclose(logits(model), own, atol=1e-6)
    assert torch.allclose(at_rest(model), own, atol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stand_on_their_own(causal, copied):
    other = copied(causal)
    other.add_adapter("c", other.trainable_state())
    other.with_adapter("a").load_state({n: torch.zeros_like(t) for n, t in other.trainable_state().items()})
    assert causal.adapters == [GLOBAL, "a", "b"]
    assert other.adapters == [GLOBAL, "a", "b", "c"]
    assert torch.equal(logits(other), logits(causal))
    assert not torch.equal(logits(other.with_adapter("a")), logits(causal.with_adapter("a")))


# --- chains ---------------------------------------------------------------------------------------------------------


def test_chains_of_one_memory_answer_with_their_adapters(chain):
    inputs = [{"text": english} for english, _ in PAIRS]
    views = [chain, chain.with_adapter("a"), chain.with_adapter("b"), chain.without_adapter()]
    answers = [view.batch(inputs) for view in views]
    assert answers[3] == ANSWERS
    assert len({tuple(a) for a in answers}) == 4
    for view, expected in zip(views, answers, strict=True):
        assert isinstance(view, LLMChain)
        assert view.model.module is chain.model.module
        assert view.model._lock is chain.model._lock
        assert view.model.tokenizer is chain.model.tokenizer
        assert [view.invoke(x) for x in inputs[:3]] == expected[:3]
        assert "".join(view.stream(inputs[1])) == expected[1]
    assert chain.with_adapter(GLOBAL).batch(inputs) == answers[0]
    assert views[1].with_adapter("b").batch(inputs) == answers[2]
    assert chain.adapters == [GLOBAL, "a", "b"]


def test_half_read_streams_of_different_adapters_do_not_mix(chain):
    views = [chain, chain.with_adapter("a"), chain.without_adapter(), chain.with_adapter("b")]
    whole = [view.invoke("change password") for view in views]
    streams = [view.stream("change password") for view in views]
    pieces = [[next(stream)] for stream in streams]
    for i in (2, 0, 3, 1):
        pieces[i] += streams[i]
    assert ["".join(p) for p in pieces] == whole


def test_threads_may_ask_different_views_at_once(chain):
    views = [chain, chain.with_adapter("a"), chain.without_adapter()]
    inputs = [{"text": english} for english, _ in PAIRS[:3]]
    expected = [view.batch(inputs) for view in views]
    wrong = []

    def hammer(i):
        for _ in range(6):
            got = views[i].batch(inputs) if i != 1 else ["".join(views[i].stream(x)) for x in inputs]
            if got != expected[i]:
                wrong.append((i, got))

    threads = [threading.Thread(target=hammer, args=(i,)) for i in range(3) for _ in range(2)]
    for thread in threads:
        thread.start()
    chain.model.add_adapter("late", chain.model.trainable_state())
    chain.model.remove_adapter("late")
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_is_bound_stays_bound(causal):
    llm = LocalLLM(model=causal, max_new_tokens=16).bind(max_new_tokens=2).with_config(tags=["t"])
    chain = LLMChain(llm=llm, prompt=TEMPLATE, llm_kwargs={"stop": ["e"]})
    view = chain.without_adapter()
    assert view.generation_options() == chain.generation_options()
    assert view.invoke("sign in") == causal.without_adapter().generate([PROMPTS[11]], max_new_tokens=2, stop=["e"])[0]
    assert chain.face.model is causal


def test_a_chat_chain_has_views_as_well(causal):
    chain = LLMChain(llm=LocalChatModel(model=causal, max_new_tokens=6), prompt="{text}")
    a = chain.with_adapter("a").invoke("sign in")
    assert isinstance(chain.with_adapter("a").llm, LocalChatModel)
    assert (
        a == causal.with_adapter("a").generate([chain.render("sign in")], max_new_tokens=6, add_special_tokens=False)[0]
    )


def test_the_identity_of_a_view_follows_its_own_weights(chain):
    model, a, b = chain.model, chain.with_adapter("a"), chain.with_adapter("b")
    views = [chain, a, b, chain.without_adapter()]

    def identities():
        return [str(sorted(view.face._identifying_params.items(), key=str)) for view in views]

    first = identities()
    assert len(set(first)) == 4
    a.model.load_state(shaken(a.model.trainable_state()))
    second = identities()
    assert [x == y for x, y in zip(first, second, strict=True)] == [True, False, True, True]
    model.add_adapter("b", model.adapter_state("b"), scaling=0.5)  # equal factors, another scaling
    third = identities()
    assert [x == y for x, y in zip(second, third, strict=True)] == [True, True, False, True]
    model.load_remainder(factors(model))
    assert [x == y for x, y in zip(third, identities(), strict=True)] == [False, True, True, True]
    model.remove_adapter("b")
    model.add_adapter("b", a.model.trainable_state())
    assert b.model.weights_hash == a.model.weights_hash
    assert identities()[1] != identities()[2]


# --- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_a_view_changes_that_adapter_alone(model, precision):
    model.load_remainder(factors(model))
    flags = {n: p.requires_grad for n, p in model.module.named_parameters()}
    before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    view = model.with_adapter("a")
    loss = evaluate_locally(view, EXAMPLES).loss
    train_locally(view, EXAMPLES, TrainingConfig(max_steps=4, learning_rate=5e-3, precision=precision))
    assert evaluate_locally(view, EXAMPLES).loss < loss
    changed = {n for n, p in model.module.named_parameters() if not torch.equal(p, before[n])}
    (key,) = view.peft_names
    assert changed
    assert all(f".{key}." in n for n in changed)
    assert {n: p.requires_grad for n, p in model.module.named_parameters()} == flags
    assert all(p.grad is None for p in model.module.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_the_ordinary_model_leaves_residents_and_remainder_alone(model, precision):
    model.load_remainder(factors(model))
    before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    train_locally(model, EXAMPLES, TrainingConfig(max_steps=2, learning_rate=5e-3, precision=precision))
    changed = {n for n, p in model.module.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(".default." in n for n in changed)


def test_a_view_trains_exactly_as_an_independent_model_would(model):
    alone = taught_model(model.kind, lora=True)
    alone.load_state(model.adapter_state("a"))
    config = TrainingConfig(max_steps=3, learning_rate=5e-3)
    for each in (alone, model.with_adapter("a")):
        train_locally(each, EXAMPLES, config)
    assert unchanged(alone, model.adapter_state("a"))
    assert evaluate_locally(alone, EXAMPLES) == evaluate_locally(model.with_adapter("a"), EXAMPLES)


def test_stable_names_are_the_primarys_whatever_lives_beside_it():
    model = taught_model("causal", lora=True)
    names = list(model.trainable_state())
    fingerprint = model.fingerprint()
    model.add_adapter("a", model.trainable_state())
    model.load_remainder(factors(model))
    assert list(model.trainable_state()) == list(model.with_adapter("a").trainable_state()) == names
    assert list(model.adapter_state("a")) == list(model.adapter_state(GLOBAL))
    assert set(model.adapter_state("a")) == set(names)
    assert LocalModel(model.module).fingerprint() == model.fingerprint() == fingerprint
    assert list(LocalModel(model.module).trainable_state()) == names
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in names


def test_the_bare_base_cannot_be_trained(model):
    base = model.without_adapter()
    for call in (base.trainable_parameters, base.trainable_state, lambda: train_locally(base, EXAMPLES)):
        with pytest.raises(NotTrainableError):
            call()


def test_dropout_of_the_trained_adapter_applies_to_residents_and_not_to_the_remainder():
    model = LocalModel(with_lora(tiny_module("causal", 300), lora_config(lora_dropout=0.5)))
    model.add_adapter("a", shaken(model.trainable_state()))
    model.load_remainder(factors(model))
    (key,) = model.with_adapter("a").peft_names
    for layer in lora_layers(model.module, "default").values():
        assert layer.lora_dropout[key].p == 0.5
        assert isinstance(layer.lora_dropout[REMAINDER], torch.nn.Identity)
        assert not layer.lora_dropout[key].training


# --- residents ------------------------------------------------------------------------------------------------------


def test_ranks_and_scalings_may_differ_from_layer_to_layer(model):
    pairs = factors(model, rank=2)
    scaling = {n: 0.5 + i for i, n in enumerate(pairs)}
    model.add_adapter("c", stacked(pairs), scaling=scaling)
    expected = merged_by_hand(model.kind, {n: [(scaling[n], *pair)] for n, pair in pairs.items()})
    assert torch.allclose(logits(model.with_adapter("c")), expected, atol=1e-5)
    assert model.with_adapter("c").lora_scaling() == scaling
    assert {n: t.dtype for n, t in model.adapter_state("c").items()} == dict.fromkeys(stacked(pairs), torch.float32)


def test_an_adapter_is_overwritten_and_removed(model):
    view, state = model.with_adapter("a"), model.adapter_state("b")
    model.add_adapter("a", state, scaling=1.0)
    assert torch.equal(logits(view), logits(model.with_adapter("b")))
    model.add_adapter("a", stacked(factors(model)))
    assert not torch.equal(logits(view), logits(model.with_adapter("b")))
    model.remove_adapter("a")
    assert model.adapters == [GLOBAL, "b"]
    for call in (view.trainable_state, lambda: logits(view), lambda: view.weights_version):
        with pytest.raises(ConfigError, match="no adapter 'a'"):
            call()
    with pytest.raises(ConfigError, match="no adapter"):
        model.remove_adapter("a")
    assert not [n for n, _ in model.module.named_parameters() if "llmchain_fed_0" in n]


def test_what_is_given_is_copied(model):
    state = shaken(model.trainable_state())
    model.add_adapter("c", state)
    expected = logits(model.with_adapter("c"))
    for tensor in (*state.values(), *model.adapter_state("c").values()):
        tensor.zero_()
    assert torch.equal(logits(model.with_adapter("c")), expected)


@pytest.mark.parametrize("name", ["a.b", "hospital/é ü.x", "lora_A", "default", " ", "llmchain_fed_0"])
def test_any_text_is_a_name(model, name):
    before = logits(model)
    model.add_adapter(name, model.adapter_state("b"), scaling=1.0)
    assert model.adapters[-1] == name
    assert torch.equal(logits(model.with_adapter(name)), logits(model.with_adapter("b")))
    assert torch.equal(logits(model), before)
    model.remove_adapter(name)
    assert model.adapters == [GLOBAL, "a", "b"]


def _first(state, change):
    name = next(iter(state))
    return state | {name: change(state[name])}


BAD = {
    "missing": (lambda s: dict(list(s.items())[1:]), WeightsMismatchError, "lacks 1"),
    "extra": (lambda s: s | {"x": torch.ones(1)}, WeightsMismatchError, "adds 1"),
    "shape": (lambda s: _first(s, lambda t: t[:, :-1]), WeightsMismatchError, r"\(r, "),
    "ranks apart": (lambda s: _first(s, lambda t: t[:-1]), WeightsMismatchError, r"\(r, "),
    "one dimension": (lambda s: _first(s, lambda t: t[0]), WeightsMismatchError, r"\(r, "),
    "integers": (lambda s: _first(s, lambda t: t.long()), WeightsMismatchError, "floating-point"),
    "no tensor": (lambda s: _first(s, lambda t: t.tolist()), WeightsMismatchError, "list"),
    "NaN": (lambda s: _first(s, lambda t: t * float("nan")), WeightsMismatchError, "NaN"),
    "infinite": (lambda s: _first(s, lambda t: t.double() + 1e300), WeightsMismatchError, "infinite"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_and_changes_nothing(model, case):
    change, error, match = BAD[case]
    before, versions = logits(model.with_adapter("a")), [model.weights_version, model.with_adapter("a").weights_version]
    names = [n for n, _ in model.module.named_parameters()]
    for name in ("a", "new"):
        with pytest.raises(error, match=match):
            model.add_adapter(name, change(model.adapter_state("b")))
    assert torch.equal(logits(model.with_adapter("a")), before)
    assert [model.weights_version, model.with_adapter("a").weights_version] == versions
    assert [n for n, _ in model.module.named_parameters()] == names
    assert model.adapters == [GLOBAL, "a", "b"]


def test_names_and_scalings_that_make_no_sense_are_refused(model):
    state = model.trainable_state()
    for name in (GLOBAL, "", None, 3):
        with pytest.raises(ConfigError, match="cannot be called"):
            model.add_adapter(name, state)
    for scaling in ({"x": 1.0}, float("nan"), "2", dict.fromkeys(model.lora_scaling(), float("inf"))):
        with pytest.raises(WeightsMismatchError, match="scaling"):
            model.add_adapter("c", state, scaling=scaling)
    with pytest.raises(ConfigError, match="not removed"):
        model.remove_adapter(GLOBAL)
    with pytest.raises(ConfigError, match="not removed"):
        model.remove_adapter("default")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("changes", [{"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_what_factors_cannot_stand_for_is_refused(changes):
    model = LocalModel(with_lora(tiny_module("causal", 300), lora_config(**changes)))
    for call in (
        lambda: model.add_adapter("a", model.trainable_state()),
        lambda: model.load_remainder({"model.layers.0.self_attn.q_proj": (torch.ones(32, 1), torch.ones(1, 32))}),
        lambda: model.resized(2, {}).__enter__(),
    ):
        with pytest.raises(UnsupportedModelError, match="no plain LoRA"):
            call()
    assert not torch.equal(logits(model.without_adapter()), logits(model))


def test_peft_reads_and_merges_what_is_added(model):
    (key,) = model.with_adapter("a").peft_names
    state = get_peft_model_state_dict(model.module, adapter_name=key, save_embedding_layers=False)
    assert {n.removeprefix("base_model.model."): t.tolist() for n, t in state.items()} == {
        n: t.tolist() for n, t in model.adapter_state("a").items()
    }
    assert len(get_peft_model_state_dict(model.module, save_embedding_layers=False)) == len(model.trainable_state())
    model.load_remainder(factors(model))
    expected = logits(model)
    merged = copy.deepcopy(model.module).merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(merged(**INPUTS[model.kind]).logits, expected, atol=1e-5)


def test_ten_adapters_switch_quickly_and_cost_their_own_size():
    model = taught_model("causal", lora=True)
    state = model.trainable_state()
    before = sum(p.numel() for p in model.parameters())
    for i in range(10):
        model.add_adapter(f"hospital.{i}", state)
    assert sum(p.numel() for p in model.parameters()) - before == 10 * sum(t.numel() for t in state.values())
    views = [model.with_adapter(name) for name in model.adapters[1:]]
    times = []
    gc.collect()
    for i in range(50):
        started = time.perf_counter()
        with views[i % 10].exclusive():
            times.append(time.perf_counter() - started)
    assert statistics.median(times) < 5e-3


# --- the remainder --------------------------------------------------------------------------------------------------


def test_the_remainder_is_added_to_the_base(model):
    pairs, state = factors(model), model.trainable_state()
    personal, bare = logits(model.with_adapter("a")), logits(model.without_adapter())
    model.load_remainder(pairs)
    together = terms(state, model.lora_scaling())
    for name, pair in pairs.items():
        together[name].append((1.0, *pair))
    expected = merged_by_hand(model.kind, together)
    for got in (logits(model), at_rest(model), logits(model.with_adapter(GLOBAL))):
        assert torch.allclose(got, expected, atol=1e-5)
    assert torch.equal(logits(model.with_adapter("a")), personal)
    assert torch.equal(logits(model.without_adapter()), bare)
    found = model.remainder()
    assert found.keys() == pairs.keys()
    assert all(torch.equal(b, pairs[n][0]) and torch.equal(a, pairs[n][1]) for n, (b, a) in found.items())
    assert model.adapters == [GLOBAL, "a", "b"]


def test_the_remainder_may_be_in_some_layers_and_of_rank_0_in_others(model):
    before, version = logits(model), model.weights_version
    pairs = factors(model, layers={0, 2})
    empty = {n: (b[:, :0], a[:0]) for n, (b, a) in factors(model, layers={1}).items()}
    model.load_remainder(pairs | empty)
    assert model.remainder().keys() == pairs.keys()
    one = logits(model)
    model.load_remainder(factors(model, layers={2, 3}))
    assert model.remainder().keys() == factors(model, layers={2, 3}).keys()
    model.load_remainder(pairs)
    assert torch.equal(logits(model), one)
    model.load_remainder({})
    assert model.remainder() == {}
    assert torch.equal(logits(model), before)
    assert torch.equal(at_rest(model), before)
    assert model.weights_version.split("-")[1] == version.split("-")[1]
    assert REMAINDER not in model.module.peft_config


def test_loading_the_same_remainder_again_changes_nothing(model):
    plain = model.weights_hash
    model.load_remainder(factors(model))
    version, stamps = model.weights_version, [p._version for p in model.parameters()]
    model.load_remainder(model.remainder())
    assert model.weights_version == version
    assert [p._version for p in model.parameters()] == stamps
    assert model.weights_hash != plain


def test_a_remainder_that_does_not_fit_is_refused_and_changes_nothing(model):
    pairs = factors(model)
    model.load_remainder(pairs)
    before, version = logits(model), model.weights_version
    name, (b, a) = next(iter(pairs.items()))
    for bad in (
        {"nowhere": (b, a)},
        {name: (b[:-1], a)},
        {name: (b[:, :-1], a)},
        {name: (b * float("nan"), a)},
        {name: (b.long(), a)},
    ):
        with pytest.raises(WeightsMismatchError):
            model.load_remainder(pairs | bad)
    assert torch.equal(logits(model), before)
    assert model.weights_version == version


def test_another_wrapping_of_the_module_knows_its_adapters(model):
    model.load_remainder(factors(model))
    other = model.wrapped(model.module)
    assert other.adapters == model.adapters
    assert torch.equal(logits(other), logits(model))
    assert torch.equal(logits(other.with_adapter("a")), logits(model.with_adapter("a")))
    assert other.weights_hash == model.weights_hash


def test_a_remainder_may_come_and_go_while_the_model_is_locked(model):
    before, personal = at_rest(model), logits(model.with_adapter("a"))
    with model.exclusive(), model.exclusive():
        model.load_remainder(factors(model))
        inside = at_rest(model)
        with model.with_adapter("a").exclusive():
            model.load_remainder({})
            model.load_remainder(factors(model))
            assert torch.equal(at_rest(model), personal)
        assert torch.equal(at_rest(model), inside)
    assert torch.equal(at_rest(model), inside)
    assert torch.equal(logits(model), inside)
    assert not torch.allclose(inside, before, atol=1e-4)
    with model.with_adapter("a").exclusive():
        model.load_remainder({})
    assert torch.equal(at_rest(model), before)


def test_pefts_own_switching_does_not_lose_or_train_the_remainder(model):
    model.load_remainder(factors(model))
    expected, names = logits(model), list(model.trainable_state())
    with model.module.disable_adapter():
        pass  # makes all that is active trainable when it ends
    assert list(model.trainable_state()) == names
    train_locally(model, EXAMPLES, TrainingConfig(max_steps=1, learning_rate=1e-9))
    layers = lora_layers(model.module, REMAINDER).values()
    assert not any(p.requires_grad or p.grad is not None for x in layers for p in x.lora_A[REMAINDER].parameters())
    model.module.set_adapter("default")
    assert torch.allclose(logits(model), expected, atol=1e-5)


# --- another rank, and freezing -------------------------------------------------------------------------------------


def test_another_rank_for_a_while(model):
    for each in (model, model.with_adapter("a")):
        own = each.trainable_parameters()
        before, state, scaling, version = logits(each), each.trainable_state(), each.lora_scaling(), each.weights_hash
        wider = dict.fromkeys(scaling, 0.5)
        pairs = factors(model, rank=6)
        with contextlib.suppress(KeyError), each.resized(6, wider):
            assert each.trainable_state().keys() == state.keys()
            assert {t.shape[0] for n, t in each.trainable_state().items() if "lora_A" in n} == {6}
            assert not any(t.any() for t in each.trainable_state().values())
            assert all(p.requires_grad for p in each.trainable_parameters().values())
            fresh = {n: torch.randn(t.shape) * 0.1 for n, t in each.trainable_state().items()}
            each.load_state(fresh)
            expected = merged_by_hand(each.kind, terms(fresh, wider))
            assert torch.allclose(logits(each), expected, atol=1e-5)
            train_locally(each, EXAMPLES, TrainingConfig(max_steps=2, learning_rate=1e-3))
            assert not unchanged(each, fresh)
            raise KeyError
        assert {n: id(p) for n, p in each.trainable_parameters().items()} == {n: id(p) for n, p in own.items()}
        assert torch.equal(logits(each), before)
        assert (each.lora_scaling(), each.weights_hash) == (scaling, version)
        assert unchanged(each, state)
        assert pairs


def test_a_rank_that_makes_no_sense_is_refused(model):
    scaling = model.lora_scaling()
    for rank in (0, -1, 2.0, True):
        with pytest.raises(ConfigError, match="rank"), model.resized(rank, scaling):
            pass
    with pytest.raises(WeightsMismatchError, match="scaling"), model.resized(2, {}):
        pass


def test_frozen_names_are_not_trained_meanwhile(model):
    for each in (model, model.with_adapter("a")):
        state = each.trainable_state()
        flags = {n: p.requires_grad for n, p in model.module.named_parameters()}
        frozen = {n for n in state if "lora_A" in n}
        with contextlib.suppress(KeyError), each.freezing(frozen):
            assert each.trainable_state().keys() == state.keys() - frozen
            train_locally(each, EXAMPLES, TrainingConfig(max_steps=2, learning_rate=1e-2))
            raise KeyError
        after = each.trainable_state()
        assert {n for n in state if torch.equal(after[n], state[n])} == frozen
        assert flags == {n: p.requires_grad for n, p in model.module.named_parameters()}
        with pytest.raises(ConfigError, match="cannot be frozen"), each.freezing(["nothing"]):
            pass


# --- on disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_with_residents_and_remainder_is_saved_and_loaded(kind, tmp_path):
    model = taught_model(kind, lora=True)
    model.add_adapter("a", stacked(factors(model, rank=2)), scaling=dict.fromkeys(model.lora_scaling(), 1.5))
    model.load_remainder(factors(model, layers={0, 1, 3}))
    chain = LLMChain(llm=LocalLLM(model=model, max_new_tokens=16), prompt=TEMPLATE)
    chain.save(tmp_path / "chain")
    chain.save(tmp_path / "chain")
    loaded = LLMChain.load(tmp_path / "chain")
    assert torch.equal(logits(loaded.model), logits(model))
    assert loaded.model.weights_hash == model.weights_hash
    assert loaded.adapters == [GLOBAL]
    assert loaded.batch(["sign in", "new folder"]) == chain.batch(["sign in", "new folder"])
    loaded.save(tmp_path / "again")
    assert torch.equal(logits(LLMChain.load(tmp_path / "again").model), logits(model))

    chain.with_adapter("a").save(tmp_path / "a")
    alone = LLMChain.load(tmp_path / "a")
    assert torch.equal(logits(alone.model), logits(model.with_adapter("a")))
    assert alone.model.lora_scaling() == model.with_adapter("a").lora_scaling()
    assert alone.model.trainable_state().keys() == model.trainable_state().keys()
    chain.with_adapter("a").save(tmp_path / "chain")  # nothing of the former chain is left


@pytest.mark.parametrize("kind", KINDS)
def test_peft_itself_loads_trained_and_remainder_as_one(kind, tmp_path):
    model = taught_model(kind, lora=True)
    model.load_remainder(factors(model, layers={0, 1, 3}))
    LLMChain(llm=LocalLLM(model=model), prompt=TEMPLATE).save(tmp_path / "chain")
    module = PeftModel.from_pretrained(taught_model(kind).module, tmp_path / "chain" / "adapter")
    with torch.no_grad():
        assert torch.allclose(module.eval()(**INPUTS[kind]).logits, logits(model), atol=1e-5)


def test_the_bare_base_is_not_saved_as_a_lora_chain(chain, tmp_path):
    with pytest.raises(ChainFileError, match="exactly one"):
        chain.without_adapter().save(tmp_path / "chain")
    assert list(tmp_path.iterdir()) == []


def test_a_given_model_takes_the_remainder_or_loses_its_own(causal, tmp_path):
    plain, with_remainder = tmp_path / "plain", tmp_path / "remainder"
    chain = LLMChain(llm=LocalLLM(model=causal, max_new_tokens=8), prompt=TEMPLATE)
    chain.save(plain)
    first = logits(causal)
    causal.load_remainder(factors(causal))
    second = logits(causal)
    chain.save(with_remainder)
    given = taught_model("causal", lora=True)
    given.add_adapter("kept", given.trainable_state())
    for directory, expected in ((with_remainder, second), (plain, first), (with_remainder, second)):
        assert LLMChain.load(directory, model=given).model is given
        assert torch.equal(logits(given), expected)
    assert given.adapters == [GLOBAL, "kept"]
    with pytest.raises(ChainFileError, match="cannot become"):
        LLMChain.load(plain, model=given.with_adapter("kept"))
    chain.with_adapter("a").save(tmp_path / "a")
    causal.add_adapter("a", causal.adapter_state("a"), scaling=9.0)
    chain.with_adapter("a").save(tmp_path / "a")
    with pytest.raises(ChainFileError, match="scaling 9 against"):
        LLMChain.load(tmp_path / "a", model=given)


@pytest.mark.parametrize(
    "change",
    [{"r": 40}, {"r": 0}, {"lora_alpha": 9}, {"rank_pattern": {"(a+)+": 2}}, {"lora_alpha": float("inf")}],
    ids=str,
)
def test_other_trained_columns_than_the_factors_have_are_refused(causal, tmp_path, change):
    causal.load_remainder(factors(causal))
    LLMChain(llm=LocalLLM(model=causal), prompt=TEMPLATE).save(tmp_path / "chain")
    path = tmp_path / "chain" / "chain.yaml"
    data = yaml.safe_load(path.read_text())
    data["model"]["trained"] |= change
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ChainFileError):
        LLMChain.load(tmp_path / "chain")


def test_rank_patterns_name_one_layer_each():
    model = LocalModel(with_lora(tiny_module("causal", 300), LoraConfig(r=4, target_modules="all-linear")))
    pairs = factors(model, rank=2)
    model.add_adapter("a", stacked(pairs))
    (key,) = model.with_adapter("a").peft_names
    again = get_peft_model(tiny_module("causal", 300), copy.deepcopy(model.module.peft_config[key]))
    for name, layer in lora_layers(again, "default").items():
        assert layer.r["default"] == pairs[name][1].shape[0]
        assert layer.scaling["default"] == model.lora_scaling()[name]
