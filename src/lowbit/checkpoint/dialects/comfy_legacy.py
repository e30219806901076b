"""Older ways of describing layers in comfy files, turned into the current description.

- `scaled_fp8` files (before ComfyUI 0.4): a tensor `scaled_fp8` marks the file, `<layer>.scale_weight` and
  `<layer>.scale_input` are the scales. Two elements in the marker ask for matrix products in full precision. An input
  scale of exactly 1 means none. A scale beside a weight that is not float8 is a dummy, and 1.
- INT8-Fast markers: `{"convrot": .., "convrot_groupsize": .., "per_row": true}` without a format, with int8 codes and
  a scale [N, 1], are int8_tensorwise.
- `hybrid_mxfp8` of convert_to_quant is mxfp8 with one more scale, `weight_scalar`, for GPUs without MXFP8. The codes
  were rounded by the scales of their blocks, so multiplied by that one alone they are noise; it is left out.
- Files without any description (a program lost the markers) are read where the dialect is named: float8 and nvfp4
  weights by their tensors.
- `weight_proj_down`, `weight_zeros` and their like: what comfy-kitchen's `state_dict` calls the parts.

(Wrong labels of convert_to_quant, which the shape of the scale puts right, are dealt with in `comfy_one_byte`.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lowbit.checkpoint.dialects.base import FoundLayers, Problem, Read, TensorSpec, join_key, layer_of, name_place
from lowbit.checkpoint.dialects.comfy_marker import Description
from lowbit.errors import CheckpointError, LowbitError

FILE_MARKER = "scaled_fp8"
FILE_PREFIXES = ("model.diffusion_model.",)  # what stands before the marker in a whole-model checkpoint
SCALE_WEIGHT = "scale_weight"
SCALE_INPUT = "scale_input"
HYBRID = "hybrid_mxfp8"
HYBRID_SCALE = "weight_scalar"
DROPPED_SCALE = "dropped_scale"  # its role among a layer's keys

# Other spellings of a part's key, after the one that is written.
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "scale": (SCALE_WEIGHT,),
    "input_scale": (SCALE_INPUT,),
    "zero": ("weight_zeros",),
    "proj_down": ("weight_proj_down",),
    "proj_up": ("weight_proj_up",),
    "smooth_factor": ("weight_smooth_factor",),
}
_INT8_FAST_FIELDS = {"convrot", "convrot_groupsize", "per_row", "format"}  # a format of null is none
_FORMATS = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2", torch.int8: "int8_tensorwise"}


def is_legacy(tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether a file is of the `scaled_fp8` kind, by its marker or by a scale beside a float8 weight."""
    for key in tensors:
        if _is_file_marker(key):
            return True
        layer = _scaled_layer(key, tensors)
        if layer is not None and tensors[join_key(layer, "weight")].dtype in _FORMATS:
            return True
    return False


def add_legacy(
    tensors: Mapping[str, TensorSpec], read: Read, where: str, found: FoundLayers, known: dict[str, Description]
) -> None:
    """Add to `known` a description of every layer that only a `scale_weight` tells of.

    Keys that carry nothing go to `found.container`, what cannot be understood to `found.problems`.
    """
    markers = {key.removesuffix(FILE_MARKER): spec for key, spec in tensors.items() if _is_file_marker(key)}
    found.container += [prefix + FILE_MARKER for prefix in markers]
    plain = 0
    for key in tensors:
        layer = _scaled_layer(key, tensors)
        if layer is None or layer in known:
            continue
        weight = tensors[join_key(layer, "weight")]
        if weight.dtype not in _FORMATS:
            try:
                _require_one(layer, key, weight, read, where)
            except LowbitError as error:
                found.problems.append(Problem(layer, error))
            dummy_input = join_key(layer, SCALE_INPUT)
            found.container += [key, *([dummy_input] if dummy_input in tensors else [])]
            plain += 1
            continue
        known[layer] = _describe(layer, weight, markers, where)
    if plain:
        found.notes.append(f"{plain} weights that are not float8 have a scale_weight of 1, which means nothing")


def add_undescribed(tensors: Mapping[str, TensorSpec], where: str, known: dict[str, Description]) -> None:
    """Add to `known` the layers of a file that describes none, and that somebody says is ComfyUI's.

    That settles what nothing in the file does: the order of nibbles and scales. Integers stay unknown: theirs may be
    the codes of a rotated weight.
    """
    for key, weight in tensors.items():
        layer = layer_of(key)
        if layer is None or layer in known:
            continue
        scale, second = (tensors.get(join_key(layer, name)) for name in ("weight_scale", "weight_scale_2"))
        name = "" if scale is None else _undescribed_format(weight.dtype, scale, second is not None)
        if name:
            known[layer] = Description(layer, {"format": name}, where)
            known[layer].note(f"nothing says how it is stored; as the dialect was named, {name} by its tensors")


def _undescribed_format(weight: torch.dtype, scale: TensorSpec, second: bool) -> str:
    """The format that these tensors are of, if ComfyUI wrote them; "" where it is not certain."""
    if second:
        blocks = len(scale.shape) == 2 and scale.dtype in (torch.float8_e4m3fn, torch.uint8)
        return "nvfp4" if weight == torch.uint8 and blocks else ""
    if weight == torch.float8_e4m3fn and scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return "mxfp8"
    return (
        _FORMATS[weight] if weight in (torch.float8_e4m3fn, torch.float8_e5m2) and scale.dtype.is_floating_point else ""
    )


def repair_fields(description: Description, weight: TensorSpec, tensors: Mapping[str, TensorSpec]) -> None:
    """Name the format of an INT8-Fast marker, and what hybrid_mxfp8 is.

    Raises `CheckpointError` when a description names no format at all.
    """
    fields = description.fields
    if fields.get("format") == HYBRID:
        description.fields, description.hybrid = {**fields, "format": "mxfp8"}, True
        description.note(f"{HYBRID} is mxfp8; its {HYBRID_SCALE} fits no code and is left out")
        return
    if fields.get("format"):
        if not isinstance(fields["format"], str):
            raise CheckpointError(
                f"{name_place(description.where, description.layer)}: format is {fields['format']!r} in the marker, "
                "expected a string; convert the file again"
            )
        return
    scale = tensors.get(join_key(description.layer, "weight_scale"))
    by_row = scale is not None and len(weight.shape) == 2 and scale.shape == (weight.shape[0], 1)
    if weight.dtype == torch.int8 and by_row and description.flag("per_row") and not set(fields) - _INT8_FAST_FIELDS:
        description.fields = {**fields, "format": "int8_tensorwise"}
        description.note("the marker names no format (INT8-Fast): its fields and int8 codes say int8_tensorwise")
        return
    raise CheckpointError(
        f"{name_place(description.where, description.layer)}: the marker names no format (its fields: "
        f"{', '.join(sorted(fields)) or 'none'}); convert the file again"
    )


def drops_input_scale(description: Description, key: str, spec: TensorSpec, read: Read) -> bool:
    """Whether this input scale of a legacy layer is the 1 that means none."""
    return description.legacy and key.endswith(SCALE_INPUT) and _value(spec, key, read) == 1.0


def _describe(layer: str, weight: TensorSpec, markers: Mapping[str, TensorSpec], where: str) -> Description:
    description = Description(layer, {"format": _FORMATS[weight.dtype]}, where, legacy=True)
    covering = [prefix for prefix in markers if f"{layer}.".startswith(prefix)]
    if not covering:
        description.note("has a scale_weight, but the file has no scaled_fp8 marker")
    elif torch.Size(markers[max(covering, key=len)].shape).numel() == 2:
        description.fields["full_precision_matrix_mult"] = True
    return description


def _scaled_layer(key: str, tensors: Mapping[str, TensorSpec]) -> str | None:
    """The layer (it may be "") whose `scale_weight` this key is, if it has a weight."""
    if key != SCALE_WEIGHT and not key.endswith(f".{SCALE_WEIGHT}"):
        return None
    layer = key.removesuffix(SCALE_WEIGHT).removesuffix(".")
    return layer if join_key(layer, "weight") in tensors else None


def _require_one(layer: str, key: str, weight: TensorSpec, read: Read, where: str) -> None:
    if torch.Size(weight.shape).numel() and (value := _value(TensorSpec.of(read(key)), key, read)) != 1.0:
        raise CheckpointError(
            f"{name_place(where, layer)}: the weight is {weight}, not float8, but has a scale_weight of "
            f"{'more than one value' if value is None else value}; it is not clear what the weight means. "
            "Get the original file, or convert again"
        )


def _value(spec: TensorSpec, key: str, read: Read) -> float | None:
    """The value of a one-element tensor, else None."""
    return float(read(key).reshape(()).float()) if torch.Size(spec.shape).numel() == 1 else None


def _is_file_marker(key: str) -> bool:
    return key == FILE_MARKER or key.endswith(f".{FILE_MARKER}")
