"""What a user hands over as batches: how each is passed to the model, how many samples it has, what is padding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import StatisticsError

TokenMask = Callable[[tuple[Any, ...], Mapping[str, Any]], Tensor | list[Tensor] | None]


@dataclass(frozen=True)
class Batch:
    """Arguments of one call of the model, the number of samples in it, and masks [B, T] that are False on padding."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    samples: int
    masks: tuple[Tensor, ...]

    def digest(self) -> str:
        """A hex digest of all tensors in it."""
        found = hashlib.sha256()
        for tensor in tensors_in((self.args, self.kwargs)):
            found.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def as_batch(item: Any, index: int, token_mask: TokenMask | None) -> Batch:
    """A batch from a tensor, a tuple of arguments, a mapping of keyword arguments, or a pair (arguments, mapping).

    Without a `token_mask`, every two-dimensional keyword argument whose name ends in "mask" and that holds zeros and
    ones marks padding by its zeros. The samples are the rows of the first tensor. Raises `StatisticsError`.
    """
    args, kwargs = _arguments(item, index)
    if token_mask is None:
        masks = [mask for name, value in kwargs.items() if (mask := _as_mask(name, value)) is not None]
    else:
        given = token_mask(args, kwargs)
        masks = [] if given is None else [given] if isinstance(given, Tensor) else list(given)
    if any(mask.dim() != 2 for mask in masks):
        raise StatisticsError(f"batch {index}: a token mask must have the shape [samples, tokens]; correct token_mask")
    sizes = (tensor.shape[0] for tensor in tensors_in((args, kwargs)) if tensor.dim())
    samples = masks[0].shape[0] if masks else next(sizes, 1)
    return Batch(args, kwargs, samples, tuple(mask.bool() for mask in masks))


def _arguments(item: Any, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(item, Tensor):
        return (item,), {}
    if isinstance(item, Mapping):
        return (), dict(item)
    if isinstance(item, tuple | list):
        if len(item) == 2 and isinstance(item[0], tuple | list) and isinstance(item[1], Mapping):
            return tuple(item[0]), dict(item[1])
        return tuple(item), {}
    raise StatisticsError(
        f"batch {index}: is a {type(item).__name__}; give a tensor, a tuple of arguments, a dict of keyword arguments, "
        "or a pair of both"
    )


def _as_mask(name: str, value: Any) -> Tensor | None:
    if not name.endswith("mask") or not isinstance(value, Tensor) or value.dim() != 2:
        return None
    if value.dtype != torch.bool and bool(((value != 0) & (value != 1)).any()):
        return None  # an additive mask
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings, tuples and lists, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from tensors_in(inner)


def rows_of(x: Tensor, batch: Batch, first_sample: int) -> tuple[Tensor | None, Tensor]:
    """Which rows of x, seen as [R, K], count (bool [R], None for all), and the half of each row (uint8 [R]).

    Samples go to the halves in turn, counted from `first_sample`, the number of the batch's first sample. Where x does
    not have a multiple of the batch's rows, all of the call goes to the half of the first one.
    """
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    keep = None
    for mask in batch.masks:
        if tuple(x.shape[:-1]) == tuple(mask.shape) or (x.dim() == 2 and rows == mask.numel() > mask.shape[0]):
            keep = mask.flatten().to(x.device)
            break
    if rows % batch.samples == 0:
        sample = torch.arange(rows, device=x.device) // max(rows // batch.samples, 1)
        return keep, ((sample + first_sample) % 2).to(torch.uint8)
    return keep, torch.full((rows,), first_sample % 2, dtype=torch.uint8, device=x.device)
