"""The rotated 4-bit formats of comfy-kitchen in comfy files.

name              weight                        beside it                                        fields
convrot_w4a4      int8 [N, K/2]                 weight_scale [N]                                 convrot_groupsize,
                                                                                                 linear_dtype
int4_tensorwise   int8 [N, K/2]                 weight_scale [N, 1]                              convrot,
                                                                                                 convrot_groupsize
asym_w4a8_int8    int8 [N, K/2] or [N, 3K/4]    weight_s_rel [N, K/g], weight_s_channel [N],     group_size,
                                                weight_codebook [16]?, weight_correction         convrot_groupsize
                                                [K/g, N]?

convrot_w4a4 and int4_tensorwise are the same codes. Some programs load one as the other, so either shape of the scale
is read under either name. int4_tensorwise is written only where there is no rotation, which the other name cannot say:
stock ComfyUI knows convrot_w4a4 alone. linear_dtype is written where it is not int4, as ComfyUI does.

asym_w4a8_int8: 6 bits are told by the width of the weight, codebook and correction by their tensors. ComfyUI's own
loader ignores weight_correction; here it is a part of the weight like the others.
"""

# ruff: noqa: D102  (the methods are documented in `Storage`)

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.dialects.base import Shape, name_place
from lowbit.checkpoint.dialects.comfy_marker import Description
from lowbit.checkpoint.dialects.comfy_storage import Storage, make_format
from lowbit.formats import Format, Parts

ROTATED, PLAIN = "convrot_w4a4", "int4_tensorwise"
_ROTATION = 256  # where the marker does not say
_KERNEL_GROUP = 64  # the only quant_group_size there is; it divides K and changes no value


class ConvrotInt4(Storage):
    """convrot_w4a4 and int4_tensorwise: one scale a row, with or without rotation."""

    names = (ROTATED, PLAIN)
    tells_shape = True
    aliases: Mapping[str, tuple[torch.dtype, ...]] = {"qdata": (torch.uint8,)}

    def format_name(self, name: str) -> str:
        return ROTATED

    def name_of(self, fmt: Format) -> str:
        return ROTATED if fmt.config()["rotation"] else PLAIN

    def fields_of(self, fmt: Format) -> dict[str, Any]:
        config = fmt.config()
        rotation, linear_dtype = config["rotation"], config["linear_dtype"]
        fields = {"convrot_groupsize": rotation} if rotation else {"convrot": False}
        return fields | ({} if linear_dtype == "int4" else {"linear_dtype": linear_dtype})

    def shape_of(self, found: Description) -> Shape:
        n, width = found.tensor("qdata").shape
        columns = found.integer("in_features", 2 * width)
        if columns != 2 * width:
            raise found.error(
                f"in_features is {columns}, but the weight holds {2 * width} columns: padded weights are not known "
                "here; convert the original again"
            )
        return found.shape() or (n, 2 * width)

    def infer(self, found: Description) -> Format:
        if found.flag("awq") or found.fields.get("stabilizer_rank"):
            raise found.error(
                "the marker speaks of awq or stabilizer_rank, a variant that is not known here; its other tensors "
                "would be lost. Convert the original again"
            )
        if found.integer("quant_group_size", _KERNEL_GROUP) != _KERNEL_GROUP:
            raise found.error(f"quant_group_size is {found.fields['quant_group_size']}, expected {_KERNEL_GROUP}")
        config = {"format": ROTATED, "rotation": self._rotation(found)}
        if found.fields.get("linear_dtype") is not None:
            config["linear_dtype"] = found.fields["linear_dtype"]
        return make_format(config, name_place(found.where, found.layer))

    def write(self, fmt: Format, parts: Mapping[str, Tensor], layout: str) -> Parts:
        return {**parts, "scale": parts["scale"].reshape((-1,) if fmt.config()["rotation"] else (-1, 1))}

    def read(self, fmt: Format, stored: Mapping[str, Tensor], shape: Shape, layout: str) -> Parts:
        return {**stored, "scale": stored["scale"].reshape(-1)}

    def _rotation(self, found: Description) -> int:
        """The size of the rotated groups, or 0."""
        flag, size = found.flag("convrot"), found.integer("convrot_groupsize")
        if found.fields["format"] == ROTATED:
            if flag is False:
                raise found.error(
                    f"convrot is false, but every {ROTATED} weight is rotated; a program has changed one of them. "
                    "Convert the original again"
                )
            return size or _ROTATION
        if flag is None and size is not None:
            found.note(f"convrot is absent, but convrot_groupsize is {size}: taken as rotated")
            return size
        return (size or _ROTATION) if flag else 0


class W4A8(Storage):
    """asym_w4a8_int8: codes that expand to int8 by two levels of scales and maybe a codebook."""

    names = ("asym_w4a8_int8",)
    tells_shape = True
    aliases: Mapping[str, tuple[torch.dtype, ...]] = {"qdata": (torch.uint8,), "s_rel": (torch.uint8,)}

    def format_name(self, name: str) -> str:
        return "w4a8_codebook"

    def name_of(self, fmt: Format) -> str:
        return self.names[0]

    def fields_of(self, fmt: Format) -> dict[str, Any]:
        config = fmt.config()
        return {"group_size": config["group_size"], "convrot_groupsize": config["rotation"]}

    def shape_of(self, found: Description) -> Shape:
        return found.shape() or self._stored_shape(found)

    def infer(self, found: Description) -> Format:
        if found.flag("convrot") is False:
            raise found.error(f"convrot is false, but every {self.names[0]} weight is rotated; convert it again")
        (_, k), width = self._stored_shape(found), found.tensor("qdata").shape[1]
        if width * 8 not in (4 * k, 6 * k):
            raise found.error(
                f"the weight has {width} bytes a row, expected {k // 2} (4 bits) or {k * 3 // 4} (6 bits) for the "
                f"scales {list(found.tensor('s_rel').shape)} of groups of {self._group_size(found)}; the file does "
                "not fit its description, convert it again"
            )
        config = {
            "format": "w4a8_codebook",
            "bits": 6 if width * 8 == 6 * k and k else 4,
            "group_size": self._group_size(found),
            "rotation": found.integer("convrot_groupsize", _ROTATION),
            "codebook": "codebook" in found.tensors,
            "correction": "correction" in found.tensors,
        }
        return make_format(config, name_place(found.where, found.layer))

    def _stored_shape(self, found: Description) -> Shape:
        scales = found.tensor("s_rel").shape
        if len(scales) != 2:
            raise found.error(f"weight_s_rel has shape {list(scales)}, expected [N, K / {self._group_size(found)}]")
        return found.tensor("qdata").shape[0], scales[1] * self._group_size(found)

    def _group_size(self, found: Description) -> int:
        return found.integer("group_size", 16) or 16
