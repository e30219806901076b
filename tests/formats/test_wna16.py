"""wna16: decoding as the owners of its files do, its codes and zero points, groups in any order, what searches gain."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from lowbit.errors import FormatError, PartsError
from lowbit.formats import parse_spec
from lowbit.formats.parts import gather_rows
from lowbit.formats.wna16 import WNA16
from lowbit.numerics.bit_packing import pack_bits, unpack_bits
from lowbit.solvers import Statistics, solve, solver
from tests.support import assert_sqnr_within, gaussian, outlier_weight, sqnr
from tests.support.layers import Layer

BITS = range(2, 9)


def random_parts(fmt, n, k, dtype=torch.bfloat16, seed=0):
    """Parts as a file may hold them: any codes, zero points up to 2**bits, scales of both signs, any g_idx."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for rule in fmt.rules:
        shape = rule.shape({"N": n, "K": k})
        if rule.name == "scale":
            made["scale"] = torch.randn(shape, generator=generator).to(dtype)
        elif rule.name == "g_idx":
            made["g_idx"] = torch.randint(0, -(-k // fmt.group_size), shape, generator=generator, dtype=torch.int32)
        else:
            most = min(2**fmt.bits + 1, 256) if rule.name == "zero_point" else 256
            made[rule.name] = torch.randint(0, most, shape, generator=generator, dtype=torch.uint8)
    return made


def reference(fmt, parts, k):
    """(code - zero) * scale as float32, from one rounded product a weight."""
    codes = unpack_bits(parts["qdata"], fmt.bits, k).double()
    groups = torch.arange(k) // (fmt.group_size or k)
    groups = parts["g_idx"].long() if fmt.act_order else groups
    zero = parts["zero_point"].double()[:, groups] if fmt.zero_point else 2 ** (fmt.bits - 1)
    return ((codes - zero) * parts["scale"].double()[:, groups]).float()


any_format = st.builds(
    lambda bits, size, zero, order: WNA16(bits=bits, group_size=size, zero_point=zero, act_order=order and size > 0),
    st.sampled_from(BITS), st.sampled_from([0, 1, 3, 8, 32]), st.booleans(), st.booleans(),
)  # fmt: skip


@given(fmt=any_format, n=st.integers(0, 3), k=st.integers(1, 70), seed=st.integers(0, 2**31),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))  # fmt: skip
def test_decoding_is_exact(fmt, n, k, seed, dtype):
    """Whatever a file holds, each weight is (code - zero point) * scale, rounded once; rows picked by index too."""
    parts = random_parts(fmt, n, k, dtype, seed)
    fmt.check(parts, (n, k))

    found, wanted = fmt.dequantize(parts, (n, k), torch.float32), reference(fmt, parts, k)

    assert torch.equal(found, wanted)
    if n:
        rows = torch.tensor([n - 1, 0, n - 1])
        assert torch.equal(fmt.embedding(rows, parts, k, torch.float32), wanted[rows])
        assert torch.equal(fmt.dequantize(gather_rows(fmt.rules, parts, rows), (3, k), torch.float32), wanted[rows])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", ["group", "group with zeros", "channel", "channel with zeros"])
def test_decodes_like_compressed_tensors(bits, case):
    """The float32 weights of compressed-tensors' own functions, bit for bit, from its int32 words."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    args, dequantize = _compressed_tensors(bits, case)
    n, k, half = 6, 96, 2 ** (bits - 1)
    fmt = WNA16(bits=bits, group_size=32 if "group" in case else 0, zero_point="zeros" in case)
    parts = random_parts(fmt, n, k, torch.float32)
    parts["zero_point"] = parts.get("zero_point", torch.full((n, 3), half, dtype=torch.uint8)) & (2 * half - 1)
    signed_zero = (parts["zero_point"].to(torch.int16) - half).to(torch.int8)
    signed = (unpack_bits(parts["qdata"], bits, k).to(torch.int16) - half).to(torch.int8)
    words = helpers.pack_to_int32(signed, bits)

    wanted = dequantize(signed, parts["scale"], signed_zero if fmt.zero_point else None, args)

    assert torch.equal(words.view(torch.uint8), parts["qdata"])
    parts = {name: parts[name] for name in fmt.part_names}
    assert torch.equal(fmt.dequantize(parts, (n, k), torch.float32), wanted)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", ["group", "group with zeros"])
def test_codes_are_those_of_compressed_tensors(bits, case):
    """Under the scales and zero points that we choose, compressed-tensors chooses our codes."""
    pytest.importorskip("compressed_tensors")
    args, _ = _compressed_tensors(bits, case)
    from compressed_tensors.quantization.lifecycle.forward import quantize

    fmt, w, half = WNA16(bits=bits, group_size=32, zero_point="zeros" in case), outlier_weight(16, 96), 2 ** (bits - 1)
    parts = fmt.quantize(w)
    zero = (parts["zero_point"].to(torch.int16) - half).to(torch.int8) if fmt.zero_point else None

    codes = quantize(w, parts["scale"].float(), zero, args, dtype=torch.int8)

    assert torch.equal(codes.to(torch.int16) + half, unpack_bits(parts["qdata"], bits).to(torch.int16))


def _compressed_tensors(bits, case):
    """Its arguments for one of the cases above, and its dequantize."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    how = {"strategy": "group", "group_size": 32} if "group" in case else {"strategy": "channel"}
    return QuantizationArgs(num_bits=bits, symmetric="zeros" not in case, **how), dequantize


def test_the_golden_bytes():
    """Bytes 21 f0 with scale 0.5 are codes 1 2 0 15 less 8; with zero point 16, as GPTQ v1 files have, less 16."""
    qdata = torch.tensor([[0x21, 0xF0, 0, 0]], dtype=torch.uint8)
    scale, zero = torch.tensor([[0.5]]), torch.tensor([[16]], dtype=torch.uint8)

    plain = WNA16(group_size=4).dequantize({"qdata": qdata, "scale": scale}, (1, 4), torch.float32)
    shifted = WNA16(group_size=4, zero_point=True).dequantize(
        {"qdata": qdata, "scale": -scale, "zero_point": zero}, (1, 4), torch.float32
    )

    assert plain.tolist() == [[-3.5, -3.0, -4.0, 3.5]]
    assert shifted.tolist() == [[7.5, 7.0, 8.0, 0.5]]


@given(fmt=any_format, k=st.integers(1, 50), seed=st.integers(0, 2**31), stochastic=st.booleans())
def test_what_is_packed_is_what_was_rounded(fmt, k, seed, stochastic):
    """Packed and read back, a weight is what project makes of it; columns beyond K hold the code of zero."""
    w = gaussian(3, k, seed=seed % 1000)
    parts = fmt.quantize(w, seed=seed if stochastic else None)
    fmt.check(parts, (3, k))
    back = fmt.dequantize(parts, (3, k), torch.float32)
    codes = unpack_bits(parts["qdata"], fmt.bits)

    assert codes.shape[1] == -(-k // 8) * 8
    if not stochastic:
        assert torch.equal(back, fmt.project(w, parts))
    zero = parts["zero_point"][:, -1:] if fmt.zero_point else torch.tensor(2 ** (fmt.bits - 1), dtype=torch.uint8)
    assert torch.equal(codes[:, k:], zero.expand(3, codes.shape[1])[:, k:])


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_codes(bits):
    """From 4 bits on the codes are symmetric, by absmax; below they include the lowest one. Nothing is clipped."""
    w = torch.tensor([[-1.0, 0.4, 0.2, 0.9, -0.3, 0.0, 0.7, -0.8], [1.0, -0.4, -0.2, -0.9, 0.3, 0.0, -0.7, 0.8]])
    fmt, half = WNA16(bits=bits, group_size=8), 2 ** (bits - 1)

    params = fmt.fit(w, {})
    values = unpack_bits(pack_bits(fmt.encode(w, params), bits), bits).to(torch.int16) - half

    lowest = half - 1 if bits >= 4 else half
    torch.testing.assert_close(params["scale"], torch.tensor([[max(1 / lowest, 0.9 / (half - 1))], [1 / (half - 1)]]))
    assert int(values.min()) >= -lowest
    assert ((fmt.project(w, params) - w).abs() <= 0.50001 * params["scale"]).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_are_chosen_for_the_stored_scale(bits, dtype):
    """Every code is the nearest one under scale and zero point as stored: no other of the 2**bits is closer."""
    fmt, w = WNA16(bits=bits, group_size=32, zero_point=True), outlier_weight(8, 64, dtype=dtype)

    parts = fmt.quantize(w)
    levels = (torch.arange(2.0**bits) - parts["zero_point"].unsqueeze(-1)) * parts["scale"].float().unsqueeze(-1)
    nearest = (levels.unsqueeze(2) - w.float().view(8, 2, 32, 1)).abs().amin(-1)
    missed = (fmt.dequantize(parts, (8, 64), torch.float32) - w.float()).abs().view(8, 2, 32)

    assert parts["scale"].dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
    torch.testing.assert_close(missed, nearest, rtol=0, atol=1e-7)


def test_zero_is_a_value_of_every_group():
    """With zero points the range includes 0, however far the weights are from it, and zeros come back as zeros."""
    fmt, w = WNA16(group_size=32, zero_point=True), gaussian(4, 64)
    w[0] += 50
    w[1] -= 50
    w[:, ::7] = 0

    parts = fmt.quantize(w)

    assert not fmt.dequantize(parts, (4, 64), torch.float32)[:, ::7].any()
    assert parts["zero_point"][:2].tolist() == [[0, 0], [15, 15]]


@pytest.mark.parametrize("zero_point", [False, True])
def test_smallest_and_largest_weights(zero_point):
    """The least float16 weights keep a scale above zero, the largest of each dtype decode to finite values."""
    fmt = WNA16(bits=2, group_size=0, zero_point=zero_point)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        most = torch.finfo(dtype).max
        for w in (torch.tensor([[most, -most, 0, 1]], dtype=dtype), torch.full((1, 4), 6e-8, dtype=dtype)):
            parts = fmt.quantize(w)
            assert float(parts["scale"].min()) >= 1e-8
            assert fmt.dequantize(parts, (1, 4), torch.float32).isfinite().all()


@pytest.mark.parametrize("zero_point", [False, True])
def test_scattered_groups(zero_point):
    """Columns permuted with their g_idx are the same weight permuted, coded anew or as they were."""
    fmt, w = WNA16(group_size=32, zero_point=zero_point, act_order=True), outlier_weight(8, 96)
    parts = fmt.quantize(w)
    order = torch.randperm(96)
    moved = {**parts, "g_idx": parts["g_idx"][order], "qdata": pack_bits(unpack_bits(parts["qdata"], 4)[:, order], 4)}
    plain = WNA16(group_size=32, zero_point=zero_point)
    ordered = {name: part for name, part in parts.items() if name != "g_idx"}

    again = fmt.quantize(w[:, order], params=moved)
    whole = fmt.dequantize(parts, (8, 96), torch.float32)

    assert parts["g_idx"].tolist() == [k // 32 for k in range(96)]
    assert torch.equal(whole, plain.dequantize(ordered, (8, 96), torch.float32))
    assert torch.equal(fmt.dequantize(moved, (8, 96), torch.float32), whole[:, order])
    assert torch.equal(again["qdata"], moved["qdata"])


def test_scattered_groups_are_not_solved():
    """A search over groups whose columns are not neighbours is refused with what to do."""
    fmt, w = WNA16(group_size=8, act_order=True), gaussian(4, 32)
    params = {**fmt.fit(w, {}), "g_idx": torch.arange(32, dtype=torch.int32) % 4}

    with pytest.raises(FormatError, match=r"scattered by g_idx; .*Quantize the weight anew"):
        fmt.grid(w, params)
    with pytest.raises(FormatError, match="scattered by g_idx"):
        next(fmt.candidates(w, params))


@pytest.mark.parametrize("bad", [-1, 4])
def test_groups_that_do_not_exist_are_refused(bad):
    """A g_idx beyond the scales is an error that names the layer, not an index into other memory."""
    fmt = WNA16(group_size=8, act_order=True)
    parts = fmt.quantize(gaussian(4, 32))
    parts["g_idx"][5] = bad

    with pytest.raises(PartsError, match=rf"layer7: g_idx holds groups from .*{bad}.*, expected 0 to 3 for K = 32"):
        fmt.check(parts, (4, 32), "layer7")


@pytest.mark.parametrize(
    ("spec", "gauss", "outliers"),
    [("wna16", 19.45, 14.75), ("wna16(group_size=32)", 20.75, 17.77), ("wna16(group_size=0)", 18.91, 11.75),
     ("wna16(zero_point=true)", 20.41, 16.75), ("wna16(bits=2)", 8.31, 6.33),
     ("wna16(bits=2,group_size=32,zero_point=true)", 9.54, 8.57), ("wna16(bits=3)", 14.13, 10.4),
     ("wna16(bits=8)", 43.97, 38.34)],
)  # fmt: skip
def test_scale_search_sqnr(spec, gauss, outliers):
    """What the search of scales, which is the default, reaches: 0.2 dB more than rounding at 8 bits, 5.4 at 2."""
    fmt = parse_spec(spec)
    for make, expected in ((gaussian, gauss), (outlier_weight, outliers)):
        w = make(1024, 1024)
        found = fmt.dequantize(solver(fmt.data_free_solver)(w, fmt), (1024, 1024), torch.float32)
        assert_sqnr_within(w, found, expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_point", [False, True])
def test_solvers_see_the_right_grid(bits, zero_point):
    """gptq and descent lower the error at the output to half of that of rounding, with a ragged last group too."""
    fmt, layer = WNA16(bits=bits, group_size=32, zero_point=zero_point), Layer.make(64, 80)
    statistics = layer.exact()

    def error(name: str) -> float:
        parts = solve(layer.weight, fmt, name, statistics).parts
        missed = (fmt.dequantize(parts, (64, 80), torch.float32) - layer.weight).double() @ layer.root
        return float(missed.square().sum())

    rounded = error("rtn")
    assert error("rtn+gptq") < 0.6 * rounded
    assert error("rtn+descent") < 0.6 * rounded
    assert error("scale_search+gptq+descent") < 0.52 * rounded


def test_act_order_is_solved_like_the_format_without():
    """Solvers find the same codes and scales with a g_idx of neighbours as without one."""
    layer = Layer.make(32, 64)

    plain, ordered = (
        solve(layer.weight, parse_spec(f"wna16(group_size=16,act_order={order})"), "auto", layer.exact()).parts
        for order in ("false", "true")
    )

    assert ordered.keys() == plain.keys() | {"g_idx"}
    assert all(torch.equal(ordered[name], part) for name, part in plain.items())


def test_statistics_weigh_the_columns():
    """The search takes the scales with the least weighted error."""
    fmt, w = WNA16(bits=3), outlier_weight(64, 256)
    weights = torch.rand(256).square()
    plain, weighed = (solver("scale_search")(w, fmt, statistics) for statistics in (None, Statistics(hessian=weights)))
    errors = [(fmt.dequantize(p, (64, 256), torch.float32) - w).square() @ weights for p in (plain, weighed)]

    assert float(errors[1].sum()) < float(errors[0].sum())


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [("bits=1", "bits is 1, expected one of 2, 3"), ("bits=9", "bits is 9"), ("group_size=-1", "group_size is -1"),
     ("group_size=true", "group_size is True"), ("zero_point=1", "zero_point is 1, expected one of False, True"),
     ("group_size=0,act_order=true", "act_order goes with groups")],
)  # fmt: skip
def test_bad_specs_are_refused(fields, complaint):
    """A field with an impossible value is an error that shows it and what is possible."""
    with pytest.raises(FormatError, match=f"wna16: .*{complaint}|wna16: {complaint}"):
        parse_spec(f"wna16({fields})")


def test_scales_of_gptq_files_are_refused_unturned():
    """Scales laid out as [G, N], as GPTQ and AWQ files have them, are named."""
    fmt = WNA16(group_size=32)
    parts = fmt.quantize(gaussian(4, 64))

    with pytest.raises(PartsError, match=r"layer: scale has shape \[2, 4\], expected \[4, 2\]"):
        fmt.check({**parts, "scale": parts["scale"].t()}, (4, 64), "layer")


@pytest.mark.parametrize(("bits", "gain"), [(2, 25), (3, 20), (4, 20), (6, 15), (8, 5)])
def test_a_second_quantization_with_zero_points(bits, gain):
    """What was decoded is coded again with far less loss; least at 8 bits, where a 16-bit scale is half a code off."""
    fmt, w = WNA16(bits=bits, group_size=32, zero_point=True), gaussian(64, 256)

    once = fmt.dequantize(fmt.quantize(w), (64, 256), torch.float32)
    twice = fmt.dequantize(fmt.quantize(once), (64, 256), torch.float32)

    assert sqnr(once, twice) > sqnr(w, once) + gain
