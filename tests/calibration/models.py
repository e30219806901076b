"""Small models whose linears share inputs in known ways."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn


class Attention(nn.Module):
    """q, k and v of one input, o of another; `cross` gives k and v an input of their own."""

    def __init__(self, width=24):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.unused = nn.Linear(width, 3)

    def forward(self, x, other=None, attention_mask=None):
        """x [B, T, width]."""
        source = x if other is None else other
        return self.o(self.q(x) * self.k(source) + self.v(source))


class Chain(nn.Module):
    """Linears of several widths, each fed by the one before it."""

    def __init__(self, widths=(64, 96, 128, 160, 32)):
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x):
        """x [..., widths[0]]."""
        for step in self.steps:
            x = torch.tanh(step(x))
        return x


def batches(count=6, size=4, tokens=5, width=24, seed=0):
    """Random inputs [size, tokens, width]."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(size, tokens, width, generator=random) for _ in range(count)]


def assert_moments(found, data, within=1.0):
    """Found [K, K] is E[x xᵀ] of rows of data [..., K]: the diagonal to 1e-5, correlations to half a step of 1/32767.

    `within`: how many times that; the sum of what packed moments are merged from has more of it.
    """
    rows = data.reshape(-1, data.shape[-1]).double()
    true = rows.mT @ rows / len(rows)
    torch.testing.assert_close(found.diagonal().double(), true.diagonal(), rtol=1e-5, atol=0)
    size = true.diagonal().sqrt()
    assert float(((found.double() - true).abs() / (size[:, None] * size)).max()) < within * 0.5 / 32767 + 2e-6


def same(one, other):
    """Whether two collections hold the same layers with the same tensors, to the bit."""
    if set(one) != set(other):
        return False
    names = ("hessian", "held_out", "absmax", "mean", "minimum", "maximum", "samples", "magnitudes")
    names += ("output_hessian", "output_held_out")
    for layer in one:
        a, b = one[layer], other[layer]
        if (a.tokens, a.held_out_tokens) != (b.tokens, b.held_out_tokens):
            return False
        for name in names:
            x, y = getattr(a, name), getattr(b, name)
            if (x is None) != (y is None) or (x is not None and not torch.equal(x, y)):
                return False
    return True
