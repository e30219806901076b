"""torchao's classes of floating-point codes: Float8Tensor, MXTensor and NVFP4Tensor.

    class          qdata                                     scale                                 format
    Float8Tensor   float8_e4m3fn or float8_e5m2 [N, K]       float32, by `block_size`              fp8_e4m3, fp8_e5m2
    MXTensor       float8_e4m3fn [N, K], or uint8 [N, K/2]   float8_e8m0fnu [N, K/32]              mxfp8, mxfp4
    NVFP4Tensor    uint8 [N, K/2]                            float8_e4m3fn [N, K/16], and          nvfp4
                                                             `per_tensor_scale` float32 [], a factor

The even column is in the low nibble. With `is_swizzled_scales` scales lie in tiles of 128 x 4 (`layouts.scale_128x4`),
in a matrix a quarter as high and four times as wide. An NVFP4Tensor without `per_tensor_scale` has one of 1.
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
    matrix,
    widened,
)
from lowbit.checkpoint.dialects.torchao_description import Described, dtype_json, tagged
from lowbit.errors import PartsError
from lowbit.formats import Format, Parts
from lowbit.formats.fp8 import Fp8E4M3, Fp8E5M2
from lowbit.formats.granular import Granular
from lowbit.formats.mxfp4 import Mxfp4
from lowbit.formats.mxfp8 import Mxfp8
from lowbit.formats.nvfp4 import Nvfp4
from lowbit.layouts.scale_128x4 import swizzle, swizzled_shape, unswizzle

_FP4 = torch.float4_e2m1fn_x2
_QUARTER = 4


class Float8(TensorClass):
    """Float8Tensor."""

    kind = "Float8Tensor"
    formats = ("fp8_e4m3", "fp8_e5m2")
    config = ("Float8WeightOnlyConfig", 2)

    def find(self, found: Described, read: Read) -> StoredLayer:
        shape, codes, scale = matrix(found), found.tensors.specs["qdata"], found.tensors.specs["scale"]
        block = found.sizes("block_size")
        if block is None:
            size = torch.Size(scale.shape).numel()
            if size not in (1, shape[0]):
                raise found.tensors.error(f"has no block_size, and its scale is {scale}; save it again with torchao")
            block = shape if size == 1 else (1, shape[1])
        granularity, tile = granularity_of(block, shape)
        classes: dict[torch.dtype, type[Fp8E4M3 | Fp8E5M2]] = {
            torch.float8_e4m3fn: Fp8E4M3,
            torch.float8_e5m2: Fp8E5M2,
        }
        if codes.dtype not in classes:
            raise found.tensors.error(f"its qdata is {codes}, expected float8_e4m3fn or float8_e5m2; take the original")
        fmt = classes[codes.dtype](granularity=granularity, block_size=tile)
        rounded = found.data.get("act_quant_kwargs") is not None
        notes = ["its runtime rounds activations to fp8; lowbit leaves them alone"] if rounded else []
        return self.layer(found, fmt, shape, found.dtype("dtype", torch.bfloat16), notes=notes)

    def why_not(self, stored: StoredLayer) -> str | None:
        if stored.format.input_scale or stored.format.pre_quant_scale:
            return "torchao stores no scales for the input of Float8Tensor"
        if stored.format.rounds_input:
            return "lowbit writes Float8Tensor with activations as they are; use activations=none"
        assert isinstance(stored.format, Granular)
        return blocks_refused(stored.format, stored.shape)

    def read(self, stored: StoredLayer, data: Mapping[str, Tensor]) -> Parts:
        scale = widened(data["scale"])
        shape = {"tensor": (), "row": (stored.shape[0], 1)}.get(stored.format.config()["granularity"])
        return {"qdata": data["qdata"], "scale": scale if shape is None else scale.reshape(shape)}

    def write(self, stored: StoredLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scale = parts["scale"] if parts["scale"].dim() else parts["scale"].reshape(1, 1)
        return {"qdata": parts["qdata"], "scale": self.as_found(stored, "scale", scale)}

    def attributes(self, stored: StoredLayer) -> dict[str, Any]:
        config = stored.format.config()
        block = block_of(config["granularity"], tuple(config["block_size"]), stored.shape)
        automatic = tagged("KernelPreference", "AUTO")
        return {
            "block_size": self.attribute(stored, "block_size", block),
            "mm_config": self.attribute(stored, "mm_config", None),
            "act_quant_kwargs": self.attribute(stored, "act_quant_kwargs", None),
            "kernel_preference": self.attribute(stored, "kernel_preference", automatic),
            "dtype": self.attribute(stored, "dtype", dtype_json(stored.dtype)),
        }


class Blocks(TensorClass):
    """What the two classes with block scales share."""

    group: int

    def checked(self, found: Described, fmt: Format) -> StoredLayer:
        """The layer, its block size being the format's."""
        size, (n, width) = found.data.get("block_size"), matrix(found)
        if size != self.group:
            raise found.tensors.error(f"has blocks of {size}, expected {self.group}; take the 16-bit model")
        k = 2 * width if found.tensors.specs["qdata"].dtype == torch.uint8 else width
        found.flag("is_swizzled_scales")
        rounded = found.data.get("act_quant_kwargs") is not None and not fmt.input_scale
        notes = ["its runtime rounds activations, too; lowbit leaves them alone"] if rounded else []
        return self.layer(found, fmt, (n, k), found.dtype("orig_dtype"), notes=notes)

    def why_not(self, stored: StoredLayer) -> str | None:
        k = stored.shape[1]
        if stored.format.pre_quant_scale:
            return f"torchao stores no pre_quant_scale for {self.kind}"
        return f"it has {k} columns, and torchao wants a multiple of {self.group}" if k % self.group else None

    def swizzled(self, stored: StoredLayer) -> bool:
        """Whether the scales lie in tiles: as they were found, by default not."""
        return bool(self.attribute(stored, "is_swizzled_scales", False))

    def natural(self, stored: StoredLayer, scale: Tensor) -> Tensor:
        """Stored scales in rows."""
        if not self.swizzled(stored):
            return scale
        n, groups = stored.shape[0], stored.shape[1] // self.group
        return unswizzle(scale.reshape(swizzled_shape(n, groups)), n, groups, stored.place)

    def arranged(self, stored: StoredLayer, scale: Tensor) -> Tensor:
        """The inverse of `natural`."""
        if not self.swizzled(stored):
            return scale
        tiles = swizzle(scale)
        return tiles.reshape(tiles.shape[0] // _QUARTER, tiles.shape[1] * _QUARTER)


class Mx(Blocks):
    """MXTensor."""

    kind = "MXTensor"
    formats = ("mxfp8", "mxfp4")
    config = ("MXDynamicActivationMXWeightConfig", 1)
    group = 32

    def find(self, found: Described, read: Read) -> StoredLayer:
        element = found.data.get("elem_dtype")
        formats = {torch.float8_e4m3fn: Mxfp8(), _FP4: Mxfp4()}
        dtype = found.dtype("elem_dtype") if isinstance(element, Mapping) else None
        if dtype not in formats:
            raise found.tensors.error(
                f"its elements are {element if dtype is None else dtype}, expected float8_e4m3fn or float4_e2m1fn_x2; "
                "lowbit has no format for others. Take the 16-bit model"
            )
        return self.checked(found, formats[dtype])

    def why_not(self, stored: StoredLayer) -> str | None:
        if stored.format.input_scale:
            return "torchao stores no scale for the input of MXTensor"
        return super().why_not(stored)

    def read(self, stored: StoredLayer, data: Mapping[str, Tensor]) -> Parts:
        return {"qdata": data["qdata"], "scale": self.natural(stored, data["scale"]).view(torch.uint8)}

    def write(self, stored: StoredLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scale = self.arranged(stored, parts["scale"]).view(torch.float8_e8m0fnu)
        return {"qdata": parts["qdata"], "scale": scale}

    def attributes(self, stored: StoredLayer) -> dict[str, Any]:
        emulated = tagged("KernelPreference", "EMULATED")
        return {
            "elem_dtype": dtype_json(_FP4 if isinstance(stored.format, Mxfp4) else torch.float8_e4m3fn),
            "block_size": self.group,
            "orig_dtype": dtype_json(stored.dtype),
            "kernel_preference": self.attribute(stored, "kernel_preference", emulated),
            "act_quant_kwargs": self.attribute(stored, "act_quant_kwargs", None),
            "is_swizzled_scales": self.swizzled(stored),
        }


class Nv(Blocks):
    """NVFP4Tensor."""

    kind = "NVFP4Tensor"
    formats = ("nvfp4",)
    config = ("NVFP4WeightOnlyConfig", 1)
    group = 16
    input_scale = "act_per_tensor_scale"

    def find(self, found: Described, read: Read) -> StoredLayer:
        return self.checked(found, Nvfp4(input_scale="act_per_tensor_scale" in found.names))

    def why_not(self, stored: StoredLayer) -> str | None:
        assert isinstance(stored.format, Nvfp4)
        if stored.format.global_scale_divides or stored.format.row_global_scale:
            return "torchao has one global scale that multiplies; use plain nvfp4"
        return super().why_not(stored)

    def read(self, stored: StoredLayer, data: Mapping[str, Tensor]) -> Parts:
        parts = {"qdata": data["qdata"], "scale": self.natural(stored, data["scale"])}
        one = torch.ones((), dtype=torch.float32, device=data["qdata"].device)
        parts["global_scale"] = data.get("global_scale", one)
        return {**parts, **{name: data[name] for name in ("input_scale",) if name in data}}

    def write(self, stored: StoredLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        data = {"qdata": parts["qdata"], "scale": self.arranged(stored, parts["scale"])}
        if self.had(stored, "per_tensor_scale") or not self.kept(stored):
            data["per_tensor_scale"] = parts["global_scale"]
        elif not parts["global_scale"].is_meta and float(parts["global_scale"]) != 1:
            raise PartsError(f"{stored.place}: its source has no per_tensor_scale, so the global scale must be 1")
        if "input_scale" in parts:
            data["act_per_tensor_scale"] = parts["input_scale"]
        return data

    def attributes(self, stored: StoredLayer) -> dict[str, Any]:
        return {
            "is_swizzled_scales": self.swizzled(stored),
            "use_triton_kernel": self.attribute(stored, "use_triton_kernel", False),
            "act_quant_kwargs": self.attribute(stored, "act_quant_kwargs", None),
            "block_size": self.group,
            "orig_dtype": dtype_json(stored.dtype),
        }
