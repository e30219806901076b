"""The sums behind the statistics, against float64."""

from __future__ import annotations

import pytest
import torch

from lowbit.calibration.accumulate import FLUSH, ROWS_KEPT, Accumulator
from lowbit.ops.column_ranges import BINS

CPU = torch.device("cpu")


def rows(count, k, seed=0):
    """Rows with channels of very different sizes and a mean."""
    x = torch.randn(count, k, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-2, 2, k) + 0.5


def taken(x, y, *, full=True, step=100):
    """The statistics of rows x of the first half and y of the other, given in pieces."""
    made = Accumulator(x.shape[1], full=full, device=CPU)
    for half, data in enumerate((x, y)):
        for piece in data.split(step):
            made.add(piece, half)
    return made.finish()


@pytest.mark.parametrize("k", [1, 7, 600])
@pytest.mark.parametrize("full", [True, False])
def test_second_moments_are_those_of_float64(k, full):
    """H of each half is E[x xᵀ] within float32's precision of its scale, symmetric to the bit."""
    x, y = rows(2500, k, 1), rows(900, k, 2)

    found = taken(x, y, full=full)

    for moment, data in ((found.hessian, x), (found.held_out, y)):
        true = data.double().mT @ data.double() / len(data)
        scale = true.diagonal().sqrt()
        if full:
            assert torch.equal(moment, moment.mT)
            assert ((moment.double() - true).abs() / (scale[:, None] * scale)).max() < 2e-6
        else:
            torch.testing.assert_close(moment.double(), true.diagonal(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("full", [True, False])
def test_rows_of_bfloat16_lose_nothing(full):
    """They give what the same values give as float32, also where rows of float32 follow, which are not rounded."""
    x, y = rows(1500, 64, 1).bfloat16(), rows(900, 64, 2)
    mixed, exact = (Accumulator(64, full=full, device=CPU) for _ in range(2))
    for made, first in ((mixed, x), (exact, x.float())):
        for half in range(2):
            made.add(first, half)
            made.add(y, half)
    found, expected = mixed.finish(), exact.finish()

    for moment, true in ((found.hessian, expected.hessian), (found.held_out, expected.held_out)):
        size = (true.diagonal() if full else true).sqrt()
        assert float(((moment - true).abs() / (size[:, None] * size if full else size.square())).max()) < 1e-6
    for name in ("absmax", "minimum", "maximum", "magnitudes", "samples", "mean"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_many_batches_lose_no_accuracy():
    """After 400 flushes the sum is still within 1e-5 of float64, relative to the channels' sizes."""
    x = rows(400 * FLUSH // 8, 24, 3).repeat(8, 1)

    found = taken(x, x[:10], step=FLUSH)

    true = x.double().mT @ x.double() / len(x)
    scale = true.diagonal().sqrt()
    assert ((found.hessian.double() - true).abs() / (scale[:, None] * scale)).max() < 1e-5


def test_the_mean_stays_accurate_beside_a_large_offset():
    """After 300 flushes of values around 1000 the mean is that of float64, to float32's precision."""
    x = torch.randn(300 * FLUSH // 4, 16, generator=torch.Generator().manual_seed(4)).add_(1000.0).repeat(4, 1)

    found = taken(x, x[:7], step=700)

    torch.testing.assert_close(found.mean, torch.cat((x, x[:7])).double().mean(0).float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("full", [True, False])
def test_it_does_not_matter_how_rows_come(full):
    """In pieces of any size, or picked from among others, rows in the same order give the same bits."""
    x, y = rows(2 * FLUSH + 300, 40, 1), rows(FLUSH, 40, 2)
    mixed = Accumulator(40, full=full, device=CPU)
    both, first = torch.stack((x[:FLUSH], y), 1).flatten(0, 1), torch.arange(0, 2 * FLUSH, 2)
    mixed.add(both, 0, first)
    mixed.add(both, 1, first + 1)
    mixed.add(x[FLUSH:], 0)
    picked = mixed.finish()

    for step in (1 + FLUSH // 3, FLUSH, 10 * FLUSH):
        found = taken(x, y, full=full, step=step)
        for name in ("hessian", "held_out", "absmax", "samples"):
            assert torch.equal(getattr(found, name), getattr(picked, name)), name
        torch.testing.assert_close(found.mean, picked.mean)


def test_a_buffer_in_use_is_not_what_is_kept():
    """Rows that are kept do not change when the memory they were gathered in is written over."""
    made = Accumulator(3, full=True, device=CPU)
    for number in range(3):
        made.add(torch.full((FLUSH, 3), float(number + 1)), 0)

    assert set(made.finish().samples.unique().tolist()) == {1.0, 2.0, 3.0}


def test_ranges_means_and_counts_cover_both_halves():
    """absmax, mean, minimum and maximum are those of all rows; tokens are counted by half."""
    x, y = rows(1500, 20, 1), rows(300, 20, 2) - 3
    both = torch.cat((x, y))

    found = taken(x, y)

    assert (found.tokens, found.held_out_tokens, found.total_tokens) == (1500, 300, 1800)
    assert torch.equal(found.absmax, both.abs().amax(0))
    assert torch.equal(found.minimum, both.amin(0))
    assert torch.equal(found.maximum, both.amax(0))
    torch.testing.assert_close(found.mean.double(), both.double().mean(0), rtol=1e-6, atol=1e-7)


def test_magnitudes_count_elements_by_their_upper_bits():
    """Each |x| falls into the bin of the upper 12 of its 31 bits; of few elements all are counted."""
    x = torch.tensor([[1.0, -1.0, 0.0, 3.0], [1.5, 65504.0, -1e-3, 1.03]])

    found = taken(x, x[:0])

    expected = torch.zeros(BINS, dtype=torch.int64)
    for value in x.flatten().tolist():
        expected[int(torch.tensor(abs(value)).view(torch.int32)) >> 19] += 1
    assert torch.equal(found.magnitudes, expected)


def test_magnitudes_of_many_elements_estimate_percentiles():
    """Counting only some rows of large inputs, the 99.9th percentile still is right to one bin (6 %)."""
    x = torch.randn(4000, 512)

    found = taken(x, x[:0], step=4000)

    below = found.magnitudes.cumsum(0) <= 0.999 * found.magnitudes.sum()
    edge = (below.sum() << 19).to(torch.int32).view(torch.float32)
    assert edge == pytest.approx(float(x.abs().flatten().kthvalue(int(0.999 * x.numel())).values), rel=0.08)


def test_few_rows_are_all_kept():
    """Up to 256 rows of the first half are kept as they are, none of the other half."""
    x = rows(200, 5)

    assert torch.equal(taken(x, rows(300, 5, 1)).samples, x)


def test_kept_rows_are_spread_over_all():
    """Of many rows 256 distinct ones are kept, as many of the last as of the first quarter within chance."""
    x = torch.arange(20_000.0)[:, None]

    kept = taken(x, x[:0], step=300).samples[:, 0]

    assert len(kept) == ROWS_KEPT == len(kept.unique())
    assert 35 < int((kept < 5000).sum()) < 95
    assert 35 < int((kept >= 15000).sum()) < 95


def test_a_state_goes_on_to_the_same_bits():
    """Saved at any point and restored in another accumulator, the end result is the same to the bit."""
    x = rows(3000, 12)
    straight, first, second = (Accumulator(12, full=True, device=CPU) for _ in range(3))
    for start in range(0, 3000, 250):
        straight.add(x[start : start + 250], start // 250 % 2)
        (first if start < 1750 else second).add(x[start : start + 250], start // 250 % 2)
        if start == 1500:
            second.restore({name: tensor.clone() for name, tensor in first.state().items()})

    one, other = straight.finish(), second.finish()

    for name in ("hessian", "held_out", "mean", "absmax", "samples", "magnitudes"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_taken_as_float32(dtype):
    """Rows of any float dtype are widened before they are multiplied."""
    x = rows(300, 9).to(dtype)

    found = taken(x, x[:0])

    assert found.hessian.dtype == torch.float32
    assert torch.equal(found.hessian, taken(x.float(), x[:0].float()).hessian)


def test_nothing_seen_is_no_statistics():
    """Without a row every field is missing."""
    found = Accumulator(4, full=True, device=CPU).finish()

    assert found.hessian is None
    assert found.absmax is None
    assert found.total_tokens == 0
