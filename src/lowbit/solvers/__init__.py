"""Solvers choose codes and scales. Each works through the hooks of `Format`, so it is written once for all formats.

Importing this package registers them all.
"""

from lowbit.solvers import rtn, scale_search
from lowbit.solvers.auto import AUTO, pick_solver
from lowbit.solvers.base import Solver, Statistics, register_solver, solver, solvers

__all__ = [
    "AUTO",
    "Solver",
    "Statistics",
    "pick_solver",
    "register_solver",
    "rtn",
    "scale_search",
    "solver",
    "solvers",
]
