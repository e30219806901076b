"""One quantized layer between a ComfyUI state dict and lowbit: found and checked, taken out, and written back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.dialects import Container, StoredLayer, TensorSpec
from lowbit.checkpoint.dialects.base import join_key, name_place, undescribed
from lowbit.checkpoint.dialects.comfy import COMFY, marker_fields, stored_keys
from lowbit.checkpoint.dialects.comfy_banks import EXPERTS
from lowbit.checkpoint.dialects.comfy_formats import known_names, storage_of
from lowbit.checkpoint.dialects.comfy_legacy import DROPPED_SCALE
from lowbit.checkpoint.dialects.comfy_marker import MARKER, marker_tensor, read_marker
from lowbit.errors import CheckpointError, UnknownFormatError
from lowbit.integrations.comfyui.layout import bias_gain, parts_of

# What stock ComfyUI reads right, where its table names it: on-disk name -> fields of our format that must be so.
_NATIVE: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "float8_e4m3fn": {"granularity": ("tensor",)},
    "float8_e5m2": {"granularity": ("tensor",)},
    "nvfp4": {},
    "mxfp8": {},
    "int8_tensorwise": {"granularity": ("tensor", "row")},
    "convrot_w4a4": {},
    "asym_w4a8_int8": {"bits": (4,), "correction": (False,)},
}


@dataclass(frozen=True)
class Reading:
    """How layers are read. `table`: ComfyUI's QUANT_ALGOS. `where`: the file, for messages.

    `kernels`: "auto" (ComfyUI's own code for the formats that it runs on this device, lowbit for all others), "lowbit"
    (for everything) or "comfy" (ComfyUI's code for everything that it can read). `disabled`: formats of ComfyUI's table
    that it cannot run on this device. `infer_act_unsigned`: take layers that early Qwen-Image files do not describe for
    unsigned, by their names.
    """

    table: Mapping[str, Mapping[str, Any]]
    kernels: str = "auto"
    disabled: frozenset[str] = frozenset()
    infer_act_unsigned: bool = False
    where: str = ""


def find_layer(
    state_dict: dict[str, Tensor], prefix: str, shape: tuple[int, int], reading: Reading
) -> StoredLayer | None:
    """The quantized layer with this key prefix ("blocks.0.mlp."), checked as a whole; None: it is for ComfyUI's loader.

    Raises `UnknownFormatError` (a KeyError and a ValueError) for a format that neither knows, `PartsError` for missing,
    extra or misshapen tensors, `CheckpointError` for a marker that cannot be read or codes without one; all of them
    name file and layer.
    """
    layer, key = prefix.removesuffix("."), f"{prefix}{MARKER}"
    specs = {name: TensorSpec.of(tensor) for name, tensor in state_dict.items() if name.startswith(prefix)}
    held = Container(specs, where=reading.where)
    if key not in state_dict:
        if undescribed(specs, specs):
            COMFY.find_layers(held, state_dict.__getitem__)  # raises, and says what to do
        return None
    fields = read_marker(specs[key], state_dict.__getitem__, key, reading.where)
    name = named_format(fields)
    if isinstance(name, str) and name not in known_names() and name in reading.table:
        return None
    found = COMFY.find_layers(held, state_dict.__getitem__, infer_act_unsigned=reading.infer_act_unsigned, strict=False)
    for problem in found.problems:
        if isinstance(problem.error, UnknownFormatError):
            raise UnknownFormatError(name, {*known_names(), *reading.table}, name_place(reading.where, layer))
        raise problem.error
    stored = _fitted(found.layers[layer], shape)
    if not _is_native(stored, specs, reading):
        return stored
    if fields.get("format") is None or name not in reading.table:  # INT8-Fast's, hybrid_mxfp8: ComfyUI wants its name
        state_dict[key] = marker_tensor(marker_fields(stored))
        for role, old in stored.keys.items():
            if role == DROPPED_SCALE:
                del state_dict[old]
    return None


def named_format(fields: Mapping[str, Any]) -> object:
    """The format that a marker's fields name, or None."""
    nested = fields.get("params")
    return fields.get("format") or (nested.get("format") if isinstance(nested, dict) else None)


def check_bank(state_dict: dict[str, Tensor], prefix: str, reading: Reading) -> None:
    """Raise `CheckpointError` or `UnknownFormatError` for a bank of experts that ComfyUI's own code does not read."""
    key, place = f"{prefix}{MARKER}", name_place(reading.where, prefix.removesuffix("."))
    if key not in state_dict:
        return
    name = named_format(read_marker(TensorSpec.of(state_dict[key]), state_dict.__getitem__, key, reading.where))
    if name in reading.table:
        return
    if name in known_names():
        raise CheckpointError(
            f"{place}: is a bank of experts in {name}, and ComfyUI runs banks in its own formats only "
            f"({', '.join(sorted(reading.table))}); convert the original again to one of them"
        )
    raise UnknownFormatError(name, {*known_names(), *reading.table}, place)


def on_disk_name(stored: StoredLayer) -> str:
    """The format's name in a ComfyUI file."""
    return storage_of(stored.format).name_of(stored.format)


def take_parts(stored: StoredLayer, state_dict: dict[str, Tensor], device: torch.device | None) -> dict[str, Tensor]:
    """The canonical parts of a layer on a device; its tensors, marker included, leave the state dict."""
    parts = COMFY.load_parts(stored, state_dict.__getitem__)
    for key in stored.keys.values():
        state_dict.pop(key, None)
    return {name: part if device is None else part.to(device) for name, part in parts.items()}


def saved_layer(
    stored: StoredLayer, weight: Any, bias: Tensor | None, prefix: str, bias_dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """A layer's tensors by key as a ComfyUI file holds them: canonical keys, the marker, and the bias.

    bias_dtype: what the bias was in the file; ComfyUI widens it where it computes in more.
    """
    layer = replace(stored, layer=prefix.removesuffix("."))
    saved = COMFY.store_parts(layer, parts_of(weight))
    gain = bias_gain(weight)
    if gain is not None:
        bias = gain if bias is None else bias.float() + gain.to(bias.device)
        bias_dtype = bias_dtype or stored.dtype
    if bias is not None:
        saved[join_key(layer.layer, "bias")] = bias if bias_dtype is None else bias.to(bias_dtype)
    return saved


def _fitted(stored: StoredLayer, shape: tuple[int, int]) -> StoredLayer:
    """The layer at the module's shape. Where the file knows only the padded shape, the module's is right."""
    if stored.options.get(EXPERTS) is not None or stored.shape == shape:
        return stored
    pad: int = getattr(storage_of(stored.format), "pad", 1)
    if stored.notes and tuple(-(-size // pad) * pad for size in shape) == stored.shape:
        return replace(stored, shape=shape)
    raise CheckpointError(
        f"{stored.place}: holds a weight of shape {list(stored.shape)}, the model expects {list(shape)}; "
        "load it into the right model"
    )


def _is_native(stored: StoredLayer, specs: Mapping[str, TensorSpec], reading: Reading) -> bool:
    """Whether ComfyUI's own code reads this layer as it is meant, and shall."""
    name = on_disk_name(stored)
    if reading.kernels == "lowbit" or name not in _NATIVE or name not in reading.table:
        return False
    if reading.kernels == "auto" and name in reading.disabled:
        return False
    config, keys = stored.format.config(), stored_keys(stored.layer, stored.format)
    said = all(config[field] in allowed for field, allowed in _NATIVE[name].items())
    spelled = all(keys[part] in specs for part in stored.format.part_names)
    scale = specs.get(keys.get("scale", ""))
    exact = scale is None or scale.dtype not in (torch.bfloat16, torch.float16)
    flat = name != "convrot_w4a4" or (scale is not None and len(scale.shape) == 1)
    return said and spelled and exact and flat and not stored.layout
