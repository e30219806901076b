"""The gradient of a linear's input for the formats that `dequantize` decodes: grad [..., N] times the weight."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.triton import decoded_linear, device, weight_rows
from lowbit.dispatch import kernel
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.layouts import words128


def refuses(fmt: Format, grad: Tensor, parts: Parts, k: int) -> str | None:
    """Why this call cannot run here, or None."""
    return device.refuses(grad, **parts) or decoded_linear.refuses(fmt, grad, parts, None, "")


def refuses_words128(fmt: Format, grad: Tensor, parts: Parts, k: int) -> str | None:
    """Why this call cannot run here, or None."""
    return device.refuses(grad, **parts) or decoded_linear.refuses(fmt, grad, parts, None, words128.NAME)


def linear_input_gradient(fmt: Format, grad: Tensor, parts: Parts, k: int) -> Tensor:
    """grad [..., N] -> [..., K] in the dtype of grad."""
    return decoded_linear.input_gradient(fmt, grad, parts, k, "")


def linear_input_gradient_words128(fmt: Format, grad: Tensor, parts: Parts, k: int) -> Tensor:
    """grad [..., N], parts in words128 -> [..., K] in the dtype of grad."""
    return decoded_linear.input_gradient(fmt, grad, parts, k, words128.NAME)


for _name in weight_rows.FORMATS:
    kernel("linear_input_gradient", format=_name, backend="triton", refuses=refuses, tolerance=6e-3)(
        linear_input_gradient
    )
    if _name in words128.FORMATS:
        kernel(
            "linear_input_gradient", format=_name, backend="triton", layout=words128.NAME, refuses=refuses_words128,
            tolerance=6e-3,
        )(linear_input_gradient_words128)  # fmt: skip
