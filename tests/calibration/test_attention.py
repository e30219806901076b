"""Attention that runs backward: of few tokens by matrix products, of many by the kernel, the same either way."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit.calibration.attention import ShortAttention


class Operators(TorchDispatchMode):
    """The names of all operators that run in its with block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def run(tokens: int, *, asks: bool, by_name: bool = False) -> tuple[bool, torch.Tensor]:
    """Whether PyTorch's kernel ran, and the result."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, tokens, 32, generator=g).requires_grad_(asks) for _ in range(3))
    with Operators() as seen, ShortAttention():
        if by_name:
            out = F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return any("flash" in name for name in seen.names), out


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(("tokens", "asks", "fused"), [(128, True, False), (129, True, True), (128, False, True)])
def test_few_tokens_that_ask_for_a_gradient_are_multiplied(tokens, asks, fused, by_name):
    """However the operands are given."""
    assert run(tokens, asks=asks, by_name=by_name)[0] == fused


def test_the_result_is_that_of_the_kernel():
    """Up to the rounding of float32."""
    (_, plain), (_, multiplied) = run(100, asks=False), run(100, asks=True)
    assert torch.allclose(multiplied, plain, rtol=1e-5, atol=1e-6)


def test_without_gradients_nothing_changes():
    """In a pass that only reads."""
    with torch.no_grad():
        assert run(64, asks=True)[0]
