"""Tensors that were cast to 8-bit floats: plain values to every reader, unless something beside them is their scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lowbit.errors import CheckpointError

from .dialects import TensorSpec
from .dialects.base import join_key, layer_of
from .eligibility import dtype_name
from .quantized_source import QuantizedComponent
from .weight_shape import CAST_DTYPES


def unknown_scales(keys: Iterable[str], specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """By layer, those of `keys` that may scale its weight of 8-bit floats, in a spelling that no dialect has."""
    return {layer: key for key in keys for layer in [_scaled_layer(key, specs)] if layer is not None}


def not_to_be_had(spec: TensorSpec, scale: str | None) -> str | None:
    """Why the values of a tensor are unknown: it is of 8-bit floats with this scale beside it. None where they are."""
    if scale is None or spec.dtype not in CAST_DTYPES:
        return None
    return f"already quantized ({dtype_name(spec.dtype)}), and how {scale!r} scales it is not known"


def cast_tensors(held: QuantizedComponent) -> dict[str, TensorSpec]:
    """The plain tensors of 8-bit floats, which are what they say. Raises `CheckpointError` for one with a scale."""
    casts = {key: held.specs[key] for key in held.found.plain if held.specs[key].dtype in CAST_DTYPES}
    scales = unknown_scales(held.found.plain, held.specs) if casts else {}
    for key, spec in casts.items():
        if why := not_to_be_had(spec, scales.get(layer_of(key) or "") if layer_of(key) is not None else None):
            raise CheckpointError(f"{held.where}: {key!r} is {why}; take the 16-bit file, or name its dialect")
    return casts


def _scaled_layer(key: str, specs: Mapping[str, TensorSpec]) -> str | None:
    """The layer whose weight of 8-bit floats this tensor may scale, by its name; None for any other tensor."""
    layer, _, name = key.rpartition(".")
    layer = layer.removesuffix(".weight")
    weight = specs.get(join_key(layer, "weight"))
    return layer if weight is not None and weight.dtype in CAST_DTYPES and "scale" in name else None
