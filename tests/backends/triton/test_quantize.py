"""quantize on the Triton backend: the reference's bits, for every format that has an encoder."""

from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import explain, use_backend
from lowbit.errors import WeightError
from lowbit.formats import Format, parse_spec
from lowbit.formats.parts import Parts
from lowbit.ops.encode import encode
from tests.support.triton_linear import DEVICE, require

require()

SPECS = (
    "fp8_e4m3",
    "fp8_e4m3(granularity=row)",
    "fp8_e4m3(granularity=block,block_size=5x200)",
    "fp8_e5m2",
    "fp8_e5m2(granularity=row)",
    "fp8_e5m2(granularity=block)",
    "int8",
    "int8(granularity=tensor)",
    "int8(granularity=block,block_size=32x144)",
    "nvfp4",
    "nvfp4(global_scale_divides=True)",
    "nvfp4(row_global_scale=True)",
    "nvfp4(global_scale_divides=True,row_global_scale=True)",
    "mxfp8",
    "mxfp4",
    "awq_w4a16(group_size=16)",
    "awq_w4a16(group_size=48)",
    "awq_w4a16",
    "wna16",
    "wna16(group_size=32,zero_point=True)",
    "wna16(group_size=32,act_order=True)",
    "wna16(group_size=0)",
    "wna16(group_size=0,zero_point=True)",
    "wna16(bits=8,group_size=16,zero_point=True)",
    "wna16(bits=8,group_size=0)",
)
STOCHASTIC = tuple(spec for spec in SPECS if parse_spec(spec).stochastic)
DTYPES = (torch.float16, torch.float32, torch.bfloat16)
SHAPES = ((1, 1), (3, 1056), (15, 36), (2, 2304))
KINDS = ("usual", "tiny", "ties", "huge", "zeros")


def weight(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Random weights whose rows differ in size: of every size, on the ties of many grids, with groups of zeros."""
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    w = torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape[0], 1, generator=generator))
    if kind == "tiny":
        w *= 1e-6
    if kind == "ties":
        w = (4 * w).round() / 4
        w[0] = -0.0
    if kind == "huge":
        w = w.clamp(-1e4, 1e4) * (3e33 if dtype != torch.float16 else 1)
    if kind == "zeros":
        w[:, 16:] = -0.0
        w[:, ::3] = 0
    return w.to(dtype)


def fitting(fmt: Format) -> list[tuple[int, int]]:
    """The shapes that a format can store."""
    return [shape for shape in SHAPES if fmt.check_shape(*shape) is None]


def differing(found: Parts, wanted: Parts) -> list[str]:
    """The names of parts that are not the same in shape, dtype and every bit."""
    assert set(found) == set(wanted)
    alike = {
        name: found[name].dtype == part.dtype
        and found[name].shape == part.shape
        and torch.equal(*(x.cpu().contiguous().view(-1).view(torch.uint8) for x in (found[name], part)))
        for name, part in wanted.items()
    }
    return [name for name, same in alike.items() if not same]


def encoded(w: torch.Tensor, fmt: Format, seed: int | None = None, where: str = "weight") -> Parts:
    """The parts as the Triton backend makes them."""
    with use_backend("triton"):
        return encode(w.to(DEVICE), fmt, seed=seed, where=where)


@pytest.mark.parametrize("spec", SPECS)
def test_bits(spec):
    """Codes and scales are the reference's, bit for bit, for weights of every kind and dtype and for ragged shapes."""
    fmt = parse_spec(spec)
    for number, kind in enumerate(KINDS):
        shape = fitting(fmt)[number % len(fitting(fmt))]
        w = weight(kind, shape, DTYPES[number % len(DTYPES)])
        assert not differing(encoded(w, fmt), fmt.quantize(w)), (kind, shape, w.dtype)


@pytest.mark.parametrize("rows", [17, 35])
@pytest.mark.parametrize("spec", ["int8(granularity=block,block_size=32x144)", "nvfp4", "mxfp4", "awq_w4a16", "wna16"])
def test_rows(spec, rows):
    """Rows that do not fill the last tile get the reference's codes, and no other row is written."""
    fmt, w = parse_spec(spec), weight("usual", (rows, 128), torch.float16)
    assert not differing(encoded(w, fmt), fmt.quantize(w))


@pytest.mark.parametrize("spec", STOCHASTIC)
def test_stochastic(spec):
    """With a seed the noise is the reference's, so the codes are, too; another seed gives others."""
    fmt = parse_spec(spec)
    w = weight("usual", fitting(fmt)[-1], torch.float32)
    found = encoded(w, fmt, seed=7)
    assert not differing(found, fmt.quantize(w, seed=7))
    assert "qdata" in differing(encoded(w, fmt, seed=8), found)


def test_stochastic_pieces():
    """The noise is drawn in the reference's pieces of rows, also of a weight that has several."""
    fmt, w = parse_spec("int8(granularity=tensor)"), weight("usual", (35, 8192), torch.float32)
    assert len(list(fmt.row_ranges(*w.shape))) > 1
    assert not differing(encoded(w, fmt, seed=3), fmt.quantize(w, seed=3))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, where a GPU is silent
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("spec", SPECS)
def test_not_finite(spec, value):
    """NaN and infinity anywhere in a weight are the reference's error, which names the layer."""
    fmt = parse_spec(spec)
    shape = fitting(fmt)[min(1, len(fitting(fmt)) - 1)]
    w = weight("usual", shape, torch.float32)
    w[shape[0] - 1, shape[1] - 1] = value
    with pytest.raises(WeightError, match=r"^blocks\.3: holds NaN or infinity"):
        encoded(w, fmt, where="blocks.3")


@pytest.mark.parametrize("spec", ["fp8_e4m3", "int8", "nvfp4", "mxfp8", "awq_w4a16", "wna16"])
def test_gaps(spec):
    """Gaps between rows and columns change no bit."""
    fmt, wide = parse_spec(spec), weight("usual", (4, 768), torch.float16)
    for w in (wide[:, :384], wide[:, ::2]):
        with use_backend("triton"):
            found = encode(wide.to(DEVICE)[:, :384] if w.stride(1) == 1 else wide.to(DEVICE)[:, ::2], fmt)
        assert not differing(found, fmt.quantize(w.contiguous()))


@pytest.mark.parametrize(
    ("spec", "dtype", "seed", "reason"),
    [
        ("int8(rotation=16)", torch.bfloat16, None, "rotated"),
        ("nvfp4", torch.float64, None, "float64"),
        ("awq_w4a16(group_size=8)", torch.bfloat16, None, "multiples of 16"),
        ("wna16(bits=3)", torch.bfloat16, None, "3 bits"),
    ],
)
def test_refusals(spec, dtype, seed, reason):
    """What no encoder takes is refused in words."""
    fmt, w = parse_spec(spec), torch.ones(4, 256, dtype=dtype, device=DEVICE)
    said = explain("quantize", fmt.name, "", DEVICE.type, (fmt, w, seed, "weight"))
    assert any(name.startswith("triton:") and reason in why for name, why in said.items()), said


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SPECS)
def test_large(spec, kind):
    """A weight as large as those of real layers gets the reference's bits, stochastically too."""
    fmt, w = parse_spec(spec), weight(kind, (1000, 6144), torch.bfloat16)
    assert not differing(encoded(w, fmt), fmt.quantize(w))
    if fmt.stochastic:
        assert not differing(encoded(w, fmt, seed=1), fmt.quantize(w, seed=1))


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["int8", "nvfp4(row_global_scale=True)", "mxfp8", "mxfp4", "wna16"])
def test_beyond_two_to_the_31(spec):
    """The last rows of a weight of more than 2**31 values are encoded and stored where they belong."""
    fmt = parse_spec(spec)
    w = torch.zeros((66000, 32768), dtype=torch.bfloat16, device=DEVICE)
    w[-64:] = weight("usual", (64, 32768), torch.bfloat16).to(DEVICE)
    found = encoded(w, fmt)
    assert not differing({name: part[-64:] for name, part in found.items()}, fmt.quantize(w[-64:].cpu()))
    assert not bool(found["scale"][:-64].float().isnan().any())
