"""Copies of a quantized weight, conversions, and new tensors like it: the same thing done to every part.

A weight in a kernel's layout stays in it, except on a device where no kernel reads it: there it has plain parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.dispatch import has_kernel
from lowbit.errors import UnsupportedError
from lowbit.formats.parts import Parts, gather_rows, raw_bytes
from lowbit.tensor import QuantizedTensor, implements, shortcut

aten = torch.ops.aten


@implements(aten.clone.default)
def _clone(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].map_parts(torch.clone)


@implements(aten.contiguous.default)
def _contiguous(func: Any, args: Any, kwargs: Any) -> Any:
    return NotImplemented if args[0].transposed else args[0].map_parts(torch.Tensor.contiguous)


@implements(aten._to_copy.default)
def _to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    w, dtype, device = args[0], kwargs.get("dtype") or args[0].dtype, kwargs.get("device")
    if not dtype.is_floating_point or dtype.itemsize == 1:
        return NotImplemented
    target = torch.device(device) if device is not None else w.device
    w = _readable_on(w, target)
    non_blocking = bool(kwargs.get("non_blocking", False))
    return w.map_parts(lambda part: part.to(target, non_blocking=non_blocking, copy=True), dtype=dtype)


def _readable_on(w: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    """The weight as it is to arrive on a device: unpacked where no kernel there reads its layout."""
    stays = not w.kernel_layout or device.type in (w.device.type, "meta")
    return w if stays or has_kernel(w.format.name, w.kernel_layout, device.type) else w.in_layout("")


@implements(aten.copy_.default)
def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[0], args[1]
    if not isinstance(target, QuantizedTensor):
        return target.copy_(source.dequantize(target.dtype))
    if target.shape != source.shape:
        raise UnsupportedError(f"cannot copy a weight {tuple(source.shape)} into one of {tuple(target.shape)}")
    if target.transposed:
        _copy(func, (target.transpose(-1, -2), source.transpose(-1, -2)), kwargs)
        return target
    parts = _fitting_parts(target, source)
    shared = [rule.name for rule in target.format.rules if rule.row_axis is None]
    if target.view_of == "copy":
        raise UnsupportedError(
            f"cannot write rows into a {target.spec} weight that is in a kernel's layout: they are a copy; write the "
            "whole weight, or take its rows after in_layout('')"
        )
    if target.view_of and not all(torch.equal(parts[name], target.parts[name]) for name in shared):
        raise UnsupportedError(
            f"cannot write rows into a {target.spec} weight: its rows share {', '.join(shared)}; copy a whole weight"
        )
    if target.view_of == "shared":
        raise UnsupportedError(
            f"cannot write rows into a {target.spec} weight that split a block of {target.format.row_multiple}; "
            "copy whole blocks"
        )
    for name, part in parts.items():
        target.parts[name].copy_(part)
    return target


def _fitting_parts(target: QuantizedTensor, source: Tensor) -> Parts:
    """The parts of `source`, which may be a plain tensor, in the format and layout of `target`."""
    if not isinstance(source, QuantizedTensor):
        plain = source.reshape(target.matrix)
        return QuantizedTensor.quantize(plain, target.format).in_layout(target.kernel_layout).parts
    if target.format == source.format.single_rows != source.format:
        source = source.in_layout("")
        rows = torch.arange(source.matrix[0], device=source.device)  # blocks of rows as blocks of one row: exact
        parts = gather_rows(source.format.rules, source.parts, rows)
        source = source.with_parts(parts, fmt=target.format)
    if (source.format, source.transposed, source.matrix) != (target.format, False, target.matrix):
        raise UnsupportedError(
            f"cannot copy {source!r} into {target!r} of another format or view; assign it instead "
            "(load_state_dict(..., assign=True)) or convert it"
        )
    return source.in_layout(target.kernel_layout).parts


@implements(aten.empty_like.default)
def _empty_like(func: Any, args: Any, kwargs: Any) -> Any:
    w, dtype = args[0], kwargs.get("dtype") or args[0].dtype
    if not dtype.is_floating_point:
        return torch.empty(w.shape, dtype=dtype, device=kwargs.get("device") or w.device)
    return w.map_parts(lambda part: torch.empty_like(part, device=kwargs.get("device")), dtype=dtype)


@implements(aten.new_empty.default, aten.new_zeros.default)
def _new(func: Any, args: Any, kwargs: Any) -> Any:
    """More or fewer rows of the same kind: a quantized weight that shares what all rows share. Else a plain tensor."""
    w, size = args[0].in_layout(""), tuple(args[1])
    dtype, device = kwargs.get("dtype") or w.dtype, kwargs.get("device") or w.device
    rows = _rows_of(w, size)
    if rows is not None and dtype.is_floating_point:
        fmt = w.format if rows % w.format.row_multiple == 0 else w.format.single_rows  # as `split` cuts rows
        matrix = (rows, w.matrix[1])
        parts, shapes = w.parts, fmt.part_shapes(*matrix)
        for rule in fmt.rules:
            if rule.row_axis is not None:
                parts[rule.name] = torch.empty(shapes[rule.name], dtype=parts[rule.name].dtype, device=device)
                if func is aten.new_zeros.default:
                    raw_bytes(parts[rule.name]).zero_()
            else:
                parts[rule.name] = parts[rule.name].to(device, copy=True)
        return QuantizedTensor(parts, fmt, size, dtype, matrix=matrix)
    make: Any = torch.zeros if func is aten.new_zeros.default else torch.empty
    return make(size, dtype=dtype, device=device)


def _rows_of(w: QuantizedTensor, size: tuple[int, ...]) -> int | None:
    """How many rows of the parts a tensor of this size has: a matrix with the same K, or entries like those of `w`."""
    if len(size) == 2 and size[1] == w.matrix[1]:
        return size[0]
    alike = not w.transposed and size[1:] == tuple(w.shape[1:]) and w.shape[0] == w.matrix[0]
    return size[0] if alike else None


@implements(aten.is_pinned.default)
def _is_pinned(func: Any, args: Any, kwargs: Any) -> Any:
    return all(part.is_pinned() for part in args[0].part_list)


@implements(aten._pin_memory.default)
def _pin_memory(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].map_parts(torch.Tensor.pin_memory)


@shortcut(torch.Tensor.share_memory_)
def _share_memory(self: QuantizedTensor) -> QuantizedTensor:
    """Other processes see the parts; the wrapper has no memory of its own to share."""
    for part in self.part_list:
        part.share_memory_()
    return self


@shortcut(torch.Tensor.is_shared)
def _is_shared(self: QuantizedTensor) -> bool:
    return all(part.is_shared() for part in self.part_list)


@implements(aten.equal.default)
def _equal(func: Any, args: Any, kwargs: Any) -> Any:
    a, b = args
    if not isinstance(a, QuantizedTensor) or not isinstance(b, QuantizedTensor) or a.format != b.format:
        return NotImplemented
    if a.kernel_layout != b.kernel_layout:
        a, b = a.in_layout(""), b.in_layout("")
    pairs = zip(a.part_list, b.part_list, strict=True)
    return a.shape == b.shape and all(torch.equal(raw_bytes(p), raw_bytes(q)) for p, q in pairs)
