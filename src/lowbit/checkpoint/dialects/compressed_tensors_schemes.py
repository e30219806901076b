"""The schemes of compressed-tensors and lowbit's formats: what `config_groups` says, and which format that is.

scheme                          format
pack-quantized                  wna16: integers of 2 to 8 bits, per group or row, with zero points or without
int-quantized, naive-quantized  int8 (activations rounded to 8 bits a token, or not); wna16 where there are fewer
                                bits, groups or zero points
float-quantized                 fp8_e4m3 per tensor, row or block
nvfp4-pack-quantized            nvfp4, its global scale as a divisor
mxfp4-pack-quantized            mxfp4
mxfp8-quantized                 mxfp8
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.formats import Format, from_config

REFUSED = {
    "marlin-24": "a sparse kernel layout",
    "sparse-24-bitmask": "2:4 sparse",
    "sparse-bitmask": "sparse",
    "mxfp6-pack-quantized": "6-bit floats",
    "fakequant": "not compressed",
}
_INT8_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@dataclass(frozen=True)
class Scheme:
    """One entry of `config_groups`: the name of its storage, and the arguments of weights and input activations."""

    name: str
    weights: Mapping[str, Any]
    input_activations: Mapping[str, Any] | None = None

    def get(self, key: str, default: Any = None) -> Any:
        """An argument of the weights; null counts as absent."""
        value = self.weights.get(key)
        return default if value is None else value

    @property
    def strategy(self) -> str:
        """tensor, channel, group, block or tensor_group; where the file leaves it out, by the group size."""
        size = self.weights.get("group_size")
        implied = "tensor" if size is None else "group" if size > 0 else "channel"
        return str(self.get("strategy", implied))

    def to_json(self) -> dict[str, Any]:
        """As a round trip keeps it."""
        return {"name": self.name, "weights": dict(self.weights), "input_activations": self.input_activations}


@dataclass(frozen=True)
class Meaning:
    """The format of a scheme, and what it says that lowbit does not do."""

    format: Format
    notes: list[str] = field(default_factory=list)


def meaning_of(scheme: Scheme, place: str, *, act_order: bool, input_scale: bool) -> Meaning:
    """The format of the layers of a scheme. Raises `CheckpointError` for one that has none."""
    if scheme.name in REFUSED:
        raise CheckpointError(
            f"{place}: is stored as {scheme.name} ({REFUSED[scheme.name]}), which lowbit does not read; take the "
            "16-bit model, or one in another format"
        )
    kind, bits, size = scheme.get("type", "int"), scheme.get("num_bits", 8), scheme.get("group_size", 0)
    activations, notes = scheme.input_activations, []
    extra: dict[str, Any] = {"input_scale": True} if input_scale else {}
    config: dict[str, Any] | None = None
    if kind == "float" and bits == 4 and scheme.strategy == "tensor_group" and size == 16:
        config = {"format": "nvfp4", "global_scale_divides": True}
    elif kind == "float" and bits == 4 and scheme.strategy == "group" and size == 32:
        config = {"format": "mxfp4"}
    elif kind == "float" and bits == 8 and scheme.strategy == "group" and size == 32:
        config = {"format": "mxfp8"}
    elif kind == "float" and bits == 8 and (granularity := _granularity(scheme, place)):
        config = {"format": "fp8_e4m3", **granularity}
    elif kind == "int" and (scheme.name == "pack-quantized" or not _is_int8(scheme)):
        config = _integers(scheme, place, act_order=act_order)
    elif kind == "int" and (g := _granularity(scheme, place)):
        config = {"format": "int8", **g, "activations": "none" if activations is None else "int8"}
        activations = None if _rounds_rows(activations) else activations
    if config is None:
        raise CheckpointError(
            f"{place}: {scheme.name} with {bits}-bit {kind} weights, strategy {scheme.strategy}, group size {size} is "
            "no scheme that lowbit knows; take the 16-bit model, or tell the authors of lowbit"
        )
    if activations is not None:
        notes.append(
            f"its activations would be rounded to {activations.get('num_bits')} bits by other programs; here the "
            "weight alone is"
        )
    return Meaning(from_config({**config, **extra}, place), notes)


def _granularity(scheme: Scheme, place: str) -> dict[str, Any] | None:
    if scheme.strategy in ("tensor", "channel"):
        return {"granularity": "tensor" if scheme.strategy == "tensor" else "row"}
    if scheme.strategy == "block":
        return {"granularity": "block", "block_size": _block(scheme.get("block_structure"), place)}
    return None


def _block(value: Any, place: str) -> list[int]:
    edges = value.split("x") if isinstance(value, str) else value
    try:
        rows, columns = (int(edge) for edge in edges)
    except (TypeError, ValueError):
        raise CheckpointError(
            f"{place}: block_structure is {value!r}, expected rows and columns; correct config.json"
        ) from None
    return [rows, columns]


def _integers(scheme: Scheme, place: str, *, act_order: bool) -> dict[str, Any]:
    if scheme.strategy not in ("group", "channel"):
        raise CheckpointError(f"{place}: packed integers with strategy {scheme.strategy}; expected group or channel")
    return {
        "format": "wna16",
        "bits": scheme.get("num_bits", 4),
        "group_size": scheme.get("group_size", 128) if scheme.strategy == "group" else 0,
        "zero_point": not scheme.get("symmetric", True),
        "act_order": act_order,
    }


def _is_int8(scheme: Scheme) -> bool:
    """Whether codes of one byte each with a scale a row or for all are what `int8` stores."""
    whole = scheme.strategy in ("tensor", "channel")
    return bool(scheme.get("num_bits", 8) == 8 and scheme.get("symmetric", True) and whole)


def _rounds_rows(activations: Mapping[str, Any] | None) -> bool:
    """Whether activations are rounded as `int8` does it: 8 bits a token, at run time."""
    return activations is not None and all(activations.get(k) == value for k, value in _INT8_ACTIVATIONS.items())


def scheme_of(fmt: Format) -> Scheme | str:
    """The scheme in which layers of a format are written, or why there is none."""
    config = fmt.config()
    if fmt.pre_quant_scale:
        return "it has a pre_quant_scale, for which compressed-tensors has no place"
    describe = _SCHEMES.get(fmt.name)
    if describe is None:
        return f"compressed-tensors has no scheme for it; formats with one are {', '.join(sorted(_SCHEMES))}"
    return describe(config)


def _weights(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    base = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False}
    return {**base, "group_size": None, "block_structure": None, "actorder": None, **more}


def _static(config: Mapping[str, Any], arguments: dict[str, Any]) -> dict[str, Any] | None:
    return arguments if config["input_scale"] else None


def _fp8(config: dict[str, Any]) -> Scheme | str:
    if config["activations"] != "none":
        return "lowbit writes fp8 there with activations as they are; use activations=none"
    strategy = {"tensor": "tensor", "row": "channel", "block": "block"}[config["granularity"]]
    more = {"block_structure": config["block_size"]} if strategy == "block" else {}
    static = _static(config, _weights(8, "float", "tensor"))
    return Scheme("float-quantized", _weights(8, "float", strategy, **more), static)


def _int8(config: dict[str, Any]) -> Scheme | str:
    if config["rotation"]:
        return "its weight is rotated, which compressed-tensors cannot say; use int8 without a rotation"
    if config["granularity"] == "block":
        return "compressed-tensors has blocks for fp8 only; use granularity=row"
    if config["activations"] == "none":
        return "8-bit integers with 16-bit activations are packed there; use wna16(bits=8,group_size=0)"
    strategy = "channel" if config["granularity"] == "row" else "tensor"
    static = _static(config, _weights(8, "int", "tensor"))
    return Scheme("int-quantized", _weights(8, "int", strategy), static or dict(_INT8_ACTIVATIONS))


def _nvfp4(config: dict[str, Any]) -> Scheme | str:
    if config["row_global_scale"]:
        return "it has a global scale a row, and compressed-tensors one for a layer; split the fused layer"
    if not config["global_scale_divides"]:
        return "compressed-tensors stores a divisor as global scale; use nvfp4(global_scale_divides=true)"
    arguments = _weights(4, "float", "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
    return Scheme("nvfp4-pack-quantized", arguments, _static(config, {**arguments, "dynamic": "local"}))


def _power_of_two_scales(name: str, bits: int) -> Any:
    def describe(config: dict[str, Any]) -> Scheme | str:
        if config["input_scale"]:
            return "it has an input_scale, which this scheme has no place for"
        return Scheme(name, _weights(bits, "float", "group", group_size=32, scale_dtype="torch.uint8"))

    return describe


def _wna16(config: dict[str, Any]) -> Scheme | str:
    if config["input_scale"]:
        return "it has an input_scale, which packed integers have no place for"
    size, order = config["group_size"], config["act_order"]
    strategy, group = ("group", size) if size else ("channel", None)
    if order and not size:
        return "an order of columns without groups means nothing"
    more = {"symmetric": not config["zero_point"], "group_size": group, "actorder": "group" if order else None}
    return Scheme("pack-quantized", _weights(config["bits"], "int", strategy, **more))


_SCHEMES = {
    "fp8_e4m3": _fp8,
    "int8": _int8,
    "nvfp4": _nvfp4,
    "mxfp4": _power_of_two_scales("mxfp4-pack-quantized", 4),
    "mxfp8": _power_of_two_scales("mxfp8-quantized", 8),
    "wna16": _wna16,
}
