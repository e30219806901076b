"""What planning and converting ask of a set of statistics; `lowbit.calibration` provides such sets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Protocol

import torch
from torch import Tensor

from lowbit.solvers import Statistics, what_is_known


class LayerStatistics(Protocol):
    """Statistics by the layer's name."""

    def get(self, layer: str, /) -> Statistics | None:
        """Those of a layer, read when asked for; None for a layer without."""
        ...

    def get_input(self, layer: str, /) -> Statistics | None:
        """The same without the moments of the gradient at its output, which are as large and are then not read."""
        ...

    def kind(self, layer: str, /) -> str:
        """What is known of a layer: "full", "diagonal" or "" for one without second moments; cheap."""
        ...

    def gradient_size(self, layer: str, /) -> int:
        """How many numbers are known of G at a layer's output, N^2 or those of its blocks; 0 for none; cheap."""
        ...

    def smallest(self, layer: str, /) -> float | None:
        """The smallest input of a layer; None where that is not known."""
        ...

    def fingerprint(self) -> str:
        """Names their contents."""
        ...


class InMemory:
    """Statistics in a dictionary as `LayerStatistics`."""

    def __init__(self, by_layer: Mapping[str, Statistics]) -> None:
        self._by_layer = by_layer

    def get(self, layer: str, /) -> Statistics | None:
        """See `LayerStatistics`."""
        return self._by_layer.get(layer)

    def get_input(self, layer: str, /) -> Statistics | None:
        """See `LayerStatistics`."""
        known = self._by_layer.get(layer)
        return None if known is None else known.without_outputs

    def kind(self, layer: str, /) -> str:
        """See `LayerStatistics`."""
        return what_is_known(self._by_layer.get(layer))

    def gradient_size(self, layer: str, /) -> int:
        """See `LayerStatistics`."""
        known = self._by_layer.get(layer)
        return 0 if known is None or known.output_hessian is None else known.output_hessian.numel()

    def smallest(self, layer: str, /) -> float | None:
        """See `LayerStatistics`."""
        known = self._by_layer.get(layer)
        return None if known is None or known.minimum is None else float(known.minimum.min())

    def input_of(self, layer: str, /) -> str | None:
        """The first layer with the same statistics: the same object stands for the same input."""
        known = self._by_layer.get(layer)
        if known is None:
            return None
        return next(name for name, other in self._by_layer.items() if other is known)

    def fingerprint(self) -> str:
        """See `LayerStatistics`."""
        digest = hashlib.sha256()
        for name, known in sorted(self._by_layer.items()):
            for field in fields(known):
                value = getattr(known, field.name)
                if isinstance(value, Tensor):
                    digest.update(f"{name} {field.name} {value.dtype} {list(value.shape)}".encode())
                    digest.update(_bytes(value))
                else:
                    digest.update(f"{name} {field.name} {value}".encode())
        return digest.hexdigest()


def judging_moments(known: Statistics | None) -> Tensor | None:
    """The second moments [K, K] or [K] that results are judged on: those held out where there are any."""
    return None if known is None else known.hessian if known.held_out is None else known.held_out


def knowledge(statistics: LayerStatistics | None, layer: str) -> str:
    """What is known of a layer: "full", "diagonal" or ""."""
    return "" if statistics is None else statistics.kind(layer)


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
    return bytes(flat.view(torch.uint8).numpy().tobytes())
