"""A quantized layer in another dialect: the same codes and scales under other keys and in another arrangement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.formats.parts import Parts, raw_bytes

from .banks import expert_parts, experts_of, is_marker, one_expert, stored_specs
from .dialects import Container, Dialect, StoredLayer, TensorSpec
from .dialects.base import Read
from .full_precision import OPTION, lacks_option
from .quantized_source import QuantizedComponent
from .rewrite import Made
from .weight_shape import lacks_place, refusal, shape_options, weight_shape


@dataclass(frozen=True)
class Respelled:
    """Makes one layer of `held` as `dialect` stores it, and checks that its parts come back with the same bits.

    Raises `CheckpointError` at once where the dialect has no place for the layer.
    """

    held: QuantizedComponent
    old: StoredLayer
    dialect: Dialect
    new: StoredLayer

    @classmethod
    def plan(cls, held: QuantizedComponent, old: StoredLayer, dialect: Dialect) -> Respelled:
        """How a layer of `held` is written in `dialect`."""
        same = held.dialect is dialect
        layout = old.layout if same else ""
        options = old.options if same else shape_options(old.options)
        if old.options.get(OPTION) and lacks_option(dialect) is None:
            options = {**options, OPTION: True}
        reason = ""
        forms = (old.format, *old.format.equivalents())
        for fmt in forms if same else sorted(forms, key=lambda fmt: len(fmt.spec)):  # plain ones are more widely read
            new = replace(old, format=fmt, keys={}, notes=[], layout=layout, options=options)
            why = refusal(dialect, new)
            if why is None:
                return cls(held, old, dialect, new)
            reason = reason or why
        if why := lacks_place(dialect, weight_shape(old)):
            raise CheckpointError(f"{old.place}: {why}; leave it in comfy, or decode it (lowbit dequantize)")
        raise CheckpointError(
            f"{old.place}: is {old.format}, and {reason}; its codes cannot be kept. Convert it again instead "
            f"(lowbit convert --requantize --dialect {dialect.name})" + _without_rotation(dialect, old)
        )

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that the layer becomes."""
        return stored_specs(self.dialect, self.new)

    @property
    def note(self) -> str:
        """What is not the same bits, in words, or ""."""
        if self.new.format == self.old.format:
            return ""
        return f"{self.old.layer}: {self.old.format} written as {self.new.format}, with the same codes"

    @property
    def memory(self) -> int:
        """Bytes that it takes at most."""
        size = sum(self.held.specs[key].nbytes for key in self.old.keys.values())
        return 6 * size // (experts_of(self.old) or 1)

    def __call__(self) -> Made:
        """Read, rearrange and store."""
        if experts_of(self.old):
            markers: dict[str, Tensor] = {}
            return Made(markers, slices=self._experts(markers))
        parts = self._recast(self.held.load(self.old))
        return Made(self.dialect.store_parts(self.new, parts), check=partial(self._check, self.specs))

    def _experts(self, markers: dict[str, Tensor]) -> Iterator[Made]:
        """A bank, one expert at a time; the marker, which is the same for all, goes into `markers`."""
        for index in range(experts_of(self.old)):
            tensors = self.dialect.store_parts(self.new, self._expert(index))
            markers |= {key: tensor for key, tensor in tensors.items() if is_marker(key)}
            stacked = {key: tensor for key, tensor in tensors.items() if not is_marker(key)}
            yield Made(stacked, check=partial(self._check_expert, index, markers))

    def _expert(self, index: int) -> Parts:
        return self._recast(expert_parts(self.held, self.old, index))

    def _recast(self, parts: Parts) -> Parts:
        return parts if self.new.format == self.old.format else self.old.format.recast(parts, self.new.format)

    def _check(self, specs: Mapping[str, TensorSpec], read: Read) -> dict[str, Any]:
        again = self._found(specs, read)
        back = self.dialect.load_parts(replace(again, shape=self.new.shape), read)
        refuse_changed(self.old, self._recast(self.held.load(self.old)), back)
        return {}

    def _check_expert(self, index: int, markers: dict[str, Tensor], read: Read) -> dict[str, Any]:
        again = self._found(self.specs, lambda key: markers[key] if is_marker(key) else read(key).unsqueeze(0))
        back = self.dialect.load_parts(replace(one_expert(again), shape=self.new.shape), read)
        refuse_changed(self.old, self._expert(index), back)
        return {}

    def _found(self, specs: Mapping[str, TensorSpec], read: Read) -> StoredLayer:
        """The layer as a loader finds it."""
        again = self.dialect.find_layers(described(self.dialect, self.new, specs), read).layers.get(self.new.layer)
        if again is None or shape_options(again.options) != shape_options(self.old.options):
            raise CheckpointError(f"{self.old.place}: is not found again as {self.dialect.name} writes it; report this")
        return again


def _without_rotation(dialect: Dialect, layer: StoredLayer) -> str:
    """Of a rotated layer, the format without a rotation that the dialect holds in its place, if it does; else ""."""
    if not getattr(layer.format, "rotation", 0):
        return ""
    plain = replace(layer.format, rotation=0)  # type: ignore[call-arg]
    if refusal(dialect, replace(layer, format=plain, keys={}, notes=[], layout="", options={})) is not None:
        return ""
    name, _, fields = plain.spec.removesuffix(")").partition("(")  # which leaves out what is the default
    spec = f"{name}({','.join(filter(None, (fields, 'rotation=0')))})"
    return f"; better the 16-bit file with --format '{spec}', which {dialect.name} can hold"


def refuse_changed(layer: StoredLayer, parts: Parts, back: Parts) -> None:
    """Raise `CheckpointError` unless the parts that were written came `back` with the same bits."""
    for name, part in parts.items():
        if name not in back or not torch.equal(raw_bytes(back[name]), raw_bytes(part)):
            raise CheckpointError(
                f"{layer.place}: its {name} does not come back from the new spelling; keep the file as it is"
            )


def described(dialect: Dialect, stored: StoredLayer, specs: Mapping[str, TensorSpec]) -> Container:
    """One layer as if it were all of a file or folder: how a loader of that dialect sees it."""
    metadata, configs = dialect.header_metadata([stored], {}), dialect.config_fields([stored], {})
    return Container(specs, metadata, configs, stored.where)
