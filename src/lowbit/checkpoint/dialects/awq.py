"""The convention of AutoAWQ, version gemm: 4-bit integers with the columns of the weight first, interleaved.

    qweight   int32 [K, N / 8]   eight outputs a word, in the order 0 2 4 6 1 3 5 7 from the lowest nibble up
    qzeros    int32 [G, N / 8]   zero points, likewise
    scales    float16 [G, N]

    w = (code - zero) * scale

Its other versions (gemv, gemv_fast, marlin, exllama) arrange the same numbers otherwise and are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.dialects.base import (
    Container,
    FoundLayers,
    Read,
    StoredLayer,
    TensorSpec,
    join_key,
    refuse_unwritable,
    register_dialect,
)
from lowbit.checkpoint.dialects.described import (
    FIELD,
    LayerTensors,
    collect,
    logical_dtype,
    one_integer_format,
    plain_layers,
    quantization_config,
    stored_tensors,
    tensors_by_layer,
)
from lowbit.errors import CheckpointError, FormatError, PartsError
from lowbit.formats import Parts, from_config
from lowbit.formats.parts import HALVES
from lowbit.numerics.packing import pack_nibbles, unpack_nibbles

_BITS, _LANES = 4, 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which column of eight each nibble holds, the lowest first
_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # which nibble holds each column
_ROLES = {"qweight": "qdata", "scales": "scale", "qzeros": "zero_point"}


class Awq:
    """Reads and writes the convention of this module's docstring; see `Dialect` for the contracts."""

    name = "awq"
    summary = "AutoAWQ folders, version gemm"
    writes = True
    needs_folder = True
    owned_metadata: tuple[str, ...] = ()
    owned_configs: Mapping[str, tuple[str, ...]] = {"config.json": (FIELD,)}
    methods: tuple[str, ...] = ("awq",)

    def detect(self, held: Container) -> bool:
        """Whether config.json says so, and there are codes."""
        described = quantization_config(held, "awq") is not None
        return described and any(key.endswith(".qweight") for key in held.tensors)

    def find_layers(
        self, held: Container, read: Read, *, infer_act_unsigned: bool = True, strict: bool = True
    ) -> FoundLayers:
        """See `Dialect.find_layers`."""
        said = quantization_config(held, "awq") or {}
        version, bits = str(said.get("version", "gemm")).lower(), said.get("bits", said.get("w_bit", _BITS))
        if version != "gemm" or bits != _BITS:
            raise CheckpointError(
                f"{held.where}: is AutoAWQ version {version} with {bits} bits; only gemm with 4 bits is read. Take the "
                "16-bit model, or one of that version"
            )
        size, dtype = said.get("group_size", said.get("q_group_size", 128)), logical_dtype(held, torch.float16)

        def make(tensors: LayerTensors) -> StoredLayer | None:
            if "qweight" not in tensors.keys:
                return None
            tensors.need("qweight", "scales", "qzeros")
            k, words = tensors.matrix("qweight")
            config = {"format": "wna16", "group_size": 0 if size == -1 else size, "zero_point": True}
            try:
                fmt = from_config(config, tensors.place)
            except FormatError as error:
                raise tensors.error(f"{error}; correct config.json") from error
            return StoredLayer(
                layer=tensors.layer,
                format=fmt,
                shape=(words * _LANES, k),
                dtype=dtype,
                keys={_ROLES[name]: key for name, key in tensors.keys.items()},
                where=held.where,
                dtypes={"scale": tensors.specs["scales"].dtype},
            )

        return collect(held, tensors_by_layer(held, _ROLES).values(), make, strict=strict)

    def load_parts(self, layer: StoredLayer, read: Read) -> Parts:
        """See `Dialect.load_parts`."""
        stored = stored_tensors(layer, _specs(layer), read)
        parts = {
            "qdata": pack_nibbles(_columns(stored["qdata"]).t().contiguous()),
            "scale": stored["scale"].t().contiguous(),
            "zero_point": _columns(stored["zero_point"]).t().contiguous(),
        }
        layer.format.check(parts, layer.shape, layer.place)
        return parts

    def refuses(self, stored: StoredLayer) -> str | None:
        """See `Dialect.refuses`."""
        fmt, config, (n, k) = stored.format, stored.format.config(), stored.shape
        if fmt.name != "wna16" or fmt.plain != fmt or config["bits"] != _BITS or not config["zero_point"]:
            return "AutoAWQ stores 4-bit integers with zero points; use wna16(zero_point=true)"
        if config["act_order"]:
            return "AutoAWQ has no order of columns; use wna16 without act_order"
        if n % _LANES or k % 2 or (config["group_size"] and k % config["group_size"]):
            return f"AutoAWQ wants whole words of 8 rows and whole groups; it is {n} x {k}"
        if stored.dtypes.get("scale", fmt.part_dtypes(stored.dtype)["scale"]) not in HALVES:
            return "AutoAWQ's scales are 16-bit, and its are float32"
        return None

    def stored_specs(self, stored: StoredLayer) -> dict[str, TensorSpec]:
        """See `Dialect.stored_specs`."""
        refuse_unwritable(self, stored)
        specs = _specs(stored)
        return {join_key(stored.layer, name): specs[role] for name, role in _ROLES.items()}

    def store_parts(self, stored: StoredLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Dialect.store_parts`."""
        refuse_unwritable(self, stored)
        stored.format.check(parts, stored.shape, stored.place)
        if int(parts["zero_point"].max()) >= 1 << _BITS:
            raise PartsError(
                f"{stored.place}: has a zero point of {int(parts['zero_point'].max())}, and AutoAWQ stores 4 bits"
            )
        tensors = {
            "qweight": _interleaved(unpack_nibbles(parts["qdata"])[:, : stored.shape[1]].t()),
            "scales": parts["scale"].t(),
            "qzeros": _interleaved(parts["zero_point"].t()),
        }
        return {join_key(stored.layer, name): tensors[name].contiguous() for name in _ROLES}

    def header_metadata(self, layers: Iterable[StoredLayer], plain: Mapping[str, TensorSpec]) -> dict[str, str]:
        """Nothing: config.json says it all."""
        return {}

    def config_fields(
        self, layers: Iterable[StoredLayer], plain: Mapping[str, TensorSpec]
    ) -> dict[str, dict[str, Any]]:
        """`quantization_config`. One group size holds for all layers."""
        fmt = one_integer_format(layers, "AutoAWQ")
        if fmt is None:
            return {}
        facts = {
            "quant_method": "awq",
            "bits": _BITS,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": plain_layers(plain),
        }
        return {"config.json": {FIELD: {**facts, "group_size": fmt.group_size or -1}}}


AWQ = Awq()
register_dialect(AWQ)


def _columns(words: Tensor) -> Tensor:
    """int32 [R, C / 8] -> uint8 codes [R, C] in the order of columns."""
    nibbles = unpack_nibbles(words.contiguous().view(torch.uint8)).unflatten(1, (-1, _LANES))
    return nibbles[..., _PLACE].flatten(1)


def _interleaved(codes: Tensor) -> Tensor:
    """The inverse of `_columns`."""
    ordered = codes.contiguous().unflatten(1, (-1, _LANES))[..., _ORDER].flatten(1)
    return pack_nibbles(ordered.contiguous()).view(torch.int32)


def _specs(stored: StoredLayer) -> dict[str, TensorSpec]:
    size, (n, k) = stored.format.config()["group_size"], stored.shape
    groups = k // size if size else 1
    return {
        "qdata": TensorSpec(torch.int32, (k, n // _LANES)),
        "scale": TensorSpec(stored.dtypes.get("scale", stored.format.part_dtypes(stored.dtype)["scale"]), (groups, n)),
        "zero_point": TensorSpec(torch.int32, (groups, n // _LANES)),
    }
