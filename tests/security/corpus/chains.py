"""Saved chains and model folders as somebody hostile would hand them over: builders over one good tiny chain.

Each builder of `CHAINS` changes a copy of a saved chain and then writes digests that are right, as its author can; each
of `MODELS` changes a copy of a model's folder. A payload that runs writes the file MARKER names.
"""

import hashlib
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import yaml

MARKER = "LLMCHAIN_FED_TEST_MARKER"
PAYLOAD = f"import os, pathlib\npathlib.Path(os.environ[{MARKER!r}]).write_text('ran')\n"


class Payload:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return exec, (PAYLOAD,)


def digests(chain):
    """Right ones, for whatever lies there."""
    path = chain / "chain.yaml"
    data = yaml.safe_load(path.read_text())
    ours = ("base/", "adapter/", "tokenizer/", "base_changes.safetensors")
    names = [p.relative_to(chain).as_posix() for p in sorted(chain.rglob("*")) if p.is_file()]
    data["files"] = {n: hashlib.sha256((chain / n).read_bytes()).hexdigest() for n in names if n.startswith(ours)}
    path.write_text(yaml.safe_dump(data))


def settings(folder, name, **changes):
    path = folder / name
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | changes))


def recipe(chain, *where, **changes):
    """Changes values in chain.yaml."""
    path = chain / "chain.yaml"
    data = yaml.safe_load(path.read_text())
    part = data
    for name in where:
        part = part[name]
    part.update(changes)
    path.write_text(yaml.safe_dump(data))


def code(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(PAYLOAD)


def moved(chain, name):
    """The chain's folder under a name by which Python can import it."""
    return chain.rename(chain.with_name(name))


ADAPTER, BASE, TOKENIZER = "adapter/adapter_config.json", "base/config.json", "tokenizer/tokenizer_config.json"
EVIL = {"megatron_config": {"x": 1}, "megatron_core": "megatron.evil"}
PEFT = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"], "base_model_name_or_path": "elsewhere"}


# --- saved chains ---------------------------------------------------------------------------------------------------


def megatron(chain):
    chain = moved(chain, "megatron")
    code(chain, "evil.py", "__init__.py")
    settings(chain, ADAPTER, **EVIL)
    return chain


def any_module(chain):
    chain = moved(chain, "chainfolder")
    code(chain, "evil.py")
    settings(chain, ADAPTER, **{**EVIL, "megatron_core": "chainfolder.evil"})
    return chain


def megatron_in_the_adapter(chain):
    chain = moved(chain, "megatron")
    code(chain / "adapter", "evil.py")
    settings(chain, ADAPTER, **{**EVIL, "megatron_core": "megatron.adapter.evil"})
    return chain


def megatron_in_the_base(chain):
    chain = moved(chain, "megatron")
    code(chain, "evil.py")
    settings(chain / "base", "adapter_config.json", **PEFT, **EVIL)
    return chain


def code_in_the_base(chain):
    code(chain / "base", "configuration_evil.py", "modeling_evil.py")
    settings(
        chain,
        BASE,
        model_type="evil",
        auto_map={"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"},
    )


def code_of_a_hub(chain):
    settings(chain, BASE, auto_map={"AutoModelForCausalLM": "some/repo--modeling_evil.M"})


def code_within_the_settings(chain):
    settings(chain, BASE, text_config={"model_type": "llama", "auto_map": {"AutoConfig": "configuration_evil.C"}})


def prompt_tuning(chain):
    other = chain / "tokenizer"
    code(other, "tokenization_evil.py")
    changes = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x"}
    settings(chain, ADAPTER, **changes, num_virtual_tokens=2, tokenizer_name_or_path=str(other))


def tokenizer_code(chain):
    code(chain / "tokenizer", "tokenization_evil.py")
    settings(chain, TOKENIZER, auto_map={"AutoTokenizer": ["tokenization_evil.T", None]}, tokenizer_class="T")


def tokenizer_map(chain):
    settings(chain, TOKENIZER, auto_map={"AutoTokenizer": ["tokenization_evil.T", None]}, tokenizer_class="T")


def own_generate(chain):
    code(chain / "base" / "custom_generate", "generate.py")


def a_pickle(chain):
    (chain / "base" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    (chain / "base" / "model.safetensors").unlink()


def a_pickle_as_safetensors(chain):
    (chain / "adapter" / "adapter_model.safetensors").write_bytes(pickle.dumps(Payload()))


def linked(where):
    def build(chain):
        outside = chain.parent / "outside"
        path = chain / where
        path.rename(outside) if path.is_file() else shutil.move(path, outside)
        path.symlink_to(outside)

    return build


def a_pipe(chain):
    (chain / BASE).unlink()
    os.mkfifo(chain / BASE)
    return  # no digest of it can be taken


def a_local_folder_as_the_base(chain):
    """Its name is one of a hub, and it lies in the working directory."""
    local = chain.parent / "some" / "model"
    shutil.copytree(chain / "base", local)
    shutil.rmtree(chain / "base")
    recipe(chain, "model", reference="some/model", digest=None)


def a_reference(text):
    def build(chain):
        shutil.rmtree(chain / "base")
        recipe(chain, "model", reference=text)

    return build


def set_in(file, **changes):
    return lambda chain: settings(chain, file, **changes)


def yaml_in(*where, **changes):
    return lambda chain: recipe(chain, *where, **changes)


def as_yaml(text):
    def build(chain):
        (chain / "chain.yaml").write_text(text)
        return ...  # no digests

    return build


def shards(target):
    def build(chain):
        (chain / "base" / "model.safetensors").rename(chain.parent / "model.safetensors")
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": target}}
        (chain / "base" / "model.safetensors.index.json").write_text(json.dumps(index))

    return build


def header(text, size=None):
    def build(chain):
        data = text if isinstance(text, bytes) else json.dumps(text).encode()
        length = len(data) if size is None else size
        (chain / "adapter" / "adapter_model.safetensors").write_bytes(length.to_bytes(8, "little") + data)

    return build


def few_shot(**changes):
    return yaml_in("prompt", **({"kind": "few_shot", "template": "{text}", "example_template": "{a}"} | changes))


def swelling(where, rules=8, content="a" * 16):
    """A tokenizer whose normalizer makes every letter 16⁸ letters, and applies it to its added tokens when read."""

    def build(folder):
        path = folder / where / "tokenizer.json"
        found = json.loads(path.read_text())
        rule = {"type": "Replace", "pattern": {"String": "a"}, "content": content}
        found["normalizer"] = {"type": "Sequence", "normalizers": [rule] * rules}
        token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
        found["added_tokens"].append({"id": 10**5, "content": "aaaa"} | token)
        path.write_text(json.dumps(found))

    return build


def many_added(where):
    def build(folder):
        path = folder / where / "tokenizer.json"
        found = json.loads(path.read_text())
        token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        found["added_tokens"] += [{"id": 10**5 + n, "content": f"<x{n}>"} | token for n in range(300_000)]
        path.write_text(json.dumps(found))

    return build


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)
WIDE = "{text:>1000000000}"
PATTERN = "(a+)+$"

CHAINS = {
    # code
    "megatron": megatron,
    "any module": any_module,
    "megatron in adapter/": megatron_in_the_adapter,
    "megatron in base/": megatron_in_the_base,
    "auto_map in base/": code_in_the_base,
    "auto_map of a hub": code_of_a_hub,
    "auto_map deeper": code_within_the_settings,
    "prompt tuning": prompt_tuning,
    "auto_map in tokenizer/": tokenizer_code,
    "auto_map in tokenizer_config.json alone": tokenizer_map,
    "trust in tokenizer_config.json": set_in(TOKENIZER, trust_remote_code=True),
    "custom_generate/": own_generate,
    "a pickle for weights": a_pickle,
    "a pickle called safetensors": a_pickle_as_safetensors,
    "kernels": set_in(BASE, attn_implementation="some/kernel"),
    "kernels of experts": set_in(BASE, _experts_implementation={"": "some/kernel:f"}),
    "use_kernels": set_in(BASE, use_kernels=True),
    "quantised": set_in(BASE, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "fusions": set_in(BASE, fusion_config={"a": {"b": "c"}}),
    "a corda config": set_in(ADAPTER, corda_config={"cache_file": "/tmp/x"}),
    "auto_mapping": set_in(ADAPTER, auto_mapping={"base_model_class": "C", "parent_library": "evil"}),
    "a start of its own": set_in(ADAPTER, init_lora_weights="pissa_niter_1000000000"),
    "an adapter of another type": set_in(ADAPTER, peft_type="XLORA"),
    # other places
    **{f"a link: {n}": linked(n) for n in ("base", "adapter", BASE, ADAPTER, "tokenizer/tokenizer.json", "chain.yaml")},
    "a folder in the working directory": a_local_folder_as_the_base,
    **{
        f"a reference {t!r}": a_reference(t)
        for t in (
            "/etc",
            "../outside",
            "./base",
            "a/b/c",
            "~/x",
            "a//b",
            "a/..",
            "..",
            "",
            "C:\\x",
            "https://x/y",
            "a\n",
        )
    },
    "shards elsewhere": shards("../../model.safetensors"),
    "shards absolute": shards("/etc/model.safetensors"),
    "shards of a pickle": shards("model.bin"),
    "weights named by the settings": set_in(BASE, transformers_weights="../../model.safetensors"),
    "other settings": set_in(BASE, configuration_files=["config.4.0.0.json"]),
    "other tokenizer files": set_in(TOKENIZER, fast_tokenizer_files=["tokenizer.4.0.0.json"]),
    "a vocabulary elsewhere": set_in(TOKENIZER, vocab_file="/etc/passwd"),
    "a name elsewhere": set_in(BASE, _name_or_path="/etc"),
    "a backbone": set_in(BASE, backbone="resnet50", use_pretrained_backbone=True),
    "options of a parser": set_in(TOKENIZER, mecab_kwargs={"mecab_option": "-r /etc/x"}),
    "positional options": set_in(TOKENIZER, init_inputs=["/etc/passwd"]),
    "a pipe": a_pipe,
    # time and memory
    "a pattern of layers": set_in(ADAPTER, target_modules=PATTERN),
    "a pattern among the layers": set_in(ADAPTER, target_modules=[PATTERN]),
    "a pattern of ranks": set_in(ADAPTER, rank_pattern={PATTERN: 2}),
    "a pattern of scalings": set_in(ADAPTER, alpha_pattern={"(.*)*.*x": 2}),
    "a rank": set_in(ADAPTER, r=10**6),
    "a rank beyond": set_in(ADAPTER, r=10**12),
    "a scaling of zero": set_in(ADAPTER, lora_alpha=5e-324),
    "layers over and over": set_in(ADAPTER, layer_replication=[[0, 10**9]]),
    "wide layers": set_in(BASE, hidden_size=10**7, intermediate_size=10**7),
    "many layers": set_in(BASE, num_hidden_layers=60_000),
    "very many layers": set_in(BASE, num_hidden_layers=10**12),
    "a vocabulary": set_in(BASE, vocab_size=10**10),
    "rows of embeddings": yaml_in("model", vocabulary=2 * 10**9),
    "a deep config": lambda c: (c / BASE).write_text('{"a":' + "[" * 10**5 + "]" * 10**5 + "}") and None,
    "a long chat template": lambda c: (c / "tokenizer/chat_template.jinja").write_text("x" * 10**6) and None,
    "a tokenizer of nothing": lambda c: (c / "tokenizer/tokenizer.json").write_text("{}") and None,
    "a deep tokenizer": lambda c: (c / "tokenizer/tokenizer.json").write_text("[" * 10**5) and None,
    "a huge header": header(b"{}", size=2**40),
    "a header of 8 MB": header(b"{" + b" " * (9 * 2**20) + b"}"),
    "a header of lists": header(b"[" * 10**5 + b"]" * 10**5),
    "dimensions": header({"a": {"dtype": "F32", "shape": [1] * 10**5, "data_offsets": [0, 4]}}),
    "sizes of many digits": header(b'{"a":{"dtype":"F32","shape":[' + b"9" * 4299 + b'],"data_offsets":[0,4]}}'),
    "billion laughs": as_yaml(LAUGHS),
    "a list within itself": as_yaml("&a [*a]"),
    "levels": as_yaml("a: " + "[" * 20_000),
    "a date": as_yaml("a: 2020-99-99"),
    "digits": as_yaml("a: " + "9" * 5000),
    "a long comment": as_yaml("#" * 2**21),
    "beams": yaml_in("options", num_beams=10**6),
    "tokens": yaml_in("options", max_new_tokens=10**12),
    "tokens at least": yaml_in("options", min_new_tokens=10**12),
    "a batch": yaml_in("options", batch_size=10**9),
    "beams of the calls": yaml_in("llm_kwargs", num_beams=10**6),
    "tokens of the calls": yaml_in("llm_kwargs", max_tokens=10**12),
    "a watermark": yaml_in(
        "model",
        generation={
            "watermarking_config": {
                "ngram_len": 5,
                "keys": [1],
                "sampling_table_size": 10**12,
                "context_history_size": 4,
            }
        },
    ),
    # prompts
    "a width": yaml_in("prompt", template=WIDE),
    "a width of a width": yaml_in("prompt", template="{text:{text}}"),
    "a conversion of no kind": yaml_in("prompt", template="{text!x}"),
    "digits without end": yaml_in("prompt", template="{text:.1000000000f}"),
    "a width of a date": yaml_in("prompt", template="{text:%1000000000d}"),
    "an attribute": yaml_in("prompt", template="{text.__class__}"),
    "an index": yaml_in("prompt", template="{text[0]}"),
    "a width before the examples": few_shot(prefix="{text:>1000000000}", examples=[{"a": "b"}]),
    "a width in an example": few_shot(examples=[{"a": WIDE}]),
    "a width over two examples": few_shot(examples=[{"a": "{text:>100"}, {"a": "0000000}"}], separator=""),
    "a width in an example's template": few_shot(examples=[{"a": "b"}], example_template="{a:>1000000000}"),
    "a width between examples": few_shot(examples=[{"a": "b"}] * 2, separator=WIDE),
    "a width in a message": yaml_in("prompt", kind="chat", messages=[{"role": "human", "template": WIDE}]),
    "jinja": yaml_in("prompt", template_format="jinja2"),
    "a placeholder of no name": yaml_in("prompt", kind="chat", messages=[{"role": "placeholder", "template": ""}]),
    "a placeholder's index": yaml_in("prompt", kind="chat", messages=[{"role": "placeholder", "template": "a.b[c]"}]),
    "values many times": few_shot(example_template="{a}" * 5000, examples=[{"a": "x" * 20_000}] * 20),
    "a default many times": yaml_in("prompt", template="{b}" * 60_000 + "{text}", defaults={"b": "x" * 300_000}),
    # what is expanded while it is read
    "kinds of layers": set_in(BASE, model_type="gpt_neo", attention_types=[[["global"], 10**9]]),
    "many kinds of layers": set_in(BASE, model_type="gpt_neo", attention_types=[[["global"], 1000]] * 1000),
    "thousands of layers": set_in(BASE, num_hidden_layers=4000),
    "a swelling text": swelling("tokenizer"),
    "a swelling text of one rule": swelling("tokenizer", rules=1, content="a" * 10**6),
    "many added tokens": many_added("tokenizer"),
    "a number of minutes": as_yaml("format: " + "1:" * 300 + "1."),
    "a number of nothing": as_yaml('format: !!int ""'),
}
"""name → builder(folder of a good chain); gives the folder if it has another name, ... where no digests are wanted"""


# --- models of one's own --------------------------------------------------------------------------------------------


def adapter_beside(folder):
    folder = moved(folder, "megatron")
    code(folder, "evil.py")
    settings(folder, "adapter_config.json", **PEFT, **EVIL)
    return folder


def pickled_adapter(folder):
    settings(folder, "adapter_config.json", **PEFT)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload()))


def own_code(folder):
    code(folder, "configuration_evil.py", "modeling_evil.py", "tokenization_evil.py")
    names = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    settings(folder, "config.json", model_type="evil", auto_map=names)


def only_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def weights_elsewhere(folder):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "model.safetensors")


def index_elsewhere(folder):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def of_settings(name, **changes):
    return lambda folder: settings(folder, name, **changes)


MODELS = {
    "an adapter beside": adapter_beside,
    "a pickled adapter beside": pickled_adapter,
    "code": own_code,
    "code for a known model": of_settings("config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.M"}),
    "code for the tokenizer": of_settings("tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]}),
    "trust": of_settings("tokenizer_config.json", trust_remote_code=True),
    "only a pickle": only_a_pickle,
    "weights elsewhere": weights_elsewhere,
    "an index elsewhere": index_elsewhere,
    "weights named by the settings": of_settings("config.json", transformers_weights="../model.safetensors"),
    "other settings": of_settings("config.json", configuration_files=["config.4.0.0.json"]),
    "kernels": of_settings("config.json", attn_implementation="evil/kernel"),
    "kernels within": of_settings("config.json", text_config={"_attn_implementation": "evil/kernel:f"}),
    "kernels by part": of_settings("config.json", attn_implementation={"": "sdpa", "x": "evil/kernel"}),
    "kernels of experts": of_settings("config.json", experts_implementation="evil/kernel"),
    "kernels named": of_settings("config.json", kernel_config={"RMSNorm": "evil/kernel:N"}),
    "kernels wanted": of_settings("config.json", use_kernels=True),
    "many layers": of_settings("config.json", num_hidden_layers=3000),
    "two layers more": of_settings("config.json", num_hidden_layers=4),
    "a head of its own": of_settings("config.json", tie_word_embeddings=False),
    "wide layers": of_settings("config.json", hidden_size=10**7, intermediate_size=10**7),
    "a pipe for weights": lambda f: (f / "model.safetensors").unlink() or os.mkfifo(f / "model.safetensors"),
    "a pipe beside": lambda f: os.mkfifo(f / "more.safetensors"),
    "layers without end": of_settings("config.json", num_hidden_layers=10**9),
    "kinds of layers": of_settings("config.json", model_type="gpt_neo", attention_types=[[["global"], 10**9]]),
    "a swelling text": swelling("."),
    "many added tokens": many_added("."),
}


def ignored_beside(folder):
    """What transformers could read and this package does not: it loads as if that were not there."""
    code(folder / "custom_generate", "generate.py")
    code(folder, "modeling_llama.py", "megatron.py", "setup.py")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    (folder / "training_args.bin").write_bytes(pickle.dumps(Payload()))
    (folder / ".metadata").write_bytes(pickle.dumps(Payload()))


NO_DIGESTS = ("a pipe", "a link: chain.yaml")


def build(table, name, good, into):
    """The hostile folder `name` of a table, made of a copy of a good one; its parent is the working directory."""
    into.mkdir(parents=True)
    folder = into / "chain"
    shutil.copytree(good, folder)
    moved_to = table[name](folder)
    folder = moved_to if isinstance(moved_to, Path) else folder
    if table is not MODELS and (folder / "chain.yaml").is_file() and name not in NO_DIGESTS and moved_to is not ...:
        digests(folder)
    return folder


# --- changed at random ----------------------------------------------------------------------------------------------

STRANGE = [
    *(None, True, -1, 0, 2**31, 10**30, 0.5, 1e308, -1e-320, "", "x", "float8_e4m3fn", "\ud800\x1b[2J", "../x"),
    *([], [0], ["x"] * 3, [[[]]], {}, {"a": 1}, {"": None}, [10**12], {"0": {"content": "x"}}, "a" * 5000),
]
MUTATED = (BASE, ADAPTER, TOKENIZER, "base/generation_config.json", "tokenizer/tokenizer.json", "chain.yaml")
TENSORS = ("base/model.safetensors", "adapter/adapter_model.safetensors", "base_changes.safetensors")


def places(data, at=()):
    """Where a value stands in plain data, at most three levels deep."""
    if isinstance(data, dict) and len(at) < 3:
        for key, value in list(data.items())[:60]:
            yield (*at, key)
            yield from places(value, (*at, key))


def mutated(seed):
    """A builder that changes one value of one file, or one byte of a tensors' header."""

    def build(chain):
        chance = random.Random(seed)
        if chance.random() < 0.2:
            path = chain / chance.choice(TENSORS)
            data = bytearray(path.read_bytes())
            size = int.from_bytes(data[:8], "little")
            data[chance.randrange(8 + size)] = chance.choice(b'\x00\x01\xff{}[]",:0199-eE')
            path.write_bytes(bytes(data))
            return
        path = chain / chance.choice(MUTATED)
        kept = yaml.safe_load(path.read_text())
        place = chance.choice(list(places(kept)))
        part = kept
        for key in place[:-1]:
            part = part[key]
        key = place[-1] if chance.random() < 0.8 else chance.choice(["x", "\x1b[2J", "_x", "token_file", "pad_token"])
        part[key] = chance.choice(STRANGE)
        path.write_text(json.dumps(kept))

    return build
