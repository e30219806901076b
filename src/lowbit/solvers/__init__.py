"""Solvers choose codes and scales. Each works through the hooks of `Format`, so it is written once for all formats.

Importing this package registers them all.
"""

from lowbit.solvers import awq, descent, gptq, learned_rounding, rtn, scale_search, svdquant
from lowbit.solvers.base import Option, Solver, Statistics, register_solver, solver, solvers
from lowbit.solvers.input_scale import fraction_problem, input_scale, percentile, scale_problem
from lowbit.solvers.pipeline import AUTO, AWQ, BIAS, Pipeline, misfit, parse_pipeline, pick_solver, what_is_known
from lowbit.solvers.refinement import DRAFT_ELEMENTS, refinements, register_refinement
from lowbit.solvers.sharing import STARTS, Member, SharedSolution, solve_shared
from lowbit.solvers.solve import Solution, solve

__all__ = [
    "AUTO",
    "AWQ",
    "BIAS",
    "DRAFT_ELEMENTS",
    "STARTS",
    "Member",
    "Option",
    "Pipeline",
    "SharedSolution",
    "Solution",
    "Solver",
    "Statistics",
    "awq",
    "descent",
    "fraction_problem",
    "gptq",
    "input_scale",
    "learned_rounding",
    "misfit",
    "parse_pipeline",
    "percentile",
    "pick_solver",
    "refinements",
    "register_refinement",
    "register_solver",
    "rtn",
    "scale_problem",
    "scale_search",
    "solve",
    "solve_shared",
    "solver",
    "solvers",
    "svdquant",
    "what_is_known",
]
