"""What a layer loses by rounding its input, for formats whose linear does that: measured on kept rows of the input."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from lowbit.formats.base import Format
from lowbit.formats.parts import Parts
from lowbit.ops.encode import decode_rows, multiply

from .curvature import energy

_TOKENS = 128  # their rounding errors are independent: enough for a few percent


def activation_loss(fmt: Format, parts: Parts, samples: Tensor | None, outputs: Tensor | None = None) -> float:
    """The mean over rows x of e^T G e, e = linear(x) - x Wq^T; 0 for a format whose linear keeps its input.

    samples: rows [S, K] of the layer's input, or None. outputs: G [N, N] or its blocks, or None for the identity.
    """
    if samples is None or not fmt.rounds_input or not samples.shape[0]:
        return 0.0
    rows = samples[:_TOKENS].to(parts["qdata"].device).float()
    share = fmt.bias_share(parts)
    scaled = rows * parts["pre_quant_scale"].float() if fmt.pre_quant_scale else rows  # before `linear`: see `Format`
    rounded = multiply(fmt, scaled, parts, None if share is None else -share)
    for start, stop in fmt.row_ranges(fmt.rows_of(parts), rows.shape[1]):
        weight = decode_rows(fmt, parts, rows.shape[1], start, stop)
        rounded[:, start:stop] -= F.linear(rows, weight)
    return energy(rounded.t(), None, outputs) / rows.shape[0]
