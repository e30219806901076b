"""Views, rows and other pieces of a quantized weight.

Rows can be cut anywhere: where a cut would split a block of rows that share a scale, the rows are gathered one by one
instead, exactly. In a kernel's layout there are no rows to cut: the weight is unpacked first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.errors import UnsupportedError
from lowbit.formats.parts import concat_rows, gather_rows, narrow_rows
from lowbit.tensor import QuantizedTensor, implements, shortcut

aten = torch.ops.aten


@implements(aten.detach.default, aten.alias.default)
def _alias(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].with_parts(args[0].parts)


@shortcut(torch.Tensor.detach)
def _detach(w: QuantizedTensor) -> QuantizedTensor:
    # nn.Parameter detaches what it is given, and the first op that PyTorch dispatches to a tensor subclass makes it
    # import half a second of torch.distributed and sympy; this way a model is loaded without them.
    return w.with_parts(w.parts)


def _flip(w: QuantizedTensor) -> QuantizedTensor:
    shape = (*w.shape[:-2], w.shape[-1], w.shape[-2])
    return w.with_parts(w.parts, shape=shape, transposed=not w.transposed)


@implements(aten.t.default)
def _t(func: Any, args: Any, kwargs: Any) -> Any:
    return _flip(args[0]) if args[0].dim() == 2 else _alias(func, args, kwargs)


@implements(aten.transpose.int)
def _transpose(func: Any, args: Any, kwargs: Any) -> Any:
    w, dims = args[0], {axis % args[0].dim() for axis in args[1:3]}
    if len(dims) == 1:
        return _alias(func, args, kwargs)
    return _flip(w) if dims == {w.dim() - 1, w.dim() - 2} else NotImplemented


@implements(aten.permute.default)
def _permute(func: Any, args: Any, kwargs: Any) -> Any:
    w = args[0]
    order, axes = [axis % w.dim() for axis in args[1]], list(range(w.dim()))
    if order == axes:
        return _alias(func, args, kwargs)
    return _flip(w) if order == [*axes[:-2], axes[-1], axes[-2]] else NotImplemented


@implements(aten.expand.default)
def _expand(func: Any, args: Any, kwargs: Any) -> Any:
    same = all(size in (-1, own) for size, own in zip(args[1], args[0].shape, strict=False))
    return _alias(func, args, kwargs) if same and len(args[1]) == args[0].dim() else NotImplemented


@implements(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(func: Any, args: Any, kwargs: Any) -> Any:
    w, size = args[0], list(args[1])
    if size == list(w.shape):
        return _alias(func, args, kwargs)
    if w.transposed:
        return NotImplemented
    if -1 in size:
        known = -torch.Size(size).numel()
        size[size.index(-1)] = w.numel() // known if known else 0
    if torch.Size(size).numel() != w.numel():
        raise UnsupportedError(f"a weight of shape {tuple(w.shape)} has no view of shape {tuple(args[1])}")
    return _reshape(w, tuple(size))


def _reshape(w: QuantizedTensor, shape: tuple[int, ...]) -> QuantizedTensor:
    return w.with_parts(w.parts, shape=shape)


def _rows(w: QuantizedTensor, start: int, stop: int, step: int = 1, *, apart: bool = False) -> Any:
    """Entries [start, stop) of the first axis as a quantized weight; NotImplemented where they are not rows.

    A view where no block of rows that share a scale is cut at its start; else, and with `apart`, a copy in the format
    of single rows.
    """
    w = w.unpacked()
    if w.transposed and w.dim() > 2:  # the first axis is not one of the two that are swapped
        rows = _rows(_flip(w), start, stop, step, apart=apart)
        return rows if rows is NotImplemented else _flip(rows)
    if not _has_rows(w):
        return NotImplemented
    per = _rows_per_entry(w)
    if step != 1 or apart or (start * per) % w.format.row_multiple:
        return _pick(w, torch.arange(start, stop, step, device=w.device))
    cut = narrow_rows(w.format.rules, w.parts, start * per, stop * per)
    splits = (stop * per) % w.format.row_multiple and stop < w.shape[0]
    return w.with_parts(
        cut,
        shape=(stop - start, *w.shape[1:]),
        matrix=((stop - start) * per, w.matrix[1]),
        view_of="shared" if splits and w.view_of != "copy" else w.view_of or "rows",
        room=0 if start else w.room or w.matrix[0],
    )


def _has_rows(w: QuantizedTensor) -> bool:
    """Whether the entries of the first axis are whole rows of the parts: of [..., K], or of a kernel [N, ...]."""
    return not w.transposed and w.dim() >= 2 and _rows_per_entry(w) * w.shape[0] == w.matrix[0]


def _rows_per_entry(w: QuantizedTensor) -> int:
    """How many rows of the parts make one entry of the first axis, where they do."""
    return torch.Size(w.shape[1:]).numel() // max(w.matrix[1], 1)


def _pick(w: QuantizedTensor, entries: Tensor) -> QuantizedTensor:
    """Entries of the first axis of plain parts by index (1-D), copied."""
    per = _rows_per_entry(w)
    rows = entries.repeat_interleave(per) * per + torch.arange(per, device=w.device).repeat(entries.numel())
    picked = gather_rows(w.format.rules, w.parts, rows)
    shape, matrix = (entries.numel(), *w.shape[1:]), (rows.numel(), w.matrix[1])
    return w.with_parts(picked, shape=shape, matrix=matrix, fmt=w.format.single_rows, view_of="shared", room=0)


@implements(aten.index_select.default)
def _index_select(func: Any, args: Any, kwargs: Any) -> Any:
    w, axis, index = args
    if axis % w.dim() or not _has_rows(w):
        return NotImplemented
    picked = _pick(w.unpacked(), index.reshape(-1))
    picked.view_of = ""
    return picked


@implements(aten.unbind.int)
def _unbind(func: Any, args: Any, kwargs: Any) -> Any:
    w, axis = args[0].unpacked(), args[1] if len(args) > 1 else kwargs.get("dim", 0)
    rows = [_select(func, (w, axis, index), {}) for index in range(w.shape[axis])]
    return NotImplemented if not rows or any(row is NotImplemented for row in rows) else rows


@implements(aten.unsqueeze.default)
def _unsqueeze(func: Any, args: Any, kwargs: Any) -> Any:
    w, axis = args
    axis %= w.dim() + 1
    return _reshape(w, (*w.shape[:axis], 1, *w.shape[axis:])) if axis < w.dim() - 1 else NotImplemented


@implements(aten.squeeze.dim)
def _squeeze(func: Any, args: Any, kwargs: Any) -> Any:
    w, axis = args[0], args[1] % args[0].dim()
    if w.shape[axis] != 1:
        return _alias(func, args, kwargs)
    return _reshape(w, (*w.shape[:axis], *w.shape[axis + 1 :])) if axis < w.dim() - 2 else NotImplemented


@implements(aten.slice.Tensor)
def _slice(func: Any, args: Any, kwargs: Any) -> Any:
    w: QuantizedTensor = args[0]
    options: list[Any] = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
    axis = options[0] % w.dim()
    start, stop, step = slice(*options[1:]).indices(w.shape[axis])
    if (start, stop, step) == (0, w.shape[axis], 1):
        return _alias(func, args, kwargs)
    return _rows(w, start, max(start, stop), step) if axis == 0 else NotImplemented


@implements(aten.as_strided.default)
def _as_strided(func: Any, args: Any, kwargs: Any) -> Any:
    """Only what FSDP asks for: the first rows of a matrix or kernel, padding cut off."""
    w, size, stride = args[0], tuple(args[1]), tuple(args[2])
    offset = args[3] if len(args) > 3 else kwargs.get("storage_offset", 0)
    dense = all(step == torch.Size(size[axis + 1 :]).numel() for axis, step in enumerate(stride))
    rows = len(size) >= 2 and size[1:] == tuple(w.shape[1:]) and dense and not offset
    return _rows(w, 0, size[0]) if rows and size[0] <= w.shape[0] else NotImplemented


@implements(aten.select.int)
def _select(func: Any, args: Any, kwargs: Any) -> Any:
    w, axis, index = args
    if axis % w.dim() or not -w.shape[0] <= index < w.shape[0]:
        return NotImplemented
    index = index % w.shape[0]
    row = _rows(w, index, index + 1)
    return row if row is NotImplemented else row.with_parts(row.parts, shape=tuple(w.shape[1:]))


@implements(aten.split.Tensor, aten.split_with_sizes.default)
def _split(func: Any, args: Any, kwargs: Any) -> Any:
    """Pieces of one format: if one of them cannot be a view, none is. FSDP relies on equal pieces on all ranks."""
    w, sizes, axis = args[0].unpacked(), args[1], args[2] if len(args) > 2 else kwargs.get("dim", 0)
    total = w.shape[axis]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    if axis % w.dim():
        return NotImplemented
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    per = _rows_per_entry(w)
    apart = any(start * per % w.format.row_multiple for start in starts)
    pieces = [_rows(w, start, start + size, apart=apart) for start, size in zip(starts, sizes, strict=True)]
    return NotImplemented if any(piece is NotImplemented for piece in pieces) else pieces


@implements(aten.cat.default)
def _cat(func: Any, args: Any, kwargs: Any) -> Any:
    weights, axis = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    weights = [w.unpacked() if isinstance(w, QuantizedTensor) else w for w in weights]
    first = weights[0]
    alike = all(isinstance(w, QuantizedTensor) and w.spec == first.spec for w in weights)
    if not alike or axis % first.dim() or any(_rows(w, 0, w.shape[0]) is NotImplemented for w in weights):
        return NotImplemented
    if any(w.shape[1:] != first.shape[1:] or w.matrix[1] != first.matrix[1] for w in weights):
        raise UnsupportedError("weights of different shapes cannot be joined along N")
    fmt, parts = first.format.joined([w.parts for w in weights])
    try:
        joined = concat_rows(fmt.rules, parts, [w.matrix[0] for w in weights])
    except UnsupportedError:  # another scale of the whole weight, or a ragged block in the middle
        return NotImplemented
    rows = sum(w.matrix[0] for w in weights)
    shape = (sum(w.shape[0] for w in weights), *first.shape[1:])
    return first.with_parts(joined, shape=shape, matrix=(rows, first.matrix[1]), fmt=fmt)
