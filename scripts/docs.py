"""Write the table of formats in docs/formats.md from the registry; with --check, only say whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

import lowbit
from lowbit.formats import formats

PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
BEGIN, END = "<!-- formats: made by scripts/docs.py -->", "<!-- formats: end -->"
SHAPE = (3072, 3072)


def table() -> str:
    """One row for each spec that a format gives a golden number for."""
    rows = ["| spec | bits a weight | SQNR, dB | stored tensors |", "|---|---|---|---|"]
    for cls in formats().values():
        for spec, decibels in cls.golden_sqnr.items():
            fmt = lowbit.parse_spec(spec)
            bits = fmt.nbytes(*SHAPE) * 8 / (SHAPE[0] * SHAPE[1])
            rows.append(f"| `{spec}` | {bits:.2f} | {decibels:.1f} | {', '.join(fmt.part_names)} |")
    return "\n".join(rows)


def main() -> int:
    """Update the page, or compare; the exit code says whether it was (or is) right."""
    old = PAGE.read_text()
    head, _, rest = old.partition(BEGIN)
    _, _, tail = rest.partition(END)
    new = f"{head}{BEGIN}\n{table()}\n{END}{tail}"
    if "--check" in sys.argv:
        if new != old:
            print("docs/formats.md is out of date: run python scripts/docs.py")
        return int(new != old)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
