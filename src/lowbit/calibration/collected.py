"""Statistics in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.solvers.base import Statistics

from .collection import Contents, Field
from .statistics_file import save_statistics
from .stored import StoredStatistics, fields_of, packed_fields


class Collected(StoredStatistics):
    """Statistics of layers by name, in memory, packed as a file holds them.

    Raises `StatisticsError` for second moments that are none.
    """

    def __init__(
        self,
        contents: Contents,
        inputs: Mapping[str, Statistics],
        outputs: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.contents = contents
        self._tensors: dict[str, Tensor] = {}
        for key, statistics in inputs.items():
            self.add(key, fields_of(statistics))
        for key, fields in (outputs or {}).items():
            self.add(key, fields)

    def add(self, key: str, fields: Mapping[str, Tensor]) -> None:
        """Keep the tensors of an input or output by field: one after the other takes no memory beside what is there."""
        self._tensors |= packed_fields(key, fields, self.contents.first_with(key))

    def __getstate__(self) -> dict[str, Any]:
        return {"contents": self.contents, "_tensors": self._tensors}  # no lock, which cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__init__()
        self.__dict__ |= state

    def stored(self, name: str) -> Tensor:
        """The tensor of a name."""
        return self._tensors[name]

    def stored_field(self, name: str) -> Field | None:
        """The dtype and shape of the tensor of a name; None where there is none."""
        tensor = self._tensors.get(name)
        return None if tensor is None else (tensor.dtype, tuple(tensor.shape))

    def save(self, path: str | Path) -> Path:
        """Write them as a statistics file. Raises `WriteError`."""
        return save_statistics(self, path)
