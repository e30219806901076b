"""Any checkpoint lowbit reads as a state dict for ComfyUI: its keys, a marker beside each quantized layer.

ComfyUI rewrites older files itself, but not for a caller that brings operations of its own: that is done here. What is
in another convention (BFL, GGUF, compressed-tensors, ...) is put into ComfyUI's; codes stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from lowbit.checkpoint.dialects import FoundLayers, TensorSpec
from lowbit.checkpoint.dialects.base import join_key, layer_of
from lowbit.checkpoint.dialects.comfy import COMFY
from lowbit.checkpoint.dialects.comfy_banks import EXPERTS
from lowbit.checkpoint.dialects.comfy_legacy import SCALE_INPUT, SCALE_WEIGHT, add_legacy
from lowbit.checkpoint.dialects.comfy_marker import HEADER, MARKER, Description, marker_tensor, read_descriptions
from lowbit.checkpoint.quantized_source import QuantizedComponent, look_for_layers
from lowbit.checkpoint.source import Component, Source, open_source
from lowbit.errors import CheckpointError


@dataclass(frozen=True)
class ComfyFile:
    """A checkpoint as ComfyUI takes it. `quantized`: how many layers are; `notes`: what was repaired, in words."""

    state_dict: dict[str, Tensor]
    metadata: dict[str, str]
    quantized: int
    notes: list[str] = field(default_factory=list)


def read_file(path: str | Path, dialect: str | None = None) -> ComfyFile:
    """Read a safetensors or GGUF file, an index or a model folder with one model in it.

    `dialect`: read it in that one, for files that do not say how their weights are stored.

    Raises `CheckpointError`, `PartsError` or `UnknownFormatError` that name file and layer.
    """
    with open_source(path, dialect) as source:
        held = look_for_layers(source, _only(source), strict=False)
        if held.dialect is None or held.dialect is COMFY:
            state_dict = {key: held.read(key) for key in held.specs}
            return describe_layers(state_dict, held.metadata, held.where)
        if held.found.problems:
            raise held.found.problems[0].error
        return _translated(held)


def describe_layers(state_dict: dict[str, Tensor], metadata: dict[str, str] | None, where: str = "") -> ComfyFile:
    """A ComfyUI file's state dict with a marker beside every quantized layer, whatever described it before.

    The header's entries and the markers are merged, the header winning; the tensors of `scaled_fp8` files get today's
    names, an input scale of 1, which means none, goes. Layers are named by their full keys, prefix and all. The tensors
    are those of `state_dict`, which is left as it is. Layers are not checked here: operations do that as they load.

    Raises `CheckpointError` for a description that cannot be read or names a layer that is not there.
    """
    specs = {key: TensorSpec.of(tensor) for key, tensor in state_dict.items()}
    found, read = FoundLayers(), state_dict.__getitem__
    described = read_descriptions(specs, metadata or {}, read, where, found)
    add_legacy(specs, read, where, found, described)
    if found.problems:
        raise found.problems[0].error
    made = {key: tensor for key, tensor in state_dict.items() if key not in found.container}
    for layer, description in _placed(described, specs, where, found.notes).items():
        made[join_key(layer, MARKER)] = marker_tensor(description.fields)
        if description.legacy:
            _rename(made, layer)
    notes = [*found.notes, *(f"{name}: {note}" for name, found_ in described.items() for note in found_.notes)]
    kept = {name: text for name, text in (metadata or {}).items() if name != HEADER}
    return ComfyFile(made, kept, len(described), notes)


def _rename(made: dict[str, Tensor], layer: str) -> None:
    """Give the scales of a `scaled_fp8` layer today's names."""
    made[join_key(layer, "weight_scale")] = made.pop(join_key(layer, SCALE_WEIGHT))
    scale = made.pop(join_key(layer, SCALE_INPUT), None)
    if scale is not None and not (scale.numel() == 1 and float(scale.float().reshape(())) == 1.0):
        made[join_key(layer, "input_scale")] = scale


def _placed(
    described: dict[str, Description], specs: dict[str, TensorSpec], where: str, notes: list[str]
) -> dict[str, Description]:
    """The descriptions by the layers that the file has.

    Some programs write a header with a prefix that the keys do not have, or without theirs. Where one prefix, put in
    front or taken away, leads from all such names to layers of the file, those are meant, and it is noted.
    """
    layers = {name for key in specs if (name := layer_of(key)) is not None} | set(specs)
    lost = [layer for layer in described if layer not in layers]
    if not lost:
        return described
    fitting = [added for added in _prefixes(lost[0], layers) if all(added + layer in layers for layer in lost)]
    extra = [cut for cut in _prefixes_of(lost[0]) if all(_cut(layer, cut) in layers for layer in lost)]
    if len(fitting) + len(extra) != 1:
        raise CheckpointError(
            f"{where or 'the file'}: describes a quantized layer {lost[0]!r}, but there is no tensor "
            f"{join_key(lost[0], 'weight')!r}, nor one prefix by which the {len(lost)} descriptions like it would fit. "
            "Get the complete file, or remove the description"
        )
    notes.append(
        f"the header names {len(lost)} layers without {fitting[0]!r}, which their keys have in front"
        if fitting
        else f"the header names {len(lost)} layers with {extra[0]!r} in front, which their keys do not have"
    )
    meant = {layer: fitting[0] + layer if fitting else _cut(layer, extra[0]) for layer in lost}
    return {meant.get(layer, layer): description for layer, description in described.items()}


def _prefixes(layer: str, layers: set[str]) -> set[str]:
    """What layers of the file have in front of this name."""
    return {name.removesuffix(layer) for name in layers if name.endswith(f".{layer}")}


def _prefixes_of(layer: str) -> list[str]:
    """The prefixes of a name: "a.b.c" has "a." and "a.b."."""
    pieces = layer.split(".")
    return [".".join(pieces[:count]) + "." for count in range(1, len(pieces))]


def _cut(layer: str, prefix: str) -> str:
    return layer.removeprefix(prefix) if layer.startswith(prefix) else ""


def _only(source: Source) -> Component:
    if len(source.components) == 1:
        return source.components[0]
    known = ", ".join(component.name for component in source.components)
    raise CheckpointError(f"{source.root}: holds several models ({known}); name the folder or the file of one")


def _translated(held: QuantizedComponent) -> ComfyFile:
    """The layers of another dialect in ComfyUI's; what ComfyUI has no place for is an error."""
    state_dict = {key: held.read(key) for key in held.found.plain}
    for layer in held.layers.values():
        if layer.options.get(EXPERTS) is not None:
            raise CheckpointError(f"{layer.place}: is a bank of experts, which is not run from this convention")
        stored = replace(layer, keys={}, layout="", options={})
        state_dict |= COMFY.store_parts(stored, held.load(layer))
    metadata = dict(held.metadata)
    held.strip_description(metadata)
    return ComfyFile(state_dict, metadata, len(held.layers), held.found.notes)
