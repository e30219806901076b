"""Marks of weights: a few of a weight's elements, by which it is known again in another dtype, and told from others.

A mark is text, base64 of bfloat16 values in little-endian order: up to 64 elements of the weight at even distances, the
first and the last among them. Elements are compared one by one and not as a hash, since a weight that was rounded to
another 16-bit dtype in between may differ by a step of bfloat16.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

ELEMENTS = 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # whose rounding is finer than `_RELATIVE`
_RELATIVE = 2.0**-7  # a step of bfloat16
_ABSOLUTE = 2.0**-24  # a step of the smallest values of float16
_ALIKE = 0.9  # of the elements, for the weights to be the same: rounding may have moved some by two steps


@runtime_checkable
class MarkedWeights(Protocol):
    """Statistics that know with which weights they were taken."""

    def other_weights(self, marks: Mapping[str, str]) -> str:
        """The warning for a model whose layers have these marks, where some tell of other weights; else ""."""
        ...


def places(count: int) -> list[int]:
    """The indices of the elements that a mark of `count` elements is made of."""
    number = min(count, ELEMENTS)
    return [index * (count - 1) // max(number - 1, 1) for index in range(number)]


def mark_of(weight: Tensor, shape: tuple[int, ...]) -> str:
    """The mark of a weight of that shape; "" where it is not here whole and plain: quantized, sharded, without values.

    8-bit floats have none either: they are rounded more coarsely than marks are compared.
    """
    plain = type(weight) in (Tensor, nn.Parameter) and not weight.is_meta
    if not plain or tuple(weight.shape) != tuple(shape) or weight.dtype not in DTYPES or not weight.numel():
        return ""
    where = torch.tensor(places(weight.numel()), device=weight.device)
    return mark_of_elements(weight.detach()[torch.unravel_index(where, weight.shape)])


def mark_of_elements(elements: Tensor) -> str:
    """The mark of a weight by its elements at `places`."""
    held = elements.float().bfloat16().cpu().view(torch.int16).numpy()
    return base64.b64encode(held.astype("<i2").tobytes()).decode("ascii")


def same_weight(mark: str, other: str) -> bool:
    """Whether two marks are of one weight, up to rounding to 16 bits. Raises `ValueError` for text that is no mark."""
    a, b = _elements(mark), _elements(other)
    if len(a) != len(b):
        return False
    close = (a - b).abs() <= torch.maximum(a.abs(), b.abs()) * _RELATIVE + _ABSOLUTE
    close |= ~(a.isfinite() & b.isfinite())  # float16 has no room for what other dtypes hold
    return bool(close.float().mean() >= _ALIKE)


def check_mark(mark: str, count: int) -> None:
    """Raise `ValueError` for text that is no mark of a weight of `count` elements."""
    if len(_elements(mark)) != min(count, ELEMENTS):
        raise ValueError(f"{mark!r} is no mark of {count} elements")


def _elements(mark: str) -> Tensor:
    raw = np.frombuffer(base64.b64decode(mark, validate=True), "<i2").astype(np.int16)
    return torch.from_numpy(raw).view(torch.bfloat16).float()
