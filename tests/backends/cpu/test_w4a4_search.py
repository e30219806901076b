"""The steps of a search for W4A4 parameters, by the compiled kernels: each against its definition in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lowbit.dispatch import explain, use_backend
from lowbit.formats.svdquant_w4a4 import SvdquantW4A4
from lowbit.numerics import w4a4_search as plain
from lowbit.ops import w4a4_search as ops
from lowbit.ops.encode import encode
from tests.support import gaussian

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)

from lowbit.backends.cpu.w4a4_search import NativePasses  # after it is known to be there

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 64), (3, 128), (33, 448), (130, 192)]


def outlying(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows with columns of very different sizes."""
    return (gaussian(rows, columns) * torch.logspace(-2, 1, columns)).to(dtype)


def factors(count: int, seed: int = 1) -> Tensor:
    """Positive numbers around 1."""
    return 0.5 + torch.rand(count, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _natively() -> Iterator[None]:
    with use_backend("cpu"):
        yield


def with_threads(made: Callable[[], Tensor]) -> list[Tensor]:
    """What is made by one and by two threads."""
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(made())
    finally:
        torch.set_num_threads(before)
    return found


# ---- passes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noisy", [False, True], ids=["", "noise"])
@pytest.mark.parametrize("rank", [1, 16, 41])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pass_is_that_of_the_reference(dtype, rank, noisy):
    """Products and error of one pass over a weight are the reference's but for the order of sums."""
    n, k = 333, 448
    w, basis = 0.02 * gaussian(n, k).to(dtype), torch.linalg.qr(gaussian(k, rank + 8)).Q
    given = (w, factors(k), factors(k, 2), 0.1 * factors(k, 3) if noisy else None)
    native, eager = ops.rounding_passes(*given), plain.rounding_passes(*given)
    assert isinstance(native, NativePasses)
    (error_found, found), (error_wanted, wanted) = (one.refinement(basis, rank, step=True) for one in (native, eager))
    for one, other in ((found, wanted), (native.step(basis), eager.step(basis))):
        for name in ("image", "gram"):  # a rounding that a tie turns over shows in the fourth place
            missed = getattr(one, name) - getattr(other, name)
            assert missed.norm() <= 1e-3 * getattr(other, name).norm()
    assert error_found == pytest.approx(error_wanted, rel=1e-3)
    assert native.refinement(basis, rank, step=False) == (error_found, None)


def test_noise_costs_the_squares_of_what_is_rounded():
    """It adds them times the noise to the error; none adds nothing."""
    w, basis = gaussian(70, 128), torch.linalg.qr(gaussian(128, 12)).Q
    ones, noise = torch.ones(128), factors(128)

    def error(of: Tensor | None) -> float:
        return ops.rounding_passes(w, ones, ones, of).refinement(basis, 4, step=False)[0]

    residual = w - (w @ basis[:, :4]) @ basis[:, :4].t()
    exact = float(plain.round_groups(residual).square().sum(0) @ noise)
    assert error(noise) - error(None) == pytest.approx(exact, rel=1e-4)
    assert error(torch.zeros(128)) == error(None)


def test_sums_of_a_pass_do_not_depend_on_threads():
    """Neither the error nor a product."""
    w, basis = outlying(700, 512, torch.bfloat16), torch.linalg.qr(gaussian(512, 24)).Q
    passes = ops.rounding_passes(w, torch.ones(512), factors(512), factors(512, 2))

    def made() -> Tensor:
        error, products = passes.refinement(basis, 16, step=True)
        assert products is not None
        return torch.cat([torch.tensor([[error]]).expand(1, 24), products.image, passes.step(basis).image])

    one, two = with_threads(made)
    assert torch.equal(one, two)


# ---- noise of inputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_is_what_the_quantizer_takes(shape, unsigned):
    """The mean square of each channel; of values between two codes some go the other way."""
    x, smooth = outlying(*shape), factors(shape[1])
    x = torch.nn.functional.gelu(x) if unsigned else x
    wanted, found = plain.input_noise(x, smooth, unsigned), ops.input_noise(x, smooth, unsigned)
    assert (found - wanted).abs().max() <= 2e-3 * wanted.max()
    torch.testing.assert_close(found.sum(), wanted.sum(), rtol=1e-3, atol=0)


def test_noise_of_nothing_and_of_what_an_unsigned_code_cannot_hold():
    """Zeros lose nothing; what is below the shift is cut off at zero, and all of it is lost."""
    x, smooth = torch.zeros(5, 128), torch.ones(128)
    assert not ops.input_noise(x, smooth, False).any()
    x[:, 0], x[:, 1] = 15.0, -3.0
    found = ops.input_noise(x, smooth, True)
    torch.testing.assert_close(found, plain.input_noise(x, smooth, True), rtol=1e-3, atol=1e-6)
    assert float(found[1]) == pytest.approx((3.0 - 0.171875) ** 2, rel=1e-5)


def test_noise_of_rows_with_gaps_and_of_more_threads_is_the_same():
    """To the bit."""
    x, smooth = outlying(40, 256), factors(256)
    one, two = with_threads(lambda: ops.input_noise(x, smooth, False))
    assert torch.equal(one, two)
    assert torch.equal(ops.input_noise(torch.cat([x, x], 1)[:, :256], smooth, False), one)


# ---- what rounding to the lowest code loses --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_lost_is_that_of_the_reference(shape):
    """But for values between two codes: fewer than one in two thousand."""
    m, rest = outlying(*shape), outlying(*shape).flip(0)
    rest[0, :64] = 0
    rest[-1, 64 : 2 * 64] = 1e-35
    wanted, found = torch.empty_like(m), torch.empty_like(m)
    plain.lost_to_lowest(m, rest.clone(), wanted)
    ops.lost_to_lowest(m, rest.clone(), found)
    far = (found - wanted).abs() > 1e-5 * rest.abs().amax(1, keepdim=True)
    assert int(far.sum()) <= m.numel() // 2000


def test_lost_rows_may_be_written_where_the_weight_is():
    """In place, with threads, to the same bits."""
    m, rest = outlying(300, 320), gaussian(300, 320)
    apart = torch.empty_like(m)
    ops.lost_to_lowest(m, rest.clone(), apart)

    def in_place() -> Tensor:
        made = m.clone()
        ops.lost_to_lowest(made, rest.clone(), made)
        return made

    for made in with_threads(in_place):
        assert torch.equal(made, apart)


def test_the_largest_of_a_group_gets_the_lowest_code():
    """Of either sign; what is lost of it is a few percent of a step."""
    rest = torch.zeros(2, 64)
    rest[0, 5], rest[1, 9] = 4.0, -4.0
    lost = torch.empty_like(rest)
    ops.lost_to_lowest(rest.clone(), rest.clone(), lost)
    assert lost[0, 5] == pytest.approx(4.0 * 0.03, rel=1e-4)
    assert lost[1, 9] == pytest.approx(-4.0 * 0.03, rel=1e-4)


# ---- scales ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [16, 33, 100])
def test_scales_are_as_good_as_those_of_the_reference(dtype, n):
    """Nearly all are the same; where two candidates are alike, the errors are."""
    fmt, k = SvdquantW4A4(rank=16), 192
    rows, weights = outlying(n, k), factors(k, 4)
    params = {
        "smooth_factor": factors(k, 5).to(dtype),
        "proj_down": (0.05 * gaussian(k, 16)).to(dtype),
        "proj_up": (0.05 * gaussian(n, 16)).to(dtype),
    }
    found = ops.searched_scales(fmt, rows, params, weights)
    with use_backend("eager"):
        wanted = ops.searched_scales(fmt, rows, params, weights)
    assert found.dtype == wanted.dtype == dtype
    assert found.shape == wanted.shape == (k // 64, n)
    assert (found != wanted).float().mean() <= 0.03
    errors = [
        float((fmt.project(rows, {**params, "scale": scale}) - rows).square().mul_(weights).sum())
        for scale in (found, wanted)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_scales_of_rows_with_gaps_and_of_more_threads_are_the_same():
    """To the bit."""
    fmt, k, n = SvdquantW4A4(rank=4), 128, 70
    rows = outlying(n, k)
    params = {"smooth_factor": factors(k), "proj_down": gaussian(k, 4), "proj_up": gaussian(n, 4)}
    one, two = with_threads(lambda: ops.searched_scales(fmt, rows, params, torch.ones(k)))
    assert torch.equal(one, two)
    assert torch.equal(ops.searched_scales(fmt, torch.cat([rows, rows], 1)[:, :k], params, torch.ones(k)), one)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_the_kernels_do_not_take_is_refused_in_words():
    """Each for the first reason that holds: nothing of another shape, dtype or device is read by its address."""
    x, ones, one, narrow = gaussian(4, 128), torch.ones(128), torch.ones(1), torch.ones(96)
    for op, args, why in (
        ("rounding_passes", (x.double(), ones, ones, None), "float64"),
        ("rounding_passes", (x, ones.double(), ones, None), "factor is float64"),
        ("rounding_passes", (x, one, ones, None), "factor is float32 [1]"),
        ("rounding_passes", (x, ones, one, None), "weights is float32 [1]"),
        ("rounding_passes", (x, ones, ones, one), "noise is float32 [1]"),
        ("rounding_passes", (x, ones.to("meta"), ones, None), "on meta"),
        ("rounding_passes", (gaussian(4, 96), narrow, narrow, None), "96 columns"),
        ("input_noise", (x.bfloat16(), ones, False), "x is bfloat16"),
        ("input_noise", (x, one, False), "smooth is float32 [1]"),
        ("input_noise", (x, torch.ones(256), False), "smooth is float32 [256]"),
        ("lost_to_lowest", (x.double(), x.double(), x.double()), "m is float64"),
        ("lost_to_lowest", (x, x[:3], x), "rest is float32 [3, 128]"),
        ("lost_to_lowest", (x, x, torch.empty(128, 4).t()), "not all rows are without gaps"),
    ):
        assert why in explain(op, "*", "", "cpu", args)[f"cpu:{op}"], (op, why)


def test_scales_are_refused_for_parts_that_do_not_fit():
    """Of another number of rows, columns or factors, of another dtype, on another device."""
    fmt, k = SvdquantW4A4(rank=4), 128
    fine = {"smooth_factor": torch.ones(k), "proj_down": gaussian(k, 4), "proj_up": gaussian(8, 4)}
    for change, why in (
        ({"smooth_factor": torch.ones(1)}, "smooth_factor"),
        ({"proj_up": gaussian(8, 5)}, "proj_up"),
        ({"proj_up": gaussian(7, 4)}, "proj_up"),
        ({"proj_down": gaussian(k, 4).double()}, "proj_down"),
        ({"proj_down": gaussian(k, 4).to("meta")}, "on meta"),
    ):
        args = (fmt, gaussian(8, k), {**fine, **change}, torch.ones(k))
        assert why in explain("searched_scales", fmt.name, "", "cpu", args)["cpu:searched_scales"], why
    args = (fmt, gaussian(8, k), fine, torch.ones(k + 1))
    assert "weights" in explain("searched_scales", fmt.name, "", "cpu", args)["cpu:searched_scales"]


def test_a_default_device_changes_nothing():
    """What the launchers make for themselves lies on the CPU, whatever new tensors do."""
    fmt, k = SvdquantW4A4(rank=4), 128
    rows, basis = outlying(70, k), torch.linalg.qr(gaussian(k, 12)).Q
    params = {"smooth_factor": factors(k), "proj_down": gaussian(k, 4), "proj_up": gaussian(70, 4)}

    def made() -> list[Tensor]:
        passes = ops.rounding_passes(rows, ones, ones, None)
        return [ops.searched_scales(fmt, rows, params, ones), passes.step(basis).image, *encode(rows, fmt).values()]

    ones = torch.ones(k)
    wanted = made()
    with torch.device("meta"):
        found = made()
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
