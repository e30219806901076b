"""linear for mxfp4 in the layout words128: codes times powers of two, exact in bfloat16."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.triton import decoded_linear, device, linear_words, words
from lowbit.dispatch import kernel
from lowbit.formats.e8m0_scales import GROUP
from lowbit.formats.mxfp4 import Mxfp4
from lowbit.formats.parts import Parts
from lowbit.layouts import words128


def refuses(fmt: Mxfp4, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    return device.refuses_product(x, bias=bias, **parts)


@kernel("linear", format="mxfp4", backend="triton", layout=words128.NAME, refuses=refuses, tolerance=6e-3)
def linear_mxfp4(fmt: Mxfp4, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts in words128, bias [N] or None -> [..., N] in the dtype of x."""
    if linear_words.is_many(fmt, x, parts, bias):
        return decoded_linear.product(fmt, x, parts, bias, words128.NAME)
    return linear_words.product(
        x, parts["qdata"], parts["scale"], group=GROUP, code=words.E2M1, stored=linear_words.E8M0, bias=bias
    )
