"""quantize and scale_search for mxfp8 and mxfp4, with the reference's codes and scales."""

from __future__ import annotations

from torch import Tensor

from lowbit.backends.cpu import encoders, native
from lowbit.backends.cpu.operands import DTYPES, address
from lowbit.dispatch import kernel
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts


@kernel("quantize", format="mxfp8", backend="cpu", refuses=encoders.refuses_quantize)
@kernel("quantize", format="mxfp4", backend="cpu", refuses=encoders.refuses_quantize)
def quantize_mx(fmt: Format, w: Tensor, seed: int | None, where: str = "weight") -> Parts:
    """w [N, K] -> parts, by rounding to nearest."""
    return _encoded(fmt, w, None, where, search=False)


@kernel("scale_search", format="mxfp8", backend="cpu", refuses=encoders.refuses_search)
@kernel("scale_search", format="mxfp4", backend="cpu", refuses=encoders.refuses_search)
def scale_search_mx(fmt: Format, w: Tensor, weights: Tensor | None, where: str = "weight") -> Parts:
    """w [N, K], weights of columns [K] or None -> parts under the best scales."""
    return _encoded(fmt, w, weights, where, search=True)


def _encoded(fmt: Format, w: Tensor, weights: Tensor | None, where: str, *, search: bool) -> Parts:
    source, columns, parts = encoders.begin(fmt, w, weights, where)
    n, k = source.shape
    finite = native.module().quantize_mx(
        source.data_ptr(), DTYPES[source.dtype], n, k, fmt.name == "mxfp4", search, address(columns),
        parts["qdata"].data_ptr(), parts["scale"].data_ptr(), native.threads(),
    )  # fmt: skip
    return encoders.finished(parts, source, where, finite=finite)
