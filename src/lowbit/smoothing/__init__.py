"""Activation-aware scales without a cost at run time: folded into the layer that comes before.

    linear(norm(x)) = (W s) (norm(x) / s)        s goes into the norm's weight and bias, or into the rows of a linear

What a model computes stays the same, but for the rounding of its dtype; what its weights lose when they are quantized
gets smaller, as with the solver `awq`, and any format and runtime can hold the result. Here it is done to modules in
memory; `lowbit.checkpoint.fold_plan` does it to files, with the same groups and the same choice of scales.

>>> import torch, lowbit
>>> from lowbit.smoothing import fold_scales_
>>> norm, linear = torch.nn.LayerNorm(4), torch.nn.Linear(4, 2)
>>> fold_scales_(norm, [linear], torch.tensor([0.5, 1.0, 1.0, 2.0]))
>>> norm.weight.tolist()
[0.5, 1.0, 1.0, 2.0]
"""

from __future__ import annotations

from .choice import Choice, choose, held_by_norm, held_by_rows, input_factor, norm_gain, rescaled, rescaled_outputs
from .groups import FoldGroup, find_groups
from .modules import Group, Smoothed, fold_scales_, llama_groups, smooth_
from .norms import NORMS, ONE_PLUS, WEIGHT

__all__ = [
    "NORMS",
    "ONE_PLUS",
    "WEIGHT",
    "Choice",
    "FoldGroup",
    "Group",
    "Smoothed",
    "choose",
    "find_groups",
    "fold_scales_",
    "held_by_norm",
    "held_by_rows",
    "input_factor",
    "llama_groups",
    "norm_gain",
    "rescaled",
    "rescaled_outputs",
    "smooth_",
]
