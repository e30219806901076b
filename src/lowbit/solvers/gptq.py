"""gptq: round one column after the other, each made up for by those still to come (arXiv 2210.17323).

From the last column in the order of `Curvature.factor` to the first: what is rounded is the weight plus the errors of
the columns done, each times its entry of L. Scales stay as they are, so any order of columns gives the same file
format (act-order with static groups). Errors reach columns outside the current block as one matrix product.
"""

from __future__ import annotations

import torch

from lowbit.ops.columns import gptq_columns

from .refinement import Draft, register_refinement

BLOCK = 64  # columns: longer blocks make the updates within them dominate


@register_refinement("gptq")
def gptq(draft: Draft) -> None:
    """Choose all codes anew, at the draft's scales. See the module."""
    grid = draft.grid
    order, lower = draft.curvature.factor
    error = torch.empty_like(grid.target)
    room = grid.target.new_empty((min(BLOCK, order.shape[0]), grid.target.shape[1]))
    for last in range(order.shape[0], 0, -BLOCK):
        first = max(0, last - BLOCK)
        columns = order[first:last]
        wanted = torch.index_select(grid.target, 0, columns, out=room[: last - first])
        wanted.addmm_(lower[last:, first:last].t(), error[last:])
        gptq_columns(grid, columns, wanted, lower[first:last, first:last], draft.values, error[first:last])
    draft.forget_gradient()
