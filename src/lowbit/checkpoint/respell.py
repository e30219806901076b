"""A quantized layer in another dialect: the same codes and scales under other keys and in another arrangement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lowbit.errors import CheckpointError
from lowbit.formats.parts import Parts, raw_bytes

from .dialects import Container, Dialect, StoredLayer, TensorSpec
from .dialects.base import Read
from .quantized_source import QuantizedComponent
from .rewrite import Made


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
        options = old.options if same else {}
        refusal = ""
        forms = (old.format, *old.format.equivalents())
        for fmt in forms if same else sorted(forms, key=lambda fmt: len(fmt.spec)):  # plain ones are more widely read
            new = replace(old, format=fmt, keys={}, notes=[], layout=layout, options=options)
            why = dialect.refuses(new)
            if why is None:
                return cls(held, old, dialect, new)
            refusal = refusal or why
        raise CheckpointError(
            f"{old.place}: is {old.format}, and {refusal}; its codes cannot be kept. Convert it again instead "
            f"(lowbit convert --requantize --dialect {dialect.name})"
        )

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that the layer becomes."""
        return self.dialect.stored_specs(self.new)

    @property
    def note(self) -> str:
        """What is not the same bits, in words, or ""."""
        if self.new.format == self.old.format:
            return ""
        return f"{self.old.layer}: {self.old.format} written as {self.new.format}, with the same codes"

    def __call__(self) -> Made:
        """Read, rearrange and store."""
        parts = self._parts()
        return Made(self.dialect.store_parts(self.new, parts), check=partial(self._check, self.specs))

    def _parts(self) -> Parts:
        parts = self.held.load(self.old)
        return parts if self.new.format == self.old.format else self.old.format.recast(parts, self.new.format)

    def _check(self, specs: Mapping[str, TensorSpec], read: Read) -> dict[str, Any]:
        alone = described(self.dialect, self.new, specs)
        again = self.dialect.find_layers(alone, read).layers.get(self.new.layer)
        if again is None:
            raise CheckpointError(f"{self.old.place}: is not found again as {self.dialect.name} writes it; report this")
        parts, back = self._parts(), self.dialect.load_parts(replace(again, shape=self.new.shape), read)
        refuse_changed(self.old, parts, back)
        return {}


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
    return Container(specs, metadata, configs, stored.place)
