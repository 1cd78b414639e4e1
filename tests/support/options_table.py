"""docs/options.md out of FederationConfig's fields: `python tests/support/options_table.py > docs/options.md`."""

import ast
import inspect
from pathlib import Path

from llmchain_fed.federated.options import CODE, Ditto, FederationConfig
from llmchain_fed.training.config import TrainingConfig

PAGE = Path(__file__).parents[2] / "docs" / "options.md"
HEAD = """# Options of a federation

Every option that can be written down and decides how a federation goes on, as `FederatedAveraging`, a checkpoint,
`fed.config` and the federation file of `llmchain-fed federate` know it, with the same defaults. What is code (a rule or
an optimizer of your own) is given to `FederatedAveraging` and given again to `FederatedAveraging.resume`; `model`,
`participants`, `runtime`, `callbacks`, `checkpoint_dir` and `progress` are arguments beside them. "May differ" says
that a run that goes on may be given another value; all other options have to be those of then.
"""


def fields(model):
    """Name → docstring of a model's fields, in their order."""
    body = ast.parse(inspect.getsource(model)).body[0].body
    found = {}
    for item, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign):
            doc = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            found[item.target.id] = " ".join(doc.split())
    return found


SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
KINDS = {
    "integer": "int",
    "number": "float",
    "string": "text",
    "boolean": "yes or no",
    "object": "a mapping",
    "array": "a list",
    "null": "None",
}


def written(schema):
    """A type and its bounds in words."""
    if "anyOf" in schema:
        return " or ".join(written(kind) for kind in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(repr(value) for value in schema["enum"])
    bounds = [f"{sign} {schema[name]:g}" for name, sign in SIGNS.items() if name in schema]
    if schema.get("pattern") == f"^{CODE}":
        return "code"
    kind = schema.get("$ref", "").rpartition("/")[2] or KINDS.get(schema.get("type"), "see there")
    return " ".join([kind, ", ".join(bounds)]).strip()


def rows(model, *, differ=False):
    decisive, schema = FederationConfig().decisive(), model.model_json_schema()["properties"]
    for name, doc in fields(model).items():
        default = model.model_fields[name].default
        shown = "" if isinstance(default, TrainingConfig) else f"`{default!r}`"
        cells = [f"`{name}`", written(schema[name]), shown, doc, *([["yes", ""][name in decisive]] if differ else [])]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page():
    head = "| option | type | default | what it is |"
    return "\n".join(
        [HEAD, head + " may differ |", "|---|---|---|---|---|", *rows(FederationConfig, differ=True), "",
         "## `training`: how one participant trains in one round", "", head, "|---|---|---|---|",
         *rows(TrainingConfig), "", "## `personal`: Ditto", "", head, "|---|---|---|---|", *rows(Ditto), ""]
    )  # fmt: skip


if __name__ == "__main__":
    print(page(), end="")
