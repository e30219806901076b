"""Sending quantized weights between processes, as DTensor does: part by part, in few bits.

Parts are sent as bytes. Rows are gathered along N; parts that all rows share are the same on all ranks already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.errors import UnsupportedError
from lowbit.formats.parts import raw_bytes
from lowbit.tensor import QuantizedTensor, implements

aten = torch.ops.aten
functional = torch.ops._c10d_functional  # noqa: SLF001  (the collectives that DTensor calls)


@implements(aten.constant_pad_nd.default)
def _pad(func: Any, args: Any, kwargs: Any) -> Any:
    """Rows of zeros at the end, which is how DTensor makes shards equal."""
    w, pad, value = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("value", 0)
    only_rows = len(pad) == 2 * w.dim() and not any(pad[:-1]) and pad[-1] >= 0 and not value
    if not only_rows or not w.is_matrix or w.transposed:
        return NotImplemented
    padded = w.new_zeros((w.shape[0] + pad[-1], w.shape[1]))
    padded.narrow(0, 0, w.shape[0]).copy_(w)
    return padded


def _scatter(func: Any, args: Any, kwargs: Any) -> Any:
    outputs, inputs, *rest = args
    (target,), pieces = outputs, inputs[0] if inputs else []
    for piece in pieces:
        _check_alike(target, piece)
    work = None
    for index, part in enumerate(target.part_list):
        _wait(work)
        into = raw_bytes(part).contiguous()
        sources = [[raw_bytes(piece.part_list[index]).contiguous() for piece in pieces]] if inputs else inputs
        _, work = func([into], sources, *rest, **kwargs)
        _wait(work)
        raw_bytes(part).copy_(into)
    return outputs, work


def _broadcast(func: Any, args: Any, kwargs: Any) -> Any:
    tensors, *rest = args
    work = None
    for tensor in tensors:
        for part in tensor.part_list:
            sent = raw_bytes(part).contiguous()
            _, work = func([sent], *rest, **kwargs)
            _wait(work)
            raw_bytes(part).copy_(sent)
    return tensors, work


def _all_gather(func: Any, args: Any, kwargs: Any) -> Any:
    w, size, *rest = args
    w = w.in_layout("")
    if w.transposed or not w.is_matrix or w.matrix[0] % w.format.row_multiple:
        return NotImplemented
    parts = w.parts
    for rule in w.format.rules:
        axis = rule.row_axis
        if axis is not None:
            rows = raw_bytes(parts[rule.name]).transpose(0, axis).contiguous()
            gathered = functional.wait_tensor(func(rows, size, *rest, **kwargs))
            parts[rule.name] = gathered.transpose(0, axis).contiguous().view(parts[rule.name].dtype)
    shape = (w.matrix[0] * size, w.matrix[1])
    return w.with_parts(parts, shape=shape, matrix=shape, view_of="", room=0)


def _waited(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0]  # the parts have arrived: `_all_gather` waits


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()


def _check_alike(target: QuantizedTensor, piece: Tensor) -> None:
    if not isinstance(piece, QuantizedTensor) or (piece.spec, piece.matrix) != (target.spec, target.matrix):
        raise UnsupportedError(f"cannot scatter {piece!r} into {target!r}: all pieces must be of one format and size")


if torch.distributed.is_available():
    implements(torch.ops.c10d.scatter_.default)(_scatter)
    implements(torch.ops.c10d.broadcast_.default)(_broadcast)
    implements(functional.all_gather_into_tensor.default)(_all_gather)
    for name in ("wait_tensor", "_wrap_tensor_autograd"):  # the second one is newer than PyTorch 2.7
        if hasattr(functional, name):
            implements(getattr(functional, name).default)(_waited)
