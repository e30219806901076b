"""Each format as comfy files hold it: its name and fields in the JSON, and its tensors' arrangement.

One `Storage` a family (`comfy_storage`). Formats with no entry here are stored as their parts are, under their own
name.
"""

# ruff: noqa: D102  (the methods are documented in `Storage`)

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.checkpoint.dialects.base import Shape, TensorSpec, name_place
from lowbit.checkpoint.dialects.comfy_marker import Description
from lowbit.checkpoint.dialects.comfy_one_byte import OneByte
from lowbit.checkpoint.dialects.comfy_rotated import W4A8, ConvrotInt4
from lowbit.checkpoint.dialects.comfy_storage import Storage, make_format
from lowbit.errors import UnknownFormatError
from lowbit.formats import Format, Parts, formats
from lowbit.layouts import scale_128x4
from lowbit.layouts.base import get_layout
from lowbit.numerics.groups import ceil_div
from lowbit.numerics.packing import swap_nibbles

TILE_LAYOUT = "kitchen_tile_packed_w4a4"
TILE_N, TILE_K = 128, 64
UNFOLDED = "proj_down_post_smoothing"  # the role of a proj_down that acts on x / smooth_factor
_RAW_BASIS = {"lowrank_branch_input_basis": "raw", "proj_down_smooth_folded": True}
_NVFP4_VARIANTS: dict[str, dict[str, Any]] = {
    "nvfp4_by_row_divided": {"global_scale_divides": True, "row_global_scale": True},
    "nvfp4_by_row": {"row_global_scale": True},
    "nvfp4_divided": {"global_scale_divides": True},
}


class Nvfp4(Storage):
    """Even column in the HIGH nibble, rows and columns padded to 16 with zeros, scales in the 128x4 swizzle.

    ComfyUI multiplies by one global scale. A divisor or a scale a row has a name that it does not know: an error there
    is better than a wrong picture.
    """

    names = ("nvfp4", *_NVFP4_VARIANTS)
    aliases: Mapping[str, tuple[torch.dtype, ...]] = {"scale": (torch.uint8,)}
    pad = 16

    def format_name(self, name: str) -> str:
        return "nvfp4"

    def name_of(self, fmt: Format) -> str:
        config = fmt.config()
        return next((name for name, said in _NVFP4_VARIANTS.items() if said.items() <= config.items()), "nvfp4")

    def infer(self, found: Description) -> Format:
        said = _NVFP4_VARIANTS.get(str(found.fields["format"]), {})
        return make_format({"format": "nvfp4", **said}, name_place(found.where, found.layer))

    def fields_of(self, fmt: Format) -> dict[str, Any]:
        return {"group_size": self.pad}

    def shape_of(self, found: Description) -> Shape:
        n, width = found.tensor("qdata").shape
        given = found.shape()
        if given is None:
            found.note(
                f"orig_shape is absent: the shape is that of the stored codes, a multiple of {self.pad} each way"
            )
        return given or (n, width * self._columns())

    def pads(self, found: Description) -> bool:
        return found.shape() is None

    def write(self, fmt: Format, parts: Mapping[str, Tensor], layout: str) -> Parts:
        codes = parts["qdata"].view(torch.uint8)
        rows, columns = (
            -size % edge for size, edge in zip(codes.shape, (self.pad, self.pad // self._columns()), strict=True)
        )
        padded = F.pad(codes, (0, columns, 0, rows)) if rows or columns else codes
        return {**parts, "qdata": self._codes(padded), "scale": scale_128x4.swizzle(parts["scale"])}

    def read(self, fmt: Format, stored: Mapping[str, Tensor], shape: Shape, layout: str) -> Parts:
        n, groups = shape[0], ceil_div(shape[1], self.pad)
        codes = self._codes(stored["qdata"][:n])
        scale = scale_128x4.unswizzle(stored["scale"], n, groups)
        return {**stored, "qdata": codes.contiguous(), "scale": scale}

    def _codes(self, codes: Tensor) -> Tensor:
        return codes if codes.is_meta else swap_nibbles(codes)  # a meta tensor's shift would load torch's compiler: 2 s

    def _columns(self) -> int:
        """Columns of the weight in one stored byte."""
        return 2


class Mxfp8(Nvfp4):
    """Rows and columns padded to 32 with zeros, E8M0 scales as bytes in the 128x4 swizzle."""

    names = ("mxfp8",)
    aliases: Mapping[str, tuple[torch.dtype, ...]] = {"scale": (torch.float8_e8m0fnu,)}
    pad = 32

    def format_name(self, name: str) -> str:
        return "mxfp8"

    def name_of(self, fmt: Format) -> str:
        return "mxfp8"

    def infer(self, found: Description) -> Format:
        return make_format({"format": "mxfp8"}, name_place(found.where, found.layer))

    def _codes(self, codes: Tensor) -> Tensor:
        return codes.view(torch.float8_e4m3fn)

    def _columns(self) -> int:
        return 1


class Awq(Storage):
    """awq_w4a16: as its parts are; `weight_zero` is written, `weight_zeros` read too."""

    names = ("awq_w4a16",)
    tells_shape = True
    aliases: Mapping[str, tuple[torch.dtype, ...]] = {"qdata": (torch.uint8,)}

    def fields_of(self, fmt: Format) -> dict[str, Any]:
        config = fmt.config()
        wzeros = {} if config["wzeros"] == "none" else {"wzeros": config["wzeros"]}
        return {"group_size": config["group_size"], **wzeros}

    def shape_of(self, found: Description) -> Shape:
        n, width = found.tensor("qdata").shape
        return found.shape() or (n, 2 * width)

    def infer(self, found: Description) -> Format:
        size = found.integer("group_size")
        if size is None:
            columns, groups = self.shape_of(found)[1], (found.tensor("scale").shape or (0,))[0]
            if not groups or columns % groups:
                raise found.error(
                    f"the marker has no group_size, and the scale {list(found.tensor('scale').shape)} does not divide "
                    f"K = {columns}; convert the file again"
                )
            size = columns // groups
            found.note(f"group_size is absent from the marker: {size} by the shape of the scale")
        config = {"format": "awq_w4a16", "group_size": size, "wzeros": found.fields.get("wzeros", "none")}
        return make_format(config, name_place(found.where, found.layer))


class Svdquant(Storage):
    """svdquant_w4a4, natural or tile-packed."""

    names = ("svdquant_w4a4",)
    tells_shape = True
    aliases: Mapping[str, tuple[torch.dtype, ...]] = {"qdata": (torch.uint8,)}
    ranks = (2, 4)

    def fields_of(self, fmt: Format) -> dict[str, Any]:
        return {"act_unsigned": fmt.config()["act_unsigned"]}

    def options_of(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {**options, **(_RAW_BASIS if "lowrank_branch_input_basis" in options else {})}

    def layout_of(self, found: Description) -> str:
        layout, axes = found.fields.get("layout"), len(found.tensor("qdata").shape)
        if layout not in (None, "", TILE_LAYOUT):
            raise found.error(f"layout {layout!r} is unknown for svdquant_w4a4; known is {TILE_LAYOUT}")
        if layout and axes != 4:
            raise found.error(
                f"the marker says {layout}, but the weight has {axes} axes, not 4; convert the file again"
            )
        if axes == 4 and not layout:
            found.note(f"the marker names no layout: a weight of 4 axes is {TILE_LAYOUT}")
        return TILE_LAYOUT if axes == 4 else ""

    def shape_of(self, found: Description) -> Shape:
        stored = found.tensor("qdata").shape
        if len(stored) == 4:
            return found.shape() or (stored[0] * TILE_N, stored[1] * TILE_K)
        return found.shape() or (stored[0], 2 * stored[1])

    def infer(self, found: Description) -> Format:
        self._check_basis(found)
        down = found.tensor(UNFOLDED if UNFOLDED in found.tensors else "proj_down").shape
        if len(down) != 2:
            raise found.error(f"proj_down has shape {list(down)}, expected [K, R]; convert the file again")
        config = {"format": "svdquant_w4a4", "rank": down[1], "act_unsigned": bool(found.flag("act_unsigned"))}
        return make_format(config, name_place(found.where, found.layer))

    def write(self, fmt: Format, parts: Mapping[str, Tensor], layout: str) -> Parts:
        return get_layout(layout, fmt).pack(fmt, parts) if layout else dict(parts)

    def read(self, fmt: Format, stored: Mapping[str, Tensor], shape: Shape, layout: str) -> Parts:
        parts = dict(stored)
        if UNFOLDED in parts:  # (x / s) @ down = x @ (down / s)
            down, smooth = parts.pop(UNFOLDED), parts["smooth_factor"]
            parts["proj_down"] = (down.float() / smooth.float().unsqueeze(1)).to(down.dtype)
        return get_layout(layout, fmt).unpack(fmt, parts) if layout else parts

    def _check_basis(self, found: Description) -> None:
        """Which input proj_down acts on: "raw" x as it is; x / smooth_factor is folded at reading."""
        basis, folded = found.fields.get("lowrank_branch_input_basis"), found.flag("proj_down_smooth_folded")
        if basis == "raw" or (basis is None and folded is not False):
            return
        if basis != "post_smoothing" or folded:
            raise found.error(
                f"lowrank_branch_input_basis is {basis!r} with proj_down_smooth_folded {folded}: not clear which "
                "input proj_down "
                'acts on. Export with basis "raw", folded true'
            )
        found.tensors[UNFOLDED] = found.tensor("proj_down")
        del found.tensors["proj_down"]
        found.note("proj_down acts on x / smooth_factor: folded into proj_down, which then acts on x")


def storage_for(name: object, where: str) -> Storage:
    """The storage of an on-disk format name. Raises `UnknownFormatError` with all that can be read here."""
    for storage in _STORAGES:
        if name in storage.names and storage.format_name(str(name)) in formats():
            return storage
    if isinstance(name, str) and name in _generic_names():
        return _AS_IT_IS
    raise UnknownFormatError(name, known_names(), where)


def storage_of(fmt: Format) -> Storage:
    """The storage of a format."""
    for storage in _STORAGES:
        if any(storage.format_name(name) == fmt.name for name in storage.names):
            return storage
    return _AS_IT_IS


def known_names() -> list[str]:
    """Every `format` string that can be read, sorted."""
    named = [name for storage in _STORAGES for name in storage.names if storage.format_name(name) in formats()]
    return sorted([*named, *_generic_names()])


def disk_specs(
    fmt: Format, shape: Shape, dtype: torch.dtype, layout: str, dtypes: Mapping[str, torch.dtype]
) -> dict[str, TensorSpec]:
    """Part name -> what `write` gives for a weight of this shape; `dtypes` where the format leaves them open."""
    blank = fmt.empty_parts(shape, torch.device("meta"), dtype)
    blank = {part: tensor.to(dtypes.get(part, tensor.dtype)) for part, tensor in blank.items()}
    return {part: TensorSpec.of(tensor) for part, tensor in storage_of(fmt).write(fmt, blank, layout).items()}


def _generic_names() -> list[str]:
    served = {storage.format_name(name) for storage in _STORAGES for name in storage.names}
    return [name for name in formats() if name not in served]


_STORAGES: tuple[Storage, ...] = (
    OneByte("float8_e4m3fn", "fp8_e4m3", row_scale_columns=False),
    OneByte("float8_e5m2", "fp8_e5m2", row_scale_columns=False),
    OneByte("int8", "int8", row_scale_columns=True),
    Nvfp4(),
    Mxfp8(),
    Awq(),
    Svdquant(),
    ConvrotInt4(),
    W4A8(),
)
_AS_IT_IS = Storage()
