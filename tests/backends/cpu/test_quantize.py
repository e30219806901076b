"""quantize, scale_search and row_errors on the CPU backend: the reference's bits, and no larger an error."""

from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import explain, select, use_backend
from lowbit.errors import WeightError
from lowbit.formats import Format, parse_spec
from lowbit.formats.parts import Parts
from lowbit.numerics.rotations import regular_hadamard
from lowbit.ops.encode import encode, encode_searched, row_errors

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)

SPECS = (
    "fp8_e4m3",
    "fp8_e4m3(granularity=row)",
    "fp8_e4m3(granularity=block,block_size=5x24)",
    "fp8_e5m2",
    "fp8_e5m2(granularity=row)",
    "fp8_e5m2(granularity=block)",
    "int8",
    "int8(granularity=tensor)",
    "int8(granularity=block,block_size=32x16)",
    "nvfp4",
    "nvfp4(global_scale_divides=True)",
    "nvfp4(row_global_scale=True)",
    "nvfp4(global_scale_divides=True,row_global_scale=True)",
    "mxfp8",
    "mxfp4",
    "awq_w4a16(group_size=16)",
    "awq_w4a16",
    "wna16",
    "wna16(group_size=32,zero_point=True)",
    "wna16(group_size=0)",
    "wna16(group_size=0,zero_point=True)",
    "wna16(bits=8,group_size=16,zero_point=True)",
    "wna16(bits=8,group_size=0)",
    "convrot_w4a4(rotation=0)",
)
ROTATED = (
    "int8(rotation=16)",
    "int8(rotation=64)",
    "int8(rotation=256)",
    "int8(rotation=1024)",
    "convrot_w4a4(rotation=16)",
    "convrot_w4a4",
    "convrot_w4a4(rotation=1024)",
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1, 1), (37, 36), (5, 200), (3, 1056), (33, 384))
ROTATED_SHAPES = ((1, 1024), (19, 3072))
KINDS = ("usual", "tiny", "ties", "huge", "spread")


def weight(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Random weights: of every size, on the ties of all grids, with rows, groups and single values of zeros."""
    generator = torch.Generator().manual_seed(shape[0] * shape[1])
    w = torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape[0], 1, generator=generator))
    if kind == "tiny":
        w *= 1e-6
    if kind == "ties":
        w = (4 * w).round() / 4
        w[0] = 0
    if kind == "huge":
        w = w.clamp(-1e4, 1e4) * (3e33 if dtype != torch.float16 else 1)
    if kind == "spread":
        w = (w * torch.exp(4 * torch.randn(shape, generator=generator))).clamp(-6e4, 6e4)
        w[:, ::3] = -0.0
    return w.to(dtype)


def fitting(fmt: Format) -> list[tuple[int, int]]:
    """The shapes that a format can store."""
    shapes = ROTATED_SHAPES if getattr(fmt, "rotation", 0) else SHAPES
    return [shape for shape in shapes if fmt.check_shape(*shape) is None]


def differing(found: Parts, wanted: Parts) -> list[str]:
    """The names of parts that are not the same in shape, dtype and every bit."""
    assert set(found) == set(wanted)
    alike = {
        name: found[name].dtype == part.dtype
        and found[name].shape == part.shape
        and torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (found[name], part)))
        for name, part in wanted.items()
    }
    return [name for name, same in alike.items() if not same]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SPECS)
def test_bits(spec, kind):
    """Codes and scales are those of the reference, bit for bit, for every dtype and for ragged shapes."""
    fmt = parse_spec(spec)
    for shape in fitting(fmt):
        for dtype in DTYPES:
            w = weight(kind, shape, dtype)
            with use_backend("cpu"):
                found = encode(w, fmt)
            assert not differing(found, fmt.quantize(w)), (shape, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", ROTATED)
def test_codes_of_a_rotated_weight_are_those_of_the_exact_rotation(spec, kind):
    """They are those of a rotation in float64, except where that lies within float32's error of a tie; and eager's."""
    fmt = parse_spec(spec)
    size, most = fmt.rotation, 127 if fmt.name == "int8" else 7
    for n, k in ROTATED_SHAPES:
        for dtype in DTYPES:
            w = weight(kind, (n, k), dtype)
            with use_backend("cpu"):
                found = encode(w, fmt)
            wanted = fmt.quantize(w)
            rotated = (w.double().view(-1, size) @ regular_hadamard(size).double()).view(n, k)
            scale, codes = found["scale"].double().view(n, 1), fmt.unpack(found["qdata"], k)
            torch.testing.assert_close(
                scale, (rotated.abs().amax(dim=1, keepdim=True) / most).clamp_min(1e-8), rtol=2e-6, atol=0
            )
            assert ((rotated / scale).clamp(-most, most) - codes).abs().max() <= 0.5 + 2e-4
            torch.testing.assert_close(found["scale"], wanted["scale"], rtol=2e-6, atol=0)
            differ = (codes.int() - fmt.unpack(wanted["qdata"], k).int()).abs()
            assert differ.max() <= 1
            assert differ.sum() <= 1 + differ.numel() // 10000
            entry = select("quantize", fmt.name, "", "cpu", (fmt, w, None, "weight"))
            values = [fmt.dequantize(parts, (n, k), torch.float32) for parts in (found, wanted)]
            assert (values[0] - values[1]).double().norm() <= entry.tolerance * values[1].double().norm()


@pytest.mark.parametrize("spec", ["int8(rotation=16)", "convrot_w4a4(rotation=16)"])
def test_a_rotation_that_overflows_float32_is_an_error(spec):
    """Rotated values beyond float32 raise, with the layer's name, instead of giving NaN codes."""
    w = 3e38 * regular_hadamard(16)[:2].sign().repeat(1, 4)  # rotated, a group has one value, four times as large
    for make in (encode, encode_searched):
        with use_backend("cpu"), pytest.raises(WeightError, match=r"^blocks\.3: its rotated values exceed float32"):
            make(w, parse_spec(spec), where="blocks.3")


@pytest.mark.parametrize("spec", [*SPECS, *ROTATED])
def test_search(spec):
    """The search finds an error that is no larger than the reference's, whether columns weigh the same or not.

    What float32 leaves open of a rotated value is some 1e-4 of an int8 step, and errors that differ by less are equal.
    """
    fmt = parse_spec(spec)
    equal = 5e-5 if spec in ROTATED else 1e-6
    for shape in fitting(fmt):
        weights = torch.rand(shape[1], generator=torch.Generator().manual_seed(1))
        weights[::5] = 0
        for kind in KINDS:
            w = weight(kind, shape, DTYPES[len(kind) % 3])
            for columns in (None, weights):
                losses = []
                for backend in ("cpu", "eager"):
                    with use_backend(backend):
                        parts = encode_searched(w, fmt, columns)
                    error = fmt.dequantize(parts, shape, torch.float32).double() - w.double()
                    losses.append(float((error.square() if columns is None else error.square() * columns).sum()))
                assert losses[0] <= losses[1] * (1 + equal), (shape, kind, columns is None)


@pytest.mark.parametrize(
    "spec",
    [
        spec
        for spec in (*SPECS, "int8(rotation=256)", "convrot_w4a4")
        if spec != "wna16(bits=8,group_size=16,zero_point=True)"
    ],
)
def test_search_makes_the_same_choice(spec):
    """On Gaussian weights the search chooses what the reference chooses, ties in less than one unit of a hundred."""
    fmt = parse_spec(spec)
    w = torch.randn(32, 768, generator=torch.Generator().manual_seed(2)).mul_(0.02).bfloat16()
    with use_backend("cpu"):
        found = encode_searched(w, fmt)
    with use_backend("eager"):
        wanted = encode_searched(w, fmt)
    scales = found["scale"].float(), wanted["scale"].float()
    assert (scales[0] != scales[1]).float().mean() < 0.01


@pytest.mark.parametrize("spec", SPECS)
def test_row_errors(spec):
    """The sums over rows are those of the reference but for the order of additions."""
    fmt = parse_spec(spec)
    for shape in fitting(fmt):
        for dtype in DTYPES:
            w = weight("usual", shape, dtype)
            parts = fmt.quantize(w)
            with use_backend("eager"):
                wanted = row_errors(fmt, parts, w)
            with use_backend("cpu"):
                found = row_errors(fmt, parts, w)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spec", [*SPECS, *ROTATED])
def test_not_finite(spec, value):
    """NaN and infinity anywhere in a weight are the reference's error, which names the layer."""
    fmt, shape = parse_spec(spec), fitting(parse_spec(spec))[-1]
    for dtype in DTYPES:
        for place in ((0, 0), (shape[0] - 1, shape[1] - 1)):
            w = weight("usual", shape, dtype)
            w[place] = value
            for make in (encode, encode_searched):
                with use_backend("cpu"), pytest.raises(WeightError, match=r"^blocks\.3: holds NaN or infinity"):
                    make(w, fmt, where="blocks.3")


@pytest.mark.parametrize("spec", ["convrot_w4a4(rotation=0)", *ROTATED])
def test_threads_of_rotated_rows(spec):
    """The number of threads and gaps between rows change no bit of a rotated weight, either."""
    fmt = parse_spec(spec)
    w, columns, before = (
        weight("usual", (70, 2048), torch.bfloat16)[:, :1024],
        torch.rand(1024),
        torch.get_num_threads(),
    )
    made = []
    with use_backend("cpu"):
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                made.append(encode_searched(w if threads == 1 else w.contiguous(), fmt, columns))
        finally:
            torch.set_num_threads(before)
    assert not differing(*made)


@pytest.mark.parametrize("spec", SPECS)
def test_threads(spec):
    """The number of threads and gaps between rows change no bit."""
    fmt = parse_spec(spec)
    wide = weight("usual", (200, 768), torch.bfloat16)
    w, before = wide[:, :384], torch.get_num_threads()
    with use_backend("cpu"):
        try:
            torch.set_num_threads(1)
            one, one_sums = encode_searched(w, fmt), row_errors(fmt, fmt.quantize(w), w)
            torch.set_num_threads(2)
            two, two_sums = encode_searched(w.contiguous(), fmt), row_errors(fmt, fmt.quantize(w), w.contiguous())
        finally:
            torch.set_num_threads(before)
    assert not differing(one, two)
    assert torch.equal(one_sums, two_sums)


@pytest.mark.parametrize(
    ("spec", "dtype", "seed", "reason"),
    [
        ("fp8_e4m3", torch.bfloat16, 1, "stochastic"),
        ("convrot_w4a4", torch.bfloat16, 1, "stochastic"),
        ("nvfp4", torch.bfloat16, 1, "stochastic"),
        ("mxfp4", torch.bfloat16, 1, "stochastic"),
        ("nvfp4", torch.float64, None, "float64"),
        ("awq_w4a16(group_size=8)", torch.bfloat16, None, "multiples of 16"),
        ("wna16(bits=3)", torch.bfloat16, None, "3 bits"),
    ],
)
def test_refusals(spec, dtype, seed, reason):
    """What no kernel takes is refused in words, and eager encodes it."""
    fmt, w = parse_spec(spec), torch.ones(4, 256, dtype=dtype)
    said = explain("quantize", fmt.name, "", "cpu", (fmt, w, seed, "weight"))
    assert any(name.startswith("cpu:") and reason in why for name, why in said.items()), said
    assert not differing(encode(w, fmt, seed=seed), fmt.quantize(w, seed=seed))
