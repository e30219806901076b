"""quantize and scale_search for svdquant_w4a4 on the CPU backend: as small an error as the reference's, and its rules.

Codes are not compared: the search for the low rank feeds each step with the roundings of the last one, so that factors
differ between any two orders of summation.
"""

from __future__ import annotations

import os

import pytest
import torch

from lowbit.dispatch import explain, select, use_backend
from lowbit.errors import WeightError
from lowbit.formats import Parts
from lowbit.formats.svdquant_w4a4 import SvdquantW4A4
from lowbit.numerics.int4_matmul import GROUP
from lowbit.ops.encode import encode, encode_searched
from tests.support import gaussian

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def trained(n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """A weight whose singular values fall as those of trained layers do, with columns of different size."""
    generator = torch.Generator().manual_seed(n * k + seed)
    most = min(n, k)
    values = torch.arange(1, most + 1).float() ** -0.7
    w = (torch.randn(n, most, generator=generator) * values) @ torch.randn(most, k, generator=generator)
    w *= torch.exp(0.5 * torch.randn(k, generator=generator))
    return (0.02 * w / w.std()).to(dtype)


def error(fmt: SvdquantW4A4, parts: Parts, w: torch.Tensor, columns: torch.Tensor | None = None) -> float:
    """The norm of what the parts miss of a weight; squares weighted by `columns`."""
    fmt.check(parts, tuple(w.shape))
    missed = fmt.dequantize(parts, tuple(w.shape), torch.float32).double() - w.double()
    return float((missed if columns is None else missed * columns.double().sqrt()).norm())


@pytest.mark.skipif("LOWBIT_KERNELS" in os.environ, reason="150 GFLOP in an emulator; a pass is compared below")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "n", "k"), [(32, 512, 768), (16, 333, 512), (33, 1000, 320)])
def test_errors_are_those_of_the_reference(rank, n, k, dtype):
    """Rounded or searched, with and without weights of columns, errors are on average within a thousandth of eager's.

    One of them may be further off: those of eager for the same weight with its rows in another order have a standard
    deviation of half a thousandth, and leave it by up to three.
    """
    fmt, columns = SvdquantW4A4(rank=rank), torch.rand(k, generator=torch.Generator().manual_seed(1))
    ratios = []
    for w in (*(trained(n, k, dtype, seed) for seed in range(3)), (0.02 * gaussian(n, k)).to(dtype)):
        made = {}
        for backend in ("cpu", "eager"):
            with use_backend(backend):
                parts = encode(w, fmt), encode_searched(w, fmt), encode_searched(w, fmt, columns)
            weights = None, None, columns
            made[backend] = [error(fmt, one, w, by) for one, by in zip(parts, weights, strict=True)]
        ratios += [found / wanted for found, wanted in zip(made["cpu"], made["eager"], strict=True)]
        assert made["cpu"][1] < 0.97 * made["cpu"][0]
    assert sum(ratios) / len(ratios) <= 1.001
    assert max(ratios) <= 1.004


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("shape", [(17, 128), (33, 64), (65, 192), (37, 3072)])
def test_small_and_odd_shapes(shape, unsigned):
    """Rows that fill no piece: the error is at most a hundredth above eager's."""
    fmt = SvdquantW4A4(rank=16, act_unsigned=unsigned)
    w = trained(*shape, torch.bfloat16)
    with use_backend("cpu"):
        found = encode(w, fmt)
    assert error(fmt, found, w) <= 1.01 * error(fmt, fmt.quantize(w), w) + 1e-4 * float(w.float().norm())


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (17, 128)])
def test_ranks_up_to_the_whole_weight(shape, unsigned):
    """What a low rank of the whole weight leaves is how its factors were rounded, which is as small as eager's.

    It differs by a third between any two bases of the same space, and so between machines: many weights are compared.
    """
    fmt = SvdquantW4A4(rank=min(shape), act_unsigned=unsigned)
    left = []
    for w in (trained(*shape, torch.bfloat16, seed) for seed in range(32)):
        with use_backend("cpu"):
            found = encode(w, fmt)
        errors = torch.tensor([error(fmt, found, w), error(fmt, fmt.quantize(w), w)])
        left.append(errors / w.float().norm())
        assert left[-1][0] < torch.finfo(torch.bfloat16).eps / 8  # codes take off most of half a unit
    found_mean, eager_mean = torch.stack(left).mean(0)
    assert found_mean <= 1.2 * eager_mean


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_the_nearest_at_the_stored_factors(dtype):
    """With the smoothing, factors and scales that were stored, no other code is nearer than the one that was chosen."""
    fmt, w = SvdquantW4A4(rank=16), trained(100, 384, dtype)
    with use_backend("cpu"):
        for parts in (encode(w, fmt), encode_searched(w, fmt)):
            low = parts["proj_up"].double() @ parts["proj_down"].double().t()
            groups = ((w.double() - low) * parts["smooth_factor"].double()).view(100, -1, GROUP)
            scale = parts["scale"].double().t().unsqueeze(-1)
            codes = fmt.unpack(parts["qdata"], 384).view_as(groups)
            assert ((groups / scale).clamp(-8, 7) - codes).abs().max() <= 0.5 + 1e-3
    assert parts["scale"].lt(0).any()


def test_scales_of_rounding_are_absmax_over_seven():
    """Without a search each scale is the largest residual of its group by 7, in the stored dtype, and no code is -8."""
    fmt, w = SvdquantW4A4(rank=16), trained(100, 384, torch.bfloat16)
    with use_backend("cpu"):
        parts = encode(w, fmt)
    wanted = fmt.plain_scale(w.float(), parts)
    torch.testing.assert_close(parts["scale"].float(), wanted, rtol=2**-8, atol=0)
    codes = fmt.unpack(parts["qdata"], 384)
    assert (codes.min(), codes.max()) == (-7, 7)


def test_zeros():
    """A weight of zeros, and rows of zeros among others, decode to zeros."""
    fmt = SvdquantW4A4(rank=16)
    w = trained(50, 128, torch.bfloat16)
    w[::7] = 0
    with use_backend("cpu"):
        for make in (encode, encode_searched):
            assert not fmt.dequantize(make(torch.zeros_like(w), fmt), (50, 128), torch.float32).any()
            assert not fmt.dequantize(make(w, fmt), (50, 128), torch.float32)[::7].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_weights(size, dtype):
    """Squares that leave float32 do not matter: the error is that of the weight in its usual size, or no worse."""
    fmt, w = SvdquantW4A4(rank=16), trained(96, 256)
    w = (w * size).to(dtype)
    with use_backend("cpu"):
        found = encode(w, fmt)
    assert error(fmt, found, w) <= 1.01 * error(fmt, fmt.quantize(w), w)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_nearly_nothing_breaks_no_search(seed):
    """Columns of zeros and a rank of all columns: products then hold subnormal numbers, and the weight is stored."""
    fmt, w = SvdquantW4A4(rank=64), gaussian(257, 64, seed=seed)
    w[:, torch.rand(64, generator=torch.Generator().manual_seed(seed)) < 0.7] = 0
    w = w.to(torch.float16)
    with use_backend("cpu"):
        for make in (encode, encode_searched):
            assert error(fmt, make(w, fmt), w) < 0.01 * float(w.float().norm())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite(dtype, value):
    """NaN and infinity anywhere in a weight are the reference's error, which names the layer."""
    for place in ((0, 0), (68, 127)):
        w = trained(69, 128, dtype)
        w[place] = value
        for make in (encode, encode_searched):
            with use_backend("cpu"), pytest.raises(WeightError, match=r"^blocks\.3: holds NaN or infinity"):
                make(w, SvdquantW4A4(rank=16), where="blocks.3")


def test_factors_beyond_their_dtype_are_an_error():
    """A float16 weight whose low-rank factors exceed float16 is refused with the layer's name, as in eager."""
    fmt, w = SvdquantW4A4(rank=1), torch.full((64, 8192), 6e4, dtype=torch.float16)
    for backend in ("cpu", "eager"):
        with use_backend(backend), pytest.raises(WeightError, match=r"^blocks\.3: its low-rank factors exceed float16"):
            encode(w, fmt, where="blocks.3")


def test_gaps_and_repetition():
    """Gaps between rows change no bit, nor does doing it again."""
    fmt, w = SvdquantW4A4(rank=16), trained(700, 1024, torch.bfloat16)[:, :512]
    with use_backend("cpu"):
        one, two = (encode_searched(source, fmt) for source in (w, w.contiguous()))
    for name, part in one.items():
        assert torch.equal(part, two[name]), name


@pytest.mark.parametrize(
    ("dtype", "seed", "reason"), [(torch.bfloat16, 1, "stochastic"), (torch.float64, None, "float64")]
)
def test_refusals(dtype, seed, reason):
    """What the kernel does not take is refused in words, and eager encodes it."""
    fmt, w = SvdquantW4A4(rank=16), trained(64, 64).to(dtype)
    said = explain("quantize", fmt.name, "", "cpu", (fmt, w, seed, "weight"))
    assert reason in said["cpu:quantize_svdquant_w4a4"]
    assert select("quantize", fmt.name, "", "cpu", (fmt, w, seed, "weight")).name == "eager:quantize"


def test_the_kernel_is_within_its_tolerance_of_the_reference():
    """Two results with other factors lie no further apart than the tolerance that the kernel states."""
    fmt, w = SvdquantW4A4(rank=16), 0.02 * gaussian(512, 512)
    for op, make in (("quantize", encode), ("scale_search", encode_searched)):
        entry = select(op, fmt.name, "", "cpu", (fmt, w, None, "weight"))
        values = []
        for backend in ("cpu", "eager"):
            with use_backend(backend):
                values.append(fmt.dequantize(make(w, fmt), (512, 512), torch.float32))
        assert entry.name.startswith("cpu:")
        assert (values[0] - values[1]).norm() <= entry.tolerance * values[1].norm()
