"""fp8 and int8 in comfy files: the codes as they are, and what the shape of the scale says about its granularity.

granularity   fp8 e4m3                  scale                int8                               scale
tensor        float8_e4m3fn             []                   int8_tensorwise                    []
row           float8_e4m3fn_rowwise     [N]                  int8_tensorwise, per_row true      [N, 1]
block         float8_e4m3fn_blockwise   [N / r, K / c]       int8_blockwise                     [N / r, K / c]

Numbers of blocks are rounded up. A square block is `group_size`, another one `block_size: [rows, columns]`. e5m2 is
named alike. Where label and scale disagree (convert_to_quant labels some wrongly) the scale decides and it is noted; a
scale that fits no granularity is refused.
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
from lowbit.numerics.groups import ceil_div

_WORDS = {"tensor": "for all", "row": "a row"}


class OneByte(Storage):
    """fp8 and int8: a code is a byte; scales per tensor, row or block."""

    tells_shape = True

    def __init__(self, name: str, format_name: str, row_scale_columns: bool) -> None:
        self.base, self._format = name, format_name
        self.names = (f"{name}_tensorwise", f"{name}_blockwise") if name == "int8" else _fp8_names(name)
        self._row_scale_columns = row_scale_columns  # [N, 1] rather than [N]

    def format_name(self, name: str) -> str:
        return self._format

    def name_of(self, fmt: Format) -> str:
        suffix = {"tensor": "", "row": "_rowwise", "block": "_blockwise"}[fmt.config()["granularity"]]
        if self.base == "int8" and suffix != "_blockwise":
            suffix = "_tensorwise"  # with per_row where it is not
        return self.base + suffix

    def fields_of(self, fmt: Format) -> dict[str, Any]:
        config = fmt.config()
        fields: dict[str, Any] = {}
        if config["granularity"] == "block":
            rows, columns = config["block_size"]
            fields = {"group_size": rows} if rows == columns else {"block_size": [rows, columns]}
        if self.base == "int8":
            fields |= {"per_row": True} if config["granularity"] == "row" else {}
            fields |= {"convrot": True, "convrot_groupsize": config["rotation"]} if config["rotation"] else {}
            fields |= {"full_precision_matrix_mult": True} if config["activations"] == "none" else {}
        return fields

    def infer(self, found: Description) -> Format:
        granularity, block = self._granularity(found)
        config: dict[str, Any] = {"format": self._format, "granularity": granularity}
        if granularity == "block":
            config["block_size"] = block
        if self.base == "int8":
            if found.flag("full_precision_matrix_mult"):
                config["activations"] = "none"
            if found.flag("convrot"):
                config["rotation"] = found.integer("convrot_groupsize", 256)
        return make_format(config, name_place(found.where, found.layer))

    def write(self, fmt: Format, parts: Mapping[str, Tensor], layout: str) -> Parts:
        flat = not self._row_scale_columns and fmt.config()["granularity"] == "row"
        return {**parts, "scale": parts["scale"].reshape(-1)} if flat else dict(parts)

    def read(self, fmt: Format, stored: Mapping[str, Tensor], shape: Shape, layout: str) -> Parts:
        row = fmt.config()["granularity"] == "row"
        return {**stored, "scale": stored["scale"].reshape(-1, 1)} if row else dict(stored)

    def _granularity(self, found: Description) -> tuple[str, tuple[int, int]]:
        """Granularity and block size: the scale's shape decides; where the label says another thing, that is noted."""
        name, scale = found.fields["format"], found.tensor("scale").shape
        n, k = found.tensor("qdata").shape
        label = name.removeprefix(self.base).removeprefix("_")
        by_row = label == "rowwise" or (label == "tensorwise" and bool(found.flag("per_row")))
        block, count = self._block(found, (n, k), scale), torch.Size(scale).numel()
        grid = _grid((n, k), block) if block else None
        if block and label == "blockwise" and (_grid_shape(scale) == grid or (count == 1 and grid == (1, 1))):
            return "block", block
        if count == 1 and not (n == 1 and (by_row or (self.base == "int8" and len(scale) == 2))):
            actual = "tensor"
        elif count == n and scale in ((), (n,), (n, 1)):
            actual = "row"
        elif block and _grid_shape(scale) == grid and self._may_be_blocks(found, label, block):
            found.note(f"labelled {name}, but weight_scale {list(scale)} is one value a block: read as that")
            return "block", block
        else:
            blocks = f" or {list(grid)} (blocks of {block[0]}x{block[1]})" if block and grid else ""
            raise found.error(
                f"weight_scale has shape {list(scale)}, expected [], [{n}], [{n}, 1]{blocks} for {name} of a weight "
                f"{[n, k]}; the file does not fit its description, convert it again"
            )
        expected = "block" if label == "blockwise" else "row" if by_row else "tensor"
        if actual != expected and not (self.base == "int8" and expected == "tensor"):
            found.note(f"labelled {name}, but weight_scale {list(scale)} is one value {_WORDS[actual]}: read as that")
        return actual, (128, 128)

    def _may_be_blocks(self, found: Description, label: str, block: tuple[int, int]) -> bool:
        """Whether a grid of scales under another label is to be believed.

        convert_to_quant writes one of its default size for an all-zero layer that it labels int8_tensorwise.
        """
        tells = any(found.fields.get(name) is not None for name in ("block_size", "group_size"))
        return block == (128, 128) if label == "tensorwise" else label == "" and (found.legacy or tells)

    def _block(self, found: Description, shape: Shape, scale: tuple[int, ...]) -> tuple[int, int] | None:
        """The block size from the fields, else from the shape of the scale where that leaves no doubt."""
        sizes = found.fields.get("block_size")
        if isinstance(sizes, list):
            if len(sizes) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
                raise found.error(f"block_size is {sizes!r} in the marker, expected [rows, columns]")
            return sizes[0], sizes[1]
        edge = found.integer("group_size") or found.integer("block_size")
        if edge is not None:
            return edge, edge
        grid = _grid_shape(scale)
        if len(grid) != 2 or not all(grid):
            return None
        if _grid(shape, (128, 128)) == grid:
            return 128, 128
        exact = all(size % blocks == 0 for size, blocks in zip(shape, grid, strict=True))
        return (shape[0] // grid[0], shape[1] // grid[1]) if exact else None


def _fp8_names(name: str) -> tuple[str, ...]:
    return name, f"{name}_rowwise", f"{name}_blockwise"


def _grid(shape: Shape, block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks a weight has each way; the last may be cut."""
    return ceil_div(shape[0], block[0]), ceil_div(shape[1], block[1])


def _grid_shape(scale: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a grid of scales without the third axis of length one that some tools give it."""
    return scale[:2] if len(scale) == 3 and scale[2] == 1 else scale
