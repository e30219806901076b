"""What every native linear kernel is held to: the product in float64 of the dequantized weight, on odd shapes."""

from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import select, use_backend
from lowbit.formats import parse_spec
from lowbit.layouts.base import get_layout
from lowbit.tensor import QuantizedTensor

TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 63)
ROWS = (1, 15, 16, 17, 33, 100)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What rounding the output to its dtype costs at least: relative RMS of one rounding.
ROUNDING = {torch.float32: 1e-7, torch.bfloat16: 2e-3, torch.float16: 3e-4}


def packed_weight(spec: str, n: int, k: int, layout: str, *, seed: int = 0) -> tuple[QuantizedTensor, torch.Tensor]:
    """A random weight with heavy tails in a layout, and what it stands for in float64."""
    generator = torch.Generator().manual_seed(seed + 7919 * n + k)
    w = torch.randn(n, k, generator=generator) * torch.exp(0.5 * torch.randn(1, k, generator=generator))
    plain = QuantizedTensor.quantize(w, spec, dtype=torch.float32)
    return plain.in_layout(layout), plain.dequantize(torch.float32).double()


def activations(m: int, k: int, dtype: torch.dtype, *, seed: int = 1) -> torch.Tensor:
    """Random activations [m, k] of which one column in 64 is thirty times larger, as those of transformers are."""
    generator = torch.Generator().manual_seed(seed + m)
    x = torch.randn(m, k, generator=generator)
    x[:, ::64] *= 30
    return x.to(dtype)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS of the difference over RMS of what is wanted."""
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def tolerance(spec: str, layout: str, x: torch.Tensor, packed: QuantizedTensor, bias: torch.Tensor | None) -> float:
    """What the kernel that would run declares; fails unless it is a native one."""
    fmt = parse_spec(spec)
    entry = select("linear", fmt.name, layout, "cpu", (fmt, x, packed.parts, bias))
    if entry.backend != "cpu":
        pytest.fail(f"{entry.name} would run, not a native kernel")
    return entry.tolerance


def check_linear(spec: str, n: int, k: int, m: int, dtype: torch.dtype, *, layout: str = "rows16", bias: bool = True,
                 float32_error: float = 1e-5, reference=None) -> None:  # fmt: skip
    """Assert that the native kernel's product is right.

    `float32_error` is what float32 activations may cost where the kernel keeps them; `reference(x, weight)` gives the
    wanted product in float64 where activations are rounded by definition.
    """
    packed, weight = packed_weight(spec, n, k, layout)
    x = activations(m, k, dtype)
    added = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(dtype) if bias else None
    wanted = (reference or (lambda x, w: x.double() @ w.t()))(x, weight)
    if added is not None:
        wanted = wanted + added.double()
    with use_backend("cpu"), torch.inference_mode():
        found = torch.nn.functional.linear(x, packed, added)
    assert found.dtype == dtype
    assert found.shape == (m, n)
    limit = float32_error if dtype == torch.float32 else tolerance(spec, layout, x, packed, added)
    assert relative_error(found, wanted) <= limit, (spec, n, k, m, dtype)


def check_properties(spec: str, n: int, k: int, *, layout: str = "rows16") -> None:
    """Assert what holds beside the numbers: gaps in x and bias, leading axes, no tokens, any number of threads."""
    packed, _ = packed_weight(spec, n, k, layout)
    fmt = parse_spec(spec)
    assert torch.equal(
        torch.cat(
            [part.reshape(-1).view(torch.uint8) for part in get_layout(layout, fmt).unpack(fmt, packed.parts).values()]
        ),
        torch.cat([part.reshape(-1).view(torch.uint8) for part in packed.in_layout("").parts.values()]),
    )
    linear = torch.nn.functional.linear
    before = torch.get_num_threads()
    with use_backend("cpu"), torch.inference_mode():
        for m in (1, 9, 40):
            x = activations(m, k, torch.bfloat16)
            whole = linear(x, packed)
            gaps = activations(m, 2 * k, torch.bfloat16)
            gaps[:, ::2] = x
            assert torch.equal(linear(gaps[:, ::2], packed), whole)
            assert torch.equal(linear(x.view(1, m, 1, k), packed), whole.view(1, m, 1, n))
            bias = torch.randn(2 * n).to(x.dtype)[::2]
            assert torch.equal(linear(x, packed, bias), linear(x, packed, bias.clone()))
            try:
                torch.set_num_threads(1)
                assert torch.equal(linear(x, packed), whole)
                torch.set_num_threads(3)
                assert torch.equal(linear(x, packed), whole)
            finally:
                torch.set_num_threads(before)
        assert linear(activations(0, k, torch.bfloat16), packed).shape == (0, n)
