"""From a description and a file's header to a `StoredLayer`: which tensors are the layer's, in which format."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch

from lowbit.checkpoint.dialects.base import Read, StoredLayer, TensorSpec, join_key, name_place
from lowbit.checkpoint.dialects.comfy_formats import UNFOLDED, storage_for, storage_of
from lowbit.checkpoint.dialects.comfy_legacy import (
    DROPPED_SCALE,
    HYBRID_SCALE,
    SPELLINGS,
    drops_input_scale,
    repair_fields,
)
from lowbit.checkpoint.dialects.comfy_marker import Description, require_weight
from lowbit.checkpoint.dialects.comfy_match import check_stored, comfy_keys, open_dtypes, suffixes
from lowbit.checkpoint.dialects.comfy_storage import Storage, make_format
from lowbit.errors import CheckpointError
from lowbit.formats import Format, get_format

_LOG = logging.getLogger(__name__)
# Layers that read what GELU gave, in early Qwen-Image files, which do not say act_unsigned.
_UNSIGNED_LAYERS = (".img_mlp.net.2", ".txt_mlp.net.2")
_INFERRED = "act_unsigned_inferred"
_OPTIONAL = ("pre_quant_scale", "input_scale")
# Fields that go into the format, the shape or the dtype; all others are options.
CONSUMED = frozenset(
    {
        *("format", "params", "lowbit", "orig_dtype", "orig_shape", "layout", "act_unsigned"),
        *("group_size", "block_size", "per_row", "convrot", "convrot_groupsize"),
        *("linear_dtype", "quant_group_size"),
    }
)

Siblings = Mapping[str, Mapping[str, str]]


def siblings(tensors: Mapping[str, TensorSpec]) -> dict[str, dict[str, str]]:
    """Layer -> last piece of a key -> key, of all tensors."""
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        layer, _, suffix = key.rpartition(".")
        found.setdefault(layer, {})[suffix] = key
    return found


def find_layer(
    description: Description, tensors: Mapping[str, TensorSpec], beside: Siblings, read: Read, infer: bool
) -> StoredLayer:
    """A described layer, checked against the file's header. Raises `LowbitError`s that name file and layer."""
    weight = require_weight(description, tensors)
    repair_fields(description, weight, tensors)
    place = name_place(description.where, description.layer)
    storage = storage_for(description.fields["format"], place)
    if len(weight.shape) not in storage.ranks:
        raise CheckpointError(
            f"{place}: the weight is {weight}, and {description.fields['format']} describes a matrix, not a "
            "convolution or a "
            "bank of experts; a runtime would use its codes as weights. Convert the original again and keep this layer"
        )
    keys = _find_keys(description, tensors, beside.get(description.layer, {}), storage, read)
    description.tensors = {role: tensors[key] for role, key in keys.items() if role != "marker"}
    inferred = _infer_act_unsigned(description, infer)
    fmt = format_of(description, storage)
    if UNFOLDED in description.tensors:
        keys = {UNFOLDED if role == "proj_down" else role: key for role, key in keys.items()}
    specs = {role: spec for role, spec in description.tensors.items() if role in (*fmt.part_names, UNFOLDED)}
    dtypes = open_dtypes(fmt, {role: spec.dtype for role, spec in specs.items()})
    stored = StoredLayer(
        layer=description.layer,
        format=fmt,
        shape=storage.shape_of(description),
        dtype=description.dtype() or (torch.float16 if dtypes.get("scale") == torch.float16 else torch.bfloat16),
        keys=keys,
        layout=storage.layout_of(description),
        options=_options(description, storage) | inferred,
        notes=description.notes,
        where=description.where,
        dtypes=dtypes,
        padded=storage.pads(description),
    )
    check_stored(stored, specs)
    return stored


def format_of(description: Description, storage: Storage) -> Format:
    """The format that fields and tensors describe; the optional parts are there when their tensors are."""
    place, config = name_place(description.where, description.layer), description.fields.get("lowbit")
    if config is None:
        fmt = storage.infer(description)
    elif isinstance(config, dict):
        fmt = make_format(config, place)
        if storage_of(fmt) is not storage or storage.name_of(fmt) != description.fields["format"]:
            raise CheckpointError(
                f"{place}: the marker says {description.fields['format']!r}, but its lowbit field {fmt}; a program "
                "has changed "
                "one of them. Remove the lowbit field, or convert again"
            )
        if fmt.pre_quant_scale and "pre_quant_scale" not in description.tensors:
            raise description.error(
                "pre_quant_scale is missing, and the weight means nothing without it; convert again"
            )
    else:
        raise CheckpointError(
            f"{place}: the lowbit field is {config!r}, expected a JSON object; convert the file again"
        )
    return dataclasses.replace(fmt, **{name: name in description.tensors for name in _OPTIONAL})


def _find_keys(
    description: Description, tensors: Mapping[str, TensorSpec], beside: Mapping[str, str], storage: Storage, read: Read
) -> dict[str, str]:
    """Role -> key of everything the layer owns. A `weight_` tensor that the format does not know is an error."""
    place, name = name_place(description.where, description.layer), description.fields["format"]
    cls = get_format(storage.format_name(name), place)
    keys = {} if description.marker is None else {"marker": description.marker}
    for part, suffix in suffixes(cls, [*comfy_keys(cls), *_OPTIONAL]).items():
        present = [beside[spelling] for spelling in (suffix, *SPELLINGS.get(part, ())) if spelling in beside]
        if len(present) > 1:
            raise description.error(f"has both {present[0]!r} and {present[1]!r} for its {part}; remove one of them")
        if not present:
            continue
        if part == "input_scale" and drops_input_scale(description, present[0], tensors[present[0]], read):
            keys["dropped_input_scale"] = present[0]
            continue
        keys[part] = present[0]
        if present[0] != join_key(description.layer, suffix) and not description.legacy:
            description.note(f"{part} is spelled {present[0].rpartition('.')[2]} here")
    if description.hybrid and HYBRID_SCALE in beside:
        keys[DROPPED_SCALE] = beside[HYBRID_SCALE]
    stray = [key for suffix, key in beside.items() if suffix.startswith("weight_") and key not in keys.values()]
    if stray:
        raise description.error(
            f"has tensors that {name} does not know: {', '.join(stray)}; they would be lost. Get a lowbit that knows "
            "this variant, or convert the original again"
        )
    return keys


def _infer_act_unsigned(description: Description, infer: bool) -> dict[str, Any]:
    """Give an svdquant layer that does not say act_unsigned its value. Returns the option that says so."""
    if description.fields["format"] != "svdquant_w4a4" or "act_unsigned" in description.fields:
        return {}
    if "lowbit" in description.fields or not description.layer.endswith(_UNSIGNED_LAYERS):
        return {}
    if not infer:
        description.note("act_unsigned is absent, and inference from the layer name is off: taken as false")
        return {}
    description.fields["act_unsigned"] = True
    description.note("act_unsigned inferred from the layer name: the key is absent")
    _LOG.warning(
        "%s: act_unsigned is absent; true by the layer's name", name_place(description.where, description.layer)
    )
    return {_INFERRED: True}


def _options(description: Description, storage: Storage) -> dict[str, Any]:
    """What the JSON says that is neither format, nor shape, nor dtype."""
    options = {name: value for name, value in description.fields.items() if name not in CONSUMED}
    if description.flag("full_precision_matrix_mult"):
        options["full_precision_matrix_mult"] = True
    else:
        options.pop("full_precision_matrix_mult", None)  # false is what absence means
    return storage.options_of(options)
