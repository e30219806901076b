"""linear for nvfp4 in the layout words128: codes times e4m3 scales are exact in 16 bits, the global scale is last."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.triton import decoded_linear, device, linear_words, words
from lowbit.dispatch import kernel
from lowbit.formats.nvfp4 import GROUP, Nvfp4
from lowbit.formats.parts import Parts
from lowbit.layouts import words128


def refuses(fmt: Nvfp4, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    return device.refuses_product(x, bias=bias, **parts)


@kernel("linear", format="nvfp4", backend="triton", layout=words128.NAME, refuses=refuses, tolerance=6e-3)
def linear_nvfp4(fmt: Nvfp4, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts in words128, bias [N] or None -> [..., N] in the dtype of x."""
    if linear_words.is_many(fmt, x, parts, bias):
        return decoded_linear.product(fmt, x, parts, bias, words128.NAME)
    shared = parts["global_scale"].float()
    return linear_words.product(
        x, parts["qdata"], parts["scale"], group=GROUP, code=words.E2M1, stored=linear_words.E4M3,
        alpha=shared.reciprocal() if fmt.global_scale_divides else shared, bias=bias,
    )  # fmt: skip
