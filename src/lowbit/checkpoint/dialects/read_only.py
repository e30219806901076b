"""The half of a dialect that writes, for those that are only read: everything is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lowbit.checkpoint.dialects.base import StoredLayer, TensorSpec
from lowbit.errors import PartsError


class ReadOnly:
    """A dialect derives from this and states `name`, `summary` and how it reads; see `Dialect` for the contracts."""

    writes = False
    needs_folder = False
    owned_metadata: tuple[str, ...] = ()
    owned_configs: Mapping[str, tuple[str, ...]] = {}
    methods: tuple[str, ...] = ()

    def refuses(self, stored: StoredLayer) -> str | None:
        """Every layer."""
        return "this dialect is only read; choose another one to write"

    def stored_specs(self, stored: StoredLayer) -> dict[str, TensorSpec]:
        """Raises `PartsError`."""
        raise PartsError(f"{stored.place}: {self.refuses(stored)}")

    def store_parts(self, stored: StoredLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raises `PartsError`."""
        raise PartsError(f"{stored.place}: {self.refuses(stored)}")

    def header_metadata(self, layers: Iterable[StoredLayer], plain: Mapping[str, TensorSpec]) -> dict[str, str]:
        """Nothing."""
        return {}

    def config_fields(
        self, layers: Iterable[StoredLayer], plain: Mapping[str, TensorSpec]
    ) -> dict[str, dict[str, Any]]:
        """Nothing."""
        return {}
