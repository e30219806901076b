"""linear for mxfp8 in plain parts: e4m3 codes and a power of two for every 32 of them, with activations as they are."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.triton import bytes_values, linear_bytes
from lowbit.backends.triton.linear_bytes import Blocks
from lowbit.dispatch import kernel
from lowbit.formats.e8m0_scales import GROUP
from lowbit.formats.mxfp8 import Mxfp8
from lowbit.formats.parts import Parts


def refuses(fmt: Mxfp8, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    return linear_bytes.refuses(x, parts, bias)


@kernel("linear", format="mxfp8", backend="triton", refuses=refuses, tolerance=6e-3)
def linear_mxfp8(fmt: Mxfp8, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], plain parts, bias [N] or None -> [..., N] in the dtype of x."""
    blocks = Blocks(parts["scale"], rows=1, columns=GROUP)
    return linear_bytes.linear(fmt, x, parts, bias, code=bytes_values.E4M3, blocks=blocks)
