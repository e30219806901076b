"""quantize and scale_search for w4a8_codebook: the reference's choice of scales and codes, on a row rotated natively.

The rotation sums in another order than a matrix product: a value may be an ulp or two away, so a code the next one
where its value lies as near to a tie, and a scale another one where two have the same error. The fit of the codebook is
the format's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import encoders, native
from lowbit.backends.cpu.operands import DTYPES, address
from lowbit.dispatch import kernel
from lowbit.formats.parts import Parts
from lowbit.formats.w4a8_codebook import UNIFORM, W4A8Codebook
from lowbit.numerics.int8_matmul import INT8_MAX

_TOLERANCE = 2e-2  # where a code of a rotated row of 1000 is the next one, as of the other rotated formats of 4 bits


@kernel("quantize", format="w4a8_codebook", backend="cpu", refuses=encoders.refuses_quantize, tolerance=_TOLERANCE)
def quantize_w4a8_codebook(fmt: W4A8Codebook, w: Tensor, seed: int | None, where: str = "weight") -> Parts:
    """w [N, K] -> parts, by rounding to nearest."""
    return _encoded(fmt, w, None, where)


@kernel("scale_search", format="w4a8_codebook", backend="cpu", refuses=encoders.refuses_search, tolerance=_TOLERANCE)
def scale_search_w4a8_codebook(fmt: W4A8Codebook, w: Tensor, weights: Tensor | None, where: str = "weight") -> Parts:
    """w [N, K] -> parts: rounding has the best scales already, and the format proposes no others."""
    return _encoded(fmt, w, weights, where)


def _encoded(fmt: W4A8Codebook, w: Tensor, weights: Tensor | None, where: str) -> Parts:
    source, _, parts = encoders.begin(fmt, w, weights, where)
    n, k = source.shape
    parts.update(fmt.fit_shared(source))
    codebook, correction = parts.get("codebook"), parts.get("correction")
    low, high = map(float, UNIFORM[fmt.bits] if codebook is None else (codebook[0], codebook[-1]))
    reach = 0.5 * (high - low) if fmt.correction else min(high, -low)
    finite = native.module().quantize_w4a8_codebook(
        source.data_ptr(), DTYPES[source.dtype], n, k, fmt.bits, fmt.group_size, fmt.rotation,
        address(codebook), reach, low, max(high, -low) / INT8_MAX, parts["qdata"].data_ptr(), parts["qdata"].shape[1],
        parts["s_rel"].data_ptr(), parts["s_channel"].data_ptr(), address(correction),
        DTYPES[torch.float32 if correction is None else correction.dtype], native.threads(),
    )  # fmt: skip
    return encoders.finished(parts, source, where, finite=finite)
