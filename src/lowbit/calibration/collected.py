"""Statistics in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lowbit.solvers.base import Statistics

from .collection import Contents, StatisticsCollection
from .statistics_file import save_statistics


class Collected(StatisticsCollection):
    """Statistics of layers by name, in memory."""

    def __init__(self, contents: Contents, inputs: Mapping[str, Statistics]) -> None:
        self.contents = contents
        self._inputs = dict(inputs)

    def load_input(self, key: str) -> Statistics:
        """The statistics of an input."""
        return self._inputs[key]

    def save(self, path: str | Path) -> Path:
        """Write them as a statistics file. Raises `WriteError`."""
        return save_statistics(self, path)
