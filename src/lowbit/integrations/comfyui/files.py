"""Any checkpoint lowbit reads as a state dict for ComfyUI: its keys, a marker beside each quantized layer.

ComfyUI rewrites older files itself, but not for a caller that brings operations of its own: that is done here. What is
in another convention (BFL, GGUF, compressed-tensors, ...) is put into ComfyUI's; codes stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from lowbit.checkpoint.dialects import FoundLayers, TensorSpec
from lowbit.checkpoint.dialects.base import join_key
from lowbit.checkpoint.dialects.comfy import COMFY
from lowbit.checkpoint.dialects.comfy_banks import EXPERTS
from lowbit.checkpoint.dialects.comfy_legacy import SCALE_INPUT, SCALE_WEIGHT, add_legacy
from lowbit.checkpoint.dialects.comfy_marker import HEADER, MARKER, marker_tensor, read_descriptions
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
    for layer, description in described.items():
        if join_key(layer, "weight") not in specs and layer not in specs:
            raise _missing_layer(layer, specs, where)
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


def _missing_layer(layer: str, specs: dict[str, TensorSpec], where: str) -> CheckpointError:
    longer = [key for key in specs if key.endswith(f".{layer}.weight")]
    hint = f"; there is {longer[0]!r}: the description must carry the full key prefix" if longer else ""
    return CheckpointError(
        f"{where or 'the file'}: describes a quantized layer {layer!r}, but there is no tensor "
        f"{join_key(layer, 'weight')!r}{hint}. Get the complete file, or remove the description"
    )


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
