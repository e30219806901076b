"""Quantized layers that transformers merges with others while it loads, such as experts into one bank.

A model's own converters stack or join the weights of several layers. Codes cannot be joined like that, so such layers
are decoded first, and the model holds them as plain weights; the rest of it stays quantized.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter

from lowbit.checkpoint.banks import experts_of, load_bank
from lowbit.checkpoint.dialects import Dialect
from lowbit.checkpoint.weight_shape import as_plain
from lowbit.errors import CheckpointError
from lowbit.integrations.transformers.loading import Claims


class MergedLayers(WeightConverter):
    """A converter of transformers that gets decoded weights where the file has quantized layers."""

    def __init__(self, inner: Any, claims: Claims, dialect: Dialect) -> None:
        patterns = (list(inner._original_source_patterns), list(inner._original_target_patterns))  # noqa: SLF001
        super().__init__(*patterns, operations=deepcopy(inner.operations), force_cpu=inner.force_cpu)
        self.scope_prefix, self.base_model_prefix = inner.scope_prefix, inner.base_model_prefix
        self.inner, self.claims, self.dialect = inner, claims, dialect
        self.dtype: torch.dtype | None = None
        self.keys: defaultdict[str, list[str]] = defaultdict(list)

    def __deepcopy__(self, memo: dict[int, Any]) -> MergedLayers:
        return MergedLayers(self.inner, self.claims, self.dialect)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """As transformers does for a layer's weight, for every tensor of the layer."""
        claim = self.claims.by_renamed.get(source_key)
        return super().rename_source_key(source_key if claim is None else claim.weight)

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        """Gather a tensor, and remember which one it is."""
        super().add_tensor(target_key, source_key, source_pattern, future)
        self.keys[source_pattern].append(source_key)

    def materialize_tensors(self) -> dict[str, list[Tensor]]:
        """The gathered tensors by pattern, those of quantized layers decoded, in the order of the layers."""
        found = super().materialize_tensors()
        return {pattern: list(self._decoded(self.keys[pattern], tensors)) for pattern, tensors in found.items()}

    def _decoded(self, keys: Iterable[str], tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        layers: dict[str, dict[str, Tensor]] = {}
        for key, tensor in zip(keys, tensors, strict=True):
            claim = self.claims.by_key.get(key)
            layers.setdefault(key if claim is None else claim.weight, {})[key] = tensor
        for held in layers.values():
            key, tensor = next(iter(held.items()))
            claim = self.claims.by_key.get(key)
            if claim is None:
                yield tensor.to(self.dtype)
                continue
            if experts_of(claim.stored):
                dtype = self.dtype or claim.stored.dtype
                yield load_bank(self.dialect, claim.stored, held.__getitem__, dtype).dequantize().contiguous()
                continue
            parts = self.dialect.load_parts(claim.stored, held.__getitem__)
            weight = claim.stored.format.dequantize(parts, claim.stored.shape, self.dtype or claim.stored.dtype)
            yield as_plain(weight, claim.stored)

    def reverse_transform(self) -> Any:
        """For saving: the model's own, as the weights are plain now."""
        return self.inner.reverse_transform()


def wrap_merging(conversions: Iterable[Any], claims: Claims, dialect: Dialect) -> tuple[list[Any], Claims]:
    """The conversions with those that merge quantized layers wrapped, and the claims on these layers.

    Raises `CheckpointError` for a layer whose format needs a bias, which a merged weight has not.
    """
    wrapped, merged = [], Claims({}, {})
    for conversion in conversions:
        mine = Claims({}, {})
        for renamed, claim in claims.by_renamed.items() if isinstance(conversion, WeightConverter) else ():
            if conversion.rename_source_key(claim.weight)[1] is not None and claim.key not in merged.by_key:
                mine.by_key[claim.key] = mine.by_renamed[renamed] = claim
                if claim.stored.format.folds_bias:
                    raise CheckpointError(
                        f"{claim.stored.place}: {claim.stored.format} moves a constant into the bias, and transformers "
                        "merges the layer into one without; convert with this layer kept (--keep)"
                    )
        wrapped.append(MergedLayers(conversion, mine, dialect) if mine.by_key else conversion)
        merged.by_key.update(mine.by_key)
        merged.by_renamed.update(mine.by_renamed)
    return wrapped, merged
