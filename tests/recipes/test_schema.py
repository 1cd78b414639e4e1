"""What a recipe may say, and that everything else is refused by name and reason.

Belongs here: the specs, with recipes written by the test. Does not: the shipped recipes (test_library).
"""

import asyncio
from pathlib import Path

import pytest
from langchain_core.prompts import PromptTemplate
from pydantic import ValidationError

from llmchain_fed.errors import LLMChainFedError, RecipeError
from llmchain_fed.library import read_spec
from llmchain_fed.recipes.prompts import make_prompt, prompt_from_data, prompt_to_data
from llmchain_fed.recipes.schema import ChainSpec, PromptSpec

GOOD_PROMPT = """
name: greet
description: Says hello.
template: "Greet {who} in {language}."
input_variables: [who]
defaults: {language: "French"}
licence: MIT
"""
GOOD_CHAIN = """
name: greet
description: Says hello.
prompt: greet
"""


def prompt_from(folder: Path, text: str, name: str = "greet") -> PromptSpec:
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return read_spec(PromptSpec, name, folder)


def chain_from(folder: Path, text: str, name: str = "greet") -> ChainSpec:
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return read_spec(ChainSpec, name, folder)


# --- few-shot ---------------------------------------------------------------------------------------------

FEW_SHOT = """
name: greet
description: Says hello.
prefix: "In {language}, as {{json}}:"
template: "{who} ->"
input_variables: [who]
defaults: {language: "{French}"}
example_template: "{{ex}} {a} -> {b}"
separator: " {sep} | "
examples:
  - {a: "x{y}", b: "{{z}}"}
  - {a: "}{", b: "{who}"}
licence: MIT
"""


def test_braces_in_a_few_shot_recipe_are_text(tmp_path):
    prompt = make_prompt(prompt_from(tmp_path, FEW_SHOT))
    expected = "In {French}, as {json}: {sep} | {ex} x{y} -> {{z}} {sep} | {ex} }{ -> {who} {sep} | {Ann} ->"
    assert prompt.format(who="{Ann}") == expected
    assert prompt.format_prompt(who="{Ann}").to_string() == expected
    assert asyncio.run(prompt.aformat(who="{Ann}")) == expected
    assert prompt_from_data(prompt_to_data(prompt)).format(who="{Ann}") == expected


def test_adjacent_braces_in_an_example_template(tmp_path):
    text = FEW_SHOT.replace('"{{ex}} {a} -> {b}"', '"{{{a}}}{b}"').replace('" {sep} | "', '"\\n"')
    expected = "In {French}, as {json}:\n{x{y}}{{z}}\n{}{}{who}\nAnn ->"
    assert make_prompt(prompt_from(tmp_path, text)).format(who="Ann") == expected


def test_values_with_short_formats(tmp_path):
    text = GOOD_PROMPT.replace("{who} in", "{who:>6} {n:,} for {price:08.2f} {part:.1%} {who!r} in")
    prompt = make_prompt(prompt_from(tmp_path, text.replace("[who]", "[who, n, price, part]")))
    found = prompt.format(who="Ann", n=12345, price=3.14159, part=0.5)
    assert found == "Greet    Ann 12,345 for 00003.14 50.0% 'Ann' in French."


# --- bad prompt recipes -----------------------------------------------------------------------------------

BAD_PROMPTS = {
    "yaml turned no into False": (
        'language: "French"',
        "language: no",
        "`defaults.language` is False, not text",
    ),
    "yaml turned 12:30 into 750": (
        'language: "French"',
        "language: 12:30",
        "12:30 in line",
    ),
    "yaml made a date": ("Says hello.", "2024-01-01", "2024-01-01 in line 3 is a date to YAML; put it in quotes"),
    "an empty value": ("Says hello.", "", "`description` is None, not text"),
    "attribute access": ("{who}", "{who.__class__}", "{who.__class__} is not a plain {variable}"),
    "indexing": ("{who}", "{who[0]}", "{who[0]} is not a plain {variable}"),
    "a position": ("{who}", "{0}", "{0} is not a plain {variable}"),
    "no name": ("{who}", "{}", "{} is not a plain {variable}"),
    "an unknown conversion": ("{who}", "{who!x}", "{who!x} is not a plain {variable}"),
    "a wide format": ("{who}", "{who:>1000}", "{who:>1000} is not a plain {variable}"),
    "many digits": ("{who}", "{who:.100f}", "{who:.100f} is not a plain {variable}"),
    "a nested format": ("{who}", "{who:{language}}", "{who:{language}} is not a plain {variable}"),
    "an open brace": ("{who}", "{who", "do not match"),
    "a closing brace": ("{who}", "who}", "do not match"),
    "jinja2 control": ("{who}", "{% if who %}{who}{% endif %}", "{% if who %} is not a plain {variable}"),
    "jinja2 or mustache variable": ("{who}", "{{who}}", "{{x}} is literal text"),
    "template_format": (
        "licence: MIT",
        "licence: MIT\ntemplate_format: jinja2",
        "`template_format` is no choice",
    ),
    "a class path": ("licence: MIT", "licence: MIT\n_type: os.system", "unknown option `_type`"),
    "a typing error": ("template:", "temlate:", "did you mean `template`"),
    "a key left out": ("licence: MIT", "", "`licence` is missing"),
    "a licence that is no identifier": ("MIT", "free for all", "use an SPDX identifier"),
    "a variable nobody declared": ("{who}", "{who} {when}", "uses ['language', 'when', 'who']"),
    "a variable nobody uses": ("[who]", "[who, when]", "declare ['language', 'when', 'who']"),
    "a variable given twice": ("[who]", "[who, who]", "name each once"),
    "a variable with a default as well": ("[who]", "[who, language]", "name each once"),
    "no variable": ("[who]", "[]", "`input_variables` is []"),
    "not a list": ("[who]", "who", "`input_variables` is 'who'; write a list"),
    "a set": ("[who]", "!!set {who}", "the tag tag:yaml.org,2002:set is not read"),
    "LangChain's own word": ("who", "stop", "cannot be called 'stop'"),
    "an example's prompt": ("who", "prompt", "cannot be called 'prompt'"),
    "an example's completion": ("who", "completion", "cannot be called 'completion'"),
    "examples without their template": (
        "licence: MIT",
        "licence: MIT\nexamples: [{a: b}]",
        "`examples.0` has ['a']",
    ),
    "a template without examples": (
        "licence: MIT",
        'licence: MIT\nexample_template: "{a}"',
        "['example_template'] would do nothing without `examples`",
    ),
    "a key given twice": ("licence: MIT", "licence: MIT\nlicence: MIT", "`licence` is given twice"),
    "a nested key given twice": (
        '{language: "French"}',
        "{language: a, language: b}",
        "`language` is given twice",
    ),
    "another name than the file": (
        "name: greet",
        "name: meet",
        "`name` is 'meet', but the file is called 'greet'",
    ),
    "a python object": (
        "Says hello.",
        "!!python/object/apply:os.getcwd []",
        "the tag tag:yaml.org,2002:python/object/apply:os.getcwd is not read",
    ),
    "not YAML": ("[who]", "[who", "is no plain YAML: did not find expected"),
    "two documents": ("licence: MIT", "licence: MIT\n---\na: b", "a second document begins in line 8"),
}


def test_the_good_prompt_is_good(tmp_path):
    """What the bad ones are made from is allowed, so that each is refused for its own reason."""
    prompt = make_prompt(prompt_from(tmp_path, GOOD_PROMPT))
    assert type(prompt) is PromptTemplate
    assert prompt.format(who="Ann") == "Greet Ann in French."


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompt_is_refused(tmp_path, case):
    good, bad, reason = BAD_PROMPTS[case]
    assert good in GOOD_PROMPT
    with pytest.raises(RecipeError) as caught:
        prompt_from(tmp_path, GOOD_PROMPT.replace(good, bad))
    message = str(caught.value)
    assert message.startswith("prompt recipe greet.yaml is refused, nothing was loaded: ")
    assert reason in message
    assert message.endswith(". Correct the file.")
    assert isinstance(caught.value, LLMChainFedError)


@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        ('a: "x{y}"', "a: 12:30", "12:30 in line"),
        ('a: "x{y}"', 'c: "x"', "`examples.0` has ['b', 'c']; `example_template` uses ['a', 'b']"),
        ("{ex}} {a}", "{ex}} {a.b}", "{a.b} is not a plain {variable}"),
        ("{ex}} {a}", "{ex}} {a:>9}", "`example_template` formats the values of `examples`; write them there"),
        ('as {{json}}:"', 'as {json}:"', "uses ['json', 'language', 'who']"),
    ],
)
def test_bad_few_shot_prompt_is_refused(tmp_path, good, bad, reason):
    assert good in FEW_SHOT
    with pytest.raises(RecipeError) as caught:
        prompt_from(tmp_path, FEW_SHOT.replace(good, bad))
    assert reason in str(caught.value)


@pytest.mark.parametrize("text", ["", "just text", "- a\n- b", "3"])
def test_a_file_without_keys_is_refused(tmp_path, text):
    with pytest.raises(RecipeError, match="write keys with values"):
        prompt_from(tmp_path, text)


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "greet.yaml").write_bytes(GOOD_PROMPT.encode() + b"# \xff\xfe\n")
    with pytest.raises(RecipeError, match="codec can't decode"):
        read_spec(PromptSpec, "greet", tmp_path)


def test_a_spec_does_not_change(tmp_path):
    spec = prompt_from(tmp_path, GOOD_PROMPT)
    with pytest.raises(ValidationError, match="frozen"):
        spec.template = "{who}"


def test_one_prompt_does_not_share_its_defaults_with_the_next(tmp_path):
    spec = prompt_from(tmp_path, GOOD_PROMPT)
    make_prompt(spec).partial_variables["language"] = "German"
    assert make_prompt(spec).format(who="Ann") == "Greet Ann in French."


# --- bad chain recipes ------------------------------------------------------------------------------------

BAD_CHAINS = {
    "a path upwards": ("model: ../weights", "never a path"),
    "an absolute path": ("model: /srv/weights", "never a path"),
    "a path here": ("model: ./weights", "never a path"),
    "a deep path": ("model: a/b/c", "never a path"),
    "a path on Windows": ("model: 'C:\\weights'", "never a path"),
    "dots": ("model: a..b", "never a path"),
    "a line end": ('model: "gpt2\\n"', "never a path"),
    "a prompt elsewhere": ("prompt: ../greet", "only a-z, 0-9 and _"),
    "a class as parser": ("parser: langchain.Parser", "'text', 'strip', 'json' or 'comma_list'"),
    "an unknown generation option": ("generation: {max_tokens: 8}", "did you mean `max_new_tokens`"),
    "text for a number": ('generation: {max_new_tokens: "8"}', "`generation.max_new_tokens` is '8'"),
    "yes for a number": ("generation: {max_new_tokens: yes}", "`generation.max_new_tokens` is True"),
    "not a number": ("generation: {temperature: .nan}", ".nan in line 5 is not finite"),
    "below zero": ("generation: {temperature: -1}", "`generation.temperature` is -1"),
    "above one": ("generation: {top_p: 1.5}", "`generation.top_p` is 1.5"),
    "a single stop": ('stop: "\\n"', "write a list"),
    "an empty stop": ('stop: [""]', "`stop.0` is ''"),
    "no as stop": ("stop: [no]", "`stop.0` is False, not text"),
    "half an adapter": ("adapter: {r: 8}", "`adapter.lora_alpha` is missing"),
    "a pattern of layers": ("adapter: {r: 8, lora_alpha: 8, target_modules: '.*'}", "a list of layer names"),
    "no layers": ("adapter: {r: 8, lora_alpha: 8, target_modules: []}", "a list of layer names"),
    "an adapter of rank 0": ("adapter: {r: 0, lora_alpha: 8}", "`adapter.r` is 0"),
    "an unknown adapter option": ("adapter: {r: 8, lora_alpha: 8, rank: 8}", "unknown option `rank`"),
    "an adapter that is a word": ("adapter: lora", "`adapter` is 'lora'; write keys with values"),
}


def test_the_good_chain_is_good(tmp_path):
    spec = chain_from(tmp_path, GOOD_CHAIN)
    assert spec.model == "smollm2-135m-instruct"
    assert (spec.adapter, spec.stop, spec.parser, spec.llm_kwargs()) == (None, (), "text", {})


@pytest.mark.parametrize("case", BAD_CHAINS)
def test_bad_chain_is_refused(tmp_path, case):
    line, reason = BAD_CHAINS[case]
    good = GOOD_CHAIN.replace("prompt: greet\n", "") if line.startswith("prompt:") else GOOD_CHAIN
    with pytest.raises(RecipeError) as caught:
        chain_from(tmp_path, good + line + "\n")
    assert str(caught.value).startswith("chain recipe greet.yaml is refused, nothing was loaded: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("model", ["gpt2", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "google/flan-t5-small"])
def test_hub_ids_are_allowed(tmp_path, model):
    assert chain_from(tmp_path, f"{GOOD_CHAIN}model: {model}\n").model == model


def test_layers_by_name(tmp_path):
    text = GOOD_CHAIN + "adapter: {r: 8, lora_alpha: 16, lora_dropout: 0.1, target_modules: [q_proj, v_proj]}\n"
    lora = chain_from(tmp_path, text).adapter.to_lora()
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (8, 16, 0.1)
    assert lora.target_modules == {"q_proj", "v_proj"}


def test_generation_and_stop_become_call_arguments(tmp_path):
    text = GOOD_CHAIN + 'generation: {max_new_tokens: 8, temperature: 1, seed: 0}\nstop: ["END"]\n'
    assert chain_from(tmp_path, text).llm_kwargs() == {
        "max_new_tokens": 8,
        "temperature": 1.0,
        "seed": 0,
        "stop": ["END"],
    }
