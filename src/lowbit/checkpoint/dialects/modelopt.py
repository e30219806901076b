"""The convention of NVIDIA ModelOpt's Hugging Face export: NVFP4 and FP8, described in JSON files beside the weights.

    algorithm     weight                 weight_scale              weight_scale_2   format
    FP8           float8_e4m3fn [N, K]   float32 []                                 fp8_e4m3
    NVFP4         uint8 [N, K / 2]       float8_e4m3fn [N, K/16]   float32 []       nvfp4, with an input_scale
    W4A16_NVFP4   as NVFP4                                                          nvfp4

The even column is in the low nibble, scales lie in rows, both global scales multiply. `hf_quant_config.json` and the
`quantization_config` of config.json say the same in other fields; where both are there they must agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
    means_zeros,
    plain_layers,
    quantization_config,
    tensors_by_layer,
)
from lowbit.errors import CheckpointError
from lowbit.formats import Format, Parts, from_config

OWN_FILE = "hf_quant_config.json"
ROLES = {
    "weight": "qdata",
    "weight_scale": "scale",
    "weight_scale_2": "global_scale",
    "input_scale": "input_scale",
    "pre_quant_scale": "pre_quant_scale",
}
_NAMES = {part: name for name, part in ROLES.items()}
_FP4 = ("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ")
_ALGORITHMS = ("FP8", *_FP4)
_GROUP = 16


class ModelOpt:
    """Reads and writes the convention of this module's docstring; see `Dialect` for the contracts."""

    name = "modelopt"
    summary = "NVIDIA ModelOpt folders: TensorRT-LLM, vLLM, SGLang"
    writes = True
    needs_folder = True
    owned_metadata: tuple[str, ...] = ()
    owned_configs: Mapping[str, tuple[str, ...]] = {"config.json": (FIELD,), OWN_FILE: ()}
    methods: tuple[str, ...] = ("modelopt", "modelopt_fp4")

    def detect(self, held: Container) -> bool:
        """Whether one of the two files says so, and there are scales."""
        described = _own(held) is not None or quantization_config(held, "modelopt", "modelopt_fp4") is not None
        return described and any(key.endswith("weight_scale") for key in held.tensors)

    def find_layers(
        self, held: Container, read: Read, *, infer_act_unsigned: bool = True, strict: bool = True
    ) -> FoundLayers:
        """See `Dialect.find_layers`."""
        algorithms, dtype = _algorithms(held), logical_dtype(held)

        def make(tensors: LayerTensors) -> StoredLayer | None:
            if "weight_scale" not in tensors.keys:
                return None
            fmt = format_of(tensors)
            algorithm = algorithms.get(tensors.layer, algorithms.get("", ""))
            if algorithm and (algorithm in _FP4) != (fmt.name == "nvfp4"):
                raise tensors.error(
                    f"holds {fmt.name}, and the configuration says {algorithm}; download the model again"
                )
            return stored_layer(tensors, fmt, dtype, read)

        found = collect(held, tensors_by_layer(held, ROLES).values(), make, strict=strict)
        _note_missing_scales(found)
        return found

    def load_parts(self, layer: StoredLayer, read: Read) -> Parts:
        """See `Dialect.load_parts`."""
        return load_linear_parts(layer, read)

    def refuses(self, stored: StoredLayer) -> str | None:
        """See `Dialect.refuses`."""
        fmt, config = stored.format, stored.format.config()
        if fmt.name == "nvfp4":
            if config["global_scale_divides"] or config["row_global_scale"]:
                return "ModelOpt has one global scale that multiplies; use plain nvfp4"
            if fmt.pre_quant_scale and not fmt.input_scale:
                return "ModelOpt has a pre_quant_scale only beside an input_scale"
            width = stored.shape[1]
            return f"it has {width} columns, and ModelOpt wants a multiple of {_GROUP}" if width % _GROUP else None
        if fmt.name != "fp8_e4m3" or config["granularity"] != "tensor" or fmt.pre_quant_scale:
            return "ModelOpt has nvfp4 and fp8_e4m3 with one scale a weight, nothing else"
        if fmt.rounds_input:
            return "ModelOpt's FP8 has no scales found on the fly; use activations=none with an input_scale"
        if not fmt.input_scale:
            return "ModelOpt's FP8 rounds its input with a stored scale; calibrate, and use fp8_e4m3(input_scale=true)"
        return None

    def stored_specs(self, stored: StoredLayer) -> dict[str, TensorSpec]:
        """See `Dialect.stored_specs`."""
        refuse_unwritable(self, stored)
        blank = stored.format.empty_parts(stored.shape, torch.device("meta"), stored.dtype)
        return {join_key(stored.layer, _NAMES[part]): TensorSpec.of(tensor) for part, tensor in blank.items()}

    def store_parts(self, stored: StoredLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Dialect.store_parts`: the parts as they are."""
        refuse_unwritable(self, stored)
        stored.format.check(parts, stored.shape, stored.place)
        return {join_key(stored.layer, _NAMES[part]): parts[part].contiguous() for part in stored.format.part_names}

    def header_metadata(self, layers: Iterable[StoredLayer], plain: Mapping[str, TensorSpec]) -> dict[str, str]:
        """Nothing: the JSON files say it all."""
        return {}

    def config_fields(
        self, layers: Iterable[StoredLayer], plain: Mapping[str, TensorSpec]
    ) -> dict[str, dict[str, Any]]:
        """Both files, with an algorithm for all or, where layers differ, one a layer."""
        by_layer = {layer.layer: _algorithm_of(layer.format) for layer in layers}
        if not by_layer:
            return {}
        kinds = sorted(set(by_layer.values()))
        algorithm = kinds[0] if len(kinds) == 1 else "MIXED_PRECISION"
        exclude = sorted({*plain_layers(plain)} | ({"lm_head"} - by_layer.keys()))
        facts: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": None}
        if any(kind in _FP4 for kind in kinds):
            facts["group_size"] = _GROUP
        if len(kinds) > 1:
            facts["quantized_layers"] = {
                name: {"quant_algo": kind, **({"group_size": _GROUP} if kind in _FP4 else {})}
                for name, kind in by_layer.items()
            }
        own = {"producer": {"name": "lowbit"}, "quantization": {**facts, "exclude_modules": exclude}}
        config = {"quant_method": "modelopt", **facts, "ignore": exclude}
        return {"config.json": {FIELD: config}, OWN_FILE: own}


MODELOPT = ModelOpt()
register_dialect(MODELOPT)


def format_of(tensors: LayerTensors) -> Format:
    """The format that a layer's tensors are of, without regard to any description."""
    tensors.need("weight", "weight_scale")
    weight = tensors.specs["weight"]
    extra: dict[str, Any] = {name: True for name in ("input_scale", "pre_quant_scale") if name in tensors.keys}
    tensors.matrix("weight")
    if weight.dtype == torch.uint8:
        tensors.need("weight_scale_2")
        return from_config({"format": "nvfp4", **extra}, tensors.place)
    if weight.dtype != torch.float8_e4m3fn:
        raise tensors.error(f"its weight is {weight} beside a scale, expected uint8 or float8_e4m3fn")
    scale = tensors.specs["weight_scale"].shape
    size = torch.Size(scale).numel()
    if size not in (1, weight.shape[0]):
        raise tensors.error(
            f"its weight_scale is {tensors.specs['weight_scale']}, expected one value or one a row ({weight.shape[0]})"
        )
    granularity = "tensor" if size == 1 and weight.shape[0] != 1 else "row" if scale else "tensor"
    return from_config({"format": "fp8_e4m3", "granularity": granularity, **extra}, tensors.place)


def stored_layer(tensors: LayerTensors, fmt: Format, dtype: torch.dtype, read: Read) -> StoredLayer:
    """A layer whose tensors are its parts, its global scale within reason."""
    n, width = tensors.specs["weight"].shape
    keys = {ROLES[name]: key for name, key in tensors.keys.items()}
    if fmt.name == "nvfp4":
        _check_multiplier(tensors, keys, read)
    shape = (n, 2 * width) if fmt.name == "nvfp4" else (n, width)
    return StoredLayer(tensors.layer, fmt, shape, dtype, keys=keys, where=tensors.where)


def _check_multiplier(tensors: LayerTensors, keys: Mapping[str, str], read: Read) -> None:
    """Raise `CheckpointError` for a global scale that cannot be what this convention stores: amax / 2688."""
    value = float(next(iter(read(keys["global_scale"]).flatten()), math.nan))
    if not math.isfinite(value) or value <= 0:
        raise tensors.error(f"its weight_scale_2 is {value}; it was never set. Download the model again")
    if value >= 1 and not means_zeros(keys, read):
        raise tensors.error(
            f"its weight_scale_2 is {value}: as a factor, weights would reach {2688 * value:.0f}; as a divisor (what "
            f"compressed-tensors stores) {2688 / value:.3g}. The file mixes two conventions: convert the original"
        )


def load_linear_parts(layer: StoredLayer, read: Read) -> Parts:
    """The parts of a layer that are stored as they are, up to the number of axes of scales."""
    rules = {rule.name: rule for rule in layer.format.rules}
    sizes = layer.format.sizes(*layer.shape)
    parts = {}
    for part, rule in rules.items():
        tensor, wanted = read(layer.keys[part]), rule.shape(sizes)
        single = tensor.numel() == torch.Size(wanted).numel() and part != "qdata"
        parts[part] = tensor.reshape(wanted) if single else tensor
        if parts[part].dtype not in rule.dtypes and tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            parts[part] = parts[part].to(rule.dtypes[0])
    layer.format.check(parts, layer.shape, layer.place)
    return parts


def _own(held: Container) -> Mapping[str, Any] | None:
    found = held.configs.get(OWN_FILE, {}).get("quantization")
    return found if isinstance(found, Mapping) else None


def _algorithms(held: Container) -> dict[str, str]:
    """The algorithm of each layer that is named, and under "" that of all others. Raises `CheckpointError`."""
    said: dict[str, str] = {}
    for facts in (_own(held), quantization_config(held, "modelopt", "modelopt_fp4")):
        if facts is None:
            continue
        _check_group_sizes(facts, held.where)
        overall = str(facts.get("quant_algo") or "")
        if said.get("", overall) != overall:
            raise CheckpointError(
                f"{held.where}: {OWN_FILE} says {said['']} and config.json says {overall}; correct one of them"
            )
        said[""] = overall
        layers = facts.get("quantized_layers")
        for name, entry in layers.items() if isinstance(layers, Mapping) else ():
            said[str(name)] = str(entry.get("quant_algo")) if isinstance(entry, Mapping) else str(entry)
    mixed = said.get("") == "MIXED_PRECISION"
    if mixed:
        said[""] = ""  # the tensors tell; a layer that is not named is not quantized
    for name, algorithm in said.items():
        if algorithm and algorithm not in _ALGORITHMS:
            about = f"layer {name!r}" if name else "the model"
            raise CheckpointError(
                f"{held.where}: {about} is {algorithm!r} by ModelOpt, which lowbit does not read; known are "
                f"{', '.join(_ALGORITHMS)} and MIXED_PRECISION. Take the 16-bit model"
            )
    return said


def _check_group_sizes(facts: Mapping[str, Any], where: str) -> None:
    """The group size may stand in three places; all that are there must be 16."""
    groups = facts.get("config_groups")
    entries: Sequence[Any] = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [entry.get("weights") for entry in entries if isinstance(entry, Mapping)]
    sizes = [facts.get("group_size"), *(w.get("group_size") for w in weights if isinstance(w, Mapping))]
    if str(facts.get("quant_algo")) not in _FP4:
        return
    for size in sizes:
        if size not in (None, _GROUP):
            raise CheckpointError(f"{where}: the group size of nvfp4 is said to be {size}; expected {_GROUP}")


def _note_missing_scales(found: FoundLayers) -> None:
    """Say where a static input scale is missing that other layers have: a runtime that takes 1.0 for it is wrong."""
    layers = list(found.layers.values())
    if not any(layer.format.input_scale for layer in layers):
        return
    for layer in layers:
        if not layer.format.input_scale:
            layer.notes.append("has no input_scale, though other layers have one: its input is not rounded")


def _algorithm_of(fmt: Format) -> str:
    if fmt.name == "nvfp4":
        return "NVFP4_AWQ" if fmt.pre_quant_scale else "NVFP4" if fmt.input_scale else "W4A16_NVFP4"
    return "FP8"
