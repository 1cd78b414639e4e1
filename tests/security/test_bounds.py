"""Every list and mapping that is read from elsewhere: it has a largest length, and one that is wrong throughout costs
hardly more than its bytes have cost to parse."""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

import llmchain_fed
from llmchain_fed.errors import FederationError, ParticipantError
from llmchain_fed.federated.checkpoint import schema as checkpoint_schema
from llmchain_fed.federated.client import global_state_cache
from llmchain_fed.federated.client import state as private_state
from llmchain_fed.federated.participant import ALPHAS, LARGEST_RANK
from llmchain_fed.federated.protocol import answers, tasks
from llmchain_fed.training.config import TrainingConfig
from llmchain_fed.untrusted import Strict, checked, parse_json, shown
from llmchain_fed.updates import serialization
from tests.security.bounded import bounded

_SEQUENCES = ("list", "tuple", "set", "frozenset")
_MANY = 30_000


def _models() -> list[type[Strict]]:
    for module in pkgutil.walk_packages(llmchain_fed.__path__, "llmchain_fed."):
        importlib.import_module(module.name)
    found, left = [], [Strict]
    while left:
        left += (own := left.pop().__subclasses__())
        found += [model for model in own if model.__module__.startswith("llmchain_fed.")]
    return sorted(set(found), key=lambda model: (model.__module__, model.__qualname__))


MODELS = _models()


def _containers(schema: Any, defs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The lists and mappings in a field's schema, but for those in models, which are looked at by themselves."""
    if isinstance(schema, (list, tuple)):
        for each in schema:
            yield from _containers(each, defs)
    if not isinstance(schema, dict) or schema.get("type") == "model":
        return
    if schema.get("type") == "definition-ref":
        yield from _containers(defs[schema["schema_ref"]], defs)
    elif schema.get("type") in (*_SEQUENCES, "dict", "generator"):
        yield schema
    for part in ("schema", "items_schema", "keys_schema", "values_schema", "choices"):
        yield from _containers(schema.get(part), defs)


def _fields(model: type[Strict]) -> dict[str, Any]:
    schema: Any = model.__pydantic_core_schema__
    defs = {each["ref"]: each for each in schema.get("definitions", ())}
    while schema["type"] != "model-fields":
        schema = schema["schema"]
    return {name: list(_containers(field["schema"], defs)) for name, field in schema["fields"].items()}


def test_the_walk_sees_what_is_there():
    names = {model.__qualname__ for model in MODELS}
    assert {
        "EvaluateAnswer",
        "CurveAnswer",
        "Introduction",
        "TrainTask",
        "PersonalStateTask",
        "StateHeader",
        "Greeting",
    } <= names
    assert {"UpdateHeader", "RoundData", "About", "_Manifest", "AdapterSettings", "ChainFile", "RankTask"} <= names
    assert [kind["type"] for kind in _fields(_Loose)["both"]] == ["dict", "list"]


class _Loose(Strict):
    both: dict[str, list[int]] | None = None


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__qualname__)
def test_every_container_has_a_largest_length_and_every_sequence_fails_at_its_first_wrong_item(model):
    for name, containers in _fields(model).items():
        for schema in containers:
            assert schema.get("max_length") is not None, f"{name}: a {schema['type']} of any length"
            assert schema["type"] == "dict" or schema.get("fail_fast"), f"{name}: an error for each item of a list"


HOSTILE = {
    "a list of numbers": json.dumps([0.5] * _MANY),
    "a list of mappings": json.dumps([{}] * _MANY),
    "a list of lists": json.dumps([[[]]] * _MANY),
    "a mapping of numbers": json.dumps({f"{i}": 0.5 for i in range(_MANY)}),
    "a mapping of mappings": json.dumps({f"{i}": {} for i in range(_MANY)}),
    "a mapping of long mappings": json.dumps({"1": {f"{i}": [] for i in range(_MANY)}}),
    "a list of one long mapping": json.dumps([{f"{i}": [] for i in range(_MANY)}]),
}


def _told(model: type[Strict], found: object) -> str:
    """Why it is refused; nothing where all that it gives is a field that contains any plain data."""
    try:
        checked(model, found, what="it", error=ParticipantError)
    except ParticipantError as error:
        return str(error)
    return ""


def _least_seconds(run: Callable[[], object], most: float) -> float:
    """The least processor time of three runs, or of the first within `most`: what other processes do does not count."""
    least = math.inf
    for _ in range(3):
        began = time.process_time()
        run()
        least = min(least, time.process_time() - began)
        if least <= most:
            break
    return least


@pytest.mark.parametrize("kind", HOSTILE)
@bounded(seconds=60, megabytes=192)
def test_what_is_wrong_throughout_costs_no_more_than_ten_times_its_parsing(kind):
    limits: dict[str, Any] = {"most": 2**24, "what": "it", "error": ParticipantError}
    found = parse_json(HOSTILE[kind], **limits)
    most = 10 * _least_seconds(lambda: parse_json(HOSTILE[kind], **limits), 0.0) + 0.1
    for model in MODELS:
        for name in _fields(model):
            given = {name: found}
            assert _least_seconds(lambda model=model, given=given: _told(model, given), most) <= most, (model, name)
            assert len(_told(model, given)) < 2000, (model, name)
        assert _least_seconds(lambda model=model: _told(model, found), most) <= most, model
        assert _told(model, found)


def test_a_few_errors_are_told_by_name_and_thousands_by_their_count():
    with pytest.raises(ParticipantError, match="100,001 of its values are unknown, of another type or out of range"):
        checked(_Loose, {"both": {f"{i}": 1 for i in range(100_001)}}, what="it", error=ParticipantError)
    with pytest.raises(ParticipantError, match=r"`both\.0`: .* and 7 more"):
        checked(_Loose, {"both": {f"{i}": 1 for i in range(10)}}, what="it", error=ParticipantError)


def test_what_is_shown_of_a_nest_is_not_spelled_out_first():
    inner = {str(i): [0] for i in range(_MANY)}
    for nest, begins in ({"a": inner}, "{'a': "), ([inner], "["):
        most = _least_seconds(lambda nest=nest: repr(nest), 0.0) / 4 + 0.001
        assert _least_seconds(lambda nest=nest: shown(nest), most) <= most
        assert shown(nest).startswith(begins)
        assert len(shown(nest)) <= 81
    assert shown([[1, 2], {"a": [3]}]) == "[[1, 2], {'a': [3]}]"


# --- one rule for one thing -------------------------------------------------------------------------------------------


def _schema(model: type[Strict], field: str) -> Any:
    return model.model_json_schema()["properties"][field]


def test_a_hello_a_message_and_a_checkpoint_agree_on_what_they_share():
    assert _schema(tasks.HelloTask, "contract") == _schema(answers.Introduction, "contract")
    ids = [_schema(model, "federation") for model in (tasks.HelloTask, checkpoint_schema.About)]
    assert ids[0] == ids[1]
    for field in ("rank", "alpha"):
        ranges = [_schema(model, field)["anyOf"] for model in (answers.Introduction, checkpoint_schema.Declaration)]
        assert ranges[0] == ranges[1]
    declaration = {"examples": 1, "tokens": 1, "rank": 1, "alpha": 1.0, "options": None}
    assert _told(checkpoint_schema.Declaration, declaration) == ""
    for wrong in ({"rank": LARGEST_RANK + 1}, {"alpha": ALPHAS[0] / 2}, {"alpha": 2 * ALPHAS[1]}):
        assert "`" + next(iter(wrong)) + "`" in _told(checkpoint_schema.Declaration, declaration | wrong)


# --- values are looked at once ----------------------------------------------------------------------------------------


def test_values_of_a_kept_optimizer_are_looked_at_only_where_they_come_from_outside(monkeypatch):
    looked: list[int] = []
    monkeypatch.setattr(private_state, "all_finite", lambda tensor: looked.append(tensor.numel()) or True)
    config = TrainingConfig(optimizer="adam", keep_optimizer=True)
    weights = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = config.make_optimizer([weights])
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    kept = json.loads(json.dumps(optimizer.state_dict()["param_groups"]))
    state = {"state": optimizer.state_dict()["state"], "param_groups": kept}
    assert private_state.fits(state, config, [(3, 4)], values=False)
    assert not private_state.fits(state, config, [(4, 3)], values=False)
    assert not private_state.fits(state, config.replace(learning_rate=0.5), [(3, 4)], values=False)
    assert looked == []
    assert private_state.fits(state, config, [(3, 4)])
    assert sorted(looked) == [1, 12, 12]


def test_tensors_side_by_side_are_looked_at_in_one_pass(monkeypatch):
    passes: list[int] = []
    inner = torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda t, *a, **k: passes.append(t.numel()) or inner(t, *a, **k))
    data = serialization.pack({f"t{i}": torch.ones(5) for i in range(20)}, {})
    _, infos = serialization.inspect(data, max_bytes=len(data))
    global_state_cache._check_finite(tensors := serialization.values(data, infos))
    assert passes == [100]
    tensors["t7"][3] = float("nan")
    with pytest.raises(FederationError, match="t7 of the global state contains NaN"):
        global_state_cache._check_finite(tensors)
    global_state_cache._check_finite({"codes": torch.ones(3, dtype=torch.int8), "scales": torch.ones(2)})
