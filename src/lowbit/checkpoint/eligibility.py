"""Why a tensor stays as it is: the reasons that hold for any model, in words.

Two kinds: a tensor that the format cannot hold, which nobody can order otherwise, and one that is better left alone,
which a rule for that layer overrides.
"""

from __future__ import annotations

import torch

from lowbit.checkpoint.dialects.base import TensorSpec, layer_of
from lowbit.checkpoint.stored_format import StoredFormat
from lowbit.formats.parts import FLOATS

MIN_WEIGHTS = 4096  # below this a layer's markers and scales eat what its codes save
_SOURCE_DTYPES = (*FLOATS, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """Its short name, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def cannot_hold(key: str, spec: TensorSpec) -> str | None:
    """Why no format can store this tensor, or None."""
    shape, name = spec.shape, dtype_name(spec.dtype)
    if name.startswith("float8"):
        return f"already quantized ({name})"
    if spec.dtype not in _SOURCE_DTYPES:
        return f"{name} values"
    if len(shape) < 2:
        return "1-D" if shape else "a single value"
    if len(shape) == 3:
        return "3-D weight (convolution or bank of experts)"
    if len(shape) > 3:
        return f"{len(shape)}-D weight (convolution)"
    if not shape[0] * shape[1]:
        return "no elements"
    return None if layer_of(key) is not None else "its name does not end in .weight"


def cannot_store(stored: StoredFormat, shape: tuple[int, ...], *, embedding: bool) -> str | None:
    """Why this format cannot store a 2-D weight, or None."""
    if embedding and not stored.format.supports_embedding:
        return f"embedding table, and {stored.format.name} has no lookup"
    return stored.refuses(shape[0], shape[1])


def better_left(shape: tuple[int, ...]) -> str | None:
    """Why a weight that could be stored is left alone unless a rule names it, or None."""
    return f"fewer than {MIN_WEIGHTS} weights" if shape[0] * shape[1] < MIN_WEIGHTS else None
