"""What a QuantizedTensor does without being dequantized: one handler an operation, on the parts.

`F.linear` reaches `__torch_dispatch__` as `aten.linear` only in inference mode; elsewhere it is `t` and `mm` or
`addmm`, so all of these lead to the same `lowbit::linear`. Rows can be cut anywhere: where a cut would split a block
of rows that share a scale, the rows are gathered one by one instead, exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.errors import UnsupportedError
from lowbit.formats.parts import concat_rows, gather_rows, narrow_rows, raw_bytes
from lowbit.ops import generic
from lowbit.tensor import QuantizedTensor, implements, shortcut

aten = torch.ops.aten


# ---- products
# ---------------------------------------------------------------------------------------------------------


def _linear(x: Tensor, w: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """Multiply x [..., K] with the weight [N, K] transposed."""
    return generic.linear(x, w.part_list, bias, w.spec)


def _is_matrix(w: object) -> bool:
    """Whether this is a quantized [N, K], or [K, N] seen transposed, whose shape is that of its parts."""
    return isinstance(w, QuantizedTensor) and w.is_matrix


@shortcut(F.linear)
def _short_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    x = input
    if isinstance(x, QuantizedTensor) or not _is_matrix(weight) or weight.transposed:  # type: ignore[attr-defined]
        return NotImplemented
    autocast = torch.is_autocast_enabled(x.device.type)
    if autocast:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    watched = torch._C._len_torch_dispatch_stack()  # noqa: SLF001  (FakeTensorMode and its like must see the op)
    if needs_grad or autocast or type(x) is not Tensor or watched:
        return _linear(x, weight, bias)  # type: ignore[arg-type]
    # Nobody watches: the kernel is called without PyTorch's dispatcher, which would take longer than a small product.
    return generic.run_linear(x, weight.part_list, bias, weight.spec)  # type: ignore[attr-defined]


@implements(aten.linear.default)
def _aten_linear(func: Any, args: Any, kwargs: Any) -> Any:
    x, w, bias = (*args, None)[:3]
    bias = kwargs.get("bias", bias)
    if isinstance(x, QuantizedTensor) or not _is_matrix(w) or w.transposed:
        return NotImplemented
    return _linear(x, w, bias)


@implements(aten.mm.default)
def _mm(func: Any, args: Any, kwargs: Any) -> Any:
    return _product(args[0], args[1])


def _product(a: Tensor, b: Tensor) -> Any:
    """Compute a @ b with one quantized matrix: on either side, transposed or not, it is linear or its transpose."""
    if isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor):
        return NotImplemented
    if isinstance(a, QuantizedTensor):  # a @ b = (b.T @ a.T).T
        swapped = _product(b.t(), a.t())
        return swapped if swapped is NotImplemented else swapped.t()
    if not _is_matrix(b):
        return NotImplemented
    if b.transposed:  # type: ignore[attr-defined]
        return _linear(a, b, None)  # type: ignore[arg-type]
    return generic.linear_input_gradient(a, b.part_list, b.shape[1], b.spec)  # type: ignore[attr-defined]


@implements(aten.addmm.default)
def _addmm(func: Any, args: Any, kwargs: Any) -> Any:
    bias, a, b = args
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    if isinstance(bias, QuantizedTensor):
        return NotImplemented
    weight_last = _is_matrix(b) and b.transposed and not isinstance(a, QuantizedTensor)
    if weight_last and beta == 1 and alpha == 1 and bias.dim() == 1 and bias.shape[0] == b.shape[1]:
        return _linear(a, b, bias.to(a.dtype))
    product = _product(a, b)
    if product is NotImplemented:
        return NotImplemented
    if alpha != 1:
        product = product * alpha
    return product if beta == 0 else product + beta * bias  # with beta 0 even a NaN bias must not count


@implements(aten.bmm.default)
def _bmm(func: Any, args: Any, kwargs: Any) -> Any:
    a, b = args
    if isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor):
        return NotImplemented
    products = [_product(a[i], b[i]) for i in range(a.shape[0])]
    if not products or any(product is NotImplemented for product in products):
        return NotImplemented
    return torch.stack(products)


@shortcut(F.embedding)
def _short_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    options = dict(zip(("max_norm", "norm_type", "scale_grad_by_freq", "sparse"), args, strict=False)) | kwargs
    if not _is_matrix(weight) or weight.transposed or options.get("max_norm") is not None:  # type: ignore[attr-defined]
        return NotImplemented
    return _lookup(weight, input)  # type: ignore[arg-type]


@implements(aten.embedding.default)
def _embedding(func: Any, args: Any, kwargs: Any) -> Any:
    weight, indices = args[:2]
    return _lookup(weight, indices) if _is_matrix(weight) and not weight.transposed else NotImplemented


def _lookup(weight: QuantizedTensor, indices: Tensor) -> Tensor:
    return generic.embedding(indices, weight.part_list, weight.matrix[1], weight.spec, weight.dtype)


# ---- copies and conversions
# ---------------------------------------------------------------------------------------------


@implements(aten.detach.default, aten.alias.default)
def _alias(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].with_parts(args[0].parts)


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
    non_blocking = bool(kwargs.get("non_blocking", False))
    return w.map_parts(lambda part: part.to(target, non_blocking=non_blocking, copy=True), dtype=dtype)


@implements(aten.copy_.default)
def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[0], args[1]
    if not isinstance(target, QuantizedTensor):
        return target.copy_(source.dequantize(target.dtype))
    if target.shape != source.shape:
        raise UnsupportedError(f"cannot copy a weight {tuple(source.shape)} into one of {tuple(target.shape)}")
    if not isinstance(source, QuantizedTensor):
        source = QuantizedTensor.quantize(source, target.format).in_layout(target.kernel_layout)
    if (source.spec, source.transposed, source.matrix) != (target.spec, target.transposed, target.matrix):
        raise UnsupportedError(
            f"cannot copy a {source.spec} weight into a {target.spec} one; assign it instead "
            "(load_state_dict(..., assign=True)) or convert it"
        )
    for name, part in source.parts.items():
        target.parts[name].copy_(part)
    return target


@implements(aten.empty_like.default)
def _empty_like(func: Any, args: Any, kwargs: Any) -> Any:
    w, dtype = args[0], kwargs.get("dtype") or args[0].dtype
    if not dtype.is_floating_point:
        return torch.empty(w.shape, dtype=dtype, device=kwargs.get("device") or w.device)
    return w.map_parts(lambda part: torch.empty_like(part, device=kwargs.get("device")), dtype=dtype)


@implements(aten.new_empty.default, aten.new_zeros.default)
def _new(func: Any, args: Any, kwargs: Any) -> Any:
    """A matrix with the same K: a quantized weight that shares what all rows share; any other shape: a plain tensor."""
    w, size = args[0], tuple(args[1])
    dtype, device = kwargs.get("dtype") or w.dtype, kwargs.get("device") or w.device
    if len(size) == 2 and size[1] == w.matrix[1] and dtype.is_floating_point and not w.kernel_layout:
        parts, shapes = w.parts, w.format.part_shapes(*size)
        for rule in w.format.rules:
            if rule.row_axis is not None:
                parts[rule.name] = torch.empty(shapes[rule.name], dtype=parts[rule.name].dtype, device=device)
                if func is aten.new_zeros.default:
                    raw_bytes(parts[rule.name]).zero_()
            else:
                parts[rule.name] = parts[rule.name].to(device, copy=True)
        return QuantizedTensor(parts, w.format, size, dtype)
    make: Any = torch.zeros if func is aten.new_zeros.default else torch.empty
    return make(size, dtype=dtype, device=device)


@implements(aten.is_pinned.default)
def _is_pinned(func: Any, args: Any, kwargs: Any) -> Any:
    return all(part.is_pinned() for part in args[0].part_list)


@implements(aten._pin_memory.default)
def _pin_memory(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].map_parts(torch.Tensor.pin_memory)


@implements(aten.equal.default)
def _equal(func: Any, args: Any, kwargs: Any) -> Any:
    a, b = args
    if not isinstance(a, QuantizedTensor) or not isinstance(b, QuantizedTensor) or a.spec != b.spec:
        return NotImplemented
    pairs = zip(a.part_list, b.part_list, strict=True)
    return a.shape == b.shape and all(torch.equal(raw_bytes(p), raw_bytes(q)) for p, q in pairs)


# ---- shapes and rows
# ----------------------------------------------------------------------------------------------------


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
    return w.with_parts(w.parts, shape=tuple(size))


def _rows(w: QuantizedTensor, start: int, stop: int, step: int = 1) -> Any:
    """Entries [start, stop) of the first axis as a quantized weight; NotImplemented where they are not rows."""
    if w.transposed and w.dim() > 2:  # the first axis is not one of the two that are swapped
        rows = _rows(_flip(w), start, stop, step)
        return rows if rows is NotImplemented else _flip(rows)
    if w.transposed or w.kernel_layout or w.dim() < 2 or w.shape[-1] != w.matrix[1]:
        return NotImplemented
    per = torch.Size(w.shape[1:-1]).numel()  # rows of the matrix for each entry
    count = len(range(start, stop, step))
    shape, matrix = (count, *w.shape[1:]), (count * per, w.matrix[1])
    if step == 1 and (start * per) % w.format.row_multiple == 0 and count:
        cut = narrow_rows(w.format.rules, w.parts, start * per, stop * per)
        return w.with_parts(cut, shape=shape, matrix=matrix)
    entries = torch.arange(start, stop, step, device=w.device).repeat_interleave(per) * per
    rows = entries + torch.arange(per, device=w.device).repeat(count)
    picked = gather_rows(w.format.rules, w.parts, rows)
    return w.with_parts(picked, shape=shape, matrix=matrix, fmt=w.format.single_rows)


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
    """Only what FSDP asks for: the first rows of a matrix, padding cut off."""
    w, size, stride = args[0], tuple(args[1]), tuple(args[2])
    offset = args[3] if len(args) > 3 else kwargs.get("storage_offset", 0)
    rows = len(size) == 2 and size[1:] == tuple(w.shape[1:]) and stride == (size[1], 1) and not offset
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
    w, sizes, axis = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("dim", 0)
    total = w.shape[axis]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    if axis % w.dim():
        return NotImplemented
    pieces, start = [], 0
    for size in sizes:
        pieces.append(_rows(w, start, start + size))
        start += size
    return NotImplemented if any(piece is NotImplemented for piece in pieces) else pieces


@implements(aten.cat.default)
def _cat(func: Any, args: Any, kwargs: Any) -> Any:
    weights, axis = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = weights[0]
    alike = all(isinstance(w, QuantizedTensor) and w.spec == first.spec for w in weights)
    if not alike or axis % first.dim() or any(_rows(w, 0, w.shape[0]) is NotImplemented for w in weights):
        return NotImplemented
    if any(w.shape[1:] != first.shape[1:] for w in weights):
        raise UnsupportedError("weights of different shapes cannot be joined along N")
    try:
        joined = concat_rows(first.format.rules, [w.parts for w in weights], [w.matrix[0] for w in weights])
    except UnsupportedError:  # another global scale, or a ragged block in the middle: the parts cannot say it
        return NotImplemented
    rows = sum(w.matrix[0] for w in weights)
    shape = (sum(w.shape[0] for w in weights), *first.shape[1:])
    return first.with_parts(joined, shape=shape, matrix=(rows, first.matrix[1]))
