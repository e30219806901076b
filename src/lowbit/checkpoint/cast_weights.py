"""Tensors that were cast to 8-bit floats: plain values to every reader, unless something beside them is their scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from lowbit.errors import CheckpointError

from .dialects import TensorSpec
from .dialects.base import join_key
from .eligibility import dtype_name
from .quantized_source import QuantizedComponent
from .weight_shape import CAST_DTYPES

_CODES = (torch.uint8, torch.int8, torch.int32)
_SCALE = "scale"


def unknown_scales(keys: Iterable[str], specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Key of a tensor of 8-bit floats -> the one of `keys` that may scale it, in a spelling that no dialect has."""
    return {scaled: key for key in keys for scaled in [_scaled_tensor(key, specs)] if scaled is not None}


def not_to_be_had(spec: TensorSpec, scale: str | None) -> str | None:
    """Why the values of a tensor are unknown: it is of 8-bit floats with this scale beside it. None where they are."""
    if scale is None or spec.dtype not in CAST_DTYPES:
        return None
    return f"already quantized ({dtype_name(spec.dtype)}), and how {scale!r} scales it is not known"


def cast_tensors(held: QuantizedComponent) -> dict[str, TensorSpec]:
    """The plain tensors of 8-bit floats, which are what they say. Raises `CheckpointError` for one with a scale."""
    casts = {key: held.specs[key] for key in held.found.plain if held.specs[key].dtype in CAST_DTYPES}
    scales = unknown_scales(held.found.plain, held.specs) if casts else {}
    codes = {_layer(key): key for key in held.found.plain if held.specs[key].dtype in _CODES} if casts else {}
    for key, spec in casts.items():
        if why := not_to_be_had(spec, scales.get(key)):
            raise CheckpointError(f"{held.where}: {key!r} is {why}; take the 16-bit file, or name its dialect")
        if _layer(key) in codes and _SCALE in key.removeprefix(_layer(key)):
            raise CheckpointError(
                f"{held.where}: {key!r} looks like the scale of {codes[_layer(key)]!r}, whose format is not known; "
                "take the 16-bit file, or name its dialect"
            )
    return casts


def _scaled_tensor(key: str, specs: Mapping[str, TensorSpec]) -> str | None:
    """The tensor of 8-bit floats that this one may scale, by its name; None for any other tensor.

    The weight of the same layer, or what the name begins with: "experts.down_proj" of "experts.down_proj_scale".
    """
    layer = _layer(key)
    if _SCALE not in key[len(layer) :]:
        return None
    starts = [key[:at] for at in range(key.rindex(_SCALE) - 1, max(len(layer), 1) - 1, -1) if key[at] in "._"]
    names = [join_key(layer.removesuffix(".weight"), "weight"), *starts, *(f"{start}.weight" for start in starts)]
    return next((name for name in names if name in specs and specs[name].dtype in CAST_DTYPES), None)


def _layer(key: str) -> str:
    return key.rpartition(".")[0]
