"""linear for awq_w4a16 in the layout words128."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.triton import decoded_linear, device, linear_words, words
from lowbit.dispatch import kernel
from lowbit.formats.awq_w4a16 import AwqW4A16
from lowbit.formats.parts import Parts
from lowbit.layouts import words128


def refuses(fmt: AwqW4A16, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    return linear_words.refuses_group(fmt.group_size) or device.refuses_product(x, bias=bias, **parts)


@kernel("linear", format="awq_w4a16", backend="triton", layout=words128.NAME, refuses=refuses, tolerance=6e-3)
def linear_awq_w4a16(fmt: AwqW4A16, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts in words128, bias [N] or None -> [..., N] in the dtype of x."""
    if linear_words.is_many(fmt, x, parts, bias):
        return decoded_linear.product(fmt, x, parts, bias, words128.NAME)
    return linear_words.product(
        x, parts["qdata"], parts["scale"], group=fmt.group_size, code=words.INTEGERS, stored=linear_words.PLAIN,
        zero=parts["zero"], bias=bias,
    )  # fmt: skip
