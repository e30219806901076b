"""quantize and scale_search for fp8_e4m3, fp8_e5m2, int8 and convrot_w4a4, with the reference's codes and scales.

Where a weight is rotated, sums are made in another order than in a matrix product: a scale may then be the next float32
or two away, and a code the next one where its value lies as near to a tie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import encoders, native
from lowbit.backends.cpu.operands import DTYPES, address
from lowbit.dispatch import kernel
from lowbit.formats.convrot_w4a4 import ConvrotW4A4
from lowbit.formats.granular import Granular
from lowbit.formats.int8 import Int8
from lowbit.formats.parts import Parts

_GRIDS = {"fp8_e4m3": 0, "fp8_e5m2": 1, "int8": 2, "convrot_w4a4": 3}
_INT8, _INT4 = 1e-3, 2e-2  # where a code of a rotated row of 1000 is the next one


@kernel("quantize", format="fp8_e4m3", backend="cpu", refuses=encoders.refuses_quantize)
@kernel("quantize", format="fp8_e5m2", backend="cpu", refuses=encoders.refuses_quantize)
@kernel("quantize", format="int8", backend="cpu", refuses=encoders.refuses_quantize, tolerance=_INT8)
@kernel("quantize", format="convrot_w4a4", backend="cpu", refuses=encoders.refuses_quantize, tolerance=_INT4)
def quantize_granular(fmt: Granular | ConvrotW4A4, w: Tensor, seed: int | None, where: str = "weight") -> Parts:
    """w [N, K] -> parts, by rounding to nearest."""
    return _encoded(fmt, w, None, (), where)


@kernel("scale_search", format="fp8_e4m3", backend="cpu", refuses=encoders.refuses_search)
@kernel("scale_search", format="fp8_e5m2", backend="cpu", refuses=encoders.refuses_search)
@kernel("scale_search", format="int8", backend="cpu", refuses=encoders.refuses_search, tolerance=_INT8)
@kernel("scale_search", format="convrot_w4a4", backend="cpu", refuses=encoders.refuses_search, tolerance=_INT4)
def scale_search_granular(
    fmt: Granular | ConvrotW4A4, w: Tensor, weights: Tensor | None, where: str = "weight"
) -> Parts:
    """w [N, K], weights of columns [K] or None -> parts under the best scales."""
    return _encoded(fmt, w, weights, fmt.factors, where)


def _encoded(
    fmt: Granular | ConvrotW4A4, w: Tensor, weights: Tensor | None, factors: tuple[float, ...], where: str
) -> Parts:
    source, columns, parts = encoders.begin(fmt, w, weights, where)
    n, k = source.shape
    tensor, tile, rotation = False, (1, k), 0
    if isinstance(fmt, Granular):
        tensor, tile = fmt.granularity == "tensor", fmt.block_size if fmt.granularity == "block" else tile
    if isinstance(fmt, Int8 | ConvrotW4A4):
        rotation = fmt.rotation
    tried = torch.tensor(factors, dtype=torch.float32, device="cpu")
    finite = native.module().quantize_granular(
        source.data_ptr(), DTYPES[source.dtype], n, k, _GRIDS[fmt.name], tensor, *tile, rotation, tried.data_ptr(),
        len(factors), address(columns), parts["qdata"].data_ptr(), parts["scale"].data_ptr(), native.threads(),
    )  # fmt: skip
    return encoders.finished(parts, source, where, finite=finite)
