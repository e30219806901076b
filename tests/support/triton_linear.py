"""What every Triton linear is held to: the product in float64 of the dequantized weight, on odd shapes.

Runs on a GPU where there is one, else in Triton's interpreter, if TRITON_INTERPRET=1 was set before Python started; the
interpreter rounds bfloat16 wrongly, so there the activations are float16 and float32.
"""

from __future__ import annotations

import os

import pytest
import torch

from lowbit.dispatch import select, use_backend
from lowbit.formats import parse_spec
from lowbit.tensor import QuantizedTensor
from tests.support.cpu_linear import activations, packed_weight, relative_error

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = (torch.float16, torch.float32, *((torch.bfloat16,) if ON_GPU else ()))
TOKENS = (1, 2, 3, 5, 8, 9, 17, 63)
ROWS = (1, 15, 17, 100)


def require() -> None:
    """Skip the calling module where Triton kernels cannot run, or nobody asked for the interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if not (ON_GPU or INTERPRETED):
        pytest.skip("no GPU; TRITON_INTERPRET=1 runs the kernels on a CPU", allow_module_level=True)


def triton_kernel(spec: str, layout: str, x: torch.Tensor, packed: QuantizedTensor, bias: torch.Tensor | None):
    """The entry that would run; fails unless it is a Triton kernel."""
    fmt = parse_spec(spec)
    entry = select("linear", fmt.name, layout, DEVICE.type, (fmt, x, packed.parts, bias))
    if entry.backend != "triton":
        pytest.fail(f"{entry.name} would run, not a Triton kernel")
    return entry


def check_linear(spec: str, n: int, k: int, m: int, dtype: torch.dtype, *, layout: str, bias: bool = True,
                 float32_error: float = 1e-5, reference=None) -> None:  # fmt: skip
    """Assert that the Triton kernel's product is right.

    `float32_error` is what float32 activations may cost; `reference(x, weight)` gives the wanted product in float64
    where activations are rounded by definition.
    """
    packed, weight = packed_weight(spec, n, k, layout)
    x = activations(m, k, dtype)
    added = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(dtype) if bias else None
    wanted = (reference or (lambda x, w: x.double() @ w.t()))(x, weight)
    if added is not None:
        wanted = wanted + added.double()
    packed, x = _moved(packed, layout), x.to(DEVICE)
    added = None if added is None else added.to(DEVICE)
    with use_backend("triton"), torch.inference_mode():
        found = torch.nn.functional.linear(x, packed, added)
    assert found.dtype == dtype
    assert found.shape == (m, n)
    limit = float32_error if dtype == torch.float32 else triton_kernel(spec, layout, x, packed, added).tolerance
    assert relative_error(found.cpu(), wanted) <= limit, (spec, n, k, m, dtype)


def check_properties(spec: str, n: int, k: int, *, layout: str) -> None:
    """Assert what holds beside the numbers: gaps in x, leading axes, no tokens, the same bits at every call."""
    packed, _ = packed_weight(spec, n, k, layout)
    packed = _moved(packed, layout)
    linear = torch.nn.functional.linear
    with use_backend("triton"), torch.inference_mode():
        for m in (1, 9, 40):
            x = activations(m, k, torch.float16).to(DEVICE)
            whole = linear(x, packed)
            gaps = activations(m, 2 * k, torch.float16).to(DEVICE)
            gaps[:, ::2] = x
            assert torch.equal(linear(gaps[:, ::2], packed), whole)
            assert torch.equal(linear(x.view(1, m, 1, k), packed), whole.view(1, m, 1, n))
            assert torch.equal(linear(x, packed), whole)
        assert torch.equal(linear(x[0], packed), linear(x[:1], packed)[0])
        assert linear(activations(0, k, torch.float16).to(DEVICE), packed).shape == (0, n)


def _moved(packed: QuantizedTensor, layout: str) -> QuantizedTensor:
    return packed if DEVICE.type == "cpu" else packed.in_layout("").to(DEVICE).in_layout(layout)
