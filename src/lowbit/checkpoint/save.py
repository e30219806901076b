"""Save a module with quantized layers as one safetensors file in a dialect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import CheckpointError
from lowbit.experts import QuantizedBank
from lowbit.layer_kinds import Layer, is_conv1d, matrix_shape, quantized_layers
from lowbit.tensor import QuantizedTensor

from .banks import check_bank_dialect, store_bank, stored_bank, stored_specs
from .dialects import Dialect, StoredLayer, TensorSpec, get_dialect
from .dialects.base import join_key
from .load import OPTIONS
from .target import check_weights_target
from .weight_shape import KERNEL, TURNED
from .writer import CheckpointWriter


@dataclass(frozen=True)
class _Coded:
    """A quantized weight to be written: the name of its parameter, and how a dialect stores it."""

    name: str
    layer: StoredLayer
    specs: dict[str, TensorSpec]
    tensors: Callable[[], dict[str, Tensor]]


def save(
    module: nn.Module, path: str | Path, *, dialect: str = "comfy", metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a module's parameters and persistent buffers to a safetensors file; `load` reads it back bit for bit.

    Quantized weights and banks of experts are stored through their parts as `dialect` says, one layer in memory at a
    time; a kernel's layout is undone first. Tied weights, quantized or not, are written once. `metadata` goes into the
    file's header. The target appears in one step, when it is complete. Raises `WriteError` when it cannot be written.
    """
    chosen, target = get_dialect(dialect), Path(path)
    if chosen.needs_folder or not chosen.writes:
        why = "describes layers in a folder's config.json" if chosen.writes else "is only read"
        raise CheckpointError(f"{target}: the dialect {dialect} {why}; save in another one, such as comfy")
    empty = [name for name, value in module.state_dict(keep_vars=True).items() if _is_meta(value)]
    if empty:
        raise CheckpointError(f"{target}: {empty[0]} is on the meta device, without values to save; load it first")
    check_weights_target(path)
    coded = [*_coded_layers(module, chosen), *_coded_banks(module, chosen)]
    plain = _plain_tensors(module, {one.name for one in coded})
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in plain.items()]
    entries += [(key, spec.dtype, spec.shape) for one in coded for key, spec in one.specs.items()]
    others = {name: TensorSpec.of(tensor) for name, tensor in plain.items()}
    header = {"format": "pt", **(metadata or {}), **chosen.header_metadata([one.layer for one in coded], others)}
    writer = CheckpointWriter(target, entries, header, fingerprint="module", resume=False)
    try:
        for name, tensor in plain.items():
            writer.write(name, tensor.detach().cpu().contiguous())
        for one in coded:
            for key, tensor in one.tensors().items():
                writer.write(key, tensor)
        writer.commit("module", {"tensors": [name for name, _, _ in entries]})
        return writer.finish()
    except BaseException:
        writer.abort(keep=False)
        raise


def _coded_layers(module: nn.Module, dialect: Dialect) -> list[_Coded]:
    found = []
    for name, layer in quantized_layers(module):
        weight = _whole_weight(name, layer)
        stored = _stored(name, layer, weight, dialect)

        def tensors(weight: QuantizedTensor = weight, stored: StoredLayer = stored) -> dict[str, Tensor]:
            parts = {part: tensor.cpu() for part, tensor in weight.in_layout("").parts.items()}
            return dialect.store_parts(stored, parts)

        found.append(_Coded(join_key(name, "weight"), stored, dialect.stored_specs(stored), tensors))
    return found


def _coded_banks(module: nn.Module, dialect: Dialect) -> list[_Coded]:
    """Every bank of experts once, under the first of its names."""
    found, seen = [], set()
    for name, bank in module.state_dict(keep_vars=True).items():
        if not isinstance(bank, QuantizedBank) or id(bank) in seen:
            continue
        seen.add(id(bank))
        stored = stored_bank(name, bank)
        check_bank_dialect(dialect, stored)

        def tensors(bank: QuantizedBank = bank, stored: StoredLayer = stored) -> dict[str, Tensor]:
            return store_bank(dialect, stored, bank)

        found.append(_Coded(name, stored, stored_specs(dialect, stored), tensors))
    return found


def _is_meta(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


def _whole_weight(name: str, layer: Layer) -> QuantizedTensor:
    weight = layer.weight
    assert isinstance(weight, QuantizedTensor)  # `quantized_layers` gave it
    if weight.matrix != matrix_shape(layer) or weight.transposed != is_conv1d(layer):
        raise CheckpointError(f"layer {name!r}: its weight is a view of a quantized matrix; save the whole matrix")
    return weight


def _stored(name: str, layer: Layer, weight: QuantizedTensor, dialect: Dialect) -> StoredLayer:
    loaded_as: str
    options: dict[str, Any]
    loaded_as, options = getattr(layer, OPTIONS, ("", {}))
    if loaded_as != weight.format.name:  # quantized anew since
        options = {}
    # Files hold matrices [N, K]: what the module's weight is besides that is said in the marker.
    shape: dict[str, Any] = {KERNEL: list(weight.shape)} if weight.dim() > 2 else {}
    if weight.transposed:
        shape = {TURNED: True}
    if shape and dialect.name != "comfy":
        raise CheckpointError(
            f"layer {name!r}: the dialect {dialect.name} has no place for the weight of a {type(layer).__name__}; save "
            "in comfy"
        )
    dtypes = {key: part.dtype for key, part in weight.in_layout("").parts.items()}
    return StoredLayer(name, weight.format, weight.matrix, weight.dtype, options={**options, **shape}, dtypes=dtypes)


def _plain_tensors(module: nn.Module, coded: set[str]) -> dict[str, Tensor]:
    """Parameters and persistent buffers that are not quantized, each object once."""
    kept: dict[str, Tensor] = {}
    state = module.state_dict(keep_vars=True)
    seen = {id(state[name]) for name in coded}
    for name, value in state.items():
        if name in coded or not isinstance(value, torch.Tensor) or id(value) in seen:
            continue
        if isinstance(value, QuantizedTensor):
            raise CheckpointError(
                f"{name}: a quantized tensor is saved as the weight of an nn.Linear, nn.Embedding or convolution only"
            )
        seen.add(id(value))
        kept[name] = value
    return kept
