"""auto: which solver to take when the user names none.

Scales matter where codes are few: a 4-bit format gains 1 to 1.5 dB from a search, an 8-bit one less than 0.2 dB for
many times the work. Each format states its choice (`Format.data_free_solver`).
"""

from __future__ import annotations

from lowbit.formats.base import Format
from lowbit.solvers.base import solver

AUTO = "auto"


def pick_solver(name: str, fmt: Format) -> tuple[str, str]:
    """The solver to use for a format and, in words, why: `name` itself, or what `auto` takes.

    Raises `SolverError` when there is no solver of that name.
    """
    if name != AUTO:
        solver(name)
        return name, "as asked"
    chosen = fmt.data_free_solver
    solver(chosen)
    return chosen, f"auto: the default of {fmt.name} without calibration data"
