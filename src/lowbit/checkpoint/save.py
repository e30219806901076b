"""Save a module with quantized layers as one safetensors file in a dialect."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.errors import CheckpointError
from lowbit.nn import quantized_layers
from lowbit.tensor import QuantizedTensor

from .dialects import StoredLayer, TensorSpec, get_dialect
from .dialects.base import join_key
from .load import OPTIONS
from .target import check_file_target
from .writer import CheckpointWriter


def save(
    module: nn.Module, path: str | Path, *, dialect: str = "comfy", metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a module's parameters and persistent buffers to a safetensors file; `load` reads it back bit for bit.

    Quantized weights are stored through their parts as `dialect` says, one layer in memory at a time; a kernel's
    layout is undone first. Tied plain tensors are written once. `metadata` goes into the file's header. The target
    appears in one step, when it is complete. Raises `WriteError` when it cannot be written.
    """
    chosen, target = get_dialect(dialect), Path(path)
    if chosen.needs_folder or not chosen.writes:
        why = "describes layers in a folder's config.json" if chosen.writes else "is only read"
        raise CheckpointError(f"{target}: the dialect {dialect} {why}; save in another one, such as comfy")
    empty = [name for name, value in module.state_dict(keep_vars=True).items() if _is_meta(value)]
    if empty:
        raise CheckpointError(f"{target}: {empty[0]} is on the meta device, without values to save; load it first")
    check_file_target(target)
    weights = {name: _whole_weight(name, layer.weight) for name, layer in quantized_layers(module)}
    layers = [_stored(name, layer, weights[name]) for name, layer in quantized_layers(module)]
    coded = {join_key(layer.layer, "weight") for layer in layers}
    plain = _plain_tensors(module, coded)
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in plain.items()]
    for layer in layers:
        entries += [(key, spec.dtype, spec.shape) for key, spec in chosen.stored_specs(layer).items()]
    others = {name: TensorSpec.of(tensor) for name, tensor in plain.items()}
    header = {"format": "pt", **(metadata or {}), **chosen.header_metadata(layers, others)}
    writer = CheckpointWriter(target, entries, header, fingerprint="module", resume=False)
    try:
        for name, tensor in plain.items():
            writer.write(name, tensor.detach().cpu().contiguous())
        for layer in layers:
            weight = weights[layer.layer]
            parts = {name: part.cpu() for name, part in weight.in_layout("").parts.items()}
            for key, tensor in chosen.store_parts(layer, parts).items():
                writer.write(key, tensor)
        writer.commit("module", {"tensors": [name for name, _, _ in entries]})
        return writer.finish()
    except BaseException:
        writer.abort(keep=False)
        raise


def _is_meta(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


def _whole_weight(name: str, weight: Tensor) -> QuantizedTensor:
    if not isinstance(weight, QuantizedTensor) or tuple(weight.shape) != weight.matrix or weight.transposed:
        raise CheckpointError(f"layer {name!r}: its weight is a view of a quantized matrix; save the whole matrix")
    return weight


def _stored(name: str, layer: nn.Module, weight: QuantizedTensor) -> StoredLayer:
    loaded_as, options = getattr(layer, OPTIONS, ("", {}))
    if loaded_as != weight.format.name:  # quantized anew since
        options = {}
    dtypes = {key: part.dtype for key, part in weight.in_layout("").parts.items()}
    return StoredLayer(name, weight.format, weight.matrix, weight.dtype, options=options, dtypes=dtypes)


def _plain_tensors(module: nn.Module, coded: set[str]) -> dict[str, Tensor]:
    """Parameters and persistent buffers that are not quantized, each object once."""
    kept: dict[str, Tensor] = {}
    state = module.state_dict(keep_vars=True)
    seen = {id(state[name]) for name in coded}
    for name, value in state.items():
        if name in coded or not isinstance(value, torch.Tensor) or id(value) in seen:
            continue
        if isinstance(value, QuantizedTensor):
            raise CheckpointError(f"{name}: only the weight of an nn.Linear or nn.Embedding is saved quantized")
        seen.add(id(value))
        kept[name] = value
    return kept
