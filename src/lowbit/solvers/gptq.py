"""gptq: round one column after the other, each made up for by those still to come (arXiv 2210.17323).

From the last column in the order of `Curvature.factor` to the first: what is rounded is the weight plus the errors of
the columns done, each times its entry of L. Scales stay as they are, so any order of columns gives the same file
format (act-order with static groups).
"""

from __future__ import annotations

from lowbit.ops.columns import gptq_sweep

from .refinement import Draft, register_refinement


@register_refinement("gptq")
def gptq(draft: Draft) -> None:
    """Choose all codes anew, at the draft's scales. See the module."""
    order, lower = draft.curvature.factor
    gptq_sweep(draft.grid, order, lower, draft.values)
    draft.forget_gradient()
