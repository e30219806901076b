"""A layout is an arrangement of a format's parts that some kernel reads: packed once at load, undone before saving.

Its name and version ride behind the spec, as in `svdquant_w4a4@kitchen_tile_packed_w4a4`, so that an arrangement is
never guessed from shapes. A kernel is only ever given the layout it asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts

Repack = Callable[[Format, Mapping[str, Tensor]], Parts]


@dataclass(frozen=True)
class Layout:
    """An inverse pair: `pack` makes the kernel's arrangement of plain parts, `unpack` gives the plain parts back.

    Both raise `PartsError` for parts they cannot hold. `refuses(fmt, n, k)` says why a weight does not fit, or None.
    """

    name: str
    version: int
    formats: tuple[str, ...]
    pack: Repack
    unpack: Repack
    refuses: Callable[[Format, int, int], str | None]
    stored: bool = True
    """Whether files hold it, too; if not, it is made at load alone."""


_REGISTRY: dict[str, Layout] = {}


def register_layout(layout: Layout) -> Layout:
    """Make a layout known by its name; a second one of that name is refused."""
    if layout.name in _REGISTRY:
        raise FormatError(f"a layout named {layout.name!r} is registered already")
    _REGISTRY[layout.name] = layout
    return layout


def layouts() -> dict[str, Layout]:
    """Every registered layout by name."""
    return dict(sorted(_REGISTRY.items()))


def get_layout(name: str, fmt: Format) -> Layout:
    """The layout of that name for a format; `FormatError` lists the ones the format has."""
    layout = _REGISTRY.get(name)
    if layout is None or fmt.name not in layout.formats:
        known = [entry.name for entry in _REGISTRY.values() if fmt.name in entry.formats]
        raise FormatError(
            f"{fmt.name} has no layout {name!r}; it has {', '.join(sorted(known)) or 'only the plain one'}"
        )
    return layout
