"""Quantized layers in the weight files that transformers loads: which tensors go where, and the weights they make.

transformers passes every tensor of a checkpoint through its `WeightConverter`s: each may claim keys, gathers the
tensors of one parameter and makes its value. `LayerConverter` claims exactly the keys of the layers that the files
describe, so names, devices, sharded files and the report of missing and unexpected keys stay transformers' business.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key

from lowbit.checkpoint.banks import experts_of, fit_bank, load_bank
from lowbit.checkpoint.dialects import Dialect, StoredLayer
from lowbit.checkpoint.dialects.base import layer_of
from lowbit.checkpoint.weight_shape import plain_key
from lowbit.errors import CheckpointError
from lowbit.integrations.hf_files import DescribedFiles, fitted_to, remember_options, restored_parameter

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_TARGET = "weight"


@dataclass(frozen=True)
class Claim:
    """One stored tensor: the layer it belongs to, its role there, its key in the file and its layer's weight's name."""

    stored: StoredLayer
    role: str
    key: str
    weight: str


@dataclass(frozen=True)
class Claims:
    """All claims, by the key in the file and by that key after transformers' own renamings."""

    by_key: dict[str, Claim]
    by_renamed: dict[str, Claim]

    def without(self, others: Claims) -> Claims:
        """These claims but those of `others`."""
        by_key = {key: claim for key, claim in self.by_key.items() if key not in others.by_key}
        return Claims(by_key, {key: claim for key, claim in self.by_renamed.items() if key not in others.by_renamed})


class LoadParts(ConversionOps):
    """Tells transformers that the tensors are for a quantizer, so that it casts none of them."""

    def __init__(self, hf_quantizer: object) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """What it is given, unchanged."""
        return input_dict


class LayerConverter(WeightConverter):
    """Claims the tensors of quantized layers and makes `QuantizedTensor` weights of them.

    One instance knows all layers; transformers copies it for every layer whose tensors it gathers. Source patterns are
    the roles of tensors here (part names and "marker"), not regular expressions on keys.
    """

    __slots__ = ("claims", "dialect", "dtype")

    def __init__(self, claims: Claims, dialect: Dialect, operation: ConversionOps) -> None:
        roles = sorted({claim.role for claim in claims.by_key.values()})
        super().__init__(source_patterns=roles, target_patterns=[_TARGET], operations=[operation])
        self.claims, self.dialect = claims, dialect
        self.dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerConverter:
        return LayerConverter(self.claims, self.dialect, self.operations[0])

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The weight that a tensor belongs to, by its key after all renamings, and its role; or the key and None."""
        claim = self.claims.by_renamed.get(source_key)
        return (source_key, None) if claim is None else (claim.weight, claim.role)

    def was_used(self) -> bool:
        """Never, for saving: `flat_state` writes what this has read, so nothing is to be reversed."""
        return False

    def convert(self, layer_name: str, model: Any = None, **kwargs: Any) -> dict[str, nn.Parameter]:
        """The weight of one layer, whose tensors have all been gathered."""
        claims = [self.claims.by_key[key] for key in next(iter(self.layer_targets.values()))]
        tensors = self.materialize_tensors()
        by_key = {claim.key: tensors[claim.role][0] for claim in claims}
        if experts_of(claims[0].stored):
            current = model.get_parameter(layer_name)
            bank = fit_bank(claims[0].stored, tuple(current.shape))
            made = load_bank(self.dialect, bank, by_key.__getitem__, self.dtype or current.dtype)
            return {layer_name: nn.Parameter(made, requires_grad=False)}
        name = layer_name.rpartition(".")[0]
        layer = model.get_submodule(name)
        stored = fitted_to(claims[0].stored, layer, name)
        remember_options(layer, stored)
        dtype = self.dtype or layer.weight.dtype
        return {layer_name: restored_parameter(layer, stored, self.dialect, by_key, dtype)}


def claim_layers(files: DescribedFiles, conversions: Iterable[Any]) -> Claims:
    """Every tensor of a quantized layer; `conversions` are those of transformers, of which the renamings count."""
    renamings = _renamings(conversions)
    claims = Claims({}, {})
    for stored in files.found.layers.values():
        weight = _renamed(plain_key(stored), renamings)
        for role, key in stored.keys.items():
            claims.by_key[key] = claims.by_renamed[_renamed(key, renamings)] = Claim(stored, role, key, weight)
    return claims


def _renamings(conversions: Iterable[Any]) -> list[Any]:
    return [entry for entry in conversions if isinstance(entry, WeightRenaming)]


def _renamed(key: str, renamings: Iterable[Any]) -> str:
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    return key


def place_layers(
    model: Any, files: DescribedFiles, conversions: list[Any], merged: Collection[str] = ()
) -> dict[str, StoredLayer]:
    """The stored layers by the names of the model's layers that they are for; banks of experts are only checked.

    Left out are layers whose codes have a key in `merged`: no layer of the model is theirs alone. Layers of a head that
    the model lacks may be in the file, and the model may have a head that the file lacks. What must not be, and raises
    a `CheckpointError` that names file and layer: a layer that the model has no place for, one of another kind or
    shape, and a layer that is missing while its like in other blocks is there.
    """
    state, base = model.state_dict(), model.base_model_prefix
    renamings = _renamings(conversions)
    placed, there = {}, set()
    for stored in files.found.layers.values():
        name, _ = rename_source_key(plain_key(stored), renamings, [], base, state)
        there.add(name)
        if stored.keys["qdata"] in merged:
            continue
        if name in state and experts_of(stored):
            fit_bank(stored, tuple(state[name].shape))
        elif name in state:
            layer = name.rpartition(".")[0]
            placed[layer] = fitted_to(stored, model.get_submodule(layer), layer)
        elif not _is_of_a_head(name, base, state, files) and not _ignored(name, model):
            raise CheckpointError(
                f"{stored.place}: is quantized, and {type(model).__name__} has no {name!r}; load the folder with the "
                "class that it was made for"
            )
    for key in files.found.plain:
        there.add(rename_source_key(key, renamings, [], base, state)[0])
    _refuse_gaps(model, files, there, state)
    return placed


def _is_of_a_head(name: str, base: str, state: Mapping[str, Tensor], files: DescribedFiles) -> bool:
    """Whether a file of a model with a head holds this for the head, while a model without one is loaded."""
    front = f"{base}."
    whole = any(key.startswith(front) for key in files.specs) and not any(key.startswith(front) for key in state)
    return bool(base) and whole and not name.startswith(front)


def _ignored(name: str, model: Any) -> bool:
    patterns = model._keys_to_ignore_on_load_unexpected or ()  # noqa: SLF001  (transformers' name for what it skips)
    return any(re.search(pattern, name) for pattern in patterns)


def _refuse_gaps(model: Any, files: DescribedFiles, there: set[str], state: Mapping[str, Tensor]) -> None:
    kinds = {_NUMBER.sub("#", name) for name in there}
    tied = model.all_tied_weights_keys.keys()
    gaps = [
        name
        for name in state
        if layer_of(name) is not None and name not in there and name not in tied and _NUMBER.sub("#", name) in kinds
    ]
    if gaps:
        more = f" and {len(gaps) - 1} more" if len(gaps) > 1 else ""
        raise CheckpointError(
            f"{files.where}: lacks {gaps[0]!r}{more}, which other blocks have; the file is not complete, or its config "
            "is that of a deeper model: download or convert it again"
        )
