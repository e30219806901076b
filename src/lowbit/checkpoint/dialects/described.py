"""What dialects share that describe their layers in a folder's JSON files instead of beside each layer.

Which layers are quantized, the tensors show; what these mean, the description says. The two must agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, LowbitError, PartsError
from lowbit.formats.wna16 import WNA16

from .base import Container, FoundLayers, Problem, Read, Shape, StoredLayer, TensorSpec, join_key, name_place

FIELD = "quantization_config"  # of config.json, as Hugging Face names it
_E2M1_MAGNITUDES = 0x77  # of two packed codes, all but the signs
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def quantization_config(held: Container, *methods: str) -> Mapping[str, Any] | None:
    """The `quantization_config` of config.json if its `quant_method` is one of these, else None."""
    found = held.configs.get("config.json", {}).get(FIELD)
    if not isinstance(found, Mapping):
        return None
    return found if str(found.get("quant_method", "")).lower() in methods else None


def logical_dtype(held: Container, default: torch.dtype = torch.bfloat16) -> torch.dtype:
    """The dtype of the model before it was quantized, as config.json states it."""
    config = held.configs.get("config.json", {})
    named = config.get("dtype", config.get("torch_dtype"))
    return _DTYPES.get(str(named).removeprefix("torch."), default)


@dataclass(frozen=True)
class LayerTensors:
    """The tensors of one layer that a dialect names: suffix -> key, and the specs by suffix."""

    layer: str
    where: str
    keys: dict[str, str]
    specs: dict[str, TensorSpec]

    @property
    def place(self) -> str:
        """File and layer, as messages name them."""
        return name_place(self.where, self.layer)

    def error(self, message: str) -> CheckpointError:
        """An error about this layer."""
        return CheckpointError(f"{self.place}: {message}")

    def need(self, *suffixes: str) -> None:
        """Raise `CheckpointError` unless all of these are there."""
        missing = [suffix for suffix in suffixes if suffix not in self.keys]
        if missing:
            raise self.error(
                f"lacks {', '.join(join_key(self.layer, suffix) for suffix in missing)}, without which its codes mean "
                "nothing; download the file again"
            )

    def matrix(self, suffix: str) -> Shape:
        """The shape of one of them. Raises `CheckpointError` for anything but a matrix."""
        spec = self.specs[suffix]
        if len(spec.shape) != 2:
            raise self.error(f"its {suffix} is {spec}, expected a matrix; only linear layers are read")
        return spec.shape[0], spec.shape[1]


def means_zeros(keys: Mapping[str, str], read: Read) -> bool:
    """Whether an nvfp4 layer is all zeros whatever its global scale is, which therefore shows no convention."""
    return not (read(keys["scale"]).float().any() and (read(keys["qdata"]) & _E2M1_MAGNITUDES).any())


def tensors_by_layer(held: Container, suffixes: Collection[str]) -> dict[str, LayerTensors]:
    """Every layer with a tensor of one of these names, and those tensors; in the file's order."""
    found: dict[str, LayerTensors] = {}
    for key, spec in held.tensors.items():
        layer, _, suffix = key.rpartition(".")
        if suffix in suffixes:
            entry = found.setdefault(layer, LayerTensors(layer, held.where, {}, {}))
            entry.keys[suffix], entry.specs[suffix] = key, spec
    return found


def collect(
    held: Container,
    candidates: Iterable[LayerTensors],
    make: Callable[[LayerTensors], StoredLayer | None],
    *,
    strict: bool,
) -> FoundLayers:
    """The layers that `make` gives of the candidates (None: a plain one). Its errors are raised, or collected."""
    found = FoundLayers()
    for candidate in candidates:
        try:
            stored = make(candidate)
        except LowbitError as error:
            if strict:
                raise
            found.problems.append(Problem(candidate.layer, error))
            continue
        if stored is not None:
            found.layers[stored.layer] = stored
    found.rest_is_plain(held.tensors)
    return found


def stored_tensors(layer: StoredLayer, specs: Mapping[str, TensorSpec], read: Read) -> dict[str, Tensor]:
    """The tensors of a layer by role. Raises `PartsError` for one that is not what its format needs."""
    stored = {role: read(key) for role, key in layer.keys.items()}
    for role, tensor in stored.items():
        if TensorSpec.of(tensor) != specs[role]:
            raise PartsError(
                f"{layer.place}: {layer.keys[role]!r} is {TensorSpec.of(tensor)}, expected {specs[role]} for "
                f"{layer.format} {list(layer.shape)}; download the model again"
            )
    return stored


def matches(name: str, pattern: str) -> bool:
    """Whether a layer's name is meant by an entry of a list: the name itself, or "re:" and an expression for it."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error as error:
            raise CheckpointError(f"config.json: {pattern!r} is no regular expression: {error}; correct it") from error
    return name == pattern


def plain_layers(plain: Mapping[str, TensorSpec]) -> list[str]:
    """The layers whose weight [N, K] is not quantized: what lists of exceptions have to name."""
    return sorted(key.removesuffix(".weight") for key, spec in plain.items() if _is_matrix(key, spec))


def one_integer_format(layers: Iterable[StoredLayer], program: str) -> WNA16 | None:
    """The format of all layers, for a program with one description for them; None where there is no layer.

    A group of all K columns of a layer is the same as its whole row (0). Raises `PartsError` for layers that differ.
    """
    found = [(layer, layer.format) for layer in layers if isinstance(layer.format, WNA16)]
    common = set.intersection(*(_sizes(layer, fmt) for layer, fmt in found)) if found else set()
    size = next((fmt.group_size for _, fmt in found if fmt.group_size in common), min(common, default=None))
    made = [fmt if size is None else replace(fmt, group_size=size) for _, fmt in found]
    for (layer, fmt), one in zip(found, made, strict=True):
        if one != made[0]:
            raise PartsError(
                f"{layer.place}: is {fmt}, and layer {found[0][0].layer!r} is {found[0][1]}, but {program} has one "
                "description for all layers; convert the 16-bit model with one format for all, or choose a dialect "
                "that describes each layer, such as compressed_tensors"
            )
    return made[0] if made else None


def _sizes(layer: StoredLayer, fmt: WNA16) -> set[int]:
    """The group sizes that say the same of a layer."""
    whole = {0, layer.shape[1]}
    return whole if fmt.group_size in whole and not fmt.act_order else {fmt.group_size}


def _is_matrix(key: str, spec: TensorSpec) -> bool:
    return key.endswith(".weight") and len(spec.shape) == 2 and spec.dtype.is_floating_point
