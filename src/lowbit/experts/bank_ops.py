"""What a QuantizedBank does without being dequantized: one handler an operation, on the parts or expert by expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import UnsupportedError
from lowbit.experts.bank import BANK, QuantizedBank
from lowbit.formats.parts import raw_bytes
from lowbit.ops import grouped
from lowbit.tensor import QuantizedTensor, handlers

aten = torch.ops.aten


def _handles(*overloads: Any) -> Callable[[handlers.Handler], handlers.Handler]:
    return handlers.implements(*overloads, table=BANK)


@_handles(aten.detach.default, aten.alias.default)
def _alias(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].with_parts(args[0].parts)


@_handles(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default)
def _same_shape(func: Any, args: Any, kwargs: Any) -> Any:
    """A product asks for these before it begins; only the shape that is there already can be given."""
    bank, size = args[0], list(args[1])
    same = len(size) == 3 and all(wanted in (-1, own) for wanted, own in zip(size, bank.shape, strict=True))
    return _alias(func, args, kwargs) if same else NotImplemented


@_handles(aten.transpose.int)
def _transpose(func: Any, args: Any, kwargs: Any) -> Any:
    bank, axes = args[0], {axis % 3 for axis in args[1:3]}
    if axes == {1, 2}:
        return bank.with_parts(bank.parts, transposed=not bank.transposed)
    return _alias(func, args, kwargs) if len(axes) == 1 else NotImplemented


@_handles(aten.permute.default)
def _permute(func: Any, args: Any, kwargs: Any) -> Any:
    order = [axis % 3 for axis in args[1]]
    if order == [0, 1, 2]:
        return _alias(func, args, kwargs)
    return _transpose(func, (args[0], 1, 2), {}) if order == [0, 2, 1] else NotImplemented


# ---- experts --------------------------------------------------------------------------------------------------------


@_handles(aten.select.int)
def _select(func: Any, args: Any, kwargs: Any) -> Any:
    bank, axis, index = args
    if axis % 3 or not -bank.shape[0] <= index < bank.shape[0]:
        return NotImplemented
    return bank.expert(index)


@_handles(aten.unbind.int)
def _unbind(func: Any, args: Any, kwargs: Any) -> Any:
    bank, axis = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return NotImplemented if axis % 3 else [bank.expert(index) for index in range(bank.shape[0])]


@_handles(aten.slice.Tensor)
def _slice(func: Any, args: Any, kwargs: Any) -> Any:
    bank: QuantizedBank = args[0]
    options: list[Any] = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
    axis, cut = options[0], slice(*options[1:])
    if axis % 3:
        whole = cut.indices(bank.shape[axis]) == (0, bank.shape[axis], 1)
        return _alias(func, args, kwargs) if whole else NotImplemented
    return bank.map_parts(lambda part: part[cut])


@_handles(aten.split.Tensor, aten.split_with_sizes.default)
def _split(func: Any, args: Any, kwargs: Any) -> Any:
    bank, sizes, axis = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("dim", 0)
    if axis % 3:
        return NotImplemented
    pieces = {name: part.split(sizes) for name, part in bank.parts.items()}
    count = len(pieces["qdata"])
    return [bank.with_parts({name: pieces[name][index] for name in pieces}) for index in range(count)]


@_handles(aten.index_select.default)
def _index_select(func: Any, args: Any, kwargs: Any) -> Any:
    bank, axis, index = args
    if axis % 3:
        return NotImplemented
    return bank.map_parts(lambda part: raw_bytes(part).index_select(0, index).view(part.dtype))


@_handles(aten.index.Tensor)
def _index(func: Any, args: Any, kwargs: Any) -> Any:
    """Experts by number, copied in few bits; anything else dequantizes."""
    bank, (index, *others) = args
    if others or index is None or index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
        return NotImplemented
    return bank.map_parts(lambda part: raw_bytes(part)[index].view(part.dtype))


@_handles(aten.cat.default)
def _cat(func: Any, args: Any, kwargs: Any) -> Any:
    banks, axis = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if axis % 3 or not all(isinstance(bank, QuantizedBank) and _alike(bank, banks[0]) for bank in banks):
        return NotImplemented
    joined = {
        name: torch.cat([raw_bytes(bank.parts[name]) for bank in banks]).view(part.dtype)
        for name, part in banks[0].parts.items()
    }
    return banks[0].with_parts(joined)


def _alike(a: QuantizedBank, b: Any) -> bool:
    return isinstance(b, QuantizedBank) and (a.spec, a.matrix, a.transposed) == (b.spec, b.matrix, b.transposed)


# ---- copies ---------------------------------------------------------------------------------------------------------


@_handles(aten.clone.default)
def _clone(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].map_parts(torch.clone)


@_handles(aten._to_copy.default)
def _to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    bank, dtype, device = args[0], kwargs.get("dtype") or args[0].dtype, kwargs.get("device")
    if not dtype.is_floating_point or dtype.itemsize == 1:
        return NotImplemented
    target = torch.device(device) if device is not None else bank.device
    non_blocking = bool(kwargs.get("non_blocking", False))
    return bank.map_parts(lambda part: part.to(target, non_blocking=non_blocking, copy=True), dtype=dtype)


@_handles(aten.empty_like.default)
def _empty_like(func: Any, args: Any, kwargs: Any) -> Any:
    bank, dtype = args[0], kwargs.get("dtype") or args[0].dtype
    if not dtype.is_floating_point:
        return torch.empty(bank.shape, dtype=dtype, device=kwargs.get("device") or bank.device)
    return bank.map_parts(lambda part: torch.empty_like(part, device=kwargs.get("device")), dtype=dtype)


@_handles(aten.copy_.default)
def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[0], args[1]
    if not isinstance(target, QuantizedBank):
        return target.copy_(source.dequantize(target.dtype))
    if target.shape != source.shape:
        raise UnsupportedError(f"cannot copy a bank {tuple(source.shape)} into one of {tuple(target.shape)}")
    if isinstance(source, QuantizedBank):
        if not _alike(target, source):
            raise UnsupportedError(f"cannot copy {source!r} into {target!r} of another format; assign it instead")
        for name, part in target.parts.items():
            part.copy_(source.parts[name])
    else:
        for index in range(target.shape[0]):
            target.expert(index).copy_(source[index])
    return target


@_handles(aten.is_pinned.default)
def _is_pinned(func: Any, args: Any, kwargs: Any) -> Any:
    return all(part.is_pinned() for part in args[0].part_list)


@_handles(aten._pin_memory.default)
def _pin_memory(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].map_parts(torch.Tensor.pin_memory)


@_handles(aten.equal.default)
def _equal(func: Any, args: Any, kwargs: Any) -> Any:
    a, b = args
    if not isinstance(a, QuantizedBank) or not _alike(a, b) or a.shape != b.shape:
        return NotImplemented
    pairs = zip(a.part_list, b.part_list, strict=True)
    return all(torch.equal(raw_bytes(p), raw_bytes(q)) for p, q in pairs)


# ---- products -------------------------------------------------------------------------------------------------------


@_handles(aten.bmm.default)
def _bmm(func: Any, args: Any, kwargs: Any) -> Any:
    a, b = args
    if a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        raise UnsupportedError(f"bmm of {list(a.shape)} and {list(b.shape)}: their experts or inner axes differ")
    if isinstance(a, QuantizedBank) and isinstance(b, QuantizedBank):
        return NotImplemented
    return torch.stack([torch.mm(a[index], b[index]) for index in range(a.shape[0])])


@_handles(aten.baddbmm.default)
def _baddbmm(func: Any, args: Any, kwargs: Any) -> Any:
    bias, a, b = args
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    if isinstance(bias, QuantizedBank | QuantizedTensor):
        return NotImplemented
    product = _bmm(func, (a, b), {})
    if product is NotImplemented:
        return NotImplemented
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else (product + beta * bias).to(product.dtype)


def _grouped_mm(func: Any, args: Any, kwargs: Any) -> Any:
    """PyTorch's grouped product: x [T, K] and a bank [E, K, N], or in the backward pass [T, N] and [E, N, K]."""
    names = ("self", "mat2", "offs", "bias", "out_dtype")
    given = dict(zip(names, args, strict=False)) | kwargs
    x, bank, offsets = given["self"], given["mat2"], given.get("offs")
    if isinstance(x, QuantizedBank) or x.dim() != 2 or offsets is None or given.get("bias") is not None:
        return NotImplemented
    n, k = bank.matrix
    check_columns(x, k if bank.transposed else n, bank)
    if bank.transposed:
        out: Tensor = grouped.grouped_linear(x, bank.part_list, offsets, None, bank.spec)
    else:
        out = grouped.grouped_linear_input_gradient(x, bank.part_list, offsets, k, bank.spec)
    dtype = given.get("out_dtype")
    return out if dtype is None else out.to(dtype)


if hasattr(aten, "_grouped_mm"):  # newer than PyTorch 2.7
    _handles(aten._grouped_mm.default)(_grouped_mm)  # noqa: SLF001


def check_columns(x: Tensor, wanted: int, bank: QuantizedBank) -> None:
    """The parts of some formats are padded: a product over the wrong length would go unnoticed."""
    if not x.dim() or x.shape[-1] != wanted:
        raise UnsupportedError(
            f"a tensor of shape {list(x.shape)} cannot be multiplied with {bank!r}: its last axis must be {wanted} long"
        )
