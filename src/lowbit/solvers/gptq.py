"""gptq: round one column after the other, each made up for by those still to come (arXiv 2210.17323).

From the last column in the order of `Curvature.factor` to the first: what is rounded is the weight plus the errors of
the columns done, each times its entry of L. Scales stay as they are, so any order of columns gives the same file
format (act-order with static groups). Errors reach columns outside the current block as one matrix product.
"""

from __future__ import annotations

import torch

from .refinement import Draft, register_refinement

BLOCK = 64  # columns: longer blocks make the updates within them dominate


@register_refinement("gptq")
def gptq(draft: Draft) -> None:
    """Choose all codes anew, at the draft's scales. See the module."""
    grid = draft.grid
    order, lower = draft.curvature.factor
    columns: list[int] = order.tolist()
    target = grid.target[order]
    error = torch.empty_like(target)
    values, targets, errors = draft.values.unbind(0), target.unbind(0), error.unbind(0)
    for last in range(len(columns), 0, -BLOCK):
        first = max(0, last - BLOCK)
        wanted = target[first:last].addmm(lower[last:, first:last].t(), error[last:])
        inner = lower[first:last, first:last]
        rows = wanted.unbind(0)
        for i in range(last - first - 1, -1, -1):
            value = grid.nearest(rows[i], columns[first + i])
            values[columns[first + i]].copy_(value)
            missed = torch.sub(targets[first + i], value, out=errors[first + i])
            if i:
                wanted[:i].addr_(inner[i, :i], missed)
    draft.forget_gradient()
