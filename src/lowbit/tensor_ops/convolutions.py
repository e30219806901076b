"""Convolutions with a quantized kernel, weight-only: a bounded piece of the kernel is decoded, then convolved with.

The kernel [O, I / groups, ...] is a view of a matrix [O, I / groups * ...], whose rows are output channels. Nothing is
unfolded: the input stays as it is, and PyTorch's own convolution runs on each decoded piece. Gradients reach the input
and the bias; the kernel is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.errors import UnsupportedError
from lowbit.formats.base import DECODE_ELEMENTS
from lowbit.formats.parts import narrow_rows
from lowbit.numerics.groups import row_chunks
from lowbit.ops import generic
from lowbit.tensor import QuantizedTensor, implements, shortcut
from lowbit.tensor_ops.products import autocast_input

aten = torch.ops.aten


class _Piece(NamedTuple):
    """Output channels [start, stop), which read input channels [first, last) in `groups` groups."""

    start: int
    stop: int
    first: int
    last: int
    groups: int


@shortcut(F.conv1d, F.conv2d, F.conv3d)
def _short_conv(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """As in a linear, kernel and bias follow the dtype of the input, which autocast may change; nothing is copied."""
    if not isinstance(weight, QuantizedTensor) or isinstance(input, QuantizedTensor):
        return NotImplemented
    autocast = torch._C._is_any_autocast_enabled()  # noqa: SLF001  (the public ones refuse devices such as meta)
    x = autocast_input(input) if autocast else input
    if not autocast and x.dtype == weight.dtype:
        return NotImplemented
    run = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}.get(weight.dim())
    if run is None or not x.is_floating_point():
        return NotImplemented
    kernel = weight.with_parts(weight.parts, dtype=x.dtype)
    with torch._C._DisableAutocast(), torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
        return run(x, kernel, None if bias is None else bias.to(x.dtype), *args, **kwargs)


@implements(aten.convolution.default)
def _convolution(func: Any, args: Any, kwargs: Any) -> Any:
    x, w, bias, stride, padding, dilation, transposed, _, groups = _full(args, kwargs, func)
    if not _is_kernel(w) or isinstance(x, QuantizedTensor) or isinstance(bias, QuantizedTensor):
        return NotImplemented
    _check(x, w, groups, transposed=transposed)
    w = w.in_layout("")
    bias = None if bias is None else bias.to(x.dtype)
    outputs = []
    for piece in _pieces(w, groups):
        part_bias = None if bias is None else bias[piece.start : piece.stop]
        kernel, channels = _decoded(w, piece, x.dtype), x[:, piece.first : piece.last]
        outputs.append(
            aten.convolution(channels, kernel, part_bias, stride, padding, dilation, False, [0], piece.groups)
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


@implements(aten.convolution_backward.default)
def _convolution_backward(func: Any, args: Any, kwargs: Any) -> Any:
    grad, x, w, _bias_sizes, stride, padding, dilation, transposed, _, groups, wanted = _full(args, kwargs, func)
    if not _is_kernel(w) or isinstance(x, QuantizedTensor) or isinstance(grad, QuantizedTensor) or wanted[1]:
        return NotImplemented
    _check(x, w, groups, transposed=transposed)
    w = w.in_layout("")
    grad_bias = grad.sum([0, *range(2, grad.dim())]) if wanted[2] else None
    if not wanted[0]:
        return None, None, grad_bias
    pieces = list(_pieces(w, groups))
    # Pieces that read the same input channels are summed: in float32, rounded once.
    total = torch.zeros_like(x, dtype=x.dtype if len(pieces) == 1 else torch.promote_types(x.dtype, torch.float32))
    for piece in pieces:
        total[:, piece.first : piece.last] += aten.convolution_backward(
            grad[:, piece.start : piece.stop],
            x[:, piece.first : piece.last],
            _decoded(w, piece, x.dtype),
            [piece.stop - piece.start],
            *(stride, padding, dilation, False, [0], piece.groups, [True, False, False]),
        )[0]
    return total.to(x.dtype), None, grad_bias


def _full(args: Any, kwargs: Any, func: Any) -> list[Any]:
    """All arguments in the order of the op's schema."""
    names = [argument.name for argument in func._schema.arguments]
    return [*args, *(kwargs[name] for name in names[len(args) :])]


def _is_kernel(w: object) -> bool:
    """Whether this is a quantized kernel [O, ...] whose rows are its output channels."""
    return isinstance(w, QuantizedTensor) and not w.transposed and w.dim() >= 3 and w.shape[0] == w.matrix[0]


def _check(x: Tensor, w: QuantizedTensor, groups: int, *, transposed: bool) -> None:
    if transposed:
        raise UnsupportedError(
            f"a transposed convolution cannot use {w!r}: the rows of its kernel are input channels; keep this layer"
        )
    if w.format.folds_bias:
        raise UnsupportedError(
            f"{w!r} shifts the activations, which a convolution pads and slides over; use a format without that"
        )
    if x.shape[1] != w.shape[1] * groups or w.shape[0] % groups:
        raise UnsupportedError(
            f"a tensor of shape {list(x.shape)} cannot be convolved with {w!r} in {groups} group(s): it must have "
            f"{w.shape[1] * groups} channels"
        )


def _pieces(w: QuantizedTensor, groups: int) -> Iterator[_Piece]:
    """Pieces of at most `DECODE_ELEMENTS` values: rows of a single group, or whole groups."""
    (n, k), inputs = w.matrix, w.shape[1]
    per, multiple = n // groups, w.format.row_multiple
    if n * k <= DECODE_ELEMENTS:
        yield _Piece(0, n, 0, inputs * groups, groups)
    elif groups > 1 and per * k <= DECODE_ELEMENTS:
        for start, stop in row_chunks(n, k, math.lcm(per, multiple), DECODE_ELEMENTS):
            first, last = start // per, stop // per
            yield _Piece(start, stop, first * inputs, last * inputs, last - first)
    else:
        for group in range(groups):
            for start, stop in row_chunks(per, k, multiple, DECODE_ELEMENTS):
                yield _Piece(group * per + start, group * per + stop, group * inputs, (group + 1) * inputs, 1)


def _decoded(w: QuantizedTensor, piece: _Piece, dtype: torch.dtype) -> Tensor:
    """The plain kernel of a piece, in `dtype`."""
    (n, k), parts = w.matrix, w.part_list
    rows = piece.stop - piece.start
    before = 0
    if rows < n:
        before = piece.start % w.format.row_multiple  # a group may begin inside a block of rows that share a scale
        parts = list(narrow_rows(w.format.rules, w.parts, piece.start - before, piece.stop).values())
    flat = generic.dequantize(parts, w.spec, [before + rows, k], dtype)
    return flat[before:].view(rows, *w.shape[1:])
