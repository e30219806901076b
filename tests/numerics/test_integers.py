"""Rounding to integers, and noise that depends on its seed alone."""

from __future__ import annotations

import pytest
import torch

from lowbit.numerics.integers import round_clamp, round_clamp_, uniform_noise


def test_halves_go_to_the_even_integer_and_the_range_holds():
    """Ties to even on both sides, and nothing leaves [low, high]."""
    x = torch.tensor([-200.0, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 200.0])
    assert round_clamp(x, -127, 127).tolist() == [-127, -2, -2, 0, 0, 2, 2, 126, 127]


@pytest.mark.parametrize("noise", [None, 0.5])
def test_in_place_rounding_gives_the_same_values(noise):
    """`round_clamp_` is `round_clamp` in the memory of its argument, which the other leaves alone."""
    x = torch.randn(1000) * 5
    before, given = x.clone(), None if noise is None else torch.full_like(x, noise)
    expected = round_clamp(x, -7, 7, given)
    assert torch.equal(x, before)
    assert round_clamp_(x, -7, 7, given).data_ptr() == x.data_ptr()
    assert torch.equal(x, expected)


def test_stochastic_rounding_is_unbiased():
    """Over evenly spread noise the mean of the result is the value, negative ones included."""
    noise = torch.arange(1024) / 1024
    for value in (-2.75, -0.125, 0.0, 0.3125, 3.0):
        got = round_clamp(torch.full((1024,), value), -7, 7, noise)
        assert got.mean().item() == value


def test_noise_depends_on_seed_and_offset_alone():
    """The same seed and offset give the same noise; another seed or another offset gives other noise."""
    cpu = torch.device("cpu")
    torch.manual_seed(1)
    first = uniform_noise((4, 8), 7, 0, cpu)
    torch.rand(3)
    assert torch.equal(first, uniform_noise((4, 8), 7, 0, cpu))
    assert not torch.equal(first, uniform_noise((4, 8), 8, 0, cpu))
    assert not torch.equal(first, uniform_noise((4, 8), 7, 4, cpu))


def test_noise_is_uniform_and_below_one():
    """Values lie in [0, 1) with mean 1/2 and variance 1/12."""
    noise = uniform_noise((1000, 100), 3, 0, torch.device("cpu"))
    assert noise.dtype == torch.float32
    assert 0 <= noise.min() <= noise.max() < 1
    assert abs(noise.mean().item() - 0.5) < 0.005
    assert abs(noise.var().item() - 1 / 12) < 0.002
