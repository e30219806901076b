"""Second moments of the gradient at the outputs of linears: which outputs count, and which make up for each other.

An error dy of a layer's output changes the model's output by J dy, which costs |J dy|^2 = dy^T J^T J dy. For a random
direction z with E[z z^T] = 1 the gradient of <z, output> is g = J^T z, and E[g g^T] = J^T J: one pass backward for each
batch shows all layers at once. What of the output counts is the caller's `Objective`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import StatisticsError

from .accumulate import FLUSH, Moment
from .batches import Batch, rows_of, tensors_in
from .collection import some

_log = logging.getLogger("lowbit")

_TAKEN, _OF = 2, 4  # batches in turn: all of them were 3 to 4 % better on MiniLM
Objective = Callable[[Any, Batch], Tensor]
"""From what the model returned for a batch, the tensor whose squared change is the cost of an error."""


def whole_output(output: Any, batch: Batch) -> Tensor:
    """The first floating-point tensor in what a model returned, padding by the batch's masks left out.

    Raises `StatisticsError` when there is none.
    """
    for tensor in filter(Tensor.is_floating_point, tensors_in(output)):
        for mask in batch.masks:
            if tensor.shape[:2] == mask.shape:
                return tensor * mask.to(tensor.device).reshape(*mask.shape, *[1] * (tensor.dim() - 2))
        return tensor
    raise StatisticsError(f"the model returned {type(output).__name__}, with no floating-point tensor in it")


class OutputMoments:
    """E[g g^T] of one layer over two halves of the samples; rows are gathered as in `accumulate.Accumulator`."""

    def __init__(self, n: int, device: torch.device) -> None:
        self._halves = tuple(Moment(n, full=True, device=device) for _ in range(2))
        self._pending: tuple[list[Tensor], list[Tensor]] = ([], [])

    def add(self, g: Tensor, half: int) -> None:
        """Take rows [R, N] of any float dtype."""
        pending = self._pending[half]
        pending.append(g.float())
        if sum(map(len, pending)) >= FLUSH:
            self._flush(half)

    def _flush(self, half: int) -> None:
        if self._pending[half]:
            self._halves[half].add(torch.cat(self._pending[half]))
            self._pending[half].clear()

    def finish(self) -> dict[str, Tensor]:
        """By the field of `Statistics`: float32 [N, N] on the CPU. A half that saw nothing, or zeros, has the other's.

        Nothing where both did: against zeros nothing can be judged.
        """
        for half in range(2):
            self._flush(half)
        means = [half.mean() for half in self._halves]
        found = [mean if mean is not None and bool(mean.any()) else None for mean in means]
        first, second = (one if one is not None else other for one, other in zip(found, found[::-1], strict=True))
        return {} if first is None or second is None else {"output_hessian": first, "output_held_out": second}


class GradientPass:
    """A pass backward over some of the batches. `memory`: bytes for all [N, N]; None for no bound.

    Layers whose matrices do not fit, the largest first, have none.
    """

    def __init__(
        self, model: nn.Module, linears: Mapping[str, nn.Linear], objective: Objective, memory: int | None, seed: int
    ) -> None:
        self._model, self._objective = model, objective
        self._linears = _fitting(linears, memory)
        self._random = torch.Generator().manual_seed(seed)
        self._moments: dict[str, OutputMoments] = {}
        self._batch: Batch | None = None
        self._first_sample = self._index = 0

    def run(self, batches: Iterable[Batch], progress: Callable[[int], None]) -> dict[str, dict[str, Tensor]]:
        """The fields of `Statistics` by linear, without those that no gradient reached. Raises `StatisticsError`."""
        handles = [linear.register_forward_hook(self._hook(name)) for name, linear in self._linears.items()]
        try:
            with _frozen(self._model), torch.enable_grad():
                for index, batch in enumerate(batches):
                    if index % _OF < _TAKEN:
                        self._batch, self._index = batch, index
                        self._backward(batch)
                    self._first_sample += batch.samples
                    progress(index + 1)
        finally:
            for handle in handles:
                handle.remove()
        found = {name: self._moments.pop(name).finish() for name in list(self._moments)}  # one by one: they are large
        return {name: fields for name, fields in found.items() if fields}

    def _backward(self, batch: Batch) -> None:
        try:
            target = self._objective(self._model(*batch.args, **batch.kwargs), batch)
            z = torch.randn(target.shape, generator=self._random).to(target.device, target.dtype)
            (target * z).sum().backward()
        except StatisticsError:
            raise
        except Exception as error:
            raise StatisticsError(
                f"batch {self._index}: no gradient can be taken through the model: {type(error).__name__}: {error}; "
                "calibrate without gradients"
            ) from error

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, out: Any) -> Tensor | None:
            if not isinstance(out, Tensor) or not out.is_floating_point() or not torch.is_grad_enabled():
                return None
            if not out.requires_grad:
                out = out.detach().requires_grad_().clone()  # a leaf could not be written over by what comes next
            out.register_hook(lambda g: self._see(name, g))
            return out

        return hook

    def _see(self, name: str, g: Tensor) -> None:
        assert self._batch is not None
        if not bool(g.isfinite().all()):
            raise StatisticsError(
                f"{name}: the gradient at its output has NaN or infinite values in batch {self._index}; run the model "
                "in a wider dtype (bfloat16 or float32), or calibrate without gradients"
            )
        keep, halves = rows_of(g, self._batch, self._first_sample)
        rows = g.reshape(-1, g.shape[-1])
        if name not in self._moments:
            self._moments[name] = OutputMoments(rows.shape[1], rows.device)
        for half in range(2):
            chosen = halves == half if keep is None else (halves == half) & keep
            if bool(chosen.any()):
                self._moments[name].add(rows[chosen], half)


def _fitting(linears: Mapping[str, nn.Linear], memory: int | None) -> dict[str, nn.Linear]:
    """The linears whose moments fit into the memory together, the smallest first."""
    if memory is None:
        return dict(linears)
    left, chosen = memory, set()
    for name, linear in sorted(linears.items(), key=lambda item: item[1].out_features):
        left -= 4 * linear.out_features * (2 * linear.out_features + 2 * FLUSH)
        if left >= 0:
            chosen.add(name)
    if out := [name for name in linears if name not in chosen]:
        _log.warning("no room for the gradients of %d linears (%s); give more memory", len(out), some(out))
    return {name: linear for name, linear in linears.items() if name in chosen}


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient; those that did ask again at the end. Of tensors of inference mode none can."""
    asking = [one for one in model.parameters() if one.requires_grad and not one.is_inference()]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_()
