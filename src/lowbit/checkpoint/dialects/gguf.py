"""GGUF files (llama.cpp, ComfyUI-GGUF): a type for every tensor in the header, blocks with their scales inside.

`<layer>.weight` of a type with blocks is a layer of the format `gguf`. Beside it may lie, each one float32 value:
`<layer>.scale` (or `<layer>.weight.scale`), which multiplies the weight, as NVFP4 files have it, and
`<layer>.input_scale`. Only reading: what has the blocks is the file, and `export_gguf` writes it.
"""

from __future__ import annotations

import json

import torch

from lowbit.checkpoint.dialects.base import (
    Container,
    FoundLayers,
    Problem,
    Read,
    StoredLayer,
    join_key,
    layer_of,
    name_place,
    register_dialect,
)
from lowbit.checkpoint.dialects.read_only import ReadOnly
from lowbit.checkpoint.gguf_file import TYPES
from lowbit.checkpoint.gguf_header import PLAIN_TYPES
from lowbit.errors import CheckpointError, LowbitError
from lowbit.formats import Format, Parts, from_config
from lowbit.numerics.gguf_blocks import READABLE, block_type

_WRITER = "GGUF files are written whole, by lowbit.checkpoint.export_gguf; choose another dialect"


class Gguf(ReadOnly):
    """Reads the convention of this module's docstring; see `Dialect` for the contracts."""

    name = "gguf"
    summary = "GGUF files of llama.cpp and ComfyUI-GGUF: blocks with their scales inside, a type a tensor"
    owned_metadata: tuple[str, ...] = (TYPES, "gguf.version")

    def detect(self, held: Container) -> bool:
        """Whether the header was that of a GGUF file."""
        return TYPES in held.metadata

    def find_layers(
        self, held: Container, read: Read, *, infer_act_unsigned: bool = True, strict: bool = True
    ) -> FoundLayers:
        """See `Dialect.find_layers`."""
        found = FoundLayers()
        types: dict[str, str] = json.loads(held.metadata[TYPES])
        for key, kind in types.items():
            if kind in PLAIN_TYPES or key not in held.tensors:
                continue
            try:
                stored = _stored_layer(key, kind, held)
            except LowbitError as error:
                found.problems.append(Problem(layer_of(key) or key, error))
            else:
                found.layers[stored.layer] = stored
        found.rest_is_plain(held.tensors)
        if strict and found.problems:
            raise found.problems[0].error
        return found

    def load_parts(self, layer: StoredLayer, read: Read) -> Parts:
        """See `Dialect.load_parts`."""
        fmt = layer.format
        parts = {name: read(layer.keys[name]) for name in fmt.part_names}
        parts = {name: part if name == "qdata" else part.reshape(()) for name, part in parts.items()}
        fmt.check(parts, layer.shape, layer.place)
        return parts

    def refuses(self, stored: StoredLayer) -> str | None:
        """Nothing is written here."""
        return _WRITER


GGUF = Gguf()
register_dialect(GGUF)


def _stored_layer(key: str, kind: str, held: Container) -> StoredLayer:
    """The layer of a tensor of blocks. Raises `CheckpointError` for one that is none."""
    layer, shape = layer_of(key), held.tensors[key].shape
    if layer is None or len(shape) != 2:
        what = f"has {len(shape)} axes" if layer is not None else "is no layer's weight by its name (<layer>.weight)"
        raise CheckpointError(
            f"{held.where}: tensor {key!r} of type {kind} {what}; only 2-D weights of layers are read as blocks. "
            "Take a file that keeps it as F16"
        )
    place = name_place(held.where, layer)
    if kind not in READABLE:
        raise CheckpointError(
            f"{place}: is of the GGUF type {kind}, which is not read here; read are {', '.join(READABLE)}. "
            "Take the model in one of these"
        )
    n, k = shape[0], shape[1] // block_type(kind).size * block_type(kind).columns
    _check_rows(key, k, held, place)
    keys, scales = {"qdata": key}, _scales(layer, key, held, place)
    fmt: Format = from_config({"format": "gguf", "type": kind, **dict.fromkeys(scales, True)})
    return StoredLayer(layer, fmt, (n, k), keys=keys | scales, where=held.where)


def _scales(layer: str, key: str, held: Container, place: str) -> dict[str, str]:
    """Part name -> key of the scales beside a weight."""
    names = {
        "global_scale": (join_key(layer, "scale"), f"{key}.scale"),
        "input_scale": (join_key(layer, "input_scale"),),
    }
    found = {}
    for part, keys in names.items():
        for name in keys:
            spec = held.tensors.get(name)
            if spec is None:
                continue
            if spec.dtype != torch.float32 or torch.Size(spec.shape).numel() != 1:
                raise CheckpointError(f"{place}: {name!r} is {spec}, expected one float32 value; get the file again")
            found[part] = name
    return found


def _check_rows(key: str, k: int, held: Container, place: str) -> None:
    """Refuse blocks that run over the ends of rows: the shape that ComfyUI-GGUF notes is another one then."""
    noted = held.metadata.get(f"comfy.gguf.orig_shape.{key}")
    if noted is not None and json.loads(noted)[-1:] != [k]:
        raise CheckpointError(
            f"{place}: its shape is {noted}, but its blocks are cut by rows of {k}: they run over the ends of rows. "
            "Take a file of type Q8_0, Q5_1, Q4_0 or F16"
        )
