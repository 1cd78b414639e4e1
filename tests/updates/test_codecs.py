"""Codecs against plain Python that quantises value by value, and against what the mathematics promises.

Belongs here: codecs, error feedback, and that parts pass through wire. Does not: what a round does with them.
"""

import itertools
import json
import math
import random
import time

import numpy as np
import pytest
import torch
from tiny import PAIRS

from llmchain_fed import FederatedAveraging
from llmchain_fed.errors import ConfigError, FederationError, UpdateRefusedError
from llmchain_fed.updates import serialization
from llmchain_fed.updates.codecs import CODECS, make_codec, spec
from llmchain_fed.updates.codecs.base import encoded_bytes
from llmchain_fed.updates.codecs.quantization import BF16, Int4, Int8
from llmchain_fed.updates.codecs.sparsification import TopK
from llmchain_fed.updates.serialization import TensorInfo, describe
from llmchain_fed.updates.transforms.error_feedback import encode_with_feedback

SHAPES = {"b.weight": (33, 17), "a": (256,), "scalar": (), "empty": (0, 4), "c": (3,), "big": (40, 64)}
ALL = [BF16(), Int8(), Int8(block=7), Int4(), Int4(block=5), Int4(block=1), TopK(), TopK(0.013), TopK(1)]
QUANTISING = [c for c in ALL if isinstance(c, Int8)]
STEPS = {"int8": 127, "int4": 7}


def delta(seed=0, shapes=SHAPES):
    """Tensors of very different size, as LoRA's A and B are."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) * 10.0 ** -(i % 4) for i, (n, s) in enumerate(shapes.items())}


def there_and_back(codec, tensors):
    return codec.decode(codec.encode(tensors), describe(tensors))


def blocks_of(tensor, block):
    values = tensor.reshape(-1).tolist()
    return [values[i : i + block] for i in range(0, len(values), block)]


# --- twins: value by value ------------------------------------------------------------------------------------------


def quantised_by_hand(tensors, block, levels):
    """Codes and largest magnitudes, in the order of names."""
    codes, scales = [], []
    for name in sorted(tensors):
        for values in blocks_of(tensors[name], block):
            scale = max(abs(v) for v in values)
            codes += [round(v / scale * levels) if scale else 0 for v in values]
            scales.append(scale)
    return codes, scales


def largest_by_hand(tensors, share):
    """Sorted by magnitude, the earlier first among equals."""
    indices, values = [], []
    for name in sorted(tensors):
        flat = tensors[name].reshape(-1).tolist()
        count = max(1, math.ceil(share * len(flat))) if flat else 0
        chosen = sorted(sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))[:count])
        indices += chosen
        values += [flat[i] for i in chosen]
    return indices, values


@pytest.mark.parametrize("codec", QUANTISING, ids=repr)
def test_quantising_is_what_plain_python_does(codec):
    tensors = delta()
    levels = STEPS[codec.name]
    codes, scales = quantised_by_hand(tensors, codec.block, levels)
    parts = codec.encode(tensors)
    assert parts["scales"].tolist() == scales
    if codec.name == "int4":
        codes += [0] * (len(codes) % 2)
        assert parts["codes"].tolist() == [a + 8 + 16 * (b + 8) for a, b in zip(codes[::2], codes[1::2], strict=True)]
    else:
        assert parts["codes"].tolist() == codes


@pytest.mark.parametrize("codec", [c for c in ALL if c.name == "topk"], ids=repr)
def test_the_largest_are_what_plain_python_finds(codec):
    tensors = delta() | {"ties": torch.tensor([1.0, -2.0, 2.0, 2.0, -1.0] * 9), "zeros": torch.zeros(70)}
    indices, values = largest_by_hand(tensors, codec.ratio)
    parts = codec.encode(tensors)
    assert (parts["indices"].tolist(), parts["values"].tolist()) == (indices, values)
    dense = codec.decode(parts, describe(tensors))
    assert sum(int((t != 0).sum()) for t in dense.values()) == sum(v != 0 for v in values)
    for name, tensor in dense.items():
        kept = tensor != 0
        assert torch.equal(tensor[kept], tensors[name][kept])


def test_bfloat16_is_the_upper_half_of_float32():
    """Rounding to nearest, ties to even, in the bits of numpy's float32."""
    tensors = delta()
    bits = np.concatenate([tensors[n].numpy().reshape(-1) for n in sorted(tensors)]).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    back = there_and_back(BF16(), tensors)
    assert np.array_equal(np.concatenate([back[n].numpy().reshape(-1) for n in sorted(tensors)]), rounded)


# --- what the mathematics promises ----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", QUANTISING, ids=repr)
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e-42, 3e37])
def test_no_value_is_off_by_more_than_half_a_step(codec, size):
    tensors = {n: t * size for n, t in delta().items()}
    back = there_and_back(codec, tensors)
    for name, tensor in tensors.items():
        for true, got in zip(blocks_of(tensor, codec.block), blocks_of(back[name], codec.block), strict=True):
            largest = max(abs(v) for v in true)
            half = (
                largest / STEPS[codec.name] / 2 + largest * 1e-6 + 1.5e-45
            )  # a float32 rounding; the smallest float32
            assert all(abs(a - b) <= half for a, b in zip(true, got, strict=True))
            assert [b for a, b in zip(true, got, strict=True) if abs(a) == largest] == [
                a for a in true if abs(a) == largest
            ]


@pytest.mark.parametrize("codec", ALL, ids=repr)
def test_zeros_are_exact(codec):
    tensors = {n: torch.zeros(s) for n, s in SHAPES.items()}
    back = there_and_back(codec, tensors)
    assert all(torch.equal(back[n], tensors[n]) for n in tensors)


@pytest.mark.parametrize("codec", QUANTISING, ids=repr)
def test_constant_blocks_are_exact(codec):
    """Also where 127·(c/127) is not c, as for one constant in a hundred, and where c/127 underflows."""
    generator = torch.Generator().manual_seed(3)
    constants = torch.cat(
        (
            1 + torch.rand(300, generator=generator),
            1.98 + torch.rand(300, generator=generator) / 50,
            torch.tensor([1e-45, 1e-40, 1.2e-38, 3.4028e38, torch.finfo(torch.float32).max]),
        )
    )
    step = STEPS[codec.name]
    assert bool(((constants / step) * step != constants).any())
    signs = torch.where(torch.arange(codec.block + 3) % 2 == 0, 1.0, -1.0)
    for tensors in (
        {f"{i:04}": c.expand(codec.block + 3).clone() for i, c in enumerate(constants)},
        {f"{i:04}": c * signs for i, c in enumerate(constants)},
    ):
        back = there_and_back(codec, tensors)
        assert all(torch.equal(back[n], tensors[n]) for n in tensors)


def test_blocks_do_not_cross_a_tensors_border():
    """A large tensor beside a small one: with a block of both the small one would be all zeros."""
    tensors = {"large": torch.full((10,), 1e4), "small": torch.tensor([1e-4, -1e-4, 0.0])}
    back = there_and_back(Int8(), tensors)
    assert all(torch.equal(back[n], tensors[n]) for n in tensors)


@pytest.mark.parametrize("codec", ALL, ids=repr)
def test_the_layout_is_known_before_a_value_is(codec):
    for shapes in (SHAPES, {"one": (1,)}, {"none": (0,)}, {}, {"odd": (3,), "row": (1, 7)}):
        tensors = delta(shapes=shapes)
        parts = codec.encode(tensors)
        assert describe(parts) == codec.layout(describe(tensors))
        back = codec.decode(parts, describe(tensors))
        assert describe(back) == {n: TensorInfo(torch.float32, tuple(s)) for n, s in shapes.items()}


@pytest.mark.parametrize("codec", ALL, ids=repr)
def test_types_of_the_weights_play_no_role(codec):
    tensors = {n: t.bfloat16() for n, t in delta().items()}
    parts = codec.encode(tensors)
    assert codec.layout(describe(tensors)) == codec.layout(describe(delta()))
    wide = codec.encode({n: t.double() for n, t in tensors.items()})
    assert all(torch.equal(parts[n], wide[n]) for n in parts)
    assert all(t.dtype == torch.float32 for t in codec.decode(parts, describe(tensors)).values())


@pytest.mark.parametrize("codec", ALL, ids=repr)
def test_the_order_of_names_does_not_matter_and_nothing_is_changed(codec):
    tensors = delta()
    kept = {n: t.clone() for n, t in tensors.items()}
    parts = codec.encode(tensors)
    names = list(tensors)
    for seed in range(4):
        random.Random(seed).shuffle(names)
        mixed = {n: tensors[n] for n in names}
        again = codec.encode(mixed)
        assert all(torch.equal(again[n], parts[n]) for n in parts)
        one, two = codec.decode(parts, describe(tensors)), codec.decode(again, describe(mixed))
        assert all(torch.equal(one[n], two[n]) for n in one)
    assert all(torch.equal(tensors[n], kept[n]) for n in tensors)
    for tensor in one.values():
        tensor.fill_(9e9)
    three = codec.decode(parts, describe(tensors))
    assert all(torch.equal(three[n], two[n]) for n in two)


def test_views_and_parameters_are_encoded_as_their_values():
    weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
    for codec in ALL:
        parts = codec.encode({"w": weight.T})
        plain = codec.encode({"w": weight.detach().T.contiguous()})
        assert all(torch.equal(parts[n], plain[n]) and not parts[n].requires_grad for n in parts)
        assert not any(t.requires_grad for t in encode_with_feedback(codec, {"w": weight}, None)[2].values())


@pytest.mark.parametrize("codec", ALL, ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_encoded(codec, bad):
    tensors = delta()
    tensors["c"][1] = bad
    with pytest.raises(FederationError, match=r"^c contains NaN or"):
        codec.encode(tensors)


def test_what_no_code_stands_for():
    with pytest.raises(FederationError, match=r"^c contains .*float32"):
        Int8().encode({"a": torch.ones(2), "c": torch.tensor([1e300], dtype=torch.float64)})
    with pytest.raises(FederationError, match=r"^c contains .*bfloat16"):
        BF16().encode({"a": torch.ones(2), "c": torch.tensor([0, torch.finfo(torch.float32).max])})
    with pytest.raises(FederationError, match=r"^c is torch\.int64; a delta is floating"):
        TopK().encode({"a": torch.ones(2), "c": torch.tensor([1])})
    with pytest.raises(FederationError, match=r"wide has 2,147,483,649 values, an int32 index reaches"):
        TopK().layout({"wide": TensorInfo(torch.float32, (2**31 + 1,))})


# --- bytes ----------------------------------------------------------------------------------------------------------


def lora_like():
    """Rank 16 over all linear layers of a 30-layer model with 576 features: 4.9 M values in 420 factors."""
    widths = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576)}
    widths |= {"gate": (576, 1536), "up": (576, 1536), "down": (1536, 576)}
    shapes = {}
    for layer, (name, (into, out)) in itertools.product(range(30), widths.items()):
        shapes[f"model.layers.{layer}.{name}_proj.lora_A.weight"] = (16, into)
        shapes[f"model.layers.{layer}.{name}_proj.lora_B.weight"] = (out, 16)
    return shapes


@pytest.mark.parametrize(
    ("codec", "most"), [(BF16(), 0.505), (Int8(), 0.26), (Int4(), 0.145), (TopK(), 0.205), (TopK(0.01), 0.0205)]
)
def test_bytes_are_what_the_formula_says_and_what_the_wire_carries(codec, most):
    shapes = lora_like()
    sizes = [math.prod(s) for s in shapes.values()]
    total = sum(sizes)
    assert 4_800_000 < total < 5_000_000
    formula = {
        "bf16": 2 * total,
        "int8": total + 4 * sum(math.ceil(n / 256) for n in sizes),
        "int4": total // 2 + 4 * sum(math.ceil(n / 64) for n in sizes),
        "topk": sum(8 * math.ceil(getattr(codec, "ratio", 0) * n) for n in sizes),
    }[codec.name]
    infos = {n: TensorInfo(torch.bfloat16, s) for n, s in shapes.items()}
    assert encoded_bytes(codec, infos) == formula
    tensors = delta(shapes=shapes)
    started = time.perf_counter()
    parts = codec.encode(tensors)
    assert time.perf_counter() - started < 2  # 0.01 to 0.2 s; value by value it would be a minute
    data = serialization.pack(parts, {"codec": codec.name})
    assert formula < len(data) < formula + 1024
    assert len(data) <= most * len(serialization.pack(tensors, {}))
    header, found = serialization.inspect(data, max_bytes=len(data))
    assert header == {"codec": codec.name}
    assert found == codec.layout(infos)
    back, direct = codec.decode(serialization.values(data, found), infos), codec.decode(parts, infos)
    assert all(torch.equal(back[n], direct[n]) for n in direct)


# --- refusals ---------------------------------------------------------------------------------------------------------


INFOS = {n: TensorInfo(torch.float32, s) for n, s in SHAPES.items()}
ENTRY = {  # the first value, block or index of each tensor, by hand: a, b.weight, big, c, (empty), scalar
    "values": {"a": 0, "b.weight": 256, "big": 256 + 561, "c": 256 + 561 + 2560, "scalar": 256 + 561 + 2560 + 3},
    "scales": {"a": 0, "b.weight": 1, "big": 4, "c": 14, "scalar": 15},
    "indices": {"a": 0, "b.weight": 26, "big": 83, "c": 339, "scalar": 340},
}


def refused(codec, parts, reason):
    with pytest.raises(UpdateRefusedError, match=reason) as caught:
        codec.decode(parts, INFOS)
    assert len(str(caught.value)) < 700


def changed(codec, part, at, value):
    parts = codec.encode(delta())
    parts[part][at] = value
    return parts


@pytest.mark.parametrize("codec", ALL, ids=repr)
def test_parts_of_another_layout(codec):
    good = codec.encode(delta())
    refused(codec, {}, f"{codec.name}, part .*found nothing")
    refused(codec, good | {"more": torch.ones(1)}, "part more: asked for was nothing")
    for name, part in good.items():
        refused(codec, {n: t for n, t in good.items() if n != name}, f"part {name}: .*found nothing")
        wrong = [part[:-1], torch.cat((part, part[:1])), part.double(), part[None], part[:0]]
        wrong.append(part.view(torch.uint8) if part.dtype != torch.uint8 else part.view(torch.int8))
        for other in wrong:
            refused(codec, good | {name: other}, f"part {name}: asked for was .*same options")
    for other in ALL:
        if other.layout(INFOS) != codec.layout(INFOS):
            refused(codec, other.encode(delta()), "asked for was")


@pytest.mark.parametrize("codec", [Int8(), Int4()], ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0, -1e-45])
@pytest.mark.parametrize("name", ["a", "b.weight", "c", "scalar"])
def test_scales_that_are_none(codec, bad, name):
    if codec == Int8():
        refused(codec, changed(codec, "scales", ENTRY["scales"][name], bad), f"^{name} has scales that are negative")
    else:
        refused(codec, changed(codec, "scales", 0, bad), "^a has scales that are negative")


@pytest.mark.parametrize("name", ENTRY["values"])
def test_codes_that_are_none(name):
    at = ENTRY["values"][name]
    refused(Int8(), changed(Int8(), "codes", at, -128), f"^{name} has a code beyond ±127")
    parts = Int4().encode(delta())
    byte, high = divmod(at, 2)
    parts["codes"][byte] &= 0x0F if high else 0xF0
    refused(Int4(), parts, f"^{name} has a code beyond ±7")


def test_codes_after_the_last_value():
    """The number of values is odd: the last byte has room for one more."""
    parts = Int4().encode(delta())
    assert int(parts["codes"][-1]) >> 4 == 8
    parts["codes"][-1] = 0x98
    refused(Int4(), parts, "go on after the last value")
    parts["codes"][-1] = 0x08
    refused(Int4(), parts, "go on after the last value")


@pytest.mark.parametrize("name", ENTRY["indices"])
def test_indices_that_are_none(name):
    at, size = ENTRY["indices"][name], math.prod(SHAPES[name])
    for bad in (-1, -(2**31), size, 2**31 - 1):
        refused(TopK(), changed(TopK(), "indices", at, bad), f"^{name} has indices outside of it")
    for bad in (math.nan, math.inf, -math.inf):
        refused(TopK(), changed(TopK(), "values", at, bad), f"^{name} contains NaN or infinite")


@pytest.mark.parametrize("name", ["a", "b.weight", "big"])
def test_indices_in_another_order_or_twice(name):
    at = ENTRY["indices"][name]
    parts = TopK().encode(delta())
    first, second = parts["indices"][at : at + 2].tolist()
    parts["indices"][at : at + 2] = torch.tensor([second, first])
    refused(TopK(), parts, f"^{name} has indices out of order or twice")
    parts["indices"][at : at + 2] = torch.tensor([second, second])
    refused(TopK(), parts, f"^{name} has indices out of order or twice")


@pytest.mark.parametrize("name", ["a", "big", "scalar"])
def test_bfloat16_values_that_are_none(name):
    for bad in (math.nan, math.inf):
        refused(BF16(), changed(BF16(), "values", ENTRY["values"][name], bad), f"^{name} contains NaN or infinite")


@pytest.mark.parametrize("codec", ALL, ids=repr)
def test_any_bytes_are_decoded_to_finite_values_or_refused(codec):
    """Random bytes of the right layout, and right parts with a few bytes changed."""
    rng = random.Random(7)
    good, outcomes = codec.encode(delta()), set()
    for trial in range(150):
        parts = {}
        for name, part in good.items():
            raw = bytearray(part.view(torch.uint8).numpy().tobytes())
            if trial % 3 == 0:
                raw = bytearray(rng.randbytes(len(raw)))
            else:
                for _ in range(rng.randrange(3)):
                    raw[rng.randrange(len(raw))] = rng.randrange(256)
            parts[name] = torch.frombuffer(raw, dtype=torch.uint8).view(part.dtype)
        try:
            back = codec.decode(parts, INFOS)
        except UpdateRefusedError:
            outcomes.add("refused")
            continue
        outcomes.add("decoded")
        assert describe(back) == INFOS
        assert all(bool(t.isfinite().all()) for t in back.values())
    assert outcomes == {"refused", "decoded"}


# --- error feedback ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [c for c in ALL if c.lossy_feedback], ids=repr)
def test_all_that_was_sent_plus_the_residual_is_all_there_was(codec):
    residual = {}
    sent = {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()}
    true = {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()}
    for number in range(30):
        tensors = delta(number)
        parts, _, residual = encode_with_feedback(codec, tensors, residual)
        got = codec.decode(parts, INFOS)
        for name in SHAPES:
            sent[name] += got[name]
            true[name] += tensors[name]
    for name in SHAPES:
        torch.testing.assert_close(sent[name] + residual[name], true[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("codec", [Int8(), Int4(), TopK(), TopK(0.01)], ids=repr)
def test_with_feedback_a_constant_delta_arrives_better(codec):
    """Thirty rounds of one delta: what rounding loses every time adds up unless it is fed back."""
    tensors = delta()
    residual, wanted = None, {n: 30 * t.double() for n, t in tensors.items()}
    fed, plain = ({n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()} for _ in range(2))
    for _ in range(30):
        _, decoded, residual = encode_with_feedback(codec, tensors, residual)
        without = there_and_back(codec, tensors)
        for name in SHAPES:
            fed[name] += decoded[name]
            plain[name] += without[name]

    def error(got):
        return math.hypot(*(float((got[n] - wanted[n]).norm()) for n in wanted))

    assert error(fed) < 0.8 * error(plain)


@pytest.mark.parametrize("codec", ALL, ids=repr)
def test_the_pure_form_changes_nothing_and_can_be_repeated(codec):
    """An interrupted round drops the new residual; the same round again gives the same."""
    tensors, residual = delta(1), delta(2)
    kept = {n: t.clone() for n, t in residual.items()}
    first, again = (encode_with_feedback(codec, tensors, residual) for _ in range(2))
    for one, two in zip(first, again, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[n], two[n]) for n in one)
    assert all(torch.equal(residual[n], kept[n]) for n in kept)
    parts, decoded, _ = first
    assert all(torch.equal(decoded[n], t) for n, t in codec.decode(parts, INFOS).items())
    together = codec.encode({n: tensors[n] + residual[n] for n in tensors})
    assert all(torch.equal(parts[n], together[n]) for n in parts)


def test_names_that_a_round_leaves_out_keep_their_residual():
    """A rule that trains half of the factors in each round."""
    residual = encode_with_feedback(TopK(), delta(), None)[2]
    _, decoded, after = encode_with_feedback(TopK(), {"a": delta(1)["a"]}, residual)
    assert decoded.keys() == {"a"}
    assert after.keys() == residual.keys()
    assert all(after[n] is residual[n] for n in residual if n != "a")
    torch.testing.assert_close(after["a"] + decoded["a"], delta(1)["a"] + residual["a"])


def test_a_codec_without_feedback_keeps_no_residual_but_sends_one():
    one = {"w": torch.tensor([1.001])}
    assert encode_with_feedback(BF16(), one)[2] == {}
    _, decoded, after = encode_with_feedback(BF16(), one, {"w": torch.tensor([1.0]), "x": torch.ones(1)})
    assert (float(decoded["w"]), list(after)) == (2.0, ["x"])


def test_a_residual_of_another_model_and_a_failed_encoding():
    with pytest.raises(FederationError, match=r"residual of w has shape \(1,\), the delta's \(2,\)"):
        encode_with_feedback(Int8(), {"w": torch.ones(2)}, {"w": torch.ones(1)})
    given = {"w": torch.tensor([0.5, 0.0])}
    with pytest.raises(FederationError, match=r"^w contains NaN"):
        encode_with_feedback(TopK(0.5), {"w": torch.tensor([1.0, math.nan])}, given)
    assert given["w"].tolist() == [0.5, 0.0]
    encode_with_feedback(TopK(0.5), {"w": torch.tensor([1.0, 2.0])}, given)
    assert given["w"].tolist() == [0.5, 0.0]


# --- by name ----------------------------------------------------------------------------------------------------------


def test_codecs_by_name():
    assert [make_codec(name) for name in CODECS] == [BF16(), Int8(block=256), Int4(block=64), TopK(ratio=0.1)]
    assert {name: make_codec(name).name for name in CODECS} == {n: n for n in ("bf16", "int8", "int4", "topk")}
    assert make_codec(None) is None
    assert make_codec("topk:0.01") == TopK(0.01)
    assert make_codec("topk:1e-3") == TopK(0.001)
    assert [make_codec("int8:64"), make_codec("int4:256")] == [Int8(block=64), Int4(block=256)]
    own = Int8(block=32)
    assert make_codec(own) is own
    assert repr(own) == "Int8(block=32)"
    assert Int8(block=64) != Int4(block=64)
    assert len({Int8(), Int8(block=256), Int4()}) == 2
    assert [c.lossy_feedback for c in (BF16(), Int8(), Int4(), TopK())] == [False, True, True, True]


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("zip", r"unknown codec 'zip'\. Valid: bf16, int8, int4, topk, topk:<ratio>"),
        ("", "unknown codec ''. Valid: bf16"),
        ("INT8", "unknown codec 'INT8'"),
        ("bf16:7", "unknown codec 'bf16:7'"),
        ("int8:", "'' is no number"),
        ("int8:1.5", "'1.5' is no number.*int8:<block>"),
        ("int4:0", "Int4: `block` .* 1 to 65,536, got 0"),
        ("topk:", "'' is no number"),
        ("topk:many", "'many' is no number"),
        ("topk:0", "above 0 up to 1, got 0.0"),
        ("topk:nan", "above 0 up to 1, got nan"),
        ("topk:1.5", "got 1.5"),
        (3, "3 is no object with name"),
        (Int8, "is no object with name"),
        (json, "is no object with name"),
    ],
)
def test_choices_that_are_no_codec(choice, reason):
    with pytest.raises(ConfigError, match=reason):
        make_codec(choice)


@pytest.mark.parametrize("codec", [Int8, Int4])
@pytest.mark.parametrize("block", [0, -1, 1.0, True, "64", None, 2**16 + 1])
def test_blocks_that_are_none(codec, block):
    with pytest.raises(ConfigError, match=rf"{codec.__name__}: `block` .* 1 to 65,536, got {block!r}"):
        codec(block=block)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, math.nan, math.inf, True, "0.1", None])
def test_ratios_that_are_none(share):
    with pytest.raises(ConfigError, match=rf"TopK: `ratio` .* got {share!r}"):
        TopK(share)


@pytest.mark.parametrize(
    ("codec", "text"),
    [
        (None, None),
        (BF16(), "bf16"),
        (Int8(), "int8"),
        (Int8(block=64), "int8:64"),
        (Int4(), "int4"),
        (Int4(block=256), "int4:256"),
        (TopK(), "topk:0.1"),
        (TopK(ratio=1 / 3), "topk:0.3333333333333333"),
    ],
)
def test_every_codec_of_these_has_a_text_that_makes_it_elsewhere(codec, text):
    assert spec(codec) == text
    assert make_codec(text) == codec


def test_a_federation_takes_these_with_other_settings(make_chain, tmp_path):
    shares = {"a": PAIRS[:5], "b": PAIRS[5:9]}
    chains = {}
    for how, choice in {"object": Int8(block=32), "name": "int8:32", "usual": "int8"}.items():
        chains[how] = make_chain()
        options = {"codec": choice, "broadcast_codec": choice, "checkpoint_dir": tmp_path / how}
        FederatedAveraging(chains[how], participants=shares, progress=False, **options).fit(2)
    weights = {how: chain.model.trainable_state() for how, chain in chains.items()}
    assert all(torch.equal(tensor, weights["name"][n]) for n, tensor in weights["object"].items())
    assert not all(torch.equal(tensor, weights["usual"][n]) for n, tensor in weights["object"].items())
    again = make_chain()
    FederatedAveraging.resume(tmp_path / "object", again, participants=shares, round=1, progress=False).fit(1)
    assert all(torch.equal(tensor, weights["object"][n]) for n, tensor in again.model.trainable_state().items())


def test_a_federation_takes_none_of_ones_own(make_chain):
    class Squared(Int8):
        name = "int8"

    class Named(Int8):
        name = "mine"

    for own in (Squared(), Named(block=32)):
        for option in ("codec", "broadcast_codec"):
            with pytest.raises(ConfigError, match=r"is code of your own.*Valid: bf16, int8, int4, topk"):
                FederatedAveraging(make_chain(), participants={"a": PAIRS}, progress=False, **{option: own})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("codec", [BF16(), Int8(), Int4(), TopK(0.3)], ids=repr)
def test_torchs_default_type_plays_no_role(codec, dtype):
    tensors = delta()
    wanted = there_and_back(codec, tensors)
    torch.set_default_dtype(dtype)
    try:
        found = there_and_back(codec, tensors)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, wanted[name]), name


def test_a_codec_of_ones_own():
    class Plain:
        name, lossy_feedback, needs_feedback = "plain", True, False

        def layout(self, infos):
            return dict(infos)

        def encode(self, tensors):
            return dict(tensors)

        def decode(self, parts, infos):
            return dict(parts)

    own = Plain()
    assert make_codec(own) is own
    assert encoded_bytes(own, INFOS) == 4 * sum(math.prod(s) for s in SHAPES.values())
    _, decoded, residual = encode_with_feedback(own, delta())
    assert all(torch.equal(decoded[n], t) for n, t in delta().items())
    assert all(float(t.abs().sum()) == 0 for t in residual.values())
