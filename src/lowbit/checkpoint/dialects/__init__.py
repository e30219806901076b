"""The on-disk conventions: one file each. Importing this package registers them all."""

from lowbit.checkpoint.dialects import awq, bfl, comfy, compressed_tensors, gguf, gptq, modelopt, nunchaku, torchao
from lowbit.checkpoint.dialects.base import (
    CONFIG_FILES,
    Container,
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
    written_dialect,
)

__all__ = [
    "CONFIG_FILES",
    "Container",
    "Dialect",
    "FoundLayers",
    "Problem",
    "StoredLayer",
    "TensorSpec",
    "awq",
    "bfl",
    "comfy",
    "compressed_tensors",
    "detect_dialect",
    "dialects",
    "get_dialect",
    "gguf",
    "gptq",
    "modelopt",
    "nunchaku",
    "register_dialect",
    "torchao",
    "undescribed",
    "written_dialect",
]
