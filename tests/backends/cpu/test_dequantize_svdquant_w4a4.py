"""dequantize for svdquant_w4a4 on the CPU backend: the effective weight of the reference, in every arrangement."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowbit.dispatch import explain, select, use_backend
from lowbit.formats import Parts, parse_spec
from lowbit.layouts.svdquant_tiles import NAME as TILES
from lowbit.ops.encode import decode_rows, row_errors
from lowbit.solvers.activations import activation_loss
from lowbit.solvers.curvature import output_loss
from lowbit.tensor import QuantizedTensor
from tests.support.cpu_linear import DTYPES
from tests.support.cpu_rows import decoded, same_bits

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)

# Rows that fill no tile, no task and no block of 16, ranks that fill no vector, and more columns than a task decodes.
SHAPES = [(1, 64, 1), (3, 64, 3), (5, 128, 5), (7, 192, 4), (35, 64, 16), (49, 320, 17), (101, 192, 32), (64, 1024, 33),
          (128, 64, 64)]  # fmt: skip
TOLERANCE = {torch.float32: 3e-7, torch.bfloat16: 1e-4, torch.float16: 3e-5}  # relative RMS: see the kernel's own


def parts_of(n: int, k: int, rank: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Parts:
    """Parts with every code, scales of both signs and a channel that is switched off."""
    generator = torch.Generator().manual_seed(n * k + rank + seed)
    smooth = torch.rand(k, generator=generator).add(0.25)
    smooth[k // 3] = 0
    return {
        "qdata": torch.randint(-128, 128, (n, k // 2), generator=generator).to(torch.int8),
        "scale": torch.randn(k // 64, n, generator=generator).mul(0.02).to(dtype),
        "smooth_factor": smooth.to(dtype),
        "proj_down": torch.randn(k, rank, generator=generator).mul(0.3).to(dtype),
        "proj_up": torch.randn(n, rank, generator=generator).mul(0.3).to(dtype),
    }


def weight(parts: Parts, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    """A weight of these parts."""
    n, (k, rank) = parts["proj_up"].shape[0], parts["proj_down"].shape
    return QuantizedTensor.from_parts(parts, f"svdquant_w4a4(rank={rank})", (n, k), dtype)


def exact(parts: Parts) -> torch.Tensor:
    """The effective weight in float64, from the definition."""
    codes = parse_spec("svdquant_w4a4").unpack(parts["qdata"], parts["qdata"].shape[1] * 2).double()
    scale = parts["scale"].double().t().repeat_interleave(64, dim=1)
    smooth = parts["smooth_factor"].double()
    residual = codes * scale / smooth.masked_fill(smooth == 0, torch.inf)
    return residual + parts["proj_up"].double() @ parts["proj_down"].double().t()


def off_by(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The RMS error relative to what is wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_those_of_the_reference(shape, stored):
    """Factors of each dtype, into each dtype, from plain parts and rows16: within float32's rounding of the exact."""
    parts = parts_of(*shape, stored)
    for dtype in DTYPES:
        one = weight(parts, dtype)
        found = decoded(one, dtype, "cpu")
        assert found.dtype == dtype
        assert found.shape == shape[:2]
        assert off_by(found, decoded(one, dtype, "eager")) <= TOLERANCE[dtype]
        assert same_bits(decoded(one.in_layout("rows16"), dtype, "cpu"), found)
    assert off_by(decoded(one, torch.float32, "cpu"), exact(parts)) < 3e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_decode_to_the_same_bits(dtype):
    """comfy-kitchen's arrangement of a weight gives what its plain parts give."""
    one = weight(parts_of(256, 192, 32, torch.bfloat16), dtype)
    assert same_bits(decoded(one.in_layout(TILES), dtype, "cpu"), decoded(one, dtype, "cpu"))


def test_every_code_alone():
    """Without a low rank, of all 16 codes and scales that are powers of two every value is exact."""
    parts = parts_of(16, 256, 2)
    parts["qdata"] = torch.arange(-128, 128).view(2, 128).to(torch.int8).repeat(8, 1)
    parts["scale"].fill_(0.5)[0] = -4.0
    parts["smooth_factor"].fill_(2.0)
    parts["proj_up"].zero_()
    assert torch.equal(decoded(weight(parts), torch.float32, "cpu").double(), exact(parts))


@pytest.mark.parametrize("factor", [2.0**-130, 2.0**-100, 2.0**100, 2.0**127])
def test_smoothing_factors_whose_inverse_is_not_exact(factor):
    """Where 1 / smooth is infinite or subnormal the kernel divides, as the reference does."""
    parts = parts_of(9, 128, 4)
    parts["smooth_factor"].fill_(1.0)[5] = factor
    parts["smooth_factor"][70] = 0
    parts["scale"].mul_(min(factor, 1.0))  # or its column would be infinite
    parts["proj_up"].zero_()
    found, wanted = (decoded(weight(parts), torch.float32, backend) for backend in ("cpu", "eager"))
    assert wanted[:, 5].abs().amax() > 0
    torch.testing.assert_close(found, wanted, rtol=3e-7, atol=0)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["scale", "smooth_factor", "proj_down", "proj_up"])
def test_infinities_and_nan(name, value):
    """They come out where they come out of the reference, and as the same."""
    parts = parts_of(9, 192, 4)
    parts[name].view(-1)[3] = value
    found, wanted = (decoded(weight(parts), torch.float32, backend) for backend in ("cpu", "eager"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_gaps_and_slices():
    """Parts with gaps decode to the same bits; a slice of rows to those rows of the whole."""
    parts = parts_of(70, 192, 17, torch.bfloat16)
    whole = decoded(weight(parts), torch.float32, "cpu")
    spread = {name: torch.stack([part, part], -1)[..., 0] for name, part in parts.items()}
    assert same_bits(decoded(weight(spread), torch.float32, "cpu"), whole)
    turned = {**parts, "scale": parts["scale"].t().contiguous().t()}
    assert same_bits(decoded(weight(turned), torch.float32, "cpu"), whole)
    for start, stop in ((0, 70), (9, 30), (69, 70), (48, 55)):
        assert same_bits(decoded(weight(parts)[start:stop], torch.float32, "cpu"), whole[start:stop])
        with use_backend("cpu"):
            found = decode_rows(weight(parts).format, parts, 192, start, stop)
        assert same_bits(found, whole[start:stop])


def test_no_rows():
    """A weight without rows decodes to none."""
    parts = parts_of(8, 128, 8)
    cut = {**parts, "qdata": parts["qdata"][:0], "scale": parts["scale"][:, :0], "proj_up": parts["proj_up"][:0]}
    fmt = parse_spec("svdquant_w4a4(rank=8)")
    kernel = select("dequantize", fmt.name, "", "cpu", (fmt, cut, (0, 128), torch.bfloat16))
    assert kernel.backend == "cpu"
    assert kernel.run(fmt, cut, (0, 128), torch.bfloat16).shape == (0, 128)


def test_threads_change_nothing():
    """The result is the same on any number of threads."""
    one, before = weight(parts_of(500, 1024, 40, torch.bfloat16)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = decoded(one, torch.float32, "cpu")
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert same_bits(decoded(one, torch.float32, "cpu"), alone)
    finally:
        torch.set_num_threads(before)


def test_float64_is_refused():
    """In words, and left to the reference."""
    parts = parts_of(8, 64, 8)
    one = weight(parts)
    said = explain("dequantize", "svdquant_w4a4", "", "cpu", (one.format, parts, (8, 64), torch.float64))
    assert "float64" in said["cpu:dequantize_svdquant_w4a4"]
    assert torch.equal(one.dequantize(torch.float64), decoded(one, torch.float64, "eager"))


def test_rows_are_judged_by_this_decoder():
    """row_errors, which has no kernel of its own for this format, gives the reference's sums."""
    parts = parts_of(300, 1024, 16, torch.bfloat16)
    w = exact(parts).float() + torch.randn(300, 1024, generator=torch.Generator().manual_seed(1))
    fmt = weight(parts).format
    with use_backend("eager"):
        wanted = row_errors(fmt, parts, w)
    torch.testing.assert_close(row_errors(fmt, parts, w), wanted, rtol=1e-5, atol=0)


def test_losses_and_gradients_decode_by_this_kernel(monkeypatch):
    """Where a weight on the CPU is decoded beside its linear, the reference's decoder is not what runs."""
    parts = parts_of(192, 128, 16, torch.bfloat16)
    one, w = weight(parts, torch.bfloat16), exact(parts).float() + 1
    x = torch.randn(5, 128, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(5, 192, dtype=torch.bfloat16)
    F.linear(x, one).backward(grad)
    samples = torch.randn(8, 128)
    wanted = output_loss(w, one.format, parts, None), activation_loss(one.format, parts, samples), x.grad
    monkeypatch.setattr(type(one.format), "decode", lambda *_: pytest.fail("decoded by the reference"))
    with use_backend("eager"), pytest.raises(pytest.fail.Exception):
        output_loss(w, one.format, parts, None)
    x.grad = None
    F.linear(x, one).backward(grad)
    assert wanted[0] == output_loss(w, one.format, parts, None)
    assert wanted[1] == activation_loss(one.format, parts, samples)
    assert torch.equal(wanted[2], x.grad)
    torch.testing.assert_close(x.grad.float(), grad.float() @ exact(parts).float(), rtol=2**-7, atol=0.05)
