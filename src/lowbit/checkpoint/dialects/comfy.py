"""The convention of ComfyUI single files: `<layer>.comfy_quant` markers, the `_quantization_metadata` header, keys.

`<layer>.weight` holds the codes, `<layer>.weight_scale` and its like the other parts. Marker and header are both
written and say the same. The fields of the JSON object, beside those of each format (`comfy_formats`,
`comfy_one_byte`):

format                       which format; required
orig_dtype, orig_shape       logical dtype ("torch.bfloat16") and shape, the latter where padding hides it
full_precision_matrix_mult   the runtime must not quantize activations; written only when true
kernel_shape                 [O, I / groups, ...]: the convolution's kernel whose matrix [N, K] this is
turned_over                  true: the weight is [K, N], as in the Conv1D of transformers
num_experts                  every tensor but the marker has a leading axis of so many experts (`comfy_banks`)
lowbit                       our own config, only where the fields above cannot say all of it; others ignore it

Whatever else a marker says is kept in `StoredLayer.options` and written again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lowbit.checkpoint.dialects.base import (
    Container,
    FoundLayers,
    Problem,
    Read,
    StoredLayer,
    TensorSpec,
    join_key,
    name_place,
    register_dialect,
    undescribed,
)
from lowbit.checkpoint.dialects.comfy_banks import as_one_expert, check_no_bank
from lowbit.checkpoint.dialects.comfy_find import CONSUMED, Siblings, find_layer, format_of, siblings
from lowbit.checkpoint.dialects.comfy_formats import UNFOLDED, disk_specs, storage_of
from lowbit.checkpoint.dialects.comfy_legacy import add_legacy, add_undescribed, is_legacy
from lowbit.checkpoint.dialects.comfy_marker import (
    HEADER,
    MARKER,
    Description,
    header_entry,
    marker_tensor,
    read_descriptions,
)
from lowbit.checkpoint.dialects.comfy_match import check_stored, suffixes, taken_as
from lowbit.checkpoint.dialects.described import FIELD
from lowbit.errors import CheckpointError, LowbitError, PartsError
from lowbit.formats import Format, Parts
from lowbit.layouts.base import get_layout


class Comfy:
    """Reads and writes the convention of this module's docstring; see `Dialect` for the contracts."""

    name = "comfy"
    summary = "ComfyUI single files: a comfy_quant marker a layer, and the same in the header"
    writes = True
    needs_folder = False
    owned_metadata: tuple[str, ...] = (HEADER,)
    owned_configs: Mapping[str, tuple[str, ...]] = {"config.json": (FIELD,)}
    methods: tuple[str, ...] = ("lowbit",)

    def detect(self, held: Container) -> bool:
        """Whether there is a marker, the header's entry, or what a `scaled_fp8` file has."""
        marked = any(key.rpartition(".")[2] == MARKER for key in held.tensors)
        return HEADER in held.metadata or marked or is_legacy(held.tensors)

    def find_layers(
        self, held: Container, read: Read, *, infer_act_unsigned: bool = True, strict: bool = True
    ) -> FoundLayers:
        """See `Dialect.find_layers`.

        An absent act_unsigned may be inferred for the layers of early Qwen-Image files.
        """
        tensors, where, found = held.tensors, held.where, FoundLayers()
        described = read_descriptions(tensors, held.metadata, read, where, found)
        add_legacy(tensors, read, where, found, described)
        if not self.detect(held):  # somebody named the dialect
            add_undescribed(tensors, where, described)
        beside = siblings(tensors)
        for layer, description in described.items():
            result = _layer_or_problem(description, tensors, beside, read, infer_act_unsigned)
            if isinstance(result, Problem):
                found.problems.append(result)
            else:
                found.layers[layer] = result
        found.rest_is_plain(tensors)
        broken = {problem.layer for problem in found.problems}
        found.problems += [
            Problem(layer, _unmarked(key, layer, tensors[key], where))
            for key in undescribed(found.plain, tensors)
            if (layer := key.rpartition(".")[0]) not in broken
        ]
        if strict and found.problems:
            raise found.problems[0].error
        return found

    def load_parts(self, layer: StoredLayer, read: Read) -> Parts:
        """See `Dialect.load_parts`."""
        check_no_bank(layer)
        fmt = layer.format
        stored = {role: read(key) for role, key in layer.keys.items() if role in (*fmt.part_names, UNFOLDED)}
        wanted = check_stored(layer, {role: TensorSpec.of(tensor) for role, tensor in stored.items()})
        stored = {role: taken_as(tensor, wanted[role]) for role, tensor in stored.items()}
        read_back = storage_of(fmt).read(fmt, stored, layer.shape, layer.layout)
        parts = {name: read_back[name] for name in fmt.part_names}
        fmt.check(parts, layer.shape, layer.place)
        return parts

    def refuses(self, stored: StoredLayer) -> str | None:
        """Every format has a place here; a layout may not suit the shape."""
        if not stored.layout or not (
            why := get_layout(stored.layout, stored.format).refuses(stored.format, *stored.shape)
        ):
            return None
        return f"{list(stored.shape)} {why}, as {stored.layout} needs; write it without a layout"

    def stored_specs(self, stored: StoredLayer) -> dict[str, TensorSpec]:
        """See `Dialect.stored_specs`."""
        self._check(stored)
        fmt, keys = stored.format, stored_keys(stored.layer, stored.format)
        specs = disk_specs(fmt, stored.shape, stored.dtype, stored.layout, stored.dtypes)
        marker = marker_tensor(marker_fields(stored))
        return {
            **{keys[part]: specs[part] for part in fmt.part_names},
            join_key(stored.layer, MARKER): TensorSpec.of(marker),
        }

    def store_parts(self, stored: StoredLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Dialect.store_parts`."""
        self._check(stored)
        fmt, keys = stored.format, stored_keys(stored.layer, stored.format)
        fmt.check(parts, stored.shape, name_place("", stored.layer))
        tensors = storage_of(fmt).write(fmt, parts, stored.layout)
        return {
            **{keys[part]: tensors[part].contiguous() for part in fmt.part_names},
            join_key(stored.layer, MARKER): marker_tensor(marker_fields(stored)),
        }

    def header_metadata(self, layers: Iterable[StoredLayer], plain: Mapping[str, TensorSpec]) -> dict[str, str]:
        """See `Dialect.header_metadata`: every layer with the very fields of its marker."""
        return header_entry({stored.layer: marker_fields(stored) for stored in layers})

    def config_fields(
        self, layers: Iterable[StoredLayer], plain: Mapping[str, TensorSpec]
    ) -> dict[str, dict[str, Any]]:
        """In a model folder, that these weights are lowbit's: a loader that does not know it reads codes as floats.

        How each is stored, the markers say.
        """
        return {"config.json": {FIELD: {"quant_method": "lowbit"}}} if list(layers) else {}

    def _check(self, stored: StoredLayer) -> None:
        if why := self.refuses(stored):
            raise PartsError(f"{name_place('', stored.layer)}: {why}")


COMFY = Comfy()
register_dialect(COMFY)


def stored_keys(layer: str, fmt: Format) -> dict[str, str]:
    """Part name -> the key it is written under."""
    return {part: join_key(layer, suffix) for part, suffix in suffixes(type(fmt), fmt.part_names).items()}


def marker_fields(stored: StoredLayer) -> dict[str, Any]:
    """The JSON object that describes a layer, as marker and header hold it."""
    fmt, shape, dtype, options, layout = stored.format, stored.shape, stored.dtype, stored.options, stored.layout
    storage = storage_of(fmt)
    fields: dict[str, Any] = {"format": storage.name_of(fmt), **storage.fields_of(fmt)}
    extra = storage.options_of({name: value for name, value in options.items() if name not in CONSUMED})
    if extra.pop("full_precision_matrix_mult", False):
        fields["full_precision_matrix_mult"] = True
    fields["orig_dtype"] = str(dtype)
    if not storage.tells_shape:
        fields["orig_shape"] = list(shape)
    if layout:
        fields["layout"] = layout
    fields |= {name: value for name, value in extra.items() if name not in fields}
    specs = disk_specs(fmt, shape, dtype, layout, {})
    if format_of(Description("", fields, "", tensors=specs), storage) != fmt:
        fields["lowbit"] = fmt.config()
    return fields


def _layer_or_problem(
    description: Description, tensors: Mapping[str, TensorSpec], beside: Siblings, read: Read, infer: bool
) -> StoredLayer | Problem:
    try:
        tensors, read = as_one_expert(description, tensors, beside.get(description.layer, {}), read)
        return find_layer(description, tensors, beside, read, infer)
    except LowbitError as error:
        return Problem(description.layer, error)


def _unmarked(key: str, layer: str, spec: TensorSpec, where: str) -> LowbitError:
    return CheckpointError(
        f"{name_place(where, layer)}: {key!r} is {spec} with scales beside it, but no {MARKER} marker and no entry in "
        "the header "
        "says how it is stored; shapes cannot tell the order of nibbles and scales. Get the original file, or convert "
        "again"
    )
