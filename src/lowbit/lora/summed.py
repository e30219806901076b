"""Several changes of one weight as one, which is rounded once: forms of one layer in a file, tied layers, adapters.

    W' = W + sum of strength * dW

A DoRA has no place in a sum: what it makes of the weight depends on whether the others are in it already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import UnsupportedError, WeightError
from lowbit.lora.adapter_delta import Delta, LoraDelta


@dataclass(frozen=True)
class SumDelta(Delta):
    """The sum of (change, strength) of one weight."""

    parts: Sequence[tuple[Delta, float]]
    scale: float = 1.0

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The kinds of the parts."""
        return " + ".join(dict.fromkeys(delta.kind for delta, _ in self.parts))

    @property
    def needs_weight(self) -> bool:  # type: ignore[override]
        """Whether a part does, which is then the only one."""
        return any(delta.needs_weight for delta, _ in self.parts)

    @property
    def rank(self) -> int:
        """The ranks of the parts add up."""
        return sum(delta.rank for delta, _ in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K], or that of a convolution's kernel where a part tells it."""
        return max((delta.shape for delta, _ in self.parts), key=len)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of all parts."""
        return tuple(tensor for delta, _ in self.parts for tensor in delta.tensors)

    def dense(self, strength: float = 1.0, device: torch.device | None = None, weight: Tensor | None = None) -> Tensor:
        """float32 [N, K]."""
        (first, own), *others = self.parts
        total = first.dense(strength * self.scale * own, device, weight)
        for delta, own in others:
            total += delta.dense(strength * self.scale * own, device, weight)
        return total

    def low_rank(self) -> LoraDelta | None:
        """The parts' factors side by side, where all have them and they are thinner than the weight."""
        thin = [(low, own * self.scale) for delta, own in self.parts if (low := delta.low_rank()) is not None]
        if len(thin) < len(self.parts):
            return None
        joined = _side_by_side(thin, self.shape)
        n, k = self.shape[0], math.prod(self.shape[1:])
        return joined if joined.rank * (n + k) < n * k else None


def summed(changes: Sequence[tuple[Delta, float]], where: str) -> Delta:
    """One change that is the sum of (change, strength). LoRAs stay a LoRA: their ranks add up.

    Raises `UnsupportedError` for a DoRA among several, `WeightError` for changes of other weights. `where` names the
    layer.
    """
    if len(changes) == 1 and changes[0][1] == 1.0:
        return changes[0][0]
    if len(changes) > 1 and (fixed := next((delta for delta, _ in changes if delta.needs_weight), None)):
        others = " + ".join(dict.fromkeys(delta.kind for delta, _ in changes if delta is not fixed))
        raise UnsupportedError(
            f"{where}: a DoRA and other changes ({others}) of one weight have no sum, because a DoRA sets the norms of "
            "what the weight is then; bake them one after the other, in the order that is meant"
        )
    shapes = [delta.shape for delta, _ in changes]
    if len({(shape[0], math.prod(shape[1:])) for shape in shapes}) > 1:
        told = " and ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise WeightError(f"{where}: the changes are of weights of different shapes, {told}; they are for other models")
    total = SumDelta(tuple(changes))
    loras = [(delta, strength) for delta, strength in changes if isinstance(delta, LoraDelta)]
    return _side_by_side(loras, total.shape) if len(loras) == len(changes) else total


def _side_by_side(loras: Sequence[tuple[LoraDelta, float]], shape: tuple[int, ...]) -> LoraDelta:
    """The sum of LoRAs as one, float32, where the first one is."""
    place = loras[0][0].down.device
    down = torch.cat([delta.down.to(place, torch.float32).flatten(1) for delta, _ in loras])
    up = torch.cat([delta.up.to(place, torch.float32) * (strength * delta.scale) for delta, strength in loras], dim=1)
    return LoraDelta(down.view(-1, *shape[1:]), up)
