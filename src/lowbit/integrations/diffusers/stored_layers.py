"""Quantized layers in what diffusers loads: it reads all tensors of a file into a dictionary and then converts names.

The tensors of a layer become one `QuantizedTensor` under the name of its weight before anything else happens to them.
So nothing casts a scale, and what converters do to weights (chunk, split, cat along N) is done to codes and scales
together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.checkpoint.dialects import Container, FoundLayers, StoredLayer, TensorSpec, detect_dialect
from lowbit.checkpoint.dialects.base import join_key
from lowbit.errors import CheckpointError
from lowbit.integrations.hf_files import DescribedFiles, fitted_to, remember_options
from lowbit.tensor import QuantizedTensor

_PLAIN_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def describe_state(state: Mapping[str, Any], where: str) -> DescribedFiles:
    """What the tensors of a file say, without its header and the JSON files beside it.

    Raises `CheckpointError` (or `PartsError`, `FormatError`, `UnknownFormatError`) for whatever is not sound.
    """
    specs = {key: TensorSpec.of(value) for key, value in state.items() if isinstance(value, Tensor)}
    held = Container(specs, where=where)
    try:
        dialect = detect_dialect(held)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. Where the header of the file describes them, which diffusers does not pass on: "
            "from_single_file(lowbit.integrations.diffusers.read_single_file(path), ...)"
        ) from error
    found = FoundLayers(plain=list(specs)) if dialect is None else dialect.find_layers(held, state.__getitem__)
    return DescribedFiles(where, specs, dialect, found)


def widened(state: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a file with plain 8-bit floats as bfloat16, which holds all their values.

    diffusers would leave them as they are where there is a quantizer, and no layer can compute with them.
    """
    return {
        key: value.bfloat16() if isinstance(value, Tensor) and value.dtype in _PLAIN_FLOAT8 else value
        for key, value in state.items()
    }


class StoredLayers:
    """The quantized layers of a checkpoint, whose tensors may come in any order and in several files.

    Attributes: `layers` by name, `where` they are.
    """

    def __init__(self, files: DescribedFiles) -> None:
        assert files.dialect is not None  # it has layers
        self.where, self._dialect = files.where, files.dialect
        self.layers = dict(files.found.layers)
        self._owners = {key: stored.layer for key, (stored, _) in files.owners().items()}
        self._container = frozenset(files.found.container)
        self._arrived: dict[str, dict[str, Tensor]] = {}

    def keys(self, keys: Iterable[str]) -> list[str]:
        """The keys of a checkpoint with one key for each quantized layer, that of its weight."""
        plain = [key for key in keys if key not in self._owners and key not in self._container]
        return [*plain, *(join_key(layer, "weight") for layer in self.layers)]

    def place(self, model: nn.Module) -> None:
        """Fit the layers to those of a model that has the same names.

        Raises `CheckpointError` that names file and layer for one that the model lacks, or of another kind or shape.
        """
        modules = dict(model.named_modules())
        for name, stored in list(self.layers.items()):
            if name in modules:
                self.layers[name] = fitted_to(stored, modules[name], name)
                remember_options(modules[name], stored)
            elif _is_ignored(join_key(name, "weight"), model):
                del self.layers[name]
            else:
                raise CheckpointError(
                    f"{stored.place}: is quantized, and {type(model).__name__} has no {name!r}; load it with the class "
                    "and config that it was made for"
                )

    def take(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors of one file with each layer whose last tensor is among them as a quantized weight."""
        made: dict[str, Any] = {}
        for key, value in state.items():
            if key in self._container:
                continue
            layer = self._owners.get(key)
            if layer is None:
                made[key] = value
                continue
            arrived = self._arrived.setdefault(layer, {})
            arrived[key] = value
            stored = self.layers.get(layer)
            if stored is not None and len(arrived) == len(stored.keys):
                tensors = self._arrived.pop(layer)
                parts = self._dialect.load_parts(stored, tensors.__getitem__)
                made[join_key(layer, "weight")] = QuantizedTensor(parts, stored.format, stored.shape, stored.dtype)
        return made

    def refuse_incomplete(self) -> None:
        """Raise `CheckpointError` where tensors of a layer never came."""
        for layer, arrived in self._arrived.items():
            if stored := self.layers.get(layer):
                lacks = sorted(stored.keys.values() - arrived.keys())
                raise CheckpointError(
                    f"{stored.place}: {', '.join(lacks)} went missing while it was loaded; download it again"
                )

    def options_of(self, name: str, weight: QuantizedTensor) -> StoredLayer | None:
        """The stored layer of this name, where `weight` is of its format and shape."""
        stored = self.layers.get(name)
        return stored if stored and (stored.format, stored.shape) == (weight.format, tuple(weight.shape)) else None


def add_biases(model: nn.Module, weights: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    """Give layers of a model on the meta device a bias where the file has one that their format needs.

    `weights`: layer -> what has its format. Raises `CheckpointError` where a format needs a bias that is not in `keys`.
    """
    there = set(keys)
    for name, weight in weights.items():
        if not weight.format.folds_bias:
            continue
        if join_key(name, "bias") not in there:
            raise CheckpointError(
                f"{where}: layer {name!r}: {weight.format} keeps a share of the weight in the bias, and the bias is "
                "missing; the results would be wrong. Convert the original again"
            )
        layer = model.get_submodule(name)
        if getattr(layer, "bias", None) is None:
            plain: Tensor = layer.weight  # type: ignore[assignment]
            layer.bias = nn.Parameter(torch.empty(plain.shape[0], dtype=plain.dtype, device=plain.device))


def refuse_missing(model: nn.Module, keys: Iterable[str], where: str) -> None:
    """Raise `CheckpointError` naming the tensors of a model (on the meta device) that a checkpoint lacks."""
    there = set(keys)
    missing = [name for name, value in model.state_dict().items() if name not in there and value.is_meta]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(
            f"{where}: lacks {', '.join(missing[:5])}{more}, which {type(model).__name__} needs; the file is not "
            "complete, or the config is that of another model"
        )


def _is_ignored(name: str, model: nn.Module) -> bool:
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)
