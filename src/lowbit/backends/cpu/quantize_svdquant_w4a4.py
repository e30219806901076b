"""quantize and scale_search for svdquant_w4a4: the reference's search for the low rank, each pass of it one kernel.

Sums are made in another order than in the reference's matrix products, and each step of the search feeds the next one:
the factors that it ends with are others as good, so codes differ and errors do not. Factors of a float32 weight are
those that are stored, bfloat16, from the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import encoders, native
from lowbit.backends.cpu.operands import DTYPES
from lowbit.backends.cpu.w4a4_search import STEPS
from lowbit.dispatch import kernel
from lowbit.errors import WeightError
from lowbit.formats.base import check_finite
from lowbit.formats.parts import Parts
from lowbit.formats.svdquant_w4a4 import FACTORS, TURNS, SvdquantW4A4
from lowbit.numerics.low_rank import least_squares
from lowbit.numerics.smoothing import column_amax

_TOLERANCE = 0.15  # two results that are each 0.1 away from the weight, with other factors; see the tests of errors


@kernel("quantize", format="svdquant_w4a4", backend="cpu", refuses=encoders.refuses_quantize, tolerance=_TOLERANCE)
def quantize_svdquant_w4a4(fmt: SvdquantW4A4, w: Tensor, seed: int | None, where: str = "weight") -> Parts:
    """w [N, K] -> parts, with scales of absmax / 7."""
    return _encoded(fmt, w, None, (), where)


@kernel("scale_search", format="svdquant_w4a4", backend="cpu", refuses=encoders.refuses_search, tolerance=_TOLERANCE)
def scale_search_svdquant_w4a4(fmt: SvdquantW4A4, w: Tensor, weights: Tensor | None, where: str = "weight") -> Parts:
    """w [N, K], weights of columns [K] or None -> parts under the best scales, which may be negative."""
    return _encoded(fmt, w, weights, FACTORS, where)


def _encoded(fmt: SvdquantW4A4, w: Tensor, weights: Tensor | None, factors: tuple[float, ...], where: str) -> Parts:
    source, columns, parts = encoders.begin(fmt, w, weights, where)
    n, k = source.shape
    amax = column_amax((source[a:b] for a, b in fmt.row_ranges(n, k)), k, source.device)
    if not bool(amax.isfinite().all()):
        check_finite(source, where)
    shared = fmt.shared(source, amax, source.dtype, STEPS)
    dtype = parts["proj_down"].dtype
    parts.update({name: part.to(dtype) for name, part in shared.items()})
    smooth, down = parts["smooth_factor"].float(), parts["proj_down"].float().contiguous()
    basis, seen = down * smooth.unsqueeze(1), smooth.square().reciprocal()
    solve, searched = least_squares(basis), seen if columns is None else seen * columns
    tried = torch.tensor(factors, dtype=torch.float32, device="cpu")
    finite = native.module().svdquant_rows(
        source.data_ptr(), DTYPES[source.dtype], n, k, smooth.data_ptr(), seen.data_ptr(), basis.data_ptr(),
        solve.data_ptr(), down.data_ptr(), fmt.rank, TURNS, tried.data_ptr(), searched.data_ptr(), len(factors),
        DTYPES[dtype], parts["proj_up"].data_ptr(), parts["scale"].data_ptr(), parts["qdata"].data_ptr(),
        native.threads(),
    )  # fmt: skip
    if not finite:
        kind = str(dtype).removeprefix("torch.")
        raise WeightError(f"{where}: its low-rank factors exceed {kind}; repair the source or keep this layer")
    return parts
