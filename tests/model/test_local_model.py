"""LocalModel against transformers' own `generate`, against literal answers, and against what may go wrong.

Belongs here: text in and out, stop strings, streams, locks, named weights, fingerprints. Does not: LangChain (test_llm,
test_chat), training (test_loop).
"""

import copy
import gc
import pickle
import threading
import time

import pytest
import torch
from safetensors.torch import save_file
from taught import ANSWERS, PROMPTS, taught_model
from tiny import lora_config, tiny_module, train_tokenizer, with_lora
from transformers import GenerationConfig

from llmchain_fed import LocalModel
from llmchain_fed.errors import (
    ConfigError,
    NotTrainableError,
    PromptTooLongError,
    UnsupportedModelError,
    WeightsMismatchError,
)
from llmchain_fed.model.generation.stop_strings import safe_length

STATE_OF_LORA = {
    f"model.layers.{layer}.{block}.{name}.lora_{factor}.weight"
    for layer in (0, 1)
    for block, name in (("self_attn", "q_proj"), ("self_attn", "v_proj"), ("mlp", "up_proj"))
    for factor in "AB"
}


@pytest.fixture(params=["causal-full", "causal-lora", "seq2seq-full", "seq2seq-lora"])
def model(request):
    kind, weights = request.param.split("-")
    return taught_model(kind, lora=weights == "lora")


@pytest.fixture
def causal():
    return taught_model("causal")


def by_hand(model, prompt, *, max_new_tokens=24, **options):
    """One prompt through the module's own `generate`, its new tokens decoded: no padding, no batch."""
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        out = model.module.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=1, pad_token_id=0, **options
            ),
        )
    new = out[0, ids.shape[1] :] if model.kind == "causal" else out[0, 1:]
    return model.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def count_forwards(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def counting_generate(monkeypatch, module):
    """Counts calls of `module.generate` and how many rows each had."""
    rows, original = [], module.generate
    monkeypatch.setattr(
        module, "generate", lambda **given: (rows.append(given["input_ids"].shape[0]), original(**given))[1]
    )
    return rows


# --- answers --------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_modules_own_generate(model):
    assert model.generate(PROMPTS, max_new_tokens=12) == [by_hand(model, p, max_new_tokens=12) for p in PROMPTS]


def test_answers_contain_neither_prompt_nor_special_tokens(model):
    assert model.generate(PROMPTS, max_new_tokens=24) == ANSWERS


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_a_batch_of_different_lengths_equals_its_singles_in_order(model, monkeypatch, batch_size):
    rows = counting_generate(monkeypatch, model.module)
    singles = [by_hand(model, p, max_new_tokens=6) for p in PROMPTS]
    model.generate(PROMPTS[:2], max_new_tokens=1)  # asks the module once whether unequal prompts may share a batch
    del rows[:]
    assert model.generate(PROMPTS, max_new_tokens=6, batch_size=batch_size) == singles
    assert rows == {1: [1] * 12, 5: [5, 5, 2], 32: [12]}[batch_size]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"repetition_penalty": 30.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 12},
    ],
)
@pytest.mark.parametrize("pads", [True, False], ids=["pad-token", "no-pad-token"])
def test_every_option_means_in_a_batch_what_it_means_alone(model, options, pads):
    if not pads:  # as in many real models: they pad with the end token
        model.tokenizer.pad_token = None
    prompts = PROMPTS[:5]
    wanted = [by_hand(model, p, max_new_tokens=14, **options) for p in prompts]
    if model.kind == "causal" and "num_beams" not in options:  # a penalty that changed nothing would test nothing
        assert wanted != ANSWERS[:5]
    assert model.generate(prompts, max_new_tokens=14, **options) == wanted


def test_no_prompts_no_answers(causal, monkeypatch):
    rows = counting_generate(monkeypatch, causal.module)
    assert causal.generate([]) == []
    assert rows == []


def test_completion_counts_tokens_and_says_why_it_ended(model):
    wanted = len(model.tokenizer("page verrouillée")["input_ids"])
    prompt_tokens = len(model.tokenizer(PROMPTS[0])["input_ids"])
    (ended,) = model.complete(PROMPTS[:1], max_new_tokens=24)
    (cut,) = model.complete(PROMPTS[:1], max_new_tokens=wanted - 1)
    (exact,) = model.complete(PROMPTS[:1], max_new_tokens=wanted + 1)
    assert (ended.prompt_tokens, ended.completion_tokens, ended.finish_reason) == (prompt_tokens, wanted, "stop")
    assert (cut.completion_tokens, cut.finish_reason) == (wanted - 1, "length")
    assert exact == ended


def test_completions_of_a_batch_equal_those_of_singles(model):
    for stop in (None, ["e"], [" "]):
        singles = [model.complete([p], max_new_tokens=24, stop=stop)[0] for p in PROMPTS[:5]]
        assert model.complete(PROMPTS[:5], max_new_tokens=24, stop=stop) == singles


def test_the_modules_own_sampling_defaults_do_not_leak_into_greedy_answers(causal):
    causal.module.generation_config = GenerationConfig(do_sample=True, temperature=5.0, top_k=0, eos_token_id=1)
    assert causal.generate(PROMPTS, max_new_tokens=24) == ANSWERS


def test_the_models_further_end_tokens_end_an_answer(causal):
    page = causal.tokenizer("page verrouillée")["input_ids"]
    causal.module.generation_config.eos_token_id = [1, page[1]]
    assert causal.eos_ids == (1, page[1])
    assert causal.generate(PROMPTS[:1], max_new_tokens=24) == [causal.tokenizer.decode(page[:1])]


def test_without_a_pad_token_batches_equal_singles(model):
    model.tokenizer.pad_token = None
    assert model.pad_id == 1
    assert model.generate(PROMPTS, max_new_tokens=24) == ANSWERS


def test_a_prompt_that_fills_the_context_leaves_room_for_the_rest(causal):
    (ids,) = causal.encode(["x" * 126])
    assert len(ids) == 126  # of 128
    long, short = causal.complete(["x" * 126, PROMPTS[0]], max_new_tokens=24)
    assert long.completion_tokens <= 2
    assert short.text == ANSWERS[0]
    assert [long] == causal.complete(["x" * 126], max_new_tokens=24)


def test_a_prompt_longer_than_the_context_is_refused(causal):
    for call in (lambda p: causal.generate([PROMPTS[0], p]), causal.stream):
        with pytest.raises(PromptTooLongError, match="128 tokens and the model's context takes 128"):
            call("x" * 128)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_token": 3}, "unknown option `max_new_token`; did you mean `max_new_tokens`"),
        ({"temperature": -1.0}, "`temperature`"),
        ({"max_new_tokens": 0}, "`max_new_tokens`"),
        ({"top_p": 1.5}, "`top_p`"),
        ({"stop": [""]}, "non-empty"),
        ({"stop": [3]}, "3"),
    ],
)
def test_options_out_of_range_are_refused_at_the_call(causal, monkeypatch, options, words):
    monkeypatch.setattr(causal.module, "generate", None)
    for call in (lambda: causal.generate(PROMPTS, **options), lambda: causal.stream(PROMPTS[0], **options)):
        with pytest.raises(ConfigError, match=words):
            call()


def test_one_text_instead_of_a_list_is_refused(causal):
    with pytest.raises(ConfigError, match=r"Pass \[text\]"):
        causal.generate(PROMPTS[0])


def test_an_empty_prompt_is_refused(causal):
    with pytest.raises(ConfigError, match="empty"):
        causal.generate([""])


def test_without_a_tokenizer_text_is_refused(causal):
    with pytest.raises(UnsupportedModelError, match="no tokenizer"):
        LocalModel(causal.module).generate(PROMPTS)


def test_only_modules_are_wrapped():
    with pytest.raises(UnsupportedModelError, match="from_pretrained"):
        LocalModel("smollm2-135m-instruct")


# --- stop strings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [
        (["verrou"], "page "),
        ([" verrou"], "page"),
        (["é"], "page verrouill"),
        (["lée"], "page verrouil"),
        (["verrouillée"], "page "),
        (["page"], ""),
        (["e"], "pag"),
        (["rou", "verr", "illée"], "page "),  # overlapping ones: the earliest cuts
        (["verrouillées", "llée"], "page verroui"),  # a longer one that never completes
        (["xyz"], "page verrouillée"),
        ("verrou", "page "),
        ([], "page verrouillée"),
    ],
)
def test_stop_cuts_alike_in_single_batch_and_stream(model, stop, wanted):
    others = [
        a[: min((a.index(s) for s in ([stop] if isinstance(stop, str) else stop) if s in a), default=99)]
        for a in ANSWERS
    ]
    assert model.generate(PROMPTS[:1], stop=stop, max_new_tokens=24) == [wanted]
    assert model.generate(PROMPTS, stop=stop, max_new_tokens=24) == others
    assert "".join(model.stream(PROMPTS[0], stop=stop, max_new_tokens=24)) == wanted


def test_stop_at_every_place_of_every_answer(causal):
    """Each pair of characters of each answer, so that stops fall within, across and at the border of tokens."""
    for prompt, answer in zip(PROMPTS[::5], ANSWERS[::5], strict=True):
        pairs = {answer[i : i + 2] for i in range(len(answer) - 1)}
        for stop in sorted(pairs):
            wanted = answer[: answer.index(stop)]
            assert causal.generate([prompt], stop=[stop], max_new_tokens=24) == [wanted]
            assert "".join(causal.stream(prompt, stop=[stop], max_new_tokens=24)) == wanted


def test_stop_ends_the_computation(causal):
    calls = count_forwards(causal.module)
    causal.generate(PROMPTS[:1], max_new_tokens=24)
    whole = len(calls)
    tokens = len(causal.tokenizer("page")["input_ids"])
    del calls[:]
    causal.generate(PROMPTS[:1], stop=["page"], max_new_tokens=24)
    assert len(calls) == tokens < whole


def test_stop_works_with_beams(model):
    assert model.generate(PROMPTS[:3], stop=["e"], num_beams=2, max_new_tokens=24) == ["pag", "", "ouvrir l"]
    assert list(model.stream(PROMPTS[2], stop=["e"], num_beams=2, max_new_tokens=24)) == ["ouvrir l"]


@pytest.mark.parametrize(
    ("text", "stops", "safe"),
    [
        ("ab", ["bc"], 1),
        ("ab", ["abc"], 0),
        ("ab", ["x"], 2),
        ("aab", ["aabc", "b!"], 0),
        ("", ["a"], 0),
        ("é", ["éa"], 0),
    ],
)
def test_a_possible_beginning_of_a_stop_is_kept_back(text, stops, safe):
    assert safe_length(text, stops) == safe


# --- streams --------------------------------------------------------------------------------------------------------


def test_stream_joined_equals_generate_in_several_pieces(model):
    for prompt, answer in zip(PROMPTS[:6], ANSWERS[:6], strict=True):
        pieces = list(model.stream(prompt, max_new_tokens=24))
        assert "".join(pieces) == answer
        assert len(pieces) > 2
        assert not any("\ufffd" in piece for piece in pieces)


def test_stream_of_a_random_model_equals_generate_whatever_bytes_come(make_model):
    """Sampled at a high temperature, most bytes are no valid UTF-8."""
    model = make_model()
    for seed in range(20):
        options = {"temperature": 3.0, "seed": seed, "max_new_tokens": 24, "stop": ["a", "\ufffd\ufffd!"]}
        (whole,) = model.generate(["go"], **options)
        assert "".join(model.stream("go", **options)) == whole


def test_stream_returns_the_completion(model):
    for stop in (None, ["verrou"]):
        pieces = model.stream(PROMPTS[0], max_new_tokens=24, stop=stop)
        returned = []
        list(_keep(pieces, returned))
        assert returned == model.complete(PROMPTS[:1], max_new_tokens=24, stop=stop)


def _keep(generator, returned):
    returned.append((yield from generator))


def test_stream_shows_the_first_piece_before_the_answer_is_ready(causal):
    gate = threading.Event()
    calls = count_forwards(causal.module)

    def wait(*_):
        if len(calls) == 4:
            assert gate.wait(10)

    causal.module.register_forward_hook(wait)
    pieces = causal.stream(PROMPTS[0], max_new_tokens=24)
    first = next(pieces)
    assert not gate.is_set()
    gate.set()
    assert first + "".join(pieces) == "page verrouillée"


def test_an_error_while_streaming_surfaces_at_once(causal, monkeypatch):
    def broken(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(causal.module, "generate", broken)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="out of memory"):
        list(causal.stream(PROMPTS[0]))
    assert time.monotonic() - start < 1


def test_an_error_in_the_middle_comes_after_the_pieces_before_it(causal):
    calls = count_forwards(causal.module)

    def fail(*_):
        if len(calls) > 4:
            raise RuntimeError("lost the device")

    handle = causal.module.register_forward_hook(fail)
    seen = []
    with pytest.raises(RuntimeError, match="lost the device"):
        seen.extend(causal.stream(PROMPTS[0], max_new_tokens=24))
    handle.remove()
    assert causal.generate(PROMPTS[:1], max_new_tokens=24) == ANSWERS[:1]  # the lock is free again


@pytest.mark.parametrize("how", ["close", "forget"])
def test_an_abandoned_stream_stops_computing(causal, how):
    calls = count_forwards(causal.module)
    slow = causal.module.register_forward_hook(lambda *_: time.sleep(0.02))
    pieces = causal.stream(PROMPTS[0], min_new_tokens=80, max_new_tokens=80)
    next(pieces)
    if how == "close":
        pieces.close()
    else:
        del pieces
        gc.collect()
    slow.remove()
    after = len(calls)
    assert after < 40
    time.sleep(0.1)
    assert len(calls) == after
    assert not [t for t in threading.enumerate() if t.name == "llmchain_fed-stream"]


# --- sampling -------------------------------------------------------------------------------------------------------


def test_a_seed_makes_sampling_reproducible_and_leaves_torchs_generator_alone(model):
    options = {"temperature": 2.0, "max_new_tokens": 12}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = model.generate(PROMPTS[:2], seed=7, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert model.generate(PROMPTS[:2], seed=7, **options) == first
    assert model.generate(PROMPTS[:2], seed=8, **options) != first
    state = torch.get_rng_state()
    "".join(model.stream(PROMPTS[0], seed=7, **options))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_sampling_draws_from_torchs_generator(causal):
    state = torch.get_rng_state()
    causal.generate(PROMPTS[:1], temperature=2.0, max_new_tokens=3)
    assert not torch.equal(torch.get_rng_state(), state)


def test_sampling_is_not_narrowed_to_transformers_fifty_candidates(make_model):
    """400 tokens nearly equally likely: among 200 draws some must fall outside the 50 best."""
    model = make_model()
    ids = torch.tensor(model.encode(["go"]))
    with torch.no_grad():
        best = set(model.module(ids).logits[0, -1].topk(50).indices.tolist())
    drawn = {
        model._generate_ids(model.encode(["go"]), _options(temperature=100.0, seed=s), ())[0][0] for s in range(30)
    }
    assert drawn - best
    narrow = {
        model._generate_ids(model.encode(["go"]), _options(temperature=100.0, seed=s, top_k=50), ())[0][0]
        for s in range(30)
    }
    assert not narrow - best


def _options(**options):
    from llmchain_fed.model.generation.answers import GenerationOptions

    return GenerationOptions(max_new_tokens=1, **options)


# --- modes and locks ------------------------------------------------------------------------------------------------


def test_generation_leaves_every_modules_training_mode_as_it_was():
    model = taught_model("causal", lora=True)
    model.module.train()
    model.module.get_submodule("base_model.model.model.layers.0").eval()  # a frozen part, say
    before = {n: m.training for n, m in model.module.named_modules()}
    assert len(set(before.values())) == 2
    model.generate(PROMPTS[:1], max_new_tokens=2)
    list(model.stream(PROMPTS[0], max_new_tokens=2))
    assert {n: m.training for n, m in model.module.named_modules()} == before


def test_dropout_is_off_while_generating():
    base = taught_model("causal")
    module = with_lora(base.module, lora_config(lora_dropout=0.9), seed=3).train()
    model = LocalModel(module, base.tokenizer)
    assert {model.generate(PROMPTS[:1], max_new_tokens=24)[0] for _ in range(5)} == {"page verrouillée"}


def test_no_graph_is_kept_while_generating(causal):
    kept = []
    causal.module.register_forward_hook(lambda m, i, out: kept.append(out.logits.requires_grad))
    causal.generate(PROMPTS[:1], max_new_tokens=3)
    assert kept == [False] * 3


def test_the_lock_keeps_threads_apart(causal):
    inside, most = [], []

    def enter(*_):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.002)
        inside.pop()

    causal.module.register_forward_hook(enter)
    results = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: causal.generate([PROMPTS[i]], max_new_tokens=24)[0]}))
        for i in range(4)
    ]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert results == dict(enumerate(ANSWERS[:4]))
    assert max(most) == 1


def test_exclusive_keeps_others_out(causal):
    done = threading.Event()
    worker = threading.Thread(target=lambda: (causal.generate(PROMPTS[:1], max_new_tokens=2), done.set()))
    with causal.exclusive():
        worker.start()
        assert not done.wait(0.3)
        assert causal.generate(PROMPTS[:1], max_new_tokens=24) == ANSWERS[:1]  # who has the lock goes on
    assert done.wait(10)


def test_the_version_can_be_read_while_another_thread_has_the_lock(causal):
    """LangChain reads it on the event loop before every call: waiting there would stall every other task."""
    locked, free = threading.Event(), threading.Event()

    def lock():
        with causal.exclusive():
            locked.set()
            free.wait(10)

    worker = threading.Thread(target=lock)
    worker.start()
    locked.wait(10)
    read = threading.Thread(target=lambda: causal.weights_version, daemon=True)
    read.start()
    read.join(1)
    alive = read.is_alive()
    free.set()
    worker.join()
    assert not alive


# --- weights --------------------------------------------------------------------------------------------------------


def test_trainable_state_names_a_lora_adapter_without_pefts_prefixes(make_model):
    assert set(make_model(lora=True).trainable_state()) == STATE_OF_LORA


def test_trainable_state_names_do_not_depend_on_the_adapters_name(tokenizer):
    from peft import get_peft_model

    module = get_peft_model(tiny_module("causal", len(tokenizer)), lora_config(), adapter_name="q_proj")
    assert set(LocalModel(module, tokenizer).trainable_state()) == STATE_OF_LORA


def test_trainable_state_of_full_weights_is_the_modules_own(make_model):
    for kind in ("causal", "seq2seq"):
        model = make_model(kind)
        own = dict(model.module.named_parameters())
        state = model.trainable_state()
        assert state.keys() == own.keys()
        assert all(torch.equal(state[n], own[n]) for n in own)


def test_tied_tensors_come_once(make_model):
    causal, seq2seq = make_model("causal").trainable_state(), make_model("seq2seq").trainable_state()
    assert [n for n in causal if "embed" in n or "lm_head" in n] == ["model.embed_tokens.weight"]
    assert [n for n in seq2seq if "shared" in n or "embed_tokens" in n] == ["shared.weight"]


def test_trainable_state_is_a_copy(model):
    state = model.trainable_state()
    before = {n: t.clone() for n, t in state.items()}
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    assert all(torch.equal(state[n], before[n]) for n in state)
    for tensor in state.values():
        tensor.zero_()
    assert all(p.abs().sum() > 0 for p in model.trainable_parameters().values())


def test_a_loaded_state_gives_a_fresh_models_logits(model):
    """Invariant 4 of docs/architecture.md, the state written into the fresh module by PEFT's or torch's own loader."""
    state = {
        n: t + 0.01 * torch.randn(t.shape, generator=torch.Generator().manual_seed(0))
        for n, t in model.trainable_state().items()
    }
    model.load_state(state)
    fresh = taught_model(model.kind, lora="lora_A" in "".join(state))
    named = dict(fresh.module.named_parameters())
    for name, value in state.items():
        peft = "base_model.model." + name.replace(".lora_A.", ".lora_A.default.").replace(
            ".lora_B.", ".lora_B.default."
        )
        named[peft if peft in named else name].data = value.clone()
    inputs = {"input_ids": torch.arange(2, 12)[None]}
    if model.kind == "seq2seq":
        inputs["decoder_input_ids"] = torch.arange(5, 9)[None]
    with torch.no_grad():
        assert torch.equal(model.module(**inputs).logits, fresh.module(**inputs).logits)
    assert all(torch.equal(t, state[n]) for n, t in model.trainable_state().items())


def test_load_state_keeps_the_parameter_objects(model):
    """An optimizer that has them goes on training the same model."""
    before = [id(p) for p in model.parameters()]
    model.load_state({n: torch.zeros_like(t) for n, t in model.trainable_state().items()})
    assert [id(p) for p in model.parameters()] == before
    assert all(not t.any() for t in model.trainable_state().values())


def _damage(state, how):
    first, last = min(state), max(state)
    match how:
        case "missing":
            del state[first]
        case "extra":
            state["unknown.weight"] = torch.zeros(1)
        case "renamed":
            state["other"] = state.pop(first)
        case "shape":
            state[last] = state[last].T.contiguous() if state[last].dim() > 1 else state[last][:-1]
        case "broadcast":
            state[last] = state[last][:1]
        case "nan":
            state[last].view(-1)[-1] = float("nan")
        case "infinite":
            state[last].view(-1)[0] = -float("inf")
        case "integers":
            state[last] = torch.zeros_like(state[last], dtype=torch.int64)
        case "list":
            state[last] = state[last].tolist()
        case "empty":
            state.clear()


@pytest.mark.parametrize(
    "how", ["missing", "extra", "renamed", "shape", "broadcast", "nan", "infinite", "integers", "list", "empty"]
)
def test_a_state_that_does_not_fit_is_refused_whole(model, how):
    before, version = model.trainable_state(), model.weights_version
    state = {n: t + 1 for n, t in before.items()}
    _damage(state, how)
    with pytest.raises(WeightsMismatchError):
        model.load_state(state)
    assert model.weights_version == version
    assert all(torch.equal(t, before[n]) for n, t in model.trainable_state().items())


def test_a_finite_value_that_the_models_type_cannot_represent_is_refused(tokenizer):
    model = LocalModel(tiny_module("causal", len(tokenizer)).half(), tokenizer)
    state = {n: t.float() for n, t in model.trainable_state().items()}
    model.load_state(state)
    max(state.items())[1].view(-1)[0] = 1e6  # more than float16's 65504
    with pytest.raises(WeightsMismatchError, match="infinite"):
        model.load_state(state)


def test_a_frozen_model_has_no_trainable_state(causal):
    causal.module.requires_grad_(False)
    with pytest.raises(NotTrainableError, match="LoraConfig"):
        causal.trainable_state()
    with pytest.raises(NotTrainableError):
        causal.load_state({})
    assert causal.generate(PROMPTS[:1], max_new_tokens=24) == ANSWERS[:1]  # but it answers


def test_the_version_changes_with_every_load_and_with_nothing_else(model):
    first = model.weights_version
    model.generate(PROMPTS[:1], max_new_tokens=2)
    model.trainable_state()
    assert model.weights_version == first
    state = model.trainable_state()
    seen = {first}
    for _ in range(3):
        model.load_state(state)
        seen.add(model.weights_version)
    assert len(seen) == 4  # even a load of the same weights counts
    assert len({v.split("-")[1] for v in seen}) == 1  # and the hash says that they are the same


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
        lambda p: torch.optim.Adam(p, lr=0.1, foreach=False),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    ],
    ids=["sgd", "foreach", "single", "fused"],
)
def test_the_version_changes_after_an_outside_optimizer_step(model, optimizer):
    parameters = [p for p in model.parameters() if p.requires_grad]
    step, seen = optimizer(parameters), {model.weights_version}
    for _ in range(3):
        for p in parameters:
            p.grad = torch.ones_like(p)
        step.step()
        seen.add(model.weights_version)
    assert len(seen) == 4


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.data.add_(0.5),
        lambda p: setattr(p, "data", p.data + 0.5),
        lambda p: p.data.copy_(torch.full_like(p, 0.25)),
    ],
    ids=["data.add_", "data=", "data.copy_"],
)
def test_the_version_changes_when_others_write_through_data(model, write):
    """As most hand-written federated averaging does; torch counts no change for these."""
    before = model.weights_version
    for p in model.trainable_parameters().values():
        write(p)
    assert model.weights_version != before


def test_the_version_of_a_frozen_adapter_differs_from_anothers(make_model):
    """An adapter that is only used, not trained, decides the answers too."""
    one, other = make_model(lora=True), make_model(lora=True)
    other.load_state({n: t + 1 for n, t in other.trainable_state().items()})
    hashes = set()
    for model in (one, other):
        model.module.requires_grad_(False)
        hashes.add(model.weights_hash)
    assert len(hashes) == 2


def test_equal_weights_have_equal_hashes_in_two_objects(battery):
    one, other = battery().model, battery().model
    assert one.weights_version == other.weights_version
    assert one.weights_hash != battery(seed=1).model.weights_hash


def test_a_fingerprint_names_the_base_not_the_adapter(make_model):
    for kind in ("causal", "seq2seq"):
        plain = make_model(kind).fingerprint()
        adapters = [
            lora_config(kind),
            lora_config(kind, r=2),
            lora_config(kind, use_dora=True),
            lora_config(kind, target_modules="all-linear"),
            lora_config(kind, modules_to_save=["down_proj" if kind == "causal" else "wo"]),
        ]
        assert {make_model(kind, lora=a).fingerprint() for a in adapters} == {plain}
        assert make_model(kind, seed=1).fingerprint() != plain
    assert make_model("causal").fingerprint() != make_model("seq2seq").fingerprint()


def test_a_fingerprint_stays_while_the_model_learns_and_in_bfloat16(make_model, tokenizer):
    model = make_model(lora=True)
    first = model.fingerprint()
    model.load_state({n: t + 1 for n, t in model.trainable_state().items()})
    assert model.fingerprint() == first
    half = LocalModel(tiny_module("causal", len(tokenizer)).to(torch.bfloat16), tokenizer)
    assert half.fingerprint() == first


# --- copies, devices ------------------------------------------------------------------------------------------------


def test_copies_and_pickles_answer_alike_and_share_nothing(model):
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        assert twin.generate(PROMPTS, max_new_tokens=24) == ANSWERS
        assert twin.weights_version == model.weights_version
        assert twin.fingerprint() == model.fingerprint()
        twin.load_state({n: torch.zeros_like(t) for n, t in twin.trainable_state().items()})
    assert model.generate(PROMPTS, max_new_tokens=24) == ANSWERS


def test_a_copy_has_a_lock_of_its_own(causal):
    twin = copy.deepcopy(causal)
    with causal.exclusive():
        worker = threading.Thread(target=lambda: twin.generate(PROMPTS[:1], max_new_tokens=2), daemon=True)
        worker.start()
        worker.join(10)
        assert not worker.is_alive()


def test_a_module_is_never_moved(model, monkeypatch):
    def moved(*_, **__):
        raise AssertionError("the module was moved")

    for name in ("to", "cuda", "cpu", "float", "half"):
        monkeypatch.setattr(type(model.module), name, moved, raising=False)
    again = LocalModel(model.module, model.tokenizer)
    assert again.generate(PROMPTS[:2], max_new_tokens=24) == ANSWERS[:2]
    again.load_state(again.trainable_state())


def test_from_pretrained_reads_a_folder_and_adds_a_repeatable_adapter(causal, tmp_path):
    causal.module.save_pretrained(tmp_path)
    causal.tokenizer.save_pretrained(tmp_path)
    plain = LocalModel.from_pretrained(str(tmp_path), device="cpu")
    assert plain.generate(PROMPTS, max_new_tokens=24) == ANSWERS
    assert plain.fingerprint() == causal.fingerprint()
    config = lora_config(task_type=None)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = LocalModel.from_pretrained(str(tmp_path), lora=config, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    other = LocalModel.from_pretrained(str(tmp_path), lora=config, device="cpu")
    assert config.task_type is None  # the caller's object is left alone
    assert one.weights_version == other.weights_version
    assert one.trainable_state().keys() == STATE_OF_LORA
    assert not any(m.training for m in one.module.modules())
    assert one.generate(PROMPTS, max_new_tokens=24) == ANSWERS  # B is zero at the start


def test_from_pretrained_reads_no_pickle(causal, tmp_path):
    causal.module.save_pretrained(tmp_path)
    causal.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(causal.module.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="safetensors"):
        LocalModel.from_pretrained(str(tmp_path), device="cpu")


def test_repr_fits_a_line(model):
    text = repr(model)
    assert len(text) < 150
    assert model.kind in text
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{trainable:,} of " in text


def test_a_tokenizer_that_appends_an_end_token_does_not_end_the_prompt(causal):
    """Llama- and T5-like tokenizers do; a causal prompt goes on, and its training twin is the same."""
    from tokenizers.processors import TemplateProcessing

    plain = causal.encode(PROMPTS)
    tokenizer = train_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    assert tokenizer("a")["input_ids"][-1] == 1
    model = LocalModel(causal.module, tokenizer)
    assert model.encode(PROMPTS) == plain
    assert model.generate(PROMPTS, max_new_tokens=24) == ANSWERS


@pytest.mark.gpu
def test_on_cuda_everything_stays_on_the_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: run on a machine that has one")
    model = taught_model("causal", lora=True)
    model.module.to("cuda")
    assert model.device.type == "cuda"
    assert model.generate(PROMPTS, max_new_tokens=24) == ANSWERS
    assert "".join(model.stream(PROMPTS[0], max_new_tokens=24)) == ANSWERS[0]
    state = model.trainable_state()
    assert {t.device.type for t in state.values()} == {"cpu"}
    model.load_state(state)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    first = model.generate(PROMPTS[:2], temperature=2.0, seed=1, max_new_tokens=8)
    before = torch.cuda.get_rng_state()
    assert model.generate(PROMPTS[:2], temperature=2.0, seed=1, max_new_tokens=8) == first
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_module_is_accepted_and_not_moved(bits, tmp_path):
    pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed: quantised modules are tested where it is"
    )
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: run on a machine that has one")
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = taught_model("causal")
    plain.module.save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8), device_map=0
    )
    model = LocalModel(get_peft_model(quantised, lora_config()), plain.tokenizer)
    assert set(model.trainable_state()) == STATE_OF_LORA
    assert len(model.generate(PROMPTS, max_new_tokens=8)) == len(PROMPTS)
    model.load_state({n: t + 1 for n, t in model.trainable_state().items()})
    assert len(list(model.stream(PROMPTS[0], max_new_tokens=8))) >= 1


def test_states_travel_through_safetensors(model, tmp_path):
    """Contiguous, unshared tensors: what the format asks for."""
    save_file(model.trainable_state(), tmp_path / "state.safetensors")
