"""Second moments of the gradient at the outputs of linears: which outputs count, and which make up for each other.

An error dy of a layer's output changes the model's output by J dy, which costs |J dy|^2 = dy^T J^T J dy. For a random
direction z with E[z z^T] = 1 the gradient of <z, output> is g = J^T z, and E[g g^T] = J^T J: one pass backward for each
batch shows all layers at once. What of the output counts is the caller's `Objective`.

Where all [N, N] fit into the memory, which is as much as that of the inputs' moments beside them, they are taken in the
first pass over the batches, whose forward then has a graph; a snapshot of the run carries them. Else they take a pass
of their own after the first. Both give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import StatisticsError
from lowbit.numerics.floats import all_finite

from .accumulate import FLUSH, Gathered, Moment
from .attention import quick_attention
from .batches import Batch, Split, tensors_in
from .directions import Directions

_HEADS = (
    30_000  # channels that only heads over a vocabulary have: their [N, N] would take more than all others together
)
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
        self._gathered = (Gathered(n, device), Gathered(n, device))

    def add(self, g: Tensor, half: int, index: Tensor | None = None) -> None:
        """Take rows [R, N] of any float dtype, those at `index` (int64, None for all)."""
        for block in self._gathered[half].add(g, index):
            self._halves[half].add(block)

    def state(self) -> dict[str, Tensor]:
        """Everything, by name, for the same layer's to `restore`; shares memory with this one."""
        found = {f"pending_{half}": rows.rest() for half, rows in enumerate(self._gathered) if rows.count}
        found |= {f"total_{half}": moment.total for half, moment in enumerate(self._halves)}
        return {**found, "counts": torch.tensor([moment.rows for moment in self._halves])}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        for half, moment in enumerate(self._halves):
            moment.rows = int(state["counts"][half])
            moment.total.copy_(state[f"total_{half}"])
            if f"pending_{half}" in state:
                self.add(state[f"pending_{half}"], half)

    def finish(self) -> dict[str, Tensor]:
        """By the field of `Statistics`: float32 [N, N] on the CPU. A half that saw nothing, or zeros, has the other's.

        Nothing where both did: against zeros nothing can be judged.
        """
        for half, gathered in enumerate(self._gathered):
            if gathered.count:
                self._halves[half].add(gathered.rest())
                gathered.count = 0
        means = [half.finish() for half in self._halves]
        found = [mean if mean is not None and bool(mean.any()) else None for mean in means]
        first, second = (one if one is not None else other for one, other in zip(found, found[::-1], strict=True))
        return {} if first is None or second is None else {"output_hessian": first, "output_held_out": second}


class Gradients:
    """The moments at the outputs of `linears`, from a pass backward over every batch."""

    def __init__(self, model: nn.Module, linears: Mapping[str, nn.Linear], objective: Objective, seed: int) -> None:
        self._model, self._objective, self._linears = model, objective, dict(linears)
        self._directions = Directions(seed)
        self._moments: dict[str, OutputMoments] = {}
        self._split: Split | None = None  # of the batch that runs backward, None at any other time
        self._index = 0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch the linears, whose parameters need no gradient, for the time of a with block."""
        handles = [linear.register_forward_hook(self._hook(name)) for name, linear in self._linears.items()]
        try:
            with _frozen(self._model):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self, split: Split, index: int, forward: Callable[[], Any]) -> None:
        """Run `forward`, which returns the model's output for the batch, and the way back. Raises `StatisticsError`."""
        self._split, self._index = split, index
        try:
            with torch.enable_grad(), quick_attention(split.batch):
                output = forward()
                with _explained(index):
                    target = self._objective(output, split.batch)
                    (target * self._directions.like(target)).sum().backward()
        finally:
            self._split = None

    def run(self, batches: Iterable[Batch], progress: Callable[[int], None]) -> dict[str, dict[str, Tensor]]:
        """A pass for nothing else. Returns what `finish` does. Raises `StatisticsError`."""
        first_sample = 0
        with self.hooked():
            for index, batch in enumerate(batches):
                self.take(Split(batch, first_sample), index, partial(self._forward, batch, index))
                first_sample += batch.samples
                progress(index + 1)
        return self.finish()

    def _forward(self, batch: Batch, index: int) -> Any:
        with _explained(index):
            return self._model(*batch.args, **batch.kwargs)

    def finish(self) -> dict[str, dict[str, Tensor]]:
        """The fields of `Statistics` by linear, without those that no gradient reached."""
        found = {name: self._moments.pop(name).finish() for name in list(self._moments)}  # one by one: they are large
        return {name: fields for name, fields in found.items() if fields}

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """All that `restore` needs: tensors by linear ("" for those of the directions) and by name."""
        for field, tensor in self._directions.state().items():
            yield "", field, tensor
        for name, moments in self._moments.items():
            for field, tensor in moments.state().items():
                yield name, field, tensor

    def restore(self, name: str, state: Mapping[str, Tensor], device: torch.device | None) -> None:
        """Bring back one linear's part of a `state`, on its `device`; for the name "" that of the directions."""
        if not name:
            self._directions.restore(state)
        elif device is not None:
            self._moments[name] = OutputMoments(self._linears[name].out_features, device)
            self._moments[name].restore(state)

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, out: Any) -> Tensor | None:
            if self._split is None or not torch.is_grad_enabled():
                return None
            if not isinstance(out, Tensor) or not out.is_floating_point():
                return None
            if not out.requires_grad:
                out = out.detach().requires_grad_().clone()  # a leaf could not be written over by what comes next
            out.register_hook(lambda g: self._see(name, g))
            return out

        return hook

    def _see(self, name: str, g: Tensor) -> None:
        assert self._split is not None
        if not all_finite(g):
            raise StatisticsError(
                f"{name}: the gradient at its output has NaN or infinite values in batch {self._index}; run the model "
                "in a wider dtype (bfloat16 or float32), or calibrate without gradients"
            )
        chosen = self._split.rows(g)
        rows = g.reshape(-1, g.shape[-1])
        if name not in self._moments:
            self._moments[name] = OutputMoments(rows.shape[1], rows.device)
        for half, index in enumerate(chosen.halves):
            self._moments[name].add(rows, half, index)


def within(linears: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """The linears whose moments are taken: all but heads over a vocabulary, where an error counts as it is."""
    return {name: linear for name, linear in linears.items() if linear.out_features < _HEADS}


def fitting(linears: Mapping[str, nn.Linear], memory: int | None) -> dict[str, nn.Linear]:
    """The linears whose moments fit into `memory` (bytes, None for no bound) together, the smallest first."""
    if memory is None:
        return dict(linears)
    left, chosen = memory, set()
    for name, linear in sorted(linears.items(), key=lambda item: item[1].out_features):
        left -= 4 * linear.out_features * (2 * linear.out_features + 2 * FLUSH)
        if left >= 0:
            chosen.add(name)
    return {name: linear for name, linear in linears.items() if name in chosen}


@contextmanager
def _explained(index: int) -> Iterator[None]:
    """Say of any other error that a with block raises that the gradient is what failed."""
    try:
        yield
    except StatisticsError:
        raise
    except Exception as error:
        raise StatisticsError(
            f"batch {index}: no gradient can be taken through the model: {type(error).__name__}: {error}; "
            "calibrate without gradients"
        ) from error


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
