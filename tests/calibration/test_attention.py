"""Attention that runs backward: by matrix products for short texts on a CPU, by PyTorch's kernel elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lowbit


class Operators(TorchDispatchMode):
    """Counts the operators of attention that run in its with block."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = self.softmaxes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.fused += "flash" in name and "backward" not in name
        self.softmaxes += "softmax" in name and "backward" not in name
        return function(*args, **(kwargs or {}))


class Attention(nn.Module):
    """One layer of attention, computed again in the way back where `again`."""

    def __init__(self, *, again: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.again = nn.Linear(32, 96), nn.Linear(32, 32), again

    def _inner(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x, attention_mask=None):
        """The mask tells how many tokens there are, and hides none."""
        return checkpoint(self._inner, x, use_reentrant=False) if self.again else self._inner(x)


def batches(tokens: int, *, masked: bool = True) -> list[dict[str, torch.Tensor]]:
    """Four of them."""
    made = [{"x": torch.randn(2, tokens, 32)} for _ in range(4)]
    return [{**one, "attention_mask": torch.ones(2, tokens, dtype=torch.long)} for one in made] if masked else made


@pytest.mark.parametrize(
    ("tokens", "masked", "gradients", "multiplied"),
    [(128, True, True, 4), (129, True, True, 0), (64, False, True, 0), (64, True, False, 0)],
)
def test_short_texts_that_run_backward_are_multiplied(tokens, masked, gradients, multiplied):
    """Longer ones, models of other things, and passes without gradients keep the kernel."""
    with Operators() as seen:
        lowbit.calibrate(Attention(), batches(tokens, masked=masked), gradients=gradients)
    assert (seen.softmaxes, seen.fused) == (multiplied, 4 - multiplied)


def test_the_moments_are_those_of_the_kernel(monkeypatch):
    """Up to the rounding of float32."""
    torch.manual_seed(0)
    model, data = Attention(), batches(40)
    found = lowbit.calibrate(model, data, gradients=True)
    monkeypatch.setattr("lowbit.calibration.attention._FEW", 0)
    expected = lowbit.calibrate(model, data, gradients=True)
    for name in ("qkv", "out"):
        torch.testing.assert_close(found[name].hessian, expected[name].hessian)
        torch.testing.assert_close(found[name].output_hessian, expected[name].output_hessian, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler's look at what a hook returns
def test_what_is_computed_again_is_computed_alike():
    """Models that keep no activations, and compiled ones, can be calibrated with gradients."""
    for model in (Attention(again=True), torch.compile(Attention(), backend="eager")):
        found = lowbit.calibrate(model, batches(16), gradients=True)
        assert all(known.output_hessian is not None for known in found.values())
