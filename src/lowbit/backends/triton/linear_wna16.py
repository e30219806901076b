"""linear for wna16 with codes of 4 bits in the layout words128."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.triton import decoded_linear, device, linear_words, words
from lowbit.dispatch import kernel
from lowbit.formats.parts import Parts
from lowbit.formats.wna16 import WNA16
from lowbit.layouts import words128


def refuses(fmt: WNA16, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    return device.refuses_product(x, bias=bias, **parts) or linear_words.refuses_group(_group(fmt, x.shape[-1]))


@kernel("linear", format="wna16", backend="triton", layout=words128.NAME, refuses=refuses, tolerance=6e-3)
def linear_wna16(fmt: WNA16, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], parts in words128, bias [N] or None -> [..., N] in the dtype of x."""
    if linear_words.is_many(fmt, x, parts, bias):
        return decoded_linear.product(fmt, x, parts, bias, words128.NAME)
    return linear_words.product(
        x, parts["qdata"], parts["scale"], group=_group(fmt, x.shape[-1]), code=words.INTEGERS,
        stored=linear_words.PLAIN, offset=parts.get("zero_point"), bias=bias,
    )  # fmt: skip


def _group(fmt: WNA16, k: int) -> int:
    """Columns of a group; one that reaches past the last column, and 0, is the whole row."""
    return min(fmt.group_size or k, k)
