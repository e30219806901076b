"""The convention of torchao's safetensors: the data of tensor subclasses, described in the header of the file.

What the classes mean is in `torchao_int4`, `torchao_integers` and `torchao_floats`, how they are described in
`torchao_description`. Layers that lie in a shard which is not at hand are told from ones that lack a part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lowbit.checkpoint.dialects.base import (
    Container,
    FoundLayers,
    Problem,
    Read,
    StoredLayer,
    TensorSpec,
    join_key,
    layer_of,
    name_place,
    refuse_unwritable,
    register_dialect,
)
from lowbit.checkpoint.dialects.described import FIELD, plain_layers
from lowbit.checkpoint.dialects.read_only import ReadOnly
from lowbit.checkpoint.dialects.torchao_classes import OPTION, TensorClass
from lowbit.checkpoint.dialects.torchao_description import (
    NAMES,
    PLAIN,
    Described,
    data_key,
    describe,
    entries,
    tagged,
)
from lowbit.checkpoint.dialects.torchao_floats import Float8, Mx, Nv
from lowbit.checkpoint.dialects.torchao_int4 import Int4
from lowbit.checkpoint.dialects.torchao_integers import Int8Codes, IntxUnpackedToInt8
from lowbit.errors import CheckpointError, LowbitError, PartsError
from lowbit.formats import Parts

_FOR_ONE_KERNEL = ("Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor", "Int4PreshuffledTensor")


class TorchAO:
    """Reads and writes the convention of this module's docstring; see `Dialect` for the contracts."""

    name = "torchao"
    summary = "torchao safetensors: transformers, diffusers, vLLM"
    writes = True
    needs_folder = False
    owned_metadata: tuple[str, ...] = (NAMES,)
    owned_configs: Mapping[str, tuple[str, ...]] = {"config.json": (FIELD,)}
    methods: tuple[str, ...] = ("torchao",)

    _integer_zeros = False

    def __init__(self) -> None:
        found = (Int4(integer_zeros=self._integer_zeros), IntxUnpackedToInt8(), Int8Codes(), Float8(), Mx(), Nv())
        self._classes: dict[str, TensorClass] = {entry.kind: entry for entry in found}

    def detect(self, held: Container) -> bool:
        """Whether the header lists tensors and describes one that is quantized."""
        if NAMES not in held.metadata:
            return False
        return any(entry["_type"] != PLAIN for entry in entries(held.metadata).values())

    def find_layers(
        self, held: Container, read: Read, *, infer_act_unsigned: bool = True, strict: bool = True
    ) -> FoundLayers:
        """See `Dialect.find_layers`. Zero points are read, too: where all are 0, the format has none."""
        described = entries(held.metadata)
        found = FoundLayers(entries=list(described))
        for tensor, entry in described.items():
            if entry["_type"] == PLAIN:
                continue
            layer = layer_of(tensor)
            try:
                stored = self._find(held, read, tensor, layer, entry)
            except LowbitError as error:
                if strict:
                    raise
                found.problems.append(Problem(tensor if layer is None else layer, error))
                continue
            if stored is not None:
                found.layers[stored.layer] = stored
        found.rest_is_plain(held.tensors)
        return found

    def load_parts(self, layer: StoredLayer, read: Read) -> Parts:
        """See `Dialect.load_parts`."""
        parts = self._class(layer).read(layer, {role: read(key) for role, key in layer.keys.items()})
        layer.format.check(parts, layer.shape, layer.place)
        return parts

    def refuses(self, stored: StoredLayer) -> str | None:
        """See `Dialect.refuses`."""
        if not stored.layer:
            return "torchao's files need a layer's name before '.weight'"
        found = self._class_or_none(stored)
        if found is None:
            formats = sorted({name for entry in self._classes.values() for name in entry.formats})
            return f"torchao has no class for it; it has some for {', '.join(formats)}"
        return found.why_not(stored)

    def stored_specs(self, stored: StoredLayer) -> dict[str, TensorSpec]:
        """See `Dialect.stored_specs`."""
        refuse_unwritable(self, stored)
        specs = self._class(stored).specs(stored)
        return {data_key(join_key(stored.layer, "weight"), name): spec for name, spec in specs.items()}

    def store_parts(self, stored: StoredLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Dialect.store_parts`."""
        refuse_unwritable(self, stored)
        stored.format.check(parts, stored.shape, stored.place)
        data = self._class(stored).write(stored, parts)
        return {data_key(join_key(stored.layer, "weight"), name): one.contiguous() for name, one in data.items()}

    def header_metadata(self, layers: Iterable[StoredLayer], plain: Mapping[str, TensorSpec]) -> dict[str, str]:
        """An entry for every tensor, and the list of their names.

        Tensors without a module (no dot in the name) are left out: torchao's reader fails on their names, and passes
        over what is not listed.
        """
        described: dict[str, str] = {}
        for stored in layers:
            refuse_unwritable(self, stored)
            found = self._class(stored)
            entry = {**tagged(found.kind, found.attributes(stored)), "_tensor_data_names": found.names(stored)}
            described[join_key(stored.layer, "weight")] = json.dumps(entry)
        if not described:
            return {}
        described |= {name: json.dumps({"_type": PLAIN}) for name in plain if "." in name}
        return {**described, NAMES: json.dumps(list(described))}

    def config_fields(
        self, layers: Iterable[StoredLayer], plain: Mapping[str, TensorSpec]
    ) -> dict[str, dict[str, Any]]:
        """`quantization_config`, by which transformers and diffusers know that they need torchao.

        What a layer is, the header says; of the settings only the name counts, and it is that of the first layer.
        """
        first = next(iter(layers), None)
        if first is None:
            return {}
        name, version = self._class(first).config_of(first)
        settings = {**tagged(name, {}), "_version": version}
        facts = {"quant_type": {"default": settings}, "modules_to_not_convert": plain_layers(plain)}
        return {"config.json": {FIELD: {"quant_method": "torchao", **facts}}}

    def _find(
        self, held: Container, read: Read, tensor: str, layer: str | None, entry: Mapping[str, Any]
    ) -> StoredLayer | None:
        place, kind = name_place(held.where, layer or tensor), entry["_type"]
        if kind not in self._classes:
            why = "is packed for one kernel" if kind in _FOR_ONE_KERNEL else "is unknown"
            raise CheckpointError(
                f"{place}: torchao's class {kind} {why}; lowbit reads {', '.join(sorted(self._classes))}. Save the "
                "model with one of these, or take the 16-bit one"
            )
        found: Described | None = describe(held, layer or tensor, tensor, entry)
        if found is None:
            return None
        if not layer:
            raise CheckpointError(f"{place}: a {kind} that is no layer's weight; lowbit reads those of linear layers")
        self._need(found)
        return self._classes[kind].find(found, read)

    def _need(self, found: Described) -> None:
        missing = [name for name in self._classes[found.kind].required if name not in found.names]
        if missing:
            raise found.tensors.error(f"has no {', '.join(missing)} among its data; download the file again")

    def _class_or_none(self, stored: StoredLayer) -> TensorClass | None:
        """The class that a layer came in, if it is still of that, or the one its format is written as."""
        entry = stored.options.get(OPTION)
        came = self._classes.get(entry["_type"]) if isinstance(entry, Mapping) else None
        zeros_too = came is not None and came.kind in ("Int4Tensor", "Int8Tensor") and stored.format.name == "wna16"
        if came is not None and (stored.format.name in came.formats or zeros_too):
            return came
        return next((one for one in self._classes.values() if stored.format.name in one.formats), None)

    def _class(self, stored: StoredLayer) -> TensorClass:
        found = self._class_or_none(stored)
        if found is None:
            raise PartsError(f"{stored.place}: is {stored.format}: {self.refuses(stored)}")
        return found


class ExecuTorch(ReadOnly, TorchAO):
    """The same, where Int4Tensor has ExecuTorch's integer zero points. Only read; nothing in a file shows it."""

    name = "executorch"
    summary = "torchao safetensors with ExecuTorch's integer zero points in Int4Tensor; never detected"
    owned_metadata = TorchAO.owned_metadata
    owned_configs = TorchAO.owned_configs
    _integer_zeros = True

    def detect(self, held: Container) -> bool:
        """Never."""
        return False


TORCHAO = TorchAO()
register_dialect(TORCHAO)
register_dialect(ExecuTorch())
