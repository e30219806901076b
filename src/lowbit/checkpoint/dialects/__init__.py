"""The on-disk conventions: one file each. Importing this package registers them all."""

from lowbit.checkpoint.dialects import comfy
from lowbit.checkpoint.dialects.base import (
    Dialect,
    FoundLayers,
    Problem,
    StoredLayer,
    TensorSpec,
    detect_dialect,
    dialects,
    get_dialect,
    register_dialect,
    undescribed,
)
from lowbit.checkpoint.dialects.comfy_migrate import Migration, Step, migrate

__all__ = [
    "Dialect",
    "FoundLayers",
    "Migration",
    "Problem",
    "Step",
    "StoredLayer",
    "TensorSpec",
    "comfy",
    "detect_dialect",
    "dialects",
    "get_dialect",
    "migrate",
    "register_dialect",
    "undescribed",
]
