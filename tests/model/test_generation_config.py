"""Every field of a module's own `generation_config`, against plain transformers' `generate`.

Belongs here: what applies, what is overridden, what has no effect, what is said, how it is stored. The table is checked
against the fields of the installed transformers, so that a new one fails until it has a line. Does not: saved chains
(test_saving), stop strings (test_stop_strings).
"""

import copy
import functools
import json
import logging
import tempfile
from pathlib import Path

import pytest
import torch
from taught import PROMPTS, taught_model
from tiny import tiny_module, train_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, SynthIDTextWatermarkingConfig, WatermarkingConfig
from transformers.generation.configuration_utils import CompileConfig, ContinuousBatchingConfig

from llmchain_fed import LLMChain, LocalLLM, LocalModel
from llmchain_fed.errors import ConfigError
from llmchain_fed.model.generation.fields import FIELDS
from llmchain_fed.model.generation.saved import from_data, names, save_without_generation_config, to_data

LENGTH = 10
SHORT = PROMPTS[:3]  # of different lengths in tokens
TOKENIZER = train_tokenizer()
FIRST, SECOND = TOKENIZER("page verrouillée")["input_ids"][:2]  # with which the first answer begins
WATERMARK = {"bias": 30.0, "greenlist_ratio": 0.5, "hashing_key": 15485863, "seeding_scheme": "lefthash"}

# field → values as models ship them, or as transformers documents them
SHIPPED = {
    "min_length": [9, 10],
    "min_new_tokens": [9],
    "use_cache": [False, True],
    "encoder_repetition_penalty": [3.0],
    "encoder_no_repeat_ngram_size": [1, 2],
    "bad_words_ids": [[[FIRST]], [[FIRST, SECOND]], [[0, FIRST]], []],
    "renormalize_logits": [True],
    "forced_bos_token_id": [SECOND],
    "forced_eos_token_id": [1, [1, 5]],
    "remove_invalid_values": [True],
    "exponential_decay_length_penalty": [(2, 3.0), [2, 3.0]],
    "suppress_tokens": [[FIRST], []],
    "begin_suppress_tokens": [[FIRST]],
    "sequence_bias": [{(FIRST,): -30.0}, [[[FIRST, SECOND], -30.0]]],
    "watermarking_config": [
        WatermarkingConfig(**WATERMARK),
        WatermarkingConfig(**WATERMARK | {"context_width": 4, "seeding_scheme": "selfhash"}),
        SynthIDTextWatermarkingConfig(ngram_len=5, keys=[654, 400, 836]),
    ],
    "pad_token_id": [0, 7],
    "bos_token_id": [5],
    "eos_token_id": [[1, SECOND]],
    "decoder_start_token_id": [0, 5],
    "disable_compile": [True],
}
CHANGES = {  # those of which the first value changes a greedy answer of these models
    "causal": {"min_new_tokens", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "bad_words_ids",
               "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
               "watermarking_config", "eos_token_id"},
    "seq2seq": {"min_length", "min_new_tokens", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size",
                "bad_words_ids", "forced_bos_token_id", "exponential_decay_length_penalty", "suppress_tokens",
                "begin_suppress_tokens", "sequence_bias", "watermarking_config", "eos_token_id"},
}  # fmt: skip
BEAMS = {"early_stopping": [True, "never"], "length_penalty": [2.0, -2.0]}
SAMPLING = {"min_p": [0.2], "top_h": [0.4], "typical_p": [0.2], "epsilon_cutoff": [0.1], "eta_cutoff": [0.1]}
OVERRIDDEN = {
    "max_length": [4096, 20],
    "max_new_tokens": [2],
    "do_sample": [True],
    "num_beams": [4],
    "temperature": [0.6],
    "top_k": [20, 1],
    "top_p": [0.9],
    "repetition_penalty": [1.9],
    "no_repeat_ngram_size": [1],
}
NO_EFFECT = {
    "max_time": [1e-9],
    "use_mtp": [True],
    "cache_implementation": ["static", "offloaded", "quantized", "paged"],
    "cache_config": [{"nbits": 4}],
    "max_cache_len": [4],
    "token_healing": [True],
    "guidance_scale": [3.0],
    "num_return_sequences": [3],
    "output_attentions": [True],
    "output_hidden_states": [True],
    "output_scores": [True],
    "output_logits": [True],
    "return_dict_in_generate": [True],
    "is_assistant": [True],
    "num_assistant_tokens": [5],
    "num_assistant_tokens_schedule": ["heuristic"],
    "assistant_confidence_threshold": [0.9],
    "prompt_lookup_num_tokens": [3],
    "max_matching_ngram_size": [2],
    "assistant_early_exit": [1],
    "assistant_lookbehind": [3],
    "target_lookbehind": [3],
    "assistant_ensemble_weight": [0.5],
    "speculation_type": ["dflash"],
    "compile_config": [CompileConfig()],
    "continuous_batching_config": [ContinuousBatchingConfig()],
    "low_memory": [True],
    "penalty_alpha": [0.6],
    "dola_layers": ["high", [1]],
    "diversity_penalty": [0.5],
    "num_beam_groups": [2],
    "constraints": [[object()]],
    "force_words_ids": [[[5]]],
    "prefill_chunk_size": [2],
}
STOPS = {"stop_strings": ["rou", ["rou", "ill"]]}
TABLE = SHIPPED | BEAMS | SAMPLING | OVERRIDDEN | NO_EFFECT | STOPS
KINDS = ["causal", "seq2seq"]


def each(table):
    """Every value of every field that this transformers has; which those are: `test_the_table_knows_every_field`."""
    return [(name, i) for name, values in table.items() if name in names() for i in range(len(values))]


def value_of(name, i):
    return copy.deepcopy(TABLE[name][i])


def shipping(kind, **fields):
    """A taught model whose own configuration has these fields, set as `from_pretrained` would, by attribute."""
    model = taught_model(kind)
    for name, value in fields.items():
        setattr(model.module.generation_config, name, value)
    return model


def by_hand(kind, prompt, *, max_new_tokens=LENGTH, eos=(1,), **fields):
    """The answer of plain transformers alone, without padding."""
    model = taught_model(kind)
    ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
    start = model.module.generation_config.decoder_start_token_id
    fields = {"pad_token_id": 0, "decoder_start_token_id": start} | fields
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=list(eos), **fields)
    out = model.module.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    new = out[0, ids.shape[1] if kind == "causal" else 1 :].tolist()
    end = next((i for i, token in enumerate(new) if token in eos), len(new))
    return TOKENIZER.decode(new[:end], skip_special_tokens=True)


def _spoken(kind, name, value, text):
    """A forced first token of an encoder-decoder, a language as a rule, is no part of its answer."""
    forced = kind == "seq2seq" and name == "forced_bos_token_id"
    return text.removeprefix(TOKENIZER.decode([value])) if forced else text


@functools.cache
def plain(kind, **fields):
    return [by_hand(kind, p, **fields) for p in SHORT]


def answers(model, prompts=SHORT, **options):
    """What `generate` says, once every way of asking has said the same."""
    options = {"max_new_tokens": LENGTH} | options
    batch = model.generate(prompts, **options)
    assert [model.generate([p], **options)[0] for p in prompts] == batch
    if "num_beams" in options:  # then a stream is one piece from the same call
        return batch
    assert ["".join(model.stream(p, **options)) for p in prompts] == batch
    llm = LocalLLM(model=model, **options)
    assert llm.batch(list(prompts)) == batch
    return batch


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """transformers itself has nothing to say, whatever a model ships: what there is to say is said in our words."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("transformers")]
    assert [text for text in said if "The seeding will be skipped" not in text] == []  # a watermark's first tokens


def test_the_table_knows_every_field():
    assert set(names()) == set(GenerationConfig().to_dict()) - {"_from_model_config", "transformers_version"}
    later = {"assistant_ensemble_weight", "max_cache_len", "speculation_type", "use_mtp"}  # not in transformers 5.10
    assert set(TABLE) == set(names()) | later
    assert set(FIELDS) == set(TABLE)


# --- what applies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "i"), each(SHIPPED))
def test_a_field_applies_as_shipped(kind, name, i, caplog):
    value = value_of(name, i)
    model = shipping(kind, **{name: value})
    eos = value if name == "eos_token_id" else (1,)
    fields = {} if name == "eos_token_id" or value == [] else {name: value}
    single = ["p", PROMPTS[0]] if name == "forced_bos_token_id" else SHORT  # a prompt of one token, for a causal model
    wanted = [_spoken(kind, name, value, by_hand(kind, p, eos=eos, **copy.deepcopy(fields))) for p in single]
    assert answers(model, single) == wanted
    assert [r for r in caplog.records if r.name == "llmchain_fed"] == []
    if i == 0 and name in CHANGES[kind]:
        assert wanted != [by_hand(kind, p) for p in single]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "i"), each(SHIPPED | BEAMS))
def test_a_field_applies_with_beams(kind, name, i):
    value = value_of(name, i)
    if name == "watermarking_config" and isinstance(value, SynthIDTextWatermarkingConfig):
        pytest.skip("SynthID remembers rows, which beams exchange: it has no meaning there")
    eos = value if name == "eos_token_id" else (1,)
    fields = {} if name == "eos_token_id" or value == [] else {name: copy.deepcopy(value)}
    wanted = [by_hand(kind, p, eos=eos, num_beams=3, **copy.deepcopy(fields)) for p in SHORT]
    wanted = [_spoken(kind, name, value, text) for text in wanted]
    assert answers(shipping(kind, **{name: value}), num_beams=3) == wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "i"), each(SAMPLING))
def test_a_field_of_sampling_applies_when_sampled(kind, name, i):
    value = value_of(name, i)
    model = shipping(kind, **{name: value})
    said = [model.generate([p], temperature=2.0, seed=4, max_new_tokens=LENGTH)[0] for p in SHORT]
    wanted = []
    for p in SHORT:
        torch.manual_seed(4)
        wanted.append(by_hand(kind, p, do_sample=True, temperature=2.0, top_k=0, **{name: value}))
    assert said == wanted
    other = taught_model(kind)
    assert said != [other.generate([p], temperature=2.0, seed=4, max_new_tokens=LENGTH)[0] for p in SHORT]
    assert ["".join(model.stream(p, temperature=2.0, seed=4, max_new_tokens=LENGTH)) for p in SHORT] == said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "i"), each(STOPS))
def test_shipped_stop_strings_end_answers_beside_the_callers(kind, name, i, caplog):
    model = shipping(kind, **{name: value_of(name, i)})
    whole = plain(kind, max_new_tokens=24)
    assert answers(model, max_new_tokens=24) == [text.split("rou")[0] for text in whole] != whole
    assert answers(model, max_new_tokens=24, stop=["v"])[0] == whole[0].split("v")[0] != whole[0].split("rou")[0]
    assert caplog.records == []


# --- what does not --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "i"), each(SAMPLING | OVERRIDDEN | NO_EFFECT))
def test_a_field_that_does_not_apply_changes_nothing_and_is_said_once(kind, name, i, caplog):
    value = value_of(name, i)
    model = shipping(kind, **{name: value})
    assert answers(model) == plain(kind)
    assert answers(model, num_beams=2) == plain(kind, num_beams=2)
    said = [r.getMessage() for r in caplog.records]
    options = {"max_new_tokens", "num_beams"}  # which `answers` gave: then nothing was overridden unasked
    if FIELDS[name].option in options and name != "num_beams":
        assert said == []
    else:
        assert len(said) == 1
        assert f"{name}={value!r:.60}" in said[0]
        assert ("without effect" in said[0]) == (name in NO_EFFECT)


def test_all_published_fields_at_once_are_one_line_each(caplog):
    shipped = {"max_length": 4096, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.05}
    model = shipping("causal", **shipped, num_beams=4, length_penalty=2.0, max_time=9.0, return_dict_in_generate=True)
    for _ in range(2):
        model.generate(SHORT[:1])
        list(model.stream(SHORT[0]))
    own, idle = (r.getMessage() for r in caplog.records)
    assert all(f"{name}={value!r}" in own for name, value in shipped.items())
    assert "num_beams=4" in own
    assert "length_penalty=2.0" in own
    assert "max_time=9.0" in idle
    assert "return_dict_in_generate=True" in idle
    model.wrapped(model.module).generate(SHORT[:1])
    assert len(caplog.records) == 2


def test_what_the_caller_chose_is_not_called_overridden(caplog):
    shipped = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "min_p": 0.1,
    }
    llm = LocalLLM(model=shipping("causal", **shipped), temperature=0.0, repetition_penalty=1.0, max_new_tokens=2)
    llm.invoke(SHORT[0])
    LLMChain(llm=llm, prompt="{x}").invoke({"x": "a"})
    assert caplog.records == []
    llm.invoke(SHORT[0], temperature=0.7, top_k=20)
    assert [r.getMessage().count("=") for r in caplog.records] == [2]  # top_p=0.9 and the option that chooses it
    assert "top_p=0.9" in caplog.text


def test_a_shipped_default_is_not_worth_a_word(caplog):
    defaults = GenerationConfig._get_default_generation_params()
    shipped = {name: value for name, value in defaults.items() if name != "max_length"}
    model = shipping("causal", **shipped, cache_implementation="hybrid", _from_model_config=True, their_own=3)
    assert answers(model) == [by_hand("causal", p) for p in SHORT]
    assert caplog.records == []


def test_a_shipped_shortest_length_gives_way_to_the_longest(caplog):
    for field in ("min_length", "min_new_tokens"):
        for kind in KINDS:
            model = shipping(kind, **{field: 120}, max_length=142)
            assert model.complete(SHORT[:1], max_new_tokens=3)[0].completion_tokens == 3
            assert model.complete(SHORT[:1], max_new_tokens=24, min_new_tokens=0)[0].text == by_hand(
                kind, SHORT[0], max_new_tokens=24
            )
    assert caplog.records == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fields",
    [
        {"early_stopping": "sometimes"},
        {"bad_words_ids": [[100_000]]},
        {"sequence_bias": {(-3,): 1.0}},
        {"forced_eos_token_id": 100_000},
        {"forced_bos_token_id": 5, "suppress_tokens": [5]},
        {"stop_strings": [""]},
    ],
)
def test_what_cannot_be_used_is_refused_by_name(kind, fields):
    model = shipping(kind, **fields)
    with pytest.raises(ConfigError, match=next(iter(fields)) if "stop_strings" not in fields else "non-empty"):
        model.generate(SHORT, max_new_tokens=4, num_beams=2)
    with pytest.raises(ConfigError):
        list(model.stream(SHORT[0], max_new_tokens=4, num_beams=2))


def test_a_field_of_a_newer_transformers_is_said_to_have_no_effect(monkeypatch, caplog):
    monkeypatch.delitem(FIELDS, "renormalize_logits")
    model = shipping("causal", renormalize_logits=True)
    assert answers(model) == [by_hand("causal", p) for p in SHORT]
    assert "renormalize_logits=True, without effect" in caplog.text


def test_the_modules_own_configuration_is_never_touched():
    model = shipping(
        "causal",
        temperature=0.6,
        max_length=99,
        stop_strings=["q"],
        watermarking_config=value_of("watermarking_config", 0),
    )
    own, before = model.module.generation_config, model.module.generation_config.to_json_string()
    answers(model)
    with tempfile.TemporaryDirectory() as folder, save_without_generation_config(model.module):
        model.module.save_pretrained(folder)
    assert model.module.generation_config is own
    assert own.to_json_string() == before


# --- as data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "i"), each({n: v for n, v in TABLE.items() if n != "constraints"}))
def test_a_field_travels_as_data(name, i):
    config = GenerationConfig()
    setattr(config, name, value_of(name, i))
    data = json.loads(json.dumps(to_data(config)))
    if name in ("compile_config", "continuous_batching_config"):
        assert data == {}
        return
    back = getattr(from_data(data), name)
    if name == "watermarking_config":
        assert (type(back), vars(back)) == (type(value_of(name, i)), vars(value_of(name, i)))
    else:  # through JSON a tuple is a list, and so are the pairs of a bias
        wanted = value_of(name, i)
        wanted = (
            [[list(k), v] for k, v in wanted.items()]
            if name == "sequence_bias" and isinstance(wanted, dict)
            else wanted
        )
        assert back == (list(wanted) if isinstance(wanted, tuple) else wanted)
    assert to_data(from_data(data)) == data


def test_a_configuration_without_fields_is_no_data():
    assert to_data(GenerationConfig()) == {}
    assert from_data({}) == GenerationConfig()


@pytest.mark.parametrize(
    "data",
    [
        {"temprature": 1.0},
        {"_from_model_config": True},
        {"validate": 3},
        {"eos_token_id": object()},
        {"watermarking_config": {"strange": 1}},
        {"watermarking_config": 3},
    ],
)
def test_data_with_more_than_fields_is_refused(data):
    with pytest.raises(ValueError, match=next(iter(data))):
        from_data(data)


@pytest.mark.parametrize(("name", "i"), each(TABLE))
def test_save_pretrained_works_whatever_is_shipped(name, i, tmp_path):
    module = tiny_module("causal", 40)
    setattr(module.generation_config, name, value_of(name, i))
    with save_without_generation_config(module):
        module.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, module.get_input_embeddings().weight)
    written = json.loads((Path(tmp_path) / "generation_config.json").read_text())
    synthid = name == "watermarking_config" and i == 2  # transformers writes it and cannot read it
    if not synthid and name not in (
        "constraints",
        "compile_config",
        "continuous_batching_config",
        "num_return_sequences",
    ):
        assert written[name] == to_data(module.generation_config)[name]


def test_without_a_configuration_there_is_nothing_to_do():
    module = torch.nn.Linear(1, 1)
    with save_without_generation_config(module):
        assert not hasattr(module, "generation_config")
    assert LocalModel(tiny_module("causal", len(TOKENIZER)), TOKENIZER).generate(["a"], max_new_tokens=1)
