"""The generic ops: `quantize`, `dequantize`, `linear`, `embedding`, over a spec string and parts in the format's order.

A new format needs no new schema. The spec may carry a kernel layout: `awq_w4a16(group_size=32)@name`. What several
kernels would have to do is done here, once: a pre-quant scale multiplies x before any kernel sees it, packed parts are
checked against their layout, and unpacked for a kernel that reads none (`FALLBACKS` counts that).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lowbit.dispatch import ANY_LAYOUT, select
from lowbit.errors import PartsError, UnsupportedError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.formats.registry import parse_spec
from lowbit.layouts.base import get_layout, misfit, read_tag, tagged
from lowbit.ops.library import declare
from lowbit.ops.packing import unpack

_device_type = cache(attrgetter("type"))  # PyTorch writes the name of a type anew whenever it is asked for
FALLBACKS: Counter[str] = Counter()  # how often a whole weight was decoded or unpacked for one call, by what for


@lru_cache(maxsize=4096)
def split_spec(spec: str) -> tuple[Format, str]:
    """The format and the layout name ("" for plain parts) of a spec string.

    Raises `PartsError` for another version of the layout than this one.
    """
    text, _, tag = spec.partition("@")
    return parse_spec(text), read_tag(tag)


def join_spec(fmt: Format, layout: str) -> str:
    """The spec string of a format in a layout ("" for plain parts); `split_spec` reads it."""
    return f"{fmt.spec}@{tagged(layout)}" if layout else fmt.spec


def named(fmt: Format, parts: Sequence[Tensor]) -> Parts:
    """The parts by name; `PartsError` when their number is wrong."""
    names = fmt.part_names
    if len(parts) != len(names):
        raise PartsError(f"{fmt}: takes {len(names)} parts ({', '.join(names)}), not {len(parts)}")
    return dict(zip(names, parts, strict=True))


def _check_columns(fmt: Format, layout: str, parts: Parts, n: int, k: int, what: str) -> None:
    """Raise `UnsupportedError` unless the parts can be those of a weight [n, k]: kernels take K from x.

    Where K is padded to whole groups, the codes of two lengths have one shape; there the caller must know.
    """
    if why := misfit(fmt, layout, parts, n, k):
        raise _is_not(fmt, layout, why, n, k, what)


def _is_not(fmt: Format, layout: str, why: str, n: int, k: int, what: str) -> UnsupportedError:
    """The error for parts that are not those of a weight [n, k]; `what` says that they should be."""
    hint = "" if layout else "; the last axis of x must be K, that of a gradient N"
    return UnsupportedError(
        f"{join_spec(fmt, layout)}: {why}. It should be a weight [{n}, {k}], as the shape of {what} says{hint}"
    )


def _rows_of(fmt: Format, layout: str, parts: Mapping[str, Tensor]) -> int:
    """N of a set of parts."""
    return get_layout(layout, fmt).rows_of(fmt, parts) if layout else fmt.rows_of(parts)


def _run(op: str, fmt: Format, layout: str, device: torch.device, args: tuple[Any, ...], parts_at: int) -> Any:
    """Run an op by the kernel that takes it, on plain parts where that kernel reads no layout.

    Raises `UnsupportedError` for a weight on another device: kernels are told addresses, and would read what is not
    theirs. Shapes alone (meta) may be asked for of any.
    """
    place = next(iter(args[parts_at].values())).device
    if place != device and device.type != "meta":
        raise UnsupportedError(f"{join_spec(fmt, layout)}: {op} on {device} of a weight on {place}; move one of them")
    entry = select(op, fmt.name, layout, _device_type(device), args)
    if layout and entry.layout == ANY_LAYOUT:
        if op in ("linear", "embedding"):  # the others decode the whole weight whatever it is in
            FALLBACKS[f"lowbit::{op} (unpacks {layout})"] += 1
        plain = unpack(fmt, args[parts_at], layout)
        args = (*args[:parts_at], plain, *args[parts_at + 1 :])
    return entry.run(*args)


def _quantize(w: Tensor, spec: str, seed: int | None) -> list[Tensor]:
    fmt, layout = split_spec(spec)
    made = select("quantize", fmt.name, layout, w.device.type, (fmt, w, seed)).run(fmt, w, seed)
    return [made[name] for name in fmt.part_names]


def _quantize_fake(w: Tensor, spec: str, seed: int | None) -> list[Tensor]:
    fmt, _ = split_spec(spec)
    shapes, dtypes = fmt.part_shapes(w.shape[0], w.shape[1]), fmt.part_dtypes(w.dtype)
    return [w.new_empty(shapes[name], dtype=dtypes[name]) for name in fmt.part_names]


def _dequantize(parts: Sequence[Tensor], spec: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    fmt, layout = split_spec(spec)
    by_name = named(fmt, parts)
    _check_columns(fmt, layout, by_name, shape[0], shape[1], "the result")
    args = (fmt, by_name, (shape[0], shape[1]), dtype)
    return _run("dequantize", fmt, layout, parts[0].device, args, 1)


def _dequantize_fake(parts: Sequence[Tensor], spec: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return parts[0].new_empty((shape[0], shape[1]), dtype=dtype)


def run_linear(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    """What the op `linear` does, without autograd and without PyTorch's dispatcher."""
    fmt, layout = split_spec(spec)
    by_name = named(fmt, parts)
    n, k = _rows_of(fmt, layout, by_name), x.shape[-1] if x.dim() else 1
    return multiply(x, fmt, layout, by_name, bias, n, k)


def multiply(x: Tensor, fmt: Format, layout: str, parts: Parts, bias: Tensor | None, n: int, k: int) -> Tensor:
    """`run_linear` for parts by name: x [..., k] times a weight [n, k].

    Weights evict from the caches whatever Python needs. After that a call of a function takes 1 to 2 microseconds
    rather than 0.1, and few are made on the way from F.linear to a kernel.
    """
    if why := misfit(fmt, layout, parts, n, k):
        raise _is_not(fmt, layout, why, n, k, "x")
    device = x.device
    if bias is not None and (bias.shape != (n,) or (bias.device != device and device.type != "meta")):
        raise _wrong_bias(fmt, bias, n, device)
    if fmt.pre_quant_scale or fmt.input_scale:
        if fmt.pre_quant_scale:
            x = x * parts["pre_quant_scale"].to(x.dtype)
        fmt = fmt.plain
        parts = {name: parts[name] for name in fmt.part_names}
    return _run("linear", fmt, layout, device, (fmt, x, parts, bias), 2)


def _wrong_bias(fmt: Format, bias: Tensor, n: int, device: torch.device) -> UnsupportedError:
    """The error for a bias that is not one of n rows, or not where x is."""
    if bias.shape != (n,):
        why = f"has shape {list(bias.shape)}, expected [{n}]; add any other to the product"
    else:
        why = f"is on {bias.device} and x on {device}; move one of them"
    return UnsupportedError(f"{fmt}: the bias {why}")


def _linear_fake(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    fmt, layout = split_spec(spec)
    return x.new_empty((*x.shape[:-1], _rows_of(fmt, layout, named(fmt, parts))))


def remember_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    """Keep what the gradients of a linear need: the parts, never a decoded weight."""
    x, parts, bias, spec = inputs
    ctx.save_for_backward(*parts)
    ctx.k, ctx.spec, ctx.has_bias = x.shape[-1], spec, bias is not None


def linear_gradients(ctx: Any, grad: Tensor, *, needs_x: bool, needs_bias: bool) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and bias; the weight is frozen. Quantized activations are passed straight through."""
    grad_x = linear_input_gradient(grad, list(ctx.saved_tensors), ctx.k, ctx.spec) if needs_x else None
    return grad_x, grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias and needs_bias else None


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs_x, _, needs_bias, _ = ctx.needs_input_grad
    grad_x, grad_bias = linear_gradients(ctx, grad, needs_x=needs_x, needs_bias=needs_bias)
    return grad_x, [None] * len(ctx.saved_tensors), grad_bias, None


def _input_gradient(grad: Tensor, parts: Sequence[Tensor], k: int, spec: str) -> Tensor:
    fmt, layout = split_spec(spec)
    by_name = named(fmt, parts)
    _check_columns(fmt, layout, by_name, grad.shape[-1] if grad.dim() else 1, k, "the gradient")
    args = (fmt, grad, by_name, k)
    return _run("linear_input_gradient", fmt, layout, grad.device, args, 2)


def _input_gradient_fake(grad: Tensor, parts: Sequence[Tensor], k: int, spec: str) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], k))


def _embedding(indices: Tensor, parts: Sequence[Tensor], k: int, spec: str, dtype: torch.dtype) -> Tensor:
    fmt, layout = split_spec(spec)
    by_name = named(fmt, parts)
    _check_columns(fmt, layout, by_name, _rows_of(fmt, layout, by_name), k, "the result")
    return _run("embedding", fmt, layout, indices.device, (fmt, indices, by_name, k, dtype), 2)


def _embedding_fake(indices: Tensor, parts: Sequence[Tensor], k: int, spec: str, dtype: torch.dtype) -> Tensor:
    return parts[0].new_empty((*indices.shape, k), dtype=dtype)


quantize = declare("quantize(Tensor w, str spec, int? seed) -> Tensor[]", _quantize, _quantize_fake)
dequantize = declare(
    "dequantize(Tensor[] parts, str spec, SymInt[] shape, ScalarType dtype) -> Tensor", _dequantize, _dequantize_fake
)
linear_input_gradient = declare(
    "linear_input_gradient(Tensor grad, Tensor[] parts, SymInt k, str spec) -> Tensor",
    _input_gradient,
    _input_gradient_fake,
)
linear = declare(
    "linear(Tensor x, Tensor[] parts, Tensor? bias, str spec) -> Tensor",
    run_linear,
    _linear_fake,
    _linear_backward,
    remember_linear,
)
embedding = declare(
    "embedding(Tensor indices, Tensor[] parts, SymInt k, str spec, ScalarType dtype) -> Tensor",
    _embedding,
    _embedding_fake,
)
