"""What a format family must state to lie in a comfy file. `Storage` itself keeps the parts of any format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.dialects.base import Shape, name_place
from lowbit.checkpoint.dialects.comfy_marker import Description
from lowbit.errors import FormatError
from lowbit.formats import Format, Parts, from_config, get_format


class Storage:
    """How one format family lies in a comfy file: its name, its JSON fields, and the arrangement of its tensors.

    `write` turns canonical parts into what is stored and `read` is its exact inverse; both run on meta tensors too,
    which is how shapes and dtypes are known before the data. `infer` finds the format, without the optional parts, from
    fields and shapes.
    """

    names: tuple[str, ...] = ()
    """The `format` strings it reads."""
    aliases: Mapping[str, tuple[torch.dtype, ...]] = {}
    """Part -> one-byte dtypes that files use for the same bytes."""
    ranks: tuple[int, ...] = (2,)
    """How many axes a stored weight has."""
    tells_shape = False
    """Whether the stored shapes tell the logical one; if not, `orig_shape` is written."""

    def format_name(self, name: str) -> str:
        """The lowbit format that an on-disk name belongs to."""
        return name

    def name_of(self, fmt: Format) -> str:
        """The on-disk name of a format."""
        return fmt.name

    def fields_of(self, fmt: Format) -> dict[str, Any]:
        """JSON fields beside the name."""
        return {}

    def options_of(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options as they are written."""
        return dict(options)

    def infer(self, found: Description) -> Format:
        """The format that fields and shapes describe."""
        return make_format({"format": self.format_name(found.fields["format"])}, name_place(found.where, found.layer))

    def shape_of(self, found: Description) -> Shape:
        """The logical shape, or the padded one where the file does not tell."""
        n, k = found.tensor("qdata").shape
        return found.shape() or (n, k)

    def pads(self, found: Description) -> bool:
        """Whether `shape_of` can only give the padded shape."""
        return False

    def layout_of(self, found: Description) -> str:
        """The kernel arrangement of the stored tensors."""
        if layout := found.fields.get("layout"):
            raise found.error(
                f"layout {layout!r} is unknown for {found.fields['format']}; get the file in its plain layout"
            )
        return ""

    def write(self, fmt: Format, parts: Mapping[str, Tensor], layout: str) -> Parts:
        """Stored tensors by part name, of canonical parts."""
        return dict(parts)

    def read(self, fmt: Format, stored: Mapping[str, Tensor], shape: Shape, layout: str) -> Parts:
        """Canonical parts of stored tensors."""
        return dict(stored)


def make_format(config: Mapping[str, Any], place: str) -> Format:
    """The format of a config; its errors name the place, such as file and layer."""
    get_format(str(config.get("format", "")), place)
    try:
        return from_config(config)
    except FormatError as error:
        raise FormatError(f"{place}: {error}") from None
