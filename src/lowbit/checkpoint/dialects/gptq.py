"""The convention of AutoGPTQ and GPTQModel: integers of 2, 3, 4 or 8 bits with the columns of the weight first.

    qweight   int32 [K * bits / 32, N]   codes of one output in consecutive bits along K, the lowest first
    qzeros    int32 [G, N * bits / 32]   zero points in consecutive bits along N
    scales    float16 [G, N]
    g_idx     int32 [K]                  the group of each column; k // group_size unless columns were reordered

    w = (code - zero) * scale

Version 1 stores every zero point less one, version 2 (`checkpoint_format: gptq_v2`) as it is. A symmetric layer's zero
points are all 2 ** (bits - 1), which shows the version whatever the configuration says. A stored 2 ** bits - 1 of
version 1 is 2 ** bits to most programs and 0 to AutoGPTQ's torch kernel; it is read as the former. Symmetric layers are
written in version 1, which everything reads, others in version 2, which alone can hold every zero point.
"""

from __future__ import annotations

import re
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
from lowbit.formats import Format, Parts, from_config
from lowbit.formats.parts import HALVES
from lowbit.numerics.bit_packing import pack_bits, unpack_bits
from lowbit.numerics.groups import ceil_div

OWN_FILE = "quantize_config.json"
WORD = 32  # bits
_BITS = (2, 3, 4, 8)
_ROLES = {"qweight": "qdata", "scales": "scale", "qzeros": "zeros", "g_idx": "g_idx"}
_VERSION = "gptq_version"  # the option that keeps which version a layer came in


class Gptq:
    """Reads and writes the convention of this module's docstring; see `Dialect` for the contracts."""

    name = "gptq"
    summary = "AutoGPTQ and GPTQModel folders, versions 1 and 2"
    writes = True
    needs_folder = True
    owned_metadata: tuple[str, ...] = ()
    owned_configs: Mapping[str, tuple[str, ...]] = {"config.json": (FIELD,), OWN_FILE: ()}
    methods: tuple[str, ...] = ("gptq",)

    def detect(self, held: Container) -> bool:
        """Whether one of the two files says so, and there are codes."""
        return _description(held) is not None and any(key.endswith(".qweight") for key in held.tensors)

    def find_layers(
        self, held: Container, read: Read, *, infer_act_unsigned: bool = True, strict: bool = True
    ) -> FoundLayers:
        """See `Dialect.find_layers`."""
        said, dtype = _description(held) or {}, logical_dtype(held, torch.float16)
        version = 2 if str(said.get("checkpoint_format", said.get("format", "gptq"))).lower() == "gptq_v2" else 1

        def make(tensors: LayerTensors) -> StoredLayer | None:
            if "qweight" not in tensors.keys:
                return None
            tensors.need("qweight", "scales", "qzeros")
            facts = _facts_of(tensors, said)
            words, n = tensors.matrix("qweight")
            fmt = _format(tensors, facts)
            if fmt.config()["act_order"]:
                tensors.need("g_idx")
            return StoredLayer(
                layer=tensors.layer,
                format=fmt,
                shape=(n, words * WORD // int(facts["bits"])),
                dtype=dtype,
                keys={_ROLES[name]: key for name, key in tensors.keys.items()},
                options={_VERSION: version},
                where=held.where,
                dtypes={"scale": tensors.specs["scales"].dtype},
            )

        return collect(held, tensors_by_layer(held, _ROLES).values(), make, strict=strict)

    def load_parts(self, layer: StoredLayer, read: Read) -> Parts:
        """See `Dialect.load_parts`."""
        config, (n, k) = layer.format.config(), layer.shape
        bits, stored = config["bits"], stored_tensors(layer, _specs(layer), read)
        parts = {
            "qdata": _bytes(stored["qdata"].t()),
            "scale": stored["scale"].t().contiguous(),
        }
        zeros = unpack_bits(_bytes(stored["zeros"]), bits, n)
        if config["zero_point"]:
            one = 2 - int(layer.options.get(_VERSION, 1))
            if one and bits == 8 and bool((zeros == 0xFF).any()):
                raise PartsError(
                    f"{layer.place}: version 1 stores a zero point of 255, which is 256 to some programs and 0 to "
                    "others; quantize the original again"
                )
            parts["zero_point"] = zeros.t().contiguous().add_(one)
        else:
            _check_symmetric(layer, zeros, bits)
        order = stored.get("g_idx")
        if config["act_order"]:
            parts["g_idx"] = stored["g_idx"]
        elif order is not None and not torch.equal(order, _in_order(k, config["group_size"]).to(order.device)):
            raise PartsError(
                f"{layer.place}: its g_idx reorders columns, and the configuration says desc_act false; correct it"
            )
        layer.format.check(parts, layer.shape, layer.place)
        return parts

    def refuses(self, stored: StoredLayer) -> str | None:
        """See `Dialect.refuses`."""
        fmt, config, (n, k) = stored.format, stored.format.config(), stored.shape
        if fmt.name != "wna16" or fmt.plain != fmt:
            return "GPTQ stores integers with a scale a group; use wna16"
        bits = config["bits"]
        if bits not in _BITS:
            return f"GPTQ has codes of {', '.join(map(str, _BITS))} bits, not of {bits}"
        if n * bits % WORD or k * bits % WORD:
            return f"GPTQ packs whole words along both sides; {n} x {k} codes of {bits} bits do not fill them"
        if config["group_size"] and k % config["group_size"] and not config["act_order"]:
            return f"its {k} columns are no whole groups of {config['group_size']}"
        if stored.dtypes.get("scale", stored.format.part_dtypes(stored.dtype)["scale"]) not in HALVES:
            return "GPTQ's scales are 16-bit, and its are float32"
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
        config, (n, k) = stored.format.config(), stored.shape
        bits = config["bits"]
        if config["zero_point"]:
            zeros = parts["zero_point"].to(torch.int16) - (2 - _version(stored))
            if int(zeros.min()) < 0 or int(zeros.max()) >= 1 << bits:
                raise PartsError(
                    f"{stored.place}: has zero points that GPTQ version {_version(stored)} cannot store; convert it "
                    "again"
                )
            zeros = zeros.to(torch.uint8)
        else:
            middle = (1 << (bits - 1)) - (2 - _version(stored))
            zeros = torch.full((n, parts["scale"].shape[1]), middle, dtype=torch.uint8)
        tensors = {
            "qweight": _words(parts["qdata"]).t(),
            "scales": parts["scale"].t(),
            "qzeros": _words(pack_bits(zeros.t().contiguous(), bits)),
            "g_idx": parts["g_idx"] if config["act_order"] else _in_order(k, config["group_size"]),
        }
        return {join_key(stored.layer, name): tensors[name].contiguous() for name in _ROLES}

    def header_metadata(self, layers: Iterable[StoredLayer], plain: Mapping[str, TensorSpec]) -> dict[str, str]:
        """Nothing: the JSON files say it all."""
        return {}

    def config_fields(
        self, layers: Iterable[StoredLayer], plain: Mapping[str, TensorSpec]
    ) -> dict[str, dict[str, Any]]:
        """Both files. One description holds for all layers but those that `dynamic` takes out."""
        layers = list(layers)
        fmt = one_integer_format(layers, "GPTQ")
        if fmt is None:
            return {}
        config = fmt.config()
        out = [name for name in plain_layers(plain) if not name.endswith(("lm_head", "embed_tokens"))]
        facts: dict[str, Any] = {
            "bits": config["bits"],
            "group_size": config["group_size"] or -1,
            "desc_act": config["act_order"],
            "sym": not config["zero_point"],
            "lm_head": False,
            "checkpoint_format": "gptq_v2" if _version(layers[0]) == 2 else "gptq",
        }
        if out:
            facts["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in out}
        return {"config.json": {FIELD: {"quant_method": "gptq", **facts}}, OWN_FILE: {"quant_method": "gptq", **facts}}


GPTQ = Gptq()
register_dialect(GPTQ)


def _description(held: Container) -> Mapping[str, Any] | None:
    """What one of the files says. Raises `CheckpointError` where both are there and differ."""
    inner = quantization_config(held, "gptq")
    own = held.configs.get(OWN_FILE)
    if own is None or (inner is None and str(own.get("quant_method", "gptq")).lower() != "gptq"):
        return inner
    inner = inner or {}
    for name in ("bits", "group_size", "sym", "desc_act"):
        if own.get(name, inner.get(name)) != inner.get(name, own.get(name)):
            raise CheckpointError(
                f"{held.where}: {name} is {own[name]} in {OWN_FILE} and {inner[name]} in config.json; correct one"
            )
    return {**own, **inner}


def _facts_of(tensors: LayerTensors, said: Mapping[str, Any]) -> dict[str, Any]:
    """What holds for one layer: the description, changed by the entries of `dynamic` that match its name."""
    facts = {"group_size": 128, "sym": True, "desc_act": False, **said}
    dynamic = said.get("dynamic")
    for pattern, changes in dynamic.items() if isinstance(dynamic, Mapping) else ():
        expression = str(pattern).removeprefix("+:")
        try:
            hit = not expression.startswith("-:") and re.match(expression, tensors.layer)
        except re.error as error:
            raise tensors.error(f"dynamic has {pattern!r}, no regular expression: {error}; correct it") from error
        if hit and isinstance(changes, Mapping):
            facts.update(changes)
    if facts.get("bits") not in _BITS:
        raise tensors.error(f"the configuration says {facts.get('bits')} bits; known are {', '.join(map(str, _BITS))}")
    return facts


def _format(tensors: LayerTensors, facts: Mapping[str, Any]) -> Format:
    size = facts["group_size"]
    config = {
        "format": "wna16",
        "bits": facts["bits"],
        "group_size": 0 if size in (-1, None) else size,
        "zero_point": not facts["sym"],
        "act_order": bool(facts["desc_act"]) and size not in (-1, None),
    }
    try:
        return from_config(config, tensors.place)
    except FormatError as error:
        raise tensors.error(f"{error}; correct {OWN_FILE}") from error


def _check_symmetric(layer: StoredLayer, zeros: Tensor, bits: int) -> None:
    middle = 1 << (bits - 1)
    if zeros.numel() and not (bool((zeros == middle).all()) or bool((zeros == middle - 1).all())):
        raise PartsError(
            f"{layer.place}: has zero points from {int(zeros.min())} to {int(zeros.max())}, and the configuration "
            f"says sym, which is {middle - 1} or {middle} throughout; correct it"
        )


def _specs(stored: StoredLayer) -> dict[str, TensorSpec]:
    config, (n, k) = stored.format.config(), stored.shape
    bits, groups = config["bits"], ceil_div(k, config["group_size"]) if config["group_size"] else 1
    scale = stored.dtypes.get("scale", stored.format.part_dtypes(stored.dtype)["scale"])
    return {
        "qdata": TensorSpec(torch.int32, (k * bits // WORD, n)),
        "scale": TensorSpec(scale, (groups, n)),
        "zeros": TensorSpec(torch.int32, (groups, n * bits // WORD)),
        "g_idx": TensorSpec(torch.int32, (k,)),
    }


def _version(stored: StoredLayer) -> int:
    known = stored.options.get(_VERSION)
    return int(known) if known else 2 if stored.format.config()["zero_point"] else 1


def _words(packed: Tensor) -> Tensor:
    """Rows of bytes as int32; a short axis may have strides that a view of another width does not take."""
    flat = packed.clone(memory_format=torch.contiguous_format).view(-1)
    return flat.view(torch.int32).view(packed.shape[0], -1)


def _bytes(words: Tensor) -> Tensor:
    """The inverse of `_words`."""
    flat = words.clone(memory_format=torch.contiguous_format).view(-1)
    return flat.view(torch.uint8).view(words.shape[0], -1)


def _in_order(k: int, group_size: int) -> Tensor:
    return torch.arange(k, dtype=torch.int32) // (group_size or k)
