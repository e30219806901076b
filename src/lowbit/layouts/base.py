"""A layout is an arrangement of a format's parts that some kernel reads: packed once at load, undone before saving.

Its name rides behind the spec, as in `svdquant_w4a4@kitchen_tile_packed_w4a4`, so that an arrangement is never guessed
from shapes; where no file holds it, its version does, too: `wna16@coalesced_int4:1`. A kernel is only ever given the
layout it asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import FormatError, PartsError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts

_FEW_ROWS = 256  # a multiple of what any layout has in a block
Repack = Callable[[Format, Mapping[str, Tensor]], Parts]


@dataclass(frozen=True)
class Layout:
    """An inverse pair: `pack` makes the kernel's arrangement of plain parts, `unpack` gives the plain parts back.

    Both raise `PartsError` for parts they cannot hold, and pass on parts that they do not know. Packed parts have the
    names of the plain ones. `refuses(fmt, n, k)` says why a weight does not fit, or None.
    """

    name: str
    version: int
    formats: tuple[str, ...]
    pack: Repack
    unpack: Repack
    refuses: Callable[[Format, int, int], str | None]
    stored: bool = True
    """Whether files hold it, too; if not, it is made at load alone."""
    rows: Callable[[Format, Mapping[str, Tensor]], int] | None = None
    """N of packed parts; None: they tell it as the plain ones do (`Format.rows_of`)."""
    shapes: Callable[[Format, int, int], Mapping[str, tuple[int, ...]]] | None = None
    """The shapes of the packed parts of a weight [n, k]; None: they are found by packing parts without values."""
    alignment: int = 0
    """Each part begins at a multiple of this many bytes and is contiguous; 0: the kernels take any storage."""
    named: bool = False
    """Whether it has to be asked for by name: its kernels round activations, which those of plain parts leave alone."""

    @property
    def tag(self) -> str:
        """The name, with the version behind it where no file holds the arrangement, so that it may change."""
        return self.name if self.stored else f"{self.name}:{self.version}"

    def rows_of(self, fmt: Format, parts: Mapping[str, Tensor]) -> int:
        """N of a set of packed parts."""
        return fmt.rows_of(parts) if self.rows is None else self.rows(fmt, parts)

    def packed(self, fmt: Format, parts: Mapping[str, Tensor]) -> Parts:
        """Plain parts in this arrangement, in storage as the kernels need it. Raises `PartsError` as `pack` does."""
        made = self.pack(fmt, parts)
        return {name: part if _is_aligned(part, self.alignment) else _compact(part) for name, part in made.items()}

    def empty_parts(
        self, fmt: Format, shape: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Parts:
        """Uninitialised packed parts for a weight [N, K]. Raises `PartsError` as `pack` does."""
        (n, k), few = shape, min(shape[0], _FEW_ROWS)
        if self.shapes is None or self.refuses(fmt, n, k) or self.refuses(fmt, few, k):
            return self.pack(fmt, fmt.empty_parts(shape, device, dtype))
        sample = self.pack(fmt, fmt.empty_parts((few, k), torch.device("meta"), dtype))  # for the dtypes
        shapes = self.shapes(fmt, n, k)
        return {name: torch.empty(shapes[name], dtype=part.dtype, device=device) for name, part in sample.items()}

    def why_not(self, name: str, part: Tensor, shape: tuple[int, ...]) -> str | None:
        """Why this is not the packed part of that name, which should have this shape, with the remedy, or None."""
        if part.shape != shape:
            return (
                f"{name} has shape {list(part.shape)}, expected {list(shape)} in version {self.version} of "
                f"{self.name}; repack the plain parts with lowbit.layouts or QuantizedTensor.in_layout({self.name!r})"
            )
        if not _is_aligned(part, self.alignment):
            return (
                f"{name} must be contiguous and begin at a multiple of {self.alignment} bytes for {self.name}; "
                f"clone it, or repack the weight: .in_layout('').in_layout({self.name!r})"
            )
        return _freed(name, part)


def _is_aligned(part: Tensor, alignment: int) -> bool:
    return not alignment or (part.is_contiguous() and part.data_ptr() % alignment == 0)


def _freed(name: str, part: Tensor) -> str | None:
    """Why a part cannot be read, or None. Wrappers and shapes alone (meta) have no address either."""
    if type(part) is Tensor and part.numel() and not part.data_ptr() and not part.is_meta:
        return f"{name} has no memory, which was freed; bring the weight back, or load it again, before it is used"
    return None


def _compact(part: Tensor) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format)


_REGISTRY: dict[str, Layout] = {}
_Expected = tuple[int, tuple[tuple[str, tuple[int, ...]], ...]]  # the alignment of parts, their names and shapes
_EXPECTED: dict[tuple[str, str, int, int], _Expected | str] = {}
_REMEMBERED = 4096


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


def misfit(fmt: Format, layout: str, parts: Mapping[str, Tensor], n: int, k: int) -> str | None:
    """Why these are not the parts of a weight [n, k] in a layout, or None; of plain parts ("") the codes are looked at.

    Asked at every call: parts may be replaced, written and freed. What they must be is remembered.
    """
    key = (fmt.spec, layout, n, k)  # strings keep their hashes: a format's takes a microsecond
    expected = _EXPECTED.get(key)
    if expected is None:
        if len(_EXPECTED) >= _REMEMBERED:  # wrong shapes are remembered, too
            _EXPECTED.clear()
        expected = _EXPECTED[key] = _expect(fmt, layout, n, k)
    if isinstance(expected, str):
        return expected
    alignment, shapes = expected
    for name, shape in shapes:
        part = parts[name]
        fits = part.shape == shape
        if fits:
            address = part.data_ptr()
            fits = address != 0 and (not alignment or (address % alignment == 0 and part.is_contiguous()))
        if not fits:
            if layout:
                why = get_layout(layout, fmt).why_not(name, part, shape)
            elif part.shape != shape:
                why = f"{name} has shape {list(part.shape)}, expected {list(shape)}"
            else:
                why = _freed(name, part)
            if why:
                return why
    return None


def _expect(fmt: Format, layout: str, n: int, k: int) -> _Expected | str:
    """What the parts of a weight [n, k] must be, or why it cannot be in the layout."""
    if not layout:
        # K may be another that fills as many blocks. Rows may have been cut: they are as many as there are.
        if why := fmt.check_shape(max(n, k), k):
            return f"a weight [{n}, {k}] {why}"
        codes = fmt.rules[0]
        return 0, ((codes.name, codes.shape(fmt.sizes(n, k))),)
    known = get_layout(layout, fmt)
    if why := fmt.check_shape(n, k) or known.refuses(fmt, n, k):
        return f"a weight [{n}, {k}] {why}, so it cannot be in {layout}"
    if known.shapes is not None:
        return known.alignment, tuple((name, tuple(shape)) for name, shape in known.shapes(fmt, n, k).items())
    made = known.pack(fmt, fmt.empty_parts((n, k), torch.device("meta")))
    return known.alignment, tuple((name, tuple(part.shape)) for name, part in made.items())


def fitting_layout(name: str, fmt: Format, n: int, k: int) -> Layout | None:
    """The layout of that name where the format has it and a weight [n, k] fits, else None."""
    layout = _REGISTRY.get(name)
    fits = layout is not None and fmt.name in layout.formats and layout.refuses(fmt, n, k) is None
    return layout if fits else None


def tagged(name: str) -> str:
    """What stands behind the @ of a spec for a layout, "" for the plain parts: its tag (`Layout.tag`)."""
    return _REGISTRY[name].tag if name in _REGISTRY else name


def read_tag(tag: str) -> str:
    """The name of the layout that a tag is of. Raises `PartsError`, with the remedy, for another version than ours."""
    name, colon, version = tag.partition(":")
    known = _REGISTRY.get(name)
    if colon and (known is None or version != str(known.version)):
        have = f"version {known.version}" if known is not None else "none of that name"
        raise PartsError(
            f"the weight is packed as version {version} of the kernel layout {name}, and this lowbit has {have}; load "
            "the checkpoint again, or pickle it from plain parts: lowbit.nn.repack_(module, '') or .in_layout('') "
            "first, with the lowbit that packed it"
        )
    return name
