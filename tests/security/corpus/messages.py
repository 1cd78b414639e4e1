"""Messages of a hub to a participant: honest ones, and what somebody else makes of them.

Builders, because a message names the base and the tensors of the model it is for.
"""

import json

import torch

from llmchain_fed.updates import serialization

BIG = 10**30
NINES = int("9" * 4000)

TRAINING = {"learning_rate": 5e-3, "batch_size": 4, "epochs": 1}


def hello(target, **changes):
    said = {"contract": target.contract(), "training": TRAINING, "federation": "0123456789abcdef"}
    return json.dumps(said | {"aggregation": "fedavg"} | changes).encode()


STATE = {"version": None, "against": None, "appended": {}}
OF_THE_STATE = {*STATE, "coded", "coded_names"}


def task(model, tensors=None, **header):
    """A task on the model's own state, a training unless its fields are another operation's."""
    head = {"round": 1, "base": model.fingerprint(), "seconds": 60.0}
    head |= {"state": STATE | {name: value for name, value in header.items() if name in OF_THE_STATE}}
    head |= {name: value for name, value in header.items() if name not in OF_THE_STATE}
    return serialization.pack(model.trainable_state() if tensors is None else tensors, head)


def evaluation(model, **header):
    return task(model, **({"samples": 0, "answer_tokens": 8} | header))


def raw(header_json, layout=None, body=b""):
    """Safetensors of any header text, and any layout."""
    text = json.dumps({"__metadata__": {"llmchain_fed": header_json}} | (layout or {})).encode()
    return len(text).to_bytes(8, "little") + text + body


# what each field of a training may not be; the field's name stands in the refusal
WRONG_FIELDS = {
    "round": [None, -1, 0, 1.5, "1", True, BIG, [1], {}],
    "base": [None, "another", 3, "x" * 10_000],
    "rounds": [-1, 0, 1.5, "3", True, BIG, [3]],
    "seconds": [-1, 0, "5", True, [5]],
    "trains": ["C", "", 1, ["A"], "ALL"],
    "shares": ["C", 0, ["B"], {"A": 1}],
    "codec": ["zip", "topk:", "topk:x", "topk:2", "int8:0", "int8:" + "9" * 5000, 8, ["int8"], "x" * 10_000],
    "feedback": [1, "yes", True],  # true without a codec leaves nothing out
    "version": [3, "x", "a/b/c", "a/-1/", "a/1/4x1.0", "a/" + "9" * 5000 + "/", "a/1/9x9x9", "\ud800/1/"],
    "against": ["start:", "start:zz", "a/1/", 7, ["a/1/"]],  # a version to change, without the version it becomes
    "coded": ["int8", "zip", 1],
    "coded_names": [{"1": "all"}, {"x": "all"}, [], {"1": []}],
    "appended": [{"nobody": 1}, {"x": -1}, {"x": BIG}, [1], {"x": True}],
    "ditto": [{"lam": -1}, {"lam": "a"}, {"lam": 0.1, "max_steps": 0}, {"lam": 0.1, "more": 1}, 3, []],
    "kind": ["update", "evaluate", 3],
    "more": [1],
    "": [1],
    "samples": [1],
    "personal": [{"steps": 1}],  # of other operations
    "curve": [[1]],
    "lr": [1e-3],
    "time_step": [True],
    "state": [None, [], "all", {"more": 1}, {"version": 3}],
}

COMBINATIONS = [
    {"round": 3, "rounds": 2},
    {"trains": "A", "shares": "B"},
    {"trains": "B", "shares": "A"},
    {"feedback": True, "codec": None},
    {"coded": "int8", "coded_names": {"1": "all"}, "version": "a/2/"},
    {"against": "a/1/"},
]

# what the fields of other operations may not be
WRONG_TASKS = {
    "evaluate": [
        {"samples": -1}, {"samples": "3"}, {"samples": True}, {"samples": BIG}, {"metrics": "f1"}, {"metrics": [""]},
        {"metrics": ["x" * 101]}, {"metrics": ["f1"] * 101}, {"metrics": [3]}, {"metrics": {"f1": 1}},
        {"labels": ["a"]}, {"labels": ["a", ""]}, {"labels": ["a"] * 1001}, {"labels": "ab"}, {"labels": [1, 2]},
        {"answer_tokens": 0}, {"answer_tokens": 1.5}, {"answer_tokens": BIG},
        {"side_by_side": True}, {"steps": [1]}, {"round": None},
        {"round": -3}, {"round": 0}, {"kind": "hello"}, {"personal": {"steps": 1}}, {"more": 1}, {"shares": "all"},
    ],
    "side_by_side": [{"samples": 2}, {"round": "1"}, {"base": 3}, {"more": 1}],
    "personalize": [
        {}, {"steps": 0}, {"steps": "2"}, {"steps": 2, "lr": -1}, {"steps": True}, {"steps": [2]}, {"steps": 2, "x": 1},
        {"steps": BIG}, {"steps": 2, "lr": "fast"}, {"steps": 1, "shares": "all"}, {"steps": 1, "codec": "int8"},
    ],
    "curve": [
        {}, {"steps": []}, {"steps": [-1]}, {"steps": ["1"]}, {"steps": [1.5]}, {"steps": 3}, {"steps": [2, 1]},
        {"steps": [1, 1]}, {"steps": [True]}, {"steps": {"1": 1}}, {"steps": [1], "lr": -1}, {"steps": [1], "lr": "x"},
        {"steps": [1], "codec": "int8"}, {"steps": list(range(10_002))}, {"steps": [BIG]},
    ],
    "time_step": [{"time_step": True}, {"steps": 1}, {"ditto": {"lam": 0.1}}, {"seconds": 0}],
}  # fmt: skip

WRONG_HELLOS = [
    {"training": {"optimizer": "torch.optim.SGD"}}, {"training": {"optimizer": {"class": "SGD"}}},
    {"training": {"optimizer": "lbfgs"}}, {"training": {"batch_size": "4"}}, {"training": {"batch_size": 0}},
    {"training": {"batch_size": 4.0}}, {"training": {"epochs": 1, "max_steps": 1}}, {"training": {"max_steps": BIG}},
    {"training": {"learning_rate": 0}}, {"training": {"learning_rate": "fast"}}, {"training": {"learning_rate": True}},
    {"training": {"seed": BIG}}, {"training": {"seed": "x"}}, {"training": {"callbacks": ["os.system"]}},
    {"training": {"lr_schedule": "polynomial"}}, {"training": {"lr_schedule": ["linear"]}},
    {"training": {"warmup": 1.0}}, {"training": {"warmup": -1}}, {"training": {"warmup": BIG}},
    {"training": {"warmup": True}}, {"training": {"warmup": "0.1"}}, {"training": {"lr_schedule_over": "epoch"}},
    {"training": {"gradient_checkpointing": 1}},
    {"training": {"precision": "fp8"}}, {"training": {"tolerance": 2}}, {"training": {"max_length": 1}},
    {"training": {"keep_optimizer": 1}}, {"training": []}, {"training": "adamw"}, {"training": None},
    {"federation": None}, {"federation": 3}, {"federation": ""}, {"federation": "x" * 65}, {"federation": "a b"},
    {"federation": "\x1b[2J"}, {"federation": "\ud800"}, {"federation": ["a"]}, {"aggregation": 3},
    {"aggregation": "x" * 101}, {"more": 1}, {"self": 1}, {"contract": None}, {"contract": 3}, {"contract": {}},
]  # fmt: skip


def wrong_tensors(model):
    """Name → tensors that are not exactly the state."""
    state = model.trainable_state()
    first = sorted(state)[0]
    spoilt = {n: t.clone() for n, t in state.items()}
    spoilt[first].view(-1)[0] = float("nan")
    infinite = {n: t.clone() for n, t in state.items()}
    infinite[first].view(-1)[-1] = float("inf")
    layer = next(n.removesuffix(".lora_A.weight") for n in state if n.endswith("lora_A.weight"))
    a, b = state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"]
    (rank, n), m = a.shape, b.shape[0]

    def remainder(of, ra, rb):
        return {f"{of}.remainder_A.weight": torch.zeros(ra), f"{of}.remainder_B.weight": torch.zeros(rb)}

    wide = rank + min(m, n) + 1
    return {
        "nothing": {},
        "one too few": {k: t for k, t in state.items() if k != first},
        "one too many": state | {"base.embed_tokens.weight": torch.zeros(2, 2)},
        "another shape": state | {first: state[first][:1].clone()},
        "transposed": state | {first: state[first].T.contiguous()},
        "another type": state | {first: state[first].double()},
        "integers": state | {first: state[first].to(torch.int32)},
        "NaN": spoilt,
        "infinity": infinite,
        "a remainder of nobody": state | remainder("nobody", (1, n), (m, 1)),
        "half a remainder": state | {f"{layer}.remainder_A.weight": torch.zeros(1, n)},
        "a remainder of two ranks": state | remainder(layer, (1, n), (m, 2)),
        "a remainder of no matrix": state | remainder(layer, (n,), (m,)),
        "a remainder that is too wide": state | remainder(layer, (wide, n), (m, wide)),
        "a remainder that is not finite": state
        | remainder(layer, (1, n), (m, 1))
        | {f"{layer}.remainder_B.weight": torch.full((m, 1), float("nan"))},
        "codes of nothing": state | {"coded/1/codes": torch.zeros(3, dtype=torch.int8)},
    }


RAW = {
    "empty": b"",
    "three bytes": b"abc",
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00",
    "a length of everything": b"\xff" * 16,
    "zeros": bytes(64),
    "a round of 4,300 nines": raw('{"round": ' + "9" * 4300 + "}"),
    "sizes of 4,300 digits": b"\x00",  # made below
    "no header of ours": raw("null"),
    "a list": raw("[1]"),
    "deep": raw("[" * 5000 + "]" * 5000),
    "NaN": raw('{"round": NaN}'),
    "twice": raw('{"round": 0, "round": 1}'),
    "UTF-16": raw('{"round": 0}').replace(b"round", "ro".encode("utf-16")),
    "many dimensions": raw("{}", {"x": {"dtype": "F32", "shape": [1] * 20_000, "data_offsets": [0, 4]}}, bytes(4)),
    "a name of the terminal's": raw(
        "{}", {"\x1b[2J": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)
    ),
    "half a surrogate": raw("{}", {"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "a type of nobody": raw("{}", {"x": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
    "behind the end": raw("{}", {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(4)),
}
_LONG = '{"__metadata__": {"llmchain_fed": "{}"}, "x": {"dtype": "U8", "shape": [%s], "data_offsets": [0, %s]}}'
_TEXT = (_LONG % ("9" * 4300, "9" * 4300)).encode()
RAW["sizes of 4,300 digits"] = len(_TEXT).to_bytes(8, "little") + _TEXT

WRONG_STATES = [
    {"progress": {}}, {"progress": {"x": {"next_step": 0, "optimizer": None}}}, {"progress": []}, {"progress": 3},
    {"progress": {"0": {"next_step": -1, "optimizer": None}}},
    {"progress": {"0": {"next_step": BIG, "optimizer": None}}},
    {"progress": {"0": {"next_step": 0}}}, {"progress": {"0": {"next_step": 0, "optimizer": {"values": {}}}}},
    {"progress": {"0": {"next_step": 0, "optimizer": {"values": {}, "param_groups": [{"lr": 100.0, "params": [0]}]}}}},
    {"progress": {"0": {"next_step": 0, "optimizer": {"values": {"x": {}}, "param_groups": []}}}},
    {"progress": {"9" * 4000: {"next_step": 0, "optimizer": None}}}, {"progress": {"0": None}},
    {"progress": {"-1": {"next_step": 0, "optimizer": None}}}, {"state": {}},
    {"new_pass": True}, {"new_pass": 1}, {"round": "1"}, {"round": -1}, {"round": 0}, {"round": True}, {"more": 1},
    {"kind": "task"},
]  # fmt: skip
WRONG_STATE_TENSORS = [
    "0/private/nobody", "0/ditto/nobody", "0/residual/", "0/personal", "0//x", "1/private/x", "x/private/x",
    "0/0/exp_avg", "0/" + "9" * 400 + "/exp_avg", "", "0/-1/step",
]  # fmt: skip
