"""The shipped recipes load and do what their files say; names and folders.

Belongs here: prompts/, chains/, loading by name. Does not: what a recipe may say (test_schema).
"""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from langchain_core.language_models.llms import LLM
from langchain_core.prompts import BasePromptTemplate, FewShotPromptTemplate
from pydantic import Field

from llmchain_fed import library
from llmchain_fed.chain.llm import LocalLLM
from llmchain_fed.errors import RecipeError
from llmchain_fed.library import list_chains, list_prompts, load_chain, load_prompt, read_spec
from llmchain_fed.recipes.prompts import prompt_from_data, prompt_to_data
from llmchain_fed.recipes.schema import ChainSpec, PromptSpec

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["classify", "fault_diagnosis", "medical_report", "personal_search", "summarize", "translate"]

RENDERED = {
    "classify": (
        {"record": "R"},
        "Classify the credit application as one of: low risk, high risk.\n\nRecord: R\n\nLabel:\n",
    ),
    "fault_diagnosis": (
        {"observations": "O"},
        "Name the likely fault of the machine and the next action, in one line.\n"
        "\n"
        "Observations: Vibration at 3x shaft speed rising for a week, bearing housing at 92 C.\n"
        "Diagnosis:\n"
        "bearing wear; replace the bearing\n"
        "\n"
        "Observations: Motor draws 20 % more current than usual, discharge pressure normal, oil dark.\n"
        "Diagnosis:\n"
        "poor lubrication; change the oil\n"
        "\n"
        "Observations: Pressure reading jumps between 0 and 10 bar while the flow stays constant.\n"
        "Diagnosis:\n"
        "faulty pressure sensor; check the wiring and replace the sensor\n"
        "\n"
        "Observations: O\n"
        "Diagnosis:\n",
    ),
    "medical_report": (
        {"findings": "F"},
        "Write the impression of this radiology report. Use only what the findings say.\n"
        "\nFindings: F\n\nImpression:\n",
    ),
    "personal_search": (
        {"query": "Q"},
        "Write the search terms this person means, separated by commas.\n"
        "\nRecent searches: none\nTyped: Q\n\nSearch terms:\n",
    ),
    "summarize": (
        {"text": "T"},
        "Summarize the following text in one sentence. Keep names, numbers and dates as they are.\n"
        "\nText: T\n\nSummary:\n",
    ),
    "translate": ({"text": "Page locked"}, "Translate the following text to French: Page locked\n"),
}

GOOD_PROMPT = """
name: greet
description: Says hello.
template: "Greet {who} in {language}."
input_variables: [who]
defaults: {language: "French"}
licence: MIT
"""


def raw(kind: str, name: str) -> dict:
    return yaml.safe_load((ROOT / kind / f"{name}.yaml").read_text(encoding="utf-8"))


# --- the shipped recipes ----------------------------------------------------------------------------------


def test_the_folders_contain_these_recipes():
    assert list_prompts() == NAMES
    assert list_chains() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_prompt_renders(name):
    values, expected = RENDERED[name]
    prompt = load_prompt(name)
    assert isinstance(prompt, BasePromptTemplate)
    assert prompt.input_variables == list(values)
    assert prompt.format(**values) == expected
    assert prompt.format_prompt(**values).to_string() == expected
    assert prompt.invoke(values).to_string() == expected


@pytest.mark.parametrize("name", NAMES)
def test_prompt_asks_for_what_its_file_says(name):
    data, prompt = raw("prompts", name), load_prompt(name)
    assert sorted(prompt.input_variables) == sorted(data["input_variables"])
    assert prompt.partial_variables == data["defaults"]
    assert data["name"] == name
    assert data["licence"] == "Apache-2.0"
    assert isinstance(prompt, FewShotPromptTemplate) is bool(data.get("examples"))


@pytest.mark.parametrize("name", NAMES)
def test_every_default_gives_way_to_the_caller(name):
    values, _ = RENDERED[name]
    prompt = load_prompt(name)
    for variable in prompt.partial_variables:
        assert "instead {of} it" in prompt.format(**values, **{variable: "instead {of} it"})


@pytest.mark.parametrize("name", NAMES)
def test_values_with_braces_arrive_as_they_are(name):
    values, expected = RENDERED[name]
    (variable,) = values
    value = '{"a": {b}} {{c}} }{'
    assert load_prompt(name).format(**{variable: value}) == expected.replace(values[variable] + "\n", value + "\n")


@pytest.mark.parametrize("name", NAMES)
def test_chain_spec_has_what_its_file_says(name):
    data = raw("chains", name)
    spec = read_spec(ChainSpec, name, ROOT / "chains")
    assert (spec.name, spec.prompt, spec.model) == (name, name, "smollm2-135m-instruct")
    assert spec.prompt in list_prompts()
    assert spec.llm_kwargs() == {**data["generation"], "stop": data["stop"]}
    assert spec.parser == data["parser"]
    assert spec.adapter is not None
    assert spec.adapter.model_dump() == data["adapter"]


def test_parsers_of_the_shipped_chains():
    found = {name: read_spec(ChainSpec, name, ROOT / "chains").parser for name in NAMES}
    assert found == {
        "classify": "strip",
        "fault_diagnosis": "strip",
        "medical_report": "strip",
        "personal_search": "comma_list",
        "summarize": "strip",
        "translate": "strip",
    }


def test_translate_chain_settings():
    spec = read_spec(ChainSpec, "translate", ROOT / "chains")
    assert spec.llm_kwargs() == {"max_new_tokens": 128, "temperature": 0.0, "stop": ["\n\n"]}
    lora = spec.adapter.to_lora()
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 32, 0.0)
    assert lora.target_modules == "all-linear"


def test_generation_keys_are_options_of_the_model():
    """Whatever a recipe may set, the model understands."""
    from llmchain_fed.model.generation.answers import GenerationOptions

    assert set(ChainSpec.model_fields["generation"].annotation.model_fields) <= set(GenerationOptions.model_fields)


def test_prompts_load_without_the_model_code():
    code = "import sys; from llmchain_fed.library import load_prompt; load_prompt('translate'); "
    code += "sys.exit('torch' in sys.modules or 'llmchain_fed.model.local_model' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- chains -------------------------------------------------------------------------------------------------------


class Recorder(LLM):
    """Answers `answer` and remembers what it was asked."""

    answer: str
    asked: list[dict] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "recorder"

    def _call(self, prompt, stop=None, run_manager=None, **kwargs):
        self.asked.append({"prompt": prompt, "stop": stop, **kwargs})
        return self.answer


def test_a_chain_asks_with_its_prompt_and_settings():
    llm = Recorder(answer=" Page verrouillée\n")
    assert load_chain("translate", llm=llm).invoke({"text": "Page locked"}) == "Page verrouillée"
    assert llm.asked == [
        {
            "prompt": "Translate the following text to French: Page locked\n",
            "stop": ["\n\n"],
            "max_new_tokens": 128,
            "temperature": 0.0,
        }
    ]


def test_a_default_gives_way_in_a_chain():
    llm = Recorder(answer="Seite gesperrt")
    load_chain("translate", llm=llm).invoke({"text": "Page locked", "language": "German"})
    assert llm.asked[0]["prompt"] == "Translate the following text to German: Page locked\n"


def test_a_call_overrides_the_recipe():
    llm = Recorder(answer="x")
    load_chain("translate", llm=llm).invoke({"text": "Page locked"}, max_new_tokens=3, stop=["."])
    assert llm.asked[0]["stop"] == ["."]
    assert (llm.asked[0]["max_new_tokens"], llm.asked[0]["temperature"]) == (3, 0.0)


def test_personal_search_answers_with_a_list():
    chain = load_chain("personal_search", llm=Recorder(answer="flat rent, berlin, student"))
    assert chain.invoke({"query": "cheap flat"}) == ["flat rent", "berlin", "student"]


@pytest.mark.parametrize("name", NAMES)
def test_every_chain_runs_on_a_local_model(name, tiny_llm):
    """The recipe's keywords are ones a LocalLLM knows, and training sees the text the model sees."""
    values, expected = RENDERED[name]
    chain = load_chain(name, llm=tiny_llm)
    assert chain.render(values) == expected
    if name == "fault_diagnosis":  # its examples alone exceed the tiny model's context of 128 tokens
        return
    answer = chain.invoke(values, max_new_tokens=2)
    assert isinstance(answer, list if name == "personal_search" else str)


def test_without_a_model_the_recipe_chooses(monkeypatch, tiny_llm):
    calls = []
    monkeypatch.setattr(LocalLLM, "from_pretrained", lambda name, *, lora: calls.append((name, lora)) or tiny_llm)
    assert load_chain("translate").llm is tiny_llm
    ((name, lora),) = calls
    assert name == "smollm2-135m-instruct"
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (16, 32, 0.0, "all-linear")


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_recipe_survives_being_written_down(name):
    values, expected = RENDERED[name]
    prompt = prompt_from_data(prompt_to_data(load_prompt(name)))
    assert prompt.format(**values) == expected
    assert prompt.input_variables == list(values)


# --- names and folders ------------------------------------------------------------------------------------


class NoDisk:
    """A folder that must not be touched."""

    def __getattr__(self, name):
        pytest.fail(f"the folder was touched: {name}")

    def __truediv__(self, name):
        pytest.fail(f"the folder was touched: {name}")


HOSTILE = [
    "../translate",
    "a/b",
    "/etc/passwd",
    "..",
    "",
    "Translate",
    "tr-anslate",
    "translate\n",
    "tränslate",
    "a.b",
]


@pytest.mark.parametrize("name", [*HOSTILE, None, 3, Path("translate")])
@pytest.mark.parametrize("kind", [PromptSpec, ChainSpec])
def test_a_name_that_could_be_a_path_is_refused_before_the_disk(kind, name):
    with pytest.raises(RecipeError, match="no file was looked for"):
        read_spec(kind, name, NoDisk())


@pytest.mark.parametrize("load", [load_prompt, load_chain])
@pytest.mark.parametrize("name", HOSTILE)
def test_public_loaders_refuse_paths(load, name):
    with pytest.raises(RecipeError, match="no file was looked for"):
        load(name)


def test_an_unknown_name_lists_the_valid_ones():
    valid = "classify, fault_diagnosis, medical_report, personal_search, summarize, translate"
    with pytest.raises(RecipeError) as caught:
        load_prompt("translat")
    assert str(caught.value) == f"there is no prompt called 'translat'. Use one of: {valid}."
    with pytest.raises(RecipeError) as caught:
        load_chain("translat")
    assert str(caught.value) == f"there is no chain called 'translat'. Use one of: {valid}."


def test_other_files_in_the_folder_are_not_recipes(tmp_path):
    for name in ["b.yaml", "a.yaml", "c.yml", "d.json", "E.yaml", "f-g.yaml", ".yaml"]:
        (tmp_path / name).write_text("")
    assert library.recipe_names(tmp_path) == ["a", "b"]


def test_the_installed_folder_comes_before_the_checkout(tmp_path, monkeypatch):
    packaged = tmp_path / "_library" / "prompts"
    packaged.mkdir(parents=True)
    (packaged / "greet.yaml").write_text(GOOD_PROMPT)
    monkeypatch.setattr(library, "files", lambda package: tmp_path)
    assert list_prompts() == ["greet"]
    assert load_prompt("greet").format(who="Ann") == "Greet Ann in French."


def test_folders_beside_an_installed_package_are_not_ours(tmp_path, monkeypatch):
    """In site-packages, `prompts` belongs to somebody else."""
    (tmp_path / "prompts").mkdir()
    monkeypatch.setattr(library, "files", lambda package: tmp_path / "llmchain_fed")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "llmchain_fed" / "library.py"))
    with pytest.raises(RecipeError, match="Reinstall llmchain-fed"):
        list_prompts()
