"""FSDP2: each rank holds some rows of a weight. Parts that run along N are gathered, shared ones are the same anyway.

FSDP pads the last shards to the size of the first, and cuts the padding off the gathered weight. It keeps the memory
of the gathered tensors, frees it after use and fills it again; what was saved for the backward pass must find the
gathered weight there without a change of version.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.formats.parts import Part, Parts, narrow_rows, raw_bytes


def gather_inputs(tensor: Any) -> tuple[Tensor, ...]:
    """The parts along N with rows first, as bytes where they are one byte, padded to the rows of the first shard."""
    return tuple(_rows_first(tensor, rule) for rule in tensor.format.rules if rule.row_axis is not None)


def gathered_parts(tensor: Any, outputs: tuple[Tensor, ...]) -> Parts:
    """The parts of the weight, padding included, from the gathered rows of all ranks; views where rows come first."""
    parts, rest = tensor.parts, iter(outputs)
    for rule in tensor.format.rules:
        if rule.row_axis is not None:
            rows = next(rest).view(parts[rule.name].dtype)
            parts[rule.name] = rows.transpose(0, rule.row_axis).contiguous() if rule.row_axis else rows
    return parts


def refill(out: Any, parts: Parts) -> None:
    """Put newly gathered parts into a weight made of an earlier gathering; most are there already, being views."""
    cut = narrow_rows(out.format.rules, parts, 0, out.matrix[0])
    for name, part in out.parts.items():
        if part.data_ptr() != cut[name].data_ptr():
            with torch.autograd._unsafe_preserve_version_counter(part):  # type: ignore[attr-defined]  # noqa: SLF001
                part.copy_(cut[name])


def _rows_first(tensor: Any, rule: Part) -> Tensor:
    part = raw_bytes(tensor.parts[rule.name])
    rows = part.transpose(0, rule.row_axis or 0).contiguous()
    missing = -(-tensor.room // rule.rows_per_entry) - rows.shape[0]
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if missing > 0 else rows
