"""A bank of experts that a conversion quantizes: each expert for itself, one at a time, with scales of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from .accuracy import AccuracyMeter
from .banks import decoded_expert, is_marker, one_expert
from .convert_layer import LayerWork
from .dialects.base import Read
from .rewrite import Made


class BankWork(LayerWork):
    """One bank to quantize; no more than one expert of it is in memory."""

    def make(self) -> Made:
        """Read, solve and store, expert by expert; the marker, which is the same for all, comes last."""
        marker: dict[str, Tensor] = {}
        record: dict[str, Any] = {"seconds": 0.0, "solver": "", "note": "", "error": None, "rtn_error": None}
        record["unseen_error"] = None
        meter = AccuracyMeter()
        slices = self._experts(marker, record, meter)
        return Made(marker, record, lambda _: {"accuracy": meter.result().to_json()}, slices)

    def _experts(self, marker: dict[str, Tensor], record: dict[str, Any], meter: AccuracyMeter) -> Iterator[Made]:
        known = self.known()
        for index in range(self.plan.weight.experts):
            began = time.perf_counter()
            w = self._weight(index)
            seed = None if self.seed is None else self.seed + index
            solution = self.solved(w, known, f"{self.place}, expert {index}", seed)
            tensors = self.dialect.store_parts(self.stored, solution.parts)
            marker |= {key: tensor for key, tensor in tensors.items() if is_marker(key)}
            stacked = {key: tensor for key, tensor in tensors.items() if not is_marker(key)}
            record["seconds"] += time.perf_counter() - began
            record["solver"] = record["solver"] or solution.solver
            if solution.note and not record["note"]:
                record["note"] = f"expert {index}: {solution.note}"
            yield Made(stacked, check=partial(self._check_expert, w, marker, meter))

    def _weight(self, index: int) -> Tensor:
        """One expert as a matrix [N, K]."""
        if self.was is not None:
            return decoded_expert(self.held, self.was, index, self.dtype)
        rows = self.held.source.read_rows(self.held.component, self.plan.key, index, index + 1)
        return self.plan.weight.as_matrix(rows[0]).contiguous()

    def _check_expert(self, w: Tensor, marker: dict[str, Tensor], meter: AccuracyMeter, read: Read) -> dict[str, Any]:
        """Load one expert from what is in the file, and compare it with its source."""
        found = self.found(lambda key: marker[key] if is_marker(key) else read(key).unsqueeze(0))
        self.compare(one_expert(found), w, read, meter)
        return {}
