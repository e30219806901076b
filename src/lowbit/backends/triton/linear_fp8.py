"""linear for fp8_e4m3 and fp8_e5m2 in plain parts, with activations as they are or rounded to fp8."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.triton import bytes_values, linear_bytes, linear_fp8_activations
from lowbit.dispatch import kernel
from lowbit.formats.fp8 import Fp8E4M3, Fp8E5M2
from lowbit.formats.parts import Parts


def refuses(fmt: Fp8E4M3 | Fp8E5M2, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    if isinstance(fmt, Fp8E4M3) and fmt.rounds_input:
        return linear_fp8_activations.refuses(fmt, x, parts, bias)
    return linear_bytes.refuses(x, parts, bias)


@kernel("linear", format="fp8_e5m2", backend="triton", refuses=refuses, tolerance=6e-3)
@kernel("linear", format="fp8_e4m3", backend="triton", refuses=refuses, tolerance=6e-3)
def linear_fp8(fmt: Fp8E4M3 | Fp8E5M2, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], plain parts, bias [N] or None -> [..., N] in the dtype of x."""
    if isinstance(fmt, Fp8E4M3) and fmt.rounds_input:
        return linear_fp8_activations.linear(fmt, x, parts, bias)
    code = bytes_values.E5M2 if fmt.name == "fp8_e5m2" else bytes_values.E4M3
    return linear_bytes.linear(fmt, x, parts, bias, code=code)
