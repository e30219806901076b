"""torchao's classes with a byte a code: IntxUnpackedToInt8Tensor and Int8Tensor.

class                     qdata                       scale, zero_point   format
IntxUnpackedToInt8Tensor  int8 [N, K], `target_dtype` [N, K/g]            wna16: w = (q - zero_point) * scale
Int8Tensor                int8 [N, K]                 by `block_size`     int8, or wna16 with zero points
"""

# ruff: noqa: D102  (the methods are documented in `TensorClass`)

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.dialects.base import Read, StoredLayer
from lowbit.checkpoint.dialects.torchao_classes import (
    TensorClass,
    block_of,
    blocks_refused,
    granularity_of,
    integers,
    matrix,
    vector,
    widened,
)
from lowbit.checkpoint.dialects.torchao_description import Described, dtype_json, tagged
from lowbit.errors import PartsError
from lowbit.formats import Parts
from lowbit.formats.int8 import Int8
from lowbit.formats.wna16 import WNA16
from lowbit.numerics.bit_packing import CODES, pack_bits, unpack_bits


class IntxUnpackedToInt8(TensorClass):
    """IntxUnpackedToInt8Tensor: a signed byte a code, whatever its bits."""

    kind = "IntxUnpackedToInt8Tensor"
    formats = ("wna16",)
    required = ("qdata", "scale", "zero_point")
    config = ("IntxWeightOnlyConfig", 2)

    def find(self, found: Described, read: Read) -> StoredLayer:
        shape, block, target = matrix(found), found.sizes("block_size"), found.dtype("target_dtype")
        bits = str(target).removeprefix("torch.int")
        if not bits.isdigit() or not 2 <= int(bits) <= 8:
            raise found.tensors.error(f"its target_dtype is {target}, expected torch.int2 to int8; take the original")
        if block is None or block[0] != 1 or shape[1] % block[1]:
            raise found.tensors.error(f"has blocks of {block}, expected groups along K; take the 16-bit model")
        half = 1 << (int(bits) - 1)
        place = StoredLayer(found.tensors.layer, WNA16(), shape, where=found.tensors.where)
        zeros = integers(place, read(found.tensors.keys["zero_point"]), -half, half - 1)
        size = 0 if block[1] == shape[1] else block[1]
        fmt = WNA16(bits=int(bits), group_size=size, zero_point=bool(zeros.any()))
        dtypes = {"scale": found.tensors.specs["scale"].dtype}
        rounded = found.data.get("activation_quantization") is not None
        notes = ["its runtime rounds activations to 8 bits; lowbit leaves them alone"] if rounded else []
        return self.layer(found, fmt, shape, found.dtype("dtype"), dtypes, notes)

    def why_not(self, stored: StoredLayer) -> str | None:
        fmt, k = stored.format, stored.shape[1]
        assert isinstance(fmt, WNA16)
        if fmt.act_order:
            return "torchao has no order of columns; convert without act_order"
        if fmt.group_size and k % fmt.group_size:
            return f"it has {k} columns, and torchao wants whole groups of {fmt.group_size}"
        return "torchao stores no scales for the input here" if fmt.input_scale or fmt.pre_quant_scale else None

    def read(self, stored: StoredLayer, data: Mapping[str, Tensor]) -> Parts:
        return _unsigned_parts(stored, data)

    def write(self, stored: StoredLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        data = _signed_data(stored, parts)
        data["zero_point"] = self.as_found(stored, "zero_point", data["zero_point"])
        return data

    def attributes(self, stored: StoredLayer) -> dict[str, Any]:
        config = stored.format.config()
        return {
            "target_dtype": tagged("torch.dtype", f"int{config['bits']}"),
            "block_size": [1, config["group_size"] or stored.shape[1]],
            "dtype": dtype_json(stored.dtype),
            "activation_quantization": self.attribute(stored, "activation_quantization", None),
        }


class Int8Codes(TensorClass):
    """Int8Tensor: with zero points that are not all 0 it is wna16, else int8."""

    kind = "Int8Tensor"
    formats = ("int8",)
    input_scale = "act_quant_scale"
    config = ("Int8WeightOnlyConfig", 2)

    def find(self, found: Described, read: Read) -> StoredLayer:
        shape, block = matrix(found), found.sizes("block_size")
        if block is None:
            raise found.tensors.error("has no block_size; save it again with a current version of torchao")
        keys, specs = found.tensors.keys, found.tensors.specs
        if "act_quant_zero_point" in keys and bool(read(keys["act_quant_zero_point"]).any()):
            raise found.tensors.error(
                "rounds its input with a zero point, which lowbit does not know; take the original"
            )
        dtypes = {"scale": torch.float32, "input_scale": torch.float32, "pre_quant_scale": torch.float32}
        scaled = vector(found, "act_pre_scale", shape[1])
        if scaled:
            dtypes["pre_quant_scale"] = specs["act_pre_scale"].dtype
        static = "act_quant_scale" in keys
        if static and torch.Size(specs["act_quant_scale"].shape).numel() != 1:
            raise found.tensors.error(f"its act_quant_scale is {specs['act_quant_scale']}, expected one value")
        if "zero_point" in keys and bool(read(keys["zero_point"]).any()):
            return self._with_zeros(found, shape, block, scaled=scaled, static=static)
        rounds = found.data.get("act_quant_kwargs") is not None or static
        granularity, tile = granularity_of(block, shape)
        fmt = Int8(
            granularity=granularity,
            block_size=tile,
            activations="int8" if rounds else "none",
            input_scale=static,
            pre_quant_scale=scaled,
        )
        return self.layer(found, fmt, shape, found.dtype("dtype"), dtypes)

    def _with_zeros(
        self, found: Described, shape: tuple[int, int], block: tuple[int, int], *, scaled: bool, static: bool
    ) -> StoredLayer:
        if block[0] != 1 or shape[1] % block[1] or scaled or static:
            raise found.tensors.error(
                f"has zero points with blocks of {list(block)} or with scales for its input; only groups along K are "
                "read. Take the 16-bit model"
            )
        size = 0 if block[1] == shape[1] else block[1]
        fmt = WNA16(bits=8, group_size=size, zero_point=True)
        dtypes = {"scale": found.tensors.specs["scale"].dtype}
        return self.layer(found, fmt, shape, found.dtype("dtype"), dtypes)

    def config_of(self, stored: StoredLayer) -> tuple[str, int]:
        rounds = isinstance(stored.format, Int8) and stored.format.activations == "int8"
        return ("Int8DynamicActivationInt8WeightConfig", 2) if rounds else self.config

    def why_not(self, stored: StoredLayer) -> str | None:
        fmt = stored.format
        if isinstance(fmt, WNA16):
            return None
        assert isinstance(fmt, Int8)
        if fmt.rotation:
            return "torchao has no rotated weights; use int8 without a rotation"
        return blocks_refused(fmt, stored.shape)

    def read(self, stored: StoredLayer, data: Mapping[str, Tensor]) -> Parts:
        if isinstance(stored.format, WNA16):
            return _unsigned_parts(stored, data)
        scale = widened(data["scale"])
        parts = {
            "qdata": data["qdata"],
            "scale": scale.reshape(()) if stored.format.config()["granularity"] == "tensor" else scale,
        }
        if "input_scale" in data:
            parts["input_scale"] = widened(data["input_scale"]).reshape(())
        if "pre_quant_scale" in data:
            parts["pre_quant_scale"] = data["pre_quant_scale"].reshape(-1)
        return parts

    def write(self, stored: StoredLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if isinstance(stored.format, WNA16):
            return _signed_data(stored, parts)
        scale = parts["scale"] if parts["scale"].dim() else parts["scale"].reshape(1, 1)
        data = {"qdata": parts["qdata"], "scale": self.as_found(stored, "scale", scale)}
        if self.had(stored, "zero_point") or not self.kept(stored):
            data["zero_point"] = torch.zeros(scale.shape, dtype=torch.int8, device=scale.device)
        if "input_scale" in parts:
            data["act_quant_scale"] = self.as_found(stored, "act_quant_scale", parts["input_scale"], (1, 1))
            if self.had(stored, "act_quant_zero_point"):
                zero = torch.zeros(1, dtype=torch.int8, device=scale.device)
                data["act_quant_zero_point"] = self.as_found(stored, "act_quant_zero_point", zero)
        if "pre_quant_scale" in parts:
            data["act_pre_scale"] = self.as_found(stored, "act_pre_scale", parts["pre_quant_scale"])
        return data

    def attributes(self, stored: StoredLayer) -> dict[str, Any]:
        fmt = stored.format
        if isinstance(fmt, Int8):
            rounds, block = fmt.activations == "int8", block_of(fmt.granularity, fmt.block_size, stored.shape)
            default = _activations(static=fmt.input_scale) if rounds else None
        else:
            rounds, block, default = True, [1, fmt.config()["group_size"] or stored.shape[1]], None
        return {
            "act_quant_kwargs": self.attribute(stored, "act_quant_kwargs", default) if rounds else None,
            "reduce_range": self.attribute(stored, "reduce_range", False),
            "block_size": block,
            "dtype": dtype_json(stored.dtype),
        }


def _activations(*, static: bool) -> dict[str, Any]:
    """How torchao quantizes activations to int8: by rows on the fly, or with a stored scale."""
    granularity = tagged("PerTensor", {}) if static else tagged("PerRow", {"dim": -1})
    settings = {"granularity": granularity, "mapping_type": tagged("MappingType", "SYMMETRIC"), "reduce_range": False}
    return tagged("QuantizeTensorToInt8Kwargs", settings)


def _unsigned_parts(stored: StoredLayer, data: Mapping[str, Tensor]) -> Parts:
    """wna16 of signed bytes: 2 ** (bits - 1) more, packed; columns beyond K hold the code of 0."""
    config = stored.format.config()
    bits, half, (n, k) = config["bits"], 1 << (config["bits"] - 1), stored.shape
    codes = integers(stored, data["qdata"], -half, half - 1).to(torch.int16).add_(half).to(torch.uint8)
    parts = {"scale": data["scale"]}
    last = torch.full((n, 1), half, dtype=torch.uint8, device=codes.device)
    if config["zero_point"]:
        zeros = integers(stored, data["zero_point"], -half, half - 1).to(torch.int16).add_(half)
        parts["zero_point"] = zeros.to(torch.uint8)
        last = parts["zero_point"][:, -1:]
    filled = torch.cat([codes, last.expand(-1, -k % CODES)], dim=1)
    return {"qdata": pack_bits(filled, bits), **parts}


def _signed_data(stored: StoredLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_unsigned_parts`; layers without zero points get zeros."""
    config = stored.format.config()
    bits, half, k = config["bits"], 1 << (config["bits"] - 1), stored.shape[1]
    codes = unpack_bits(parts["qdata"], bits, k).to(torch.int16).sub_(half).to(torch.int8)
    if "zero_point" not in parts:
        scale = parts["scale"]
        return {
            "qdata": codes,
            "scale": scale,
            "zero_point": torch.zeros(scale.shape, dtype=torch.int8, device=scale.device),
        }
    zeros = parts["zero_point"].to(torch.int16).sub_(half)
    if not zeros.is_meta and zeros.numel() and int(zeros.max()) >= half:
        raise PartsError(
            f"{stored.place}: has a zero point of {int(zeros.max()) + half}, and torchao stores {bits} bits"
        )
    return {"qdata": codes, "scale": parts["scale"], "zero_point": zeros.to(torch.int8)}
