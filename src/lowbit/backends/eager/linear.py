"""linear for every format: a bounded piece of the weight is decoded at a time and multiplied in the dtype of x."""

from __future__ import annotations

from torch import Tensor

from lowbit.dispatch import ANY_LAYOUT, kernel
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts


@kernel("linear", backend="eager", layout=ANY_LAYOUT)
@kernel("linear", backend="eager")
def linear(fmt: Format, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """x [..., K], bias [N] or None -> [..., N] in the dtype of x. Without columns that is the bias, or zeros."""
    if not x.shape[-1]:  # what no kernel takes: so no format has to decode nothing
        out = x.new_zeros((*x.shape[:-1], fmt.rows_of(parts)))
        return out if bias is None else out.copy_(bias)
    return fmt.linear(x, parts, bias)
