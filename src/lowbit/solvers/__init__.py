"""Solvers choose codes and scales. Each works through the hooks of `Format`, so it is written once for all formats.

Importing this package registers them all.
"""

from lowbit.solvers import descent, gptq, learned_rounding, rtn, scale_search
from lowbit.solvers.base import Solver, Statistics, register_solver, solver, solvers
from lowbit.solvers.pipeline import AUTO, BIAS, Pipeline, parse_pipeline, pick_solver, what_is_known
from lowbit.solvers.refinement import DRAFT_ELEMENTS, refinements, register_refinement
from lowbit.solvers.solve import Solution, solve

__all__ = [
    "AUTO",
    "BIAS",
    "DRAFT_ELEMENTS",
    "Pipeline",
    "Solution",
    "Solver",
    "Statistics",
    "descent",
    "gptq",
    "learned_rounding",
    "parse_pipeline",
    "pick_solver",
    "refinements",
    "register_refinement",
    "register_solver",
    "rtn",
    "scale_search",
    "solve",
    "solver",
    "solvers",
    "what_is_known",
]
