"""Write the tables of formats in README.md and docs/formats.md from the registry; --check says if they are right."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import lowbit
from lowbit.formats import Format, formats
from lowbit.solvers import AUTO, pick_solver, solver

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- formats: made by scripts/docs.py -->", "<!-- formats: end -->"
SHAPE = (3072, 3072)
USES = {
    "awq_w4a16": "4-bit weights, 16-bit activations: layers that see few tokens",
    "convrot_w4a4": "rotated 4-bit weights with one scale a row, 4-bit activations (ConvRot); also int4_tensorwise",
    "fp8_e4m3": "8-bit float; a scale for the tensor, each row or each block of any size",
    "fp8_e5m2": "the same with more range and less precision",
    "int8": "8-bit integer with 8-bit activations; row, tensor, block, or rotated (ConvRot)",
    "mxfp8": "8-bit float with a power-of-two scale every 32 weights",
    "nvfp4": "4-bit float with an 8-bit scale every 16 weights",
    "svdquant_w4a4": "4-bit weights and activations with a 16-bit low-rank branch",
    "w4a8_codebook": "rotated 4- or 6-bit weights that expand to int8, 8-bit activations (asym_w4a8_int8)",
}


def bits(fmt: Format) -> float:
    """Bits a weight of a 3072 x 3072 bfloat16 matrix takes, side tensors included."""
    return fmt.nbytes(*SHAPE) * 8 / (SHAPE[0] * SHAPE[1])


def every_spec() -> str:
    """One row for each spec that a format gives a golden number for."""
    rows = ["| spec | bits a weight | SQNR, dB | stored tensors |", "|---|---|---|---|"]
    for cls in formats().values():
        for spec, decibels in cls.golden_sqnr.items():
            fmt = lowbit.parse_spec(spec)
            rows.append(f"| `{spec}` | {bits(fmt):.2f} | {decibels:.1f} | {', '.join(fmt.part_names)} |")
    return "\n".join(rows)


def every_format() -> str:
    """One row a format: size, error by rounding and by the solver that `auto` takes, use."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    rows = ["| format | bits a weight | SQNR, dB | what it is |", "|---|---|---|---|"]
    for name, cls in formats().items():
        fmt = cls()
        shown = []
        for chosen in dict.fromkeys(("rtn", pick_solver(AUTO, fmt)[0])):
            back = fmt.dequantize(solver(chosen)(weight, fmt), (1024, 1024), torch.float32)
            shown.append(f"{20 * math.log10(weight.norm() / (weight - back).norm()):.1f}")
        rows.append(f"| `{name}` | {bits(fmt):.2f} | {' -> '.join(shown)} | {USES[name]} |")
    return "\n".join(rows)


PAGES: dict[str, Callable[[], str]] = {"README.md": every_format, "docs/formats.md": every_spec}


def main() -> int:
    """Update the pages, or compare; the exit code says whether they were (or are) right."""
    stale = []
    for name, table in PAGES.items():
        page = ROOT / name
        old = page.read_text()
        head, begin, rest = old.partition(BEGIN)
        _, end, tail = rest.partition(END)
        if not begin or not end:
            sys.exit(f"{name}: lacks the marks {BEGIN} and {END}")
        new = f"{head}{BEGIN}\n{table()}\n{END}{tail}"
        if new != old:
            stale.append(name)
        if "--check" not in sys.argv:
            page.write_text(new)
    if stale and "--check" in sys.argv:
        print(f"{', '.join(stale)}: out of date; run python scripts/docs.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
