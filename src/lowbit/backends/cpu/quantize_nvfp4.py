"""quantize and scale_search for nvfp4, with the reference's codes and scales."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cpu import encoders, native
from lowbit.backends.cpu.operands import DTYPES, address
from lowbit.dispatch import kernel
from lowbit.formats.nvfp4 import Nvfp4
from lowbit.formats.parts import Parts


@kernel("quantize", format="nvfp4", backend="cpu", refuses=encoders.refuses_quantize)
def quantize_nvfp4(fmt: Nvfp4, w: Tensor, seed: int | None, where: str = "weight") -> Parts:
    """w [N, K] -> parts, by rounding to nearest."""
    return _encoded(fmt, w, None, where, search=False)


@kernel("scale_search", format="nvfp4", backend="cpu", refuses=encoders.refuses_search)
def scale_search_nvfp4(fmt: Nvfp4, w: Tensor, weights: Tensor | None, where: str = "weight") -> Parts:
    """w [N, K], weights of columns [K] or None -> parts under the best scales."""
    return _encoded(fmt, w, weights, where, search=True)


def _encoded(fmt: Nvfp4, w: Tensor, weights: Tensor | None, where: str, *, search: bool) -> Parts:
    source, columns, parts = encoders.begin(fmt, w, weights, where)
    n, k = source.shape
    finite = native.module().quantize_nvfp4(
        source.data_ptr(), DTYPES[source.dtype], n, k, fmt.global_scale_divides, fmt.row_global_scale, search,
        address(columns), parts["qdata"].data_ptr(), parts["scale"].data_ptr(), parts["global_scale"].data_ptr(),
        False, native.threads(),
    )  # fmt: skip
    return encoders.finished(parts, source, where, finite=finite)
