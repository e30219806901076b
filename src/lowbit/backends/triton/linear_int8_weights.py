"""The product with an int8 weight that is only stored in int8 (activations=none). `linear_int8` calls it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lowbit.backends.triton import bytes_values, linear_bytes
from lowbit.formats.int8 import Int8
from lowbit.formats.parts import Parts
from lowbit.numerics.rotations import rotate_groups


def refuses(fmt: Int8, x: Tensor, parts: Parts, bias: Tensor | None) -> str | None:
    """Why this call cannot run here, or None."""
    return linear_bytes.refuses(x, parts, bias)


def linear(fmt: Int8, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], plain parts, bias [N] or None -> [..., N] in the dtype of x.

    A rotated weight stays as it is: the groups of x are rotated, in float32, and rounded to its dtype.
    """
    if fmt.rotation:
        fmt, x = replace(fmt, rotation=0), rotate_groups(x, fmt.rotation)
    return linear_bytes.linear(fmt, x, parts, bias, code=bytes_values.INT8)
