"""Statistics in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lowbit.solvers.base import Statistics

from .collection import Contents, Field, StatisticsCollection
from .statistics_file import save_statistics, stored_fields


class Collected(StatisticsCollection):
    """Statistics of layers by name, in memory."""

    def __init__(
        self,
        contents: Contents,
        inputs: Mapping[str, Statistics],
        outputs: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.contents = contents
        self._inputs = dict(inputs)
        self._outputs = {key: dict(fields) for key, fields in (outputs or {}).items()}

    def load_input(self, key: str) -> Statistics:
        """The statistics of an input."""
        return self._inputs[key]

    def load_output(self, key: str) -> dict[str, Tensor]:
        """The moments of the gradient at an output, by the field of `Statistics`."""
        return self._outputs[key]

    def fields(self, key: str) -> dict[str, Field]:
        """The tensors of an input: dtype and shape by field."""
        return {name: (t.dtype, tuple(t.shape)) for name, t in stored_fields(self._inputs[key]).items()}

    def save(self, path: str | Path) -> Path:
        """Write them as a statistics file. Raises `WriteError`."""
        return save_statistics(self, path)
