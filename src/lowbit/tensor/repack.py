"""Which kernel layout a weight should be in, and putting it there: done once, at load, never at a call."""

from __future__ import annotations

from lowbit.dispatch import preferred_layout
from lowbit.errors import FormatError, PartsError
from lowbit.formats.base import Format
from lowbit.layouts.base import layouts
from lowbit.tensor.quantized import QuantizedTensor

AUTO, PLAIN = "auto", "plain"


def check_layout(layout: str) -> None:
    """Raise `FormatError` unless this is "auto", "plain", "" or the name of a layout."""
    if layout not in (AUTO, PLAIN, "", *layouts()):
        raise FormatError(f"there is no layout {layout!r}; choose {AUTO!r}, {PLAIN!r} or one of {', '.join(layouts())}")


def choose_layout(layout: str, fmt: Format, matrix: tuple[int, int], device: str, op: str) -> tuple[str, str]:
    """The layout for a weight [n, k] on a device type that mostly runs `op`, "" for plain parts; and why.

    `layout`: "auto" for that of the kernel that would run, "plain" or "" for the plain parts, or a layout's name, which
    is followed where the weight fits it.
    """
    fmt = fmt.plain  # kernels see no optional parts
    if layout in (PLAIN, ""):
        return "", "plain parts are asked for"
    if layout == AUTO:
        found = preferred_layout(op, fmt, *matrix, device)
        return found, f"{'its kernel reads it' if found else 'no kernel has another layout'} on {device}"
    known = layouts()[layout]
    if fmt.name not in known.formats:
        return "", f"{fmt.name} has no layout {layout}"
    why = known.refuses(fmt, *matrix)
    return ("", f"{list(matrix)} {why}") if why else (layout, "asked for")


def repacked(weight: QuantizedTensor, layout: str) -> tuple[QuantizedTensor, str]:
    """The weight in a layout; or, where its values cannot be packed exactly, its plain parts, and why."""
    try:
        return weight.in_layout(layout), ""
    except PartsError as error:
        return weight.in_layout(""), str(error)
