"""A format together with the arrangement in which a file holds it, and the written form of both.

`svdquant_w4a4(rank=16)` is stored as its parts are; `svdquant_w4a4(rank=16)@kitchen_tile_packed_w4a4` in the tiles of
that layout.

>>> from lowbit.checkpoint.stored_format import StoredFormat
>>> StoredFormat.parse("svdquant_w4a4@kitchen_tile_packed_w4a4").layout
'kitchen_tile_packed_w4a4'
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lowbit.errors import FormatError
from lowbit.formats.base import Format
from lowbit.formats.registry import as_format, spec_config
from lowbit.layouts.base import get_layout


@dataclass(frozen=True)
class StoredFormat:
    """What a weight becomes in a file: a format, and "" or the name of a layout that the format has."""

    format: Format
    layout: str = ""
    is_name: bool = field(default=False, compare=False)
    """Whether no more than the name of the format was asked for; what its options are is then for `auto` to choose."""
    given: frozenset[str] = field(default=frozenset(), compare=False)
    """The options of the format that were asked for by name: these stay as they are."""

    @classmethod
    def parse(cls, spec: Format | str) -> StoredFormat:
        """A format, or a spec with "@" and a layout behind it or without. Raises `FormatError`."""
        if isinstance(spec, Format):
            return cls(spec)
        text, at, layout = (piece.strip() for piece in spec.partition("@"))
        fmt = as_format(text)
        if at:
            get_layout(layout, fmt)
        given = frozenset(spec_config(text)) - {"format"}
        return cls(fmt, layout, is_name=text == fmt.name and not at, given=given)

    def check_stored(self) -> None:
        """Raise `FormatError` for a format that can only be read, and for a layout that no file holds."""
        self.format.check_encodable("convert")
        if self.layout and not get_layout(self.layout, self.format).stored:
            raise FormatError(
                f"{self.spec}: {self.layout} is made of plain parts when a weight is loaded, and no file holds it; "
                f"write {self.format.spec}"
            )

    @property
    def spec(self) -> str:
        """The written form; `parse` reads it."""
        return f"{self.format.spec}@{self.layout}" if self.layout else self.format.spec

    def refuses(self, n: int, k: int) -> str | None:
        """Why a weight [n, k] cannot be stored like this, or None."""
        why = self.format.check_shape(n, k)
        if why is None and self.layout:
            why = get_layout(self.layout, self.format).refuses(self.format, n, k)
        return why
