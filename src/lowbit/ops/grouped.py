"""Grouped linear: rows of x, sorted by expert, times each its own expert's weight.

The parts are those of a format with a leading axis E; whatever a weight shares as a whole (a global scale) each expert
has for itself. Offsets are those of PyTorch's grouped product: int32 or int64 [E], the row after the last one of each
expert. Every expert that has rows is one call of `linear`, so the kernel that serves its format and device serves it
here; reading the offsets waits for the device once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import UnsupportedError
from lowbit.ops.generic import linear_input_gradient, named, run_linear, split_spec
from lowbit.ops.library import declare


def _groups(x: Tensor, parts: Sequence[Tensor], offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, start, stop) of every expert with rows. Raises `UnsupportedError` for offsets that make no sense."""
    experts = parts[0].shape[0]
    if x.dim() != 2 or offsets.dim() != 1 or offsets.dtype not in (torch.int32, torch.int64):
        kind = str(offsets.dtype).removeprefix("torch.")
        raise UnsupportedError(
            f"grouped_linear takes x [T, K] and offsets int32 [E], not {list(x.shape)} and {kind} {list(offsets.shape)}"
        )
    ends = [0, *offsets.tolist()]
    if len(ends) != experts + 1 or ends[-1] > x.shape[0] or any(a > b for a, b in pairwise(ends)):
        raise UnsupportedError(
            f"offsets {ends[1:]} do not cut {x.shape[0]} rows into {experts} groups: they must be {experts} numbers "
            "that do not decrease, the ends of the groups"
        )
    for expert, (start, stop) in enumerate(pairwise(ends)):
        if stop > start:
            yield expert, start, stop


def _rows(parts: Sequence[Tensor], spec: str) -> int:
    fmt, _ = split_spec(spec)
    return fmt.rows_of(named(fmt, [part[0] for part in parts]))


def _grouped_linear(x: Tensor, parts: Sequence[Tensor], offsets: Tensor, bias: Tensor | None, spec: str) -> Tensor:
    out = x.new_zeros((x.shape[0], _rows(parts, spec)))
    for expert, start, stop in _groups(x, parts, offsets):
        own = None if bias is None else bias[expert]
        out[start:stop] = run_linear(x[start:stop], [part[expert] for part in parts], own, spec)
    return out


def _grouped_linear_fake(x: Tensor, parts: Sequence[Tensor], offsets: Tensor, bias: Tensor | None, spec: str) -> Tensor:
    return x.new_empty((x.shape[0], _rows(parts, spec)))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, parts, offsets, bias, spec = inputs
    ctx.save_for_backward(offsets, *parts)
    ctx.k, ctx.spec, ctx.bias = x.shape[-1], spec, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    offsets, *parts = ctx.saved_tensors
    needs_x, _, _, needs_bias, _ = ctx.needs_input_grad
    grad_x = grouped_linear_input_gradient(grad, parts, offsets, ctx.k, ctx.spec) if needs_x else None
    grad_bias = None
    if needs_bias and ctx.bias is not None:
        experts = offsets.shape[0]
        rows = torch.arange(grad.shape[0], dtype=offsets.dtype, device=offsets.device)
        owner = torch.searchsorted(offsets, rows, right=True)  # E for rows of no expert
        sums = grad.new_zeros((experts + 1, grad.shape[1]), dtype=torch.promote_types(grad.dtype, torch.float32))
        grad_bias = sums.index_add(0, owner, grad.to(sums.dtype))[:experts].to(ctx.bias)
    return grad_x, [None] * len(parts), None, grad_bias, None


def _input_gradient(grad: Tensor, parts: Sequence[Tensor], offsets: Tensor, k: int, spec: str) -> Tensor:
    out = grad.new_zeros((grad.shape[0], k))
    for expert, start, stop in _groups(grad, parts, offsets):
        out[start:stop] = linear_input_gradient(grad[start:stop], [part[expert] for part in parts], k, spec)
    return out


def _input_gradient_fake(grad: Tensor, parts: Sequence[Tensor], offsets: Tensor, k: int, spec: str) -> Tensor:
    return grad.new_empty((grad.shape[0], k))


grouped_linear_input_gradient = declare(
    "grouped_linear_input_gradient(Tensor grad, Tensor[] parts, Tensor offsets, SymInt k, str spec) -> Tensor",
    _input_gradient,
    _input_gradient_fake,
)
grouped_linear = declare(
    "grouped_linear(Tensor x, Tensor[] parts, Tensor offsets, Tensor? bias, str spec) -> Tensor",
    _grouped_linear,
    _grouped_linear_fake,
    _backward,
    _remember,
)
