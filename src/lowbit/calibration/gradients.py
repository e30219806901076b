"""Second moments of the gradient at the outputs of linears: which outputs count, and which make up for each other.

An error dy of a layer's output changes the model's output by J dy, which costs |J dy|^2 = dy^T J^T J dy. For a random
direction z with E[z z^T] = 1 the gradient of <z, output> is g = J^T z, and E[g g^T] = J^T J: one pass backward for each
batch shows all layers at once. What of the output counts is the caller's `Objective`.

They are taken in the first pass over the batches, whose forward then has a graph; a snapshot of the run carries them.
They take as much memory as the moments of the inputs beside them. Where not all [N, N] fit, the widest are taken in
blocks along the diagonal, which hold most of what rows can do for each other: of what whole ones take off the error of
a small language model (`benchmarks/small_llama.py`, five formats, two texts), blocks of 1/4 of the widest layers' rows
do 0.93 to 0.98, of 1/2 of all layers' and 1/8 of the widest 0.77 to 0.96, of 1/4 and 1/16 0.68 to 0.88.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import StatisticsError
from lowbit.numerics.floats import all_finite

from .accumulate import FLUSH, Gathered, Moment
from .attention import quick_attention
from .batches import Batch, Split, tensors_in
from .directions import Directions

_HEADS = 30_000  # channels that only heads over a vocabulary have: their [N, N] would take more than all others
_SMALLEST = 128  # rows of a block that is not divided further: less would take hardly less room
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
    """E[g g^T] of one layer over two halves of the samples, in blocks along the diagonal.

    Rows are gathered as in `accumulate.Accumulator`.
    """

    def __init__(self, n: int, blocks: int, device: torch.device) -> None:
        self._size = n // blocks
        self._halves = tuple([Moment(self._size, full=True, device=device) for _ in range(blocks)] for _ in range(2))
        self._gathered = tuple(Gathered(n, device, _gathered(blocks)) for _ in range(2))

    def add(self, g: Tensor, half: int, index: Tensor | None = None) -> None:
        """Take rows [R, N] of any float dtype, those at `index` (int64, None for all)."""
        for rows in self._gathered[half].add(g, index):
            self._add(rows, half)

    def _add(self, rows: Tensor, half: int) -> None:
        for moment, own in zip(self._halves[half], rows.split(self._size, 1), strict=True):
            moment.add(own.contiguous())

    def state(self) -> dict[str, Tensor]:
        """Everything, by name, for the same layer's to `restore`; shares memory with this one."""
        found = {f"pending_{half}": rows.rest() for half, rows in enumerate(self._gathered) if rows.count}
        for half, moments in enumerate(self._halves):
            found |= {f"total_{half}.{block}": moment.total for block, moment in enumerate(moments)}
        return {**found, "counts": torch.tensor([moments[0].rows for moments in self._halves])}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        for half, moments in enumerate(self._halves):
            for block, moment in enumerate(moments):
                moment.rows = int(state["counts"][half])
                moment.total.copy_(state[f"total_{half}.{block}"])
            if f"pending_{half}" in state:
                self.add(state[f"pending_{half}"], half)

    def finish(self) -> dict[str, Tensor]:
        """By the field of `Statistics`: float32 [N, N] or its blocks, on the CPU.

        A half that saw nothing, or zeros, has the other's.
        Nothing where both did: against zeros nothing can be judged.
        """
        for half, gathered in enumerate(self._gathered):
            if gathered.count:
                self._add(gathered.rest(), half)
                gathered.count = 0
        means = [self._mean(moments) for moments in self._halves]
        found = [mean if mean is not None and bool(mean.any()) else None for mean in means]
        first, second = (one if one is not None else other for one, other in zip(found, found[::-1], strict=True))
        return {} if first is None or second is None else {"output_hessian": first, "output_held_out": second}

    def _mean(self, moments: list[Moment]) -> Tensor | None:
        means = [mean for moment in moments if (mean := moment.finish()) is not None]
        if not means:
            return None
        return means[0] if len(means) == 1 else torch.stack(means)


class Gradients:
    """The moments at the outputs of those `linears` that `blocks` has, in so many, from a pass backward a batch."""

    def __init__(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Linear],
        blocks: Mapping[str, int],
        objective: Objective,
        seed: int,
    ) -> None:
        self._model, self._objective, self.blocks = model, objective, dict(blocks)
        self._linears = {name: linears[name] for name in blocks}
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
            self._moments[name] = OutputMoments(self._linears[name].out_features, self.blocks[name], device)
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
            self._moments[name] = OutputMoments(rows.shape[1], self.blocks[name], rows.device)
        for half, index in enumerate(chosen.halves):
            self._moments[name].add(rows, half, index)


def within(linears: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """The linears whose moments are taken: all but heads over a vocabulary, where an error counts as it is."""
    return {name: linear for name, linear in linears.items() if linear.out_features < _HEADS}


def fitting(linears: Mapping[str, nn.Linear], memory: int | None) -> dict[str, int]:
    """Into how many blocks to divide the moments of each linear so that all fit into `memory` (bytes, None for any).

    The widest blocks are halved first. Linears that have no room even in the smallest blocks are not among them, and
    those that do are divided as if there were no others.
    """
    counts = dict.fromkeys(linears, 1)
    widths = {name: linear.out_features for name, linear in linears.items()}
    while memory is not None and sum(_bytes(widths[name], count) for name, count in counts.items()) > memory:
        size = {name: widths[name] // count for name, count in counts.items()}
        may = [name for name in counts if size[name] % 2 == 0 and size[name] > _SMALLEST]
        if not may:
            break
        widest = max(size[name] for name in may)
        counts |= {name: 2 * counts[name] for name in may if size[name] == widest}
    left, chosen = memory, set()
    for name in sorted(counts, key=lambda name: _bytes(widths[name], counts[name])):
        if left is not None:
            left -= _bytes(widths[name], counts[name])
        if left is None or left >= 0:
            chosen.add(name)
    if len(chosen) < len(counts):
        return fitting({name: linear for name, linear in linears.items() if name in chosen}, memory)
    return counts


def _gathered(blocks: int) -> int:
    """How many rows wait for a product: beside small blocks, most of the room would be theirs."""
    return FLUSH if blocks == 1 else FLUSH // 4


def _bytes(n: int, blocks: int) -> int:
    """What `OutputMoments` take."""
    return 4 * n * (2 * (n // blocks) + 2 * _gathered(blocks))


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
