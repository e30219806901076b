"""Layers to solve: weights with inputs whose second moments are known exactly, and samples of these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.solvers import Statistics
from tests.support.tensors import gaussian


def power_law(k: int, alpha: float, seed: int = 0) -> Tensor:
    """A root A [k, k] (float64) of H = A A^T, whose eigenvalues are 1, 2^-alpha, 3^-alpha, .. in random directions."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn((k, k), generator=generator, dtype=torch.float64))
    return basis * torch.arange(1, k + 1, dtype=torch.float64).pow(-alpha / 2)


@dataclass(frozen=True)
class Layer:
    """A Gaussian weight [n, k] and the input A z + mean, z standard normal."""

    weight: Tensor
    root: Tensor
    mean: Tensor

    @classmethod
    def make(cls, n: int, k: int, alpha: float = 1.0, seed: int = 0, mean: float = 0.0) -> Layer:
        """`mean`: the root mean square of E[x], in units of that of x - E[x]."""
        root = power_law(k, alpha, seed)
        offset = gaussian(1, k, seed=seed + 77, dtype=torch.float64)[0] * mean * root.square().sum(1).mean().sqrt()
        return cls(gaussian(n, k, seed=seed + 1), root, offset)

    @property
    def hessian(self) -> Tensor:
        """H = E[x x^T], exact, as float32."""
        return (self.root @ self.root.t() + torch.outer(self.mean, self.mean)).float()

    def samples(self, tokens: int, seed: int = 0) -> Tensor:
        """Rows of x, float64 [tokens, k]."""
        return gaussian(tokens, self.root.shape[0], seed=seed, dtype=torch.float64) @ self.root.t() + self.mean

    def statistics(self, tokens: int, seed: int = 0, *, kept: int = 0) -> Statistics:
        """What calibration sees of so many samples in each half; it keeps some of them."""
        first, second = self.samples(2 * tokens, seed).split(tokens)
        both = torch.cat([first, second])
        return Statistics(
            hessian=(first.t() @ first / tokens).float(),
            tokens=tokens,
            held_out=(second.t() @ second / tokens).float(),
            held_out_tokens=tokens,
            absmax=both.abs().amax(0).float(),
            mean=both.mean(0).float(),
            minimum=both.amin(0).float(),
            maximum=both.amax(0).float(),
            samples=first[:kept].float() if kept else None,
        )

    def exact(self) -> Statistics:
        """Statistics of infinitely many samples."""
        known = self.hessian
        return Statistics(
            hessian=known, tokens=1 << 40, held_out=known, held_out_tokens=1 << 40, mean=self.mean.float()
        )
