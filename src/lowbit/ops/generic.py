"""The generic ops: `quantize`, `dequantize`, `linear`, `embedding`, over a spec string and parts in the format's order.

A new format needs no new schema. The spec may carry a kernel layout: `awq_w4a16(group_size=32)@name`. Optional parts
are dealt with here, once for all kernels: a pre-quant scale multiplies x before any kernel sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lowbit.dispatch import select
from lowbit.errors import PartsError, UnsupportedError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.formats.registry import parse_spec
from lowbit.ops.library import declare


@lru_cache(maxsize=4096)
def split_spec(spec: str) -> tuple[Format, str]:
    """The format and the layout name ("" for plain parts) of a spec string."""
    text, _, layout = spec.partition("@")
    return parse_spec(text), layout


def named(fmt: Format, parts: Sequence[Tensor]) -> Parts:
    """The parts by name; `PartsError` when their number is wrong."""
    names = fmt.part_names
    if len(parts) != len(names):
        raise PartsError(f"{fmt}: takes {len(names)} parts ({', '.join(names)}), not {len(parts)}")
    return dict(zip(names, parts, strict=True))


@lru_cache(maxsize=4096)
def _codes_shape(fmt: Format, n: int, k: int) -> tuple[int, ...]:
    return fmt.rules[0].shape(fmt.sizes(n, k))


def _check_columns(fmt: Format, layout: str, parts: Sequence[Tensor], n: int, k: int, what: str) -> None:
    """Raise `UnsupportedError` unless plain parts can be those of a weight [n, k]: kernels take K from x.

    Where K is padded to whole groups, the codes of two lengths have one shape; there the caller must know.
    """
    if not layout and tuple(parts[0].shape) != _codes_shape(fmt, n, k):
        raise UnsupportedError(
            f"{fmt}: a weight whose codes are {list(parts[0].shape)} is not [{n}, {k}], as the shape of {what} says; "
            "the last axis of x must be K, that of a gradient N"
        )


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
    _check_columns(fmt, layout, parts, shape[0], shape[1], "the result")
    args = (fmt, named(fmt, parts), (shape[0], shape[1]), dtype)
    return select("dequantize", fmt.name, layout, parts[0].device.type, args).run(*args)


def _dequantize_fake(parts: Sequence[Tensor], spec: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return parts[0].new_empty((shape[0], shape[1]), dtype=dtype)


def run_linear(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    """What the op `linear` does, without autograd and without PyTorch's dispatcher."""
    fmt, layout = split_spec(spec)
    by_name = named(fmt, parts)
    _check_columns(fmt, layout, parts, fmt.rows_of(by_name), x.shape[-1] if x.dim() else 1, "x")
    if fmt.pre_quant_scale or fmt.input_scale:
        if fmt.pre_quant_scale:
            x = x * by_name["pre_quant_scale"].to(x.dtype)
        fmt = fmt.plain
        by_name = {name: by_name[name] for name in fmt.part_names}
    args = (fmt, x, by_name, bias)
    return select("linear", fmt.name, layout, x.device.type, args).run(*args)


def _linear_fake(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    fmt, _ = split_spec(spec)
    return x.new_empty((*x.shape[:-1], fmt.rows_of(named(fmt, parts))))


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
    _check_columns(fmt, layout, parts, grad.shape[-1] if grad.dim() else 1, k, "the gradient")
    args = (fmt, grad, named(fmt, parts), k)
    return select("linear_input_gradient", fmt.name, layout, grad.device.type, args).run(*args)


def _input_gradient_fake(grad: Tensor, parts: Sequence[Tensor], k: int, spec: str) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], k))


def _embedding(indices: Tensor, parts: Sequence[Tensor], k: int, spec: str, dtype: torch.dtype) -> Tensor:
    fmt, layout = split_spec(spec)
    args = (fmt, indices, named(fmt, parts), k, dtype)
    return select("embedding", fmt.name, layout, indices.device.type, args).run(*args)


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
