"""The types of GGUF blocks that are searched here, K-quants first: less error than ggml's, whatever the weights are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.formats import Format, Parts, parse_spec
from lowbit.numerics.gguf_blocks import block_type
from lowbit.numerics.gguf_encode import SEARCHED
from lowbit.numerics.gguf_headers import Split
from lowbit.numerics.gguf_k_encode import WRITABLE_K
from lowbit.ops.encode import encode_searched
from lowbit.solvers.base import Statistics
from lowbit.solvers.solve import solve
from tests.support import gaussian, outlier_weight

gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle")
np = pytest.importorskip("numpy")

SHAPE = (128, 1024)
# Decibels of ggml 0.21.0: ggml_quantize_chunk, called by ctypes on these very tensors, its blocks decoded as ours. What
# weights columns here was its importance matrix (NVFP4 has no use for one).
#          gaussian, plain and weighted; outlier_weight, plain and weighted
GGML = {
    "Q2_K": (10.58, 13.26, 8.90, 11.50),
    "Q3_K": (16.45, 17.93, 14.51, 15.19),
    "Q4_K": (22.92, 24.55, 20.78, 21.81),
    "Q5_K": (28.84, 30.23, 26.68, 27.28),
    "Q6_K": (35.03, 36.21, 32.25, 32.47),
    "NVFP4": (20.45, 20.37, 20.42, 19.92),
}
LEAST_GAIN = 0.1  # dB
EVERY_TYPE = pytest.mark.parametrize("name", SEARCHED)
EVERY_K = pytest.mark.parametrize("name", WRITABLE_K)
WITH_ZEROS = pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q5_K"])


def of(name: str) -> Format:
    """The format of a type."""
    return parse_spec(f"gguf(type={name})")


def column_weights() -> Tensor:
    """Three decades, in no order."""
    return torch.logspace(-1.5, 1.5, SHAPE[1])[torch.arange(SHAPE[1]) * 37 % SHAPE[1]].roll(9)


def stored(fmt: Format, w: Tensor) -> Tensor:
    """What a weight becomes."""
    return fmt.dequantize(fmt.quantize(w), (w.shape[0], w.shape[1]), torch.float32)


def decibels(w: Tensor, found: Tensor, weights: Tensor | None = None) -> float:
    """The signal-to-noise ratio, squares times weights of columns."""
    heavy = torch.ones(w.shape[1]) if weights is None else weights
    signal, noise = ((x.double().square() * heavy).sum() for x in (w, w - found))
    return float(10 * torch.log10(signal / noise))


@EVERY_TYPE
def test_less_is_lost_than_with_ggml(name):
    """Plain and weighted, of Gaussian weights and of ones with outliers, the blocks beat those of ggml's encoder."""
    fmt, weights = of(name), column_weights()
    for w, facts in ((gaussian(*SHAPE), GGML[name][:2]), (outlier_weight(*SHAPE), GGML[name][2:])):
        plain, weighted = fmt.quantize(w), encode_searched(w, fmt, weights)

        assert decibels(w, fmt.dequantize(plain, SHAPE, torch.float32)) > facts[0] + LEAST_GAIN
        assert decibels(w, fmt.dequantize(weighted, SHAPE, torch.float32), weights) > facts[1] + LEAST_GAIN


@EVERY_TYPE
def test_the_package_reads_what_is_written(name):
    """gguf.dequantize gives for our blocks, bit for bit, the values that we read."""
    fmt, w = of(name), outlier_weight(33, 512)
    parts = fmt.quantize(w)

    expected = gguf.dequantize(parts["qdata"].numpy(), gguf.GGMLQuantizationType[name])

    assert np.array_equal(fmt.dequantize(parts, (33, 512), torch.float32).numpy(), expected)


@EVERY_TYPE
def test_blocks_do_not_depend_on_their_neighbours(name):
    """A row alone, or among many, becomes the same bytes; with weights, too."""
    fmt, w, weights = of(name), outlier_weight(300, 1024), column_weights()
    whole, searched = fmt.quantize(w)["qdata"], encode_searched(w, fmt, weights)["qdata"]

    for row in (0, 63, 64, 299):
        assert torch.equal(fmt.quantize(w[row : row + 1])["qdata"][0], whole[row])
        assert torch.equal(encode_searched(w[row : row + 1], fmt, weights)["qdata"][0], searched[row])


@EVERY_TYPE
def test_weights_move_the_error(name):
    """Searched with weights of columns, the weighted error is less than without, and the plain one more."""
    fmt, w, weights = of(name), gaussian(*SHAPE), column_weights()
    plain, weighted = fmt.quantize(w), encode_searched(w, fmt, weights)
    found = [fmt.dequantize(parts, SHAPE, torch.float32) for parts in (plain, weighted)]

    assert decibels(w, found[1], weights) > decibels(w, found[0], weights) + 0.2
    assert decibels(w, found[1]) < decibels(w, found[0])


@EVERY_TYPE
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30], ids=["zero", "small", "large"])
def test_any_weights_of_columns_are_taken(name, scale):
    """Columns that count nothing, or all of them hardly anything or very much, leave ordinary values."""
    fmt, w = of(name), gaussian(16, 512)
    weights = torch.full((512,), scale or 1.0)
    weights[100:180] = 0

    found = fmt.dequantize(encode_searched(w, fmt, weights), (16, 512), torch.float32)

    assert (found - w).abs().max() < 2 * w.abs().max()
    assert decibels(w[:, 256:], found[:, 256:]) > 9


@EVERY_K
@pytest.mark.parametrize("value", [3.7, -3.7])
def test_constant_blocks_come_back(name, value):
    """A block of one value is that value but for the rounding of a float16."""
    found = stored(of(name), torch.full((2, 512), value))

    torch.testing.assert_close(found, torch.full((2, 512), value), rtol=1e-3, atol=0)


@WITH_ZEROS
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_blocks_far_from_zero_keep_their_details(name, sign):
    """Of weights in [5, 5.1] or [-5.1, -5] the offset costs no levels."""
    w = (5 + 0.1 * torch.rand((4, 512), generator=torch.Generator().manual_seed(1))) * sign
    lost = (stored(of(name), w) - w).square().mean().sqrt()

    assert lost < 0.5 * 0.1 / block_type(name).levels.high  # evenly spread, it would be 0.29


@EVERY_TYPE
@pytest.mark.parametrize("scale", [1e-38, 1e-22, 1e-9, 1e-7, 3e-6])
def test_small_weights_are_not_made_larger(name, scale):
    """Weights about as small as the smallest float16, or smaller: no more is lost than by zeros."""
    w = gaussian(8, 512) * scale
    found = stored(of(name), w)

    assert found.isfinite().all()
    assert (found - w).double().square().sum() <= w.double().square().sum()


@EVERY_K
def test_steps_below_a_normal_float16_are_put_together(name):
    """Where the float16 of the steps is subnormal, multiples make up for how few of them there are."""
    w = gaussian(8, 512)

    assert abs(decibels(w * 2e-4, stored(of(name), w * 2e-4)) - decibels(w, stored(of(name), w))) < 0.6


@EVERY_TYPE
@pytest.mark.parametrize("scale", [1e9, 3e38])
def test_huge_weights_saturate(name, scale):
    """Beyond the largest steps, values become about the largest of their sign, none an infinity."""
    w = torch.ones(2, 512)
    w[1] = -1
    found = stored(of(name), w * scale)

    assert found.isfinite().all()
    assert torch.equal(found.sign(), w)
    assert (found.abs() > 2000).all()


@EVERY_TYPE
def test_one_value_among_zeros(name):
    """A single weight in a block of zeros is kept, and the zeros stay small beside it."""
    w = torch.zeros(2, 512)
    w[0, 5], w[1, 300] = 0.75, -0.75
    found = stored(of(name), w)

    torch.testing.assert_close(found, w, rtol=2e-3, atol=2e-4)


@EVERY_K
def test_headers_are_joined_as_they_were_split(name):
    """Any header of a type comes back from its float16 and whole numbers, bit for bit."""
    kind = block_type(name)
    raw = torch.randint(0, 256, (500, kind.header_size), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    found = kind.shared.split(raw)
    finite = torch.stack([x.isfinite().all(1) for x in found if x is not None]).all(0)

    assert torch.equal(kind.shared.join(found)[finite], raw[finite])


@EVERY_K
def test_refitted_steps_are_multiples_of_what_the_block_has(name):
    """The refinements change whole numbers and codes, not the float16 of a block, and lower the error; zeros stay."""
    fmt, w = of(name), outlier_weight(32, 512)
    w[3, 256:] = 0
    x = torch.randn(1024, 512, generator=torch.Generator().manual_seed(1)) @ gaussian(512, 512, seed=2)
    x *= torch.linspace(0.2, 2, 512)  # so that a search by the channels' weights gains enough on any samples to be kept
    halves = [half.t() @ half / 512 for half in x.split(512)]
    statistics = Statistics(hessian=halves[0], tokens=512, held_out=halves[1], held_out_tokens=512)
    start = split(fmt, encode_searched(w, fmt, halves[0].diagonal()))
    steps = ("gptq", "scale_refit", "descent")
    gptq, refit, both = (solve(w, fmt, f"scale_search+{step}", statistics) for step in steps)

    for solution in (refit, both):
        found = split(fmt, solution.parts)
        assert torch.equal(found.factor, start.factor)
        assert not torch.equal(found.scales, start.scales)
        assert (fmt.dequantize(solution.parts, (32, 512), torch.float32)[3, 256:] == 0).all()
    assert torch.equal(split(fmt, gptq.parts).scales, start.scales)
    assert both.error < refit.error < both.rtn_error


@EVERY_K
def test_units_and_rows_of_a_grid_have_the_factors_of_their_blocks(name):
    """A part of the units, or of the rows, snaps to what the whole does there; other places have other factors."""
    fmt, w = of(name), outlier_weight(12, 768)
    grid = fmt.grid(w, fmt.quantize(w))
    wanted = grid.step * torch.linspace(0.6, 1.3, grid.step.shape[0]).unsqueeze(1)
    zero = None if grid.zero is None else grid.zero * 0.9
    step, stored_zero = grid.snapped(slice(None), wanted, zero)

    units, piece = slice(3, 7), grid.narrow(4, 9)
    some, some_zero = grid.snapped(units, wanted[units], None if zero is None else zero[units])
    few, few_zero = piece.snapped(units, wanted[units, 4:9], None if zero is None else zero[units, 4:9])

    assert torch.equal(some, step[units])
    assert torch.equal(few, step[units, 4:9])
    assert not torch.equal(grid.snapped(units, wanted[20:24], None if zero is None else zero[20:24])[0], step[20:24])
    if stored_zero is not None:
        assert torch.equal(some_zero, stored_zero[units])
        assert torch.equal(few_zero, stored_zero[units, 4:9])


def test_rows_that_make_up_for_each_other():
    """With second moments of the gradient, rows are solved some at a time, and less is lost than by rounding."""
    fmt, w = of("Q4_K"), outlier_weight(96, 256)
    x = torch.randn(1024, 256, generator=torch.Generator().manual_seed(1)) @ gaussian(256, 256, seed=2)
    g = torch.randn(1024, 96, generator=torch.Generator().manual_seed(3)) @ gaussian(96, 96, seed=4)
    moments, outputs = ([half.t() @ half / 512 for half in both.split(512)] for both in (x, g))
    statistics = Statistics(moments[0], 512, moments[1], 512, output_hessian=outputs[0], output_held_out=outputs[1])

    solution = solve(w, fmt, "auto", statistics)

    assert solution.solver == "scale_search+gptq+descent"
    assert solution.error < 0.7 * solution.rtn_error


def split(fmt: Format, parts: Parts) -> Split:
    """The headers of blocks."""
    kind = block_type(fmt.config()["type"])
    return kind.shared.split(kind.headers(parts["qdata"].reshape(-1, kind.size)))
