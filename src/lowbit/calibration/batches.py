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


@dataclass(frozen=True)
class Rows:
    """Which rows of a tensor x, seen as [R, K], count. All are int64, ascending, on the device of x.

    `kept`: those that are not padding, None for all R. `halves`: those of them that belong to either half.
    """

    kept: Tensor | None
    halves: tuple[Tensor, Tensor]

    @property
    def counts(self) -> tuple[int, int]:
        """How many there are of each half."""
        return len(self.halves[0]), len(self.halves[1])

    def select(self, x: Tensor) -> Tensor:
        """The kept ones of x [R, ...]."""
        return x if self.kept is None else x.index_select(0, self.kept)


class Split:
    """The halves of one batch's rows; worked out once for each shape, of which a model has few.

    Samples go to the halves in turn, counted from `first_sample`, the number of the batch's first sample. Where x does
    not have a multiple of the batch's rows, all of the call goes to the half of the first one.
    """

    def __init__(self, batch: Batch, first_sample: int) -> None:
        self.batch, self._first_sample = batch, first_sample
        self._known: dict[tuple[torch.Size, torch.device], Rows] = {}

    def rows(self, x: Tensor) -> Rows:
        """Those of x [..., K]."""
        key = (x.shape[:-1], x.device)
        if key not in self._known:
            self._known[key] = self._find(x.shape[:-1], x.device)
        return self._known[key]

    def _find(self, shape: torch.Size, device: torch.device) -> Rows:
        batch, rows = self.batch, shape.numel()
        keep = None
        for mask in batch.masks:
            if tuple(shape) == tuple(mask.shape) or (len(shape) == 1 and rows == mask.numel() > mask.shape[0]):
                keep = mask.flatten().to(device)
                break
        if rows % batch.samples == 0:
            sample = torch.arange(rows, device=device) // max(rows // batch.samples, 1)
            second = (sample + self._first_sample) % 2 == 1
        else:
            second = torch.full((rows,), self._first_sample % 2 == 1, device=device)
        chosen = (~second, second) if keep is None else (~second & keep, second & keep)
        first, other = (one.nonzero()[:, 0] for one in chosen)
        return Rows(None if keep is None else keep.nonzero()[:, 0], (first, other))
