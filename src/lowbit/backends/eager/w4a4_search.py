"""The steps of a search for W4A4 parameters on every device."""

from __future__ import annotations

from torch import Tensor

from lowbit.dispatch import kernel
from lowbit.formats.parts import Parts
from lowbit.formats.scale_search import search_rows
from lowbit.formats.svdquant_w4a4 import SvdquantW4A4
from lowbit.numerics import w4a4_search

for _step in (w4a4_search.rounding_passes, w4a4_search.input_noise, w4a4_search.lost_to_lowest):
    kernel(_step.__name__, backend="eager")(_step)


@kernel("searched_scales", format="svdquant_w4a4", backend="eager")
def searched_scales(fmt: SvdquantW4A4, rows: Tensor, params: Parts, weights: Tensor) -> Tensor:
    """See `lowbit.ops.w4a4_search`. The search starts at absmax / 7."""
    plain = fmt.plain_scale(rows, params).to(params["proj_up"].dtype)
    return search_rows(rows, fmt, {**params, "scale": plain}, weights)["scale"]
