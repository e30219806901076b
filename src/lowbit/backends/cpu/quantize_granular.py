"""quantize and scale_search for fp8_e4m3, fp8_e5m2 and int8, with the reference's codes and scales."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu import encoders, native
from lowbit.backends.cpu.operands import DTYPES, address
from lowbit.dispatch import kernel
from lowbit.formats.base import Format
from lowbit.formats.granular import Granular
from lowbit.formats.int8 import Int8
from lowbit.formats.parts import Parts

_GRIDS = {"fp8_e4m3": 0, "fp8_e5m2": 1, "int8": 2}


def _refuses_rotation(fmt: Format) -> str | None:
    if isinstance(fmt, Int8) and fmt.rotation:
        return "the codes are of the rotated weight, which no encoder here makes"
    return None


def _refuses_quantize(fmt: Granular, w: Tensor, seed: int | None, where: str = "weight") -> str | None:
    return _refuses_rotation(fmt) or encoders.refuses_quantize(fmt, w, seed, where)


def _refuses_search(fmt: Granular, w: Tensor, weights: Tensor | None, where: str = "weight") -> str | None:
    return _refuses_rotation(fmt) or encoders.refuses_search(fmt, w, weights, where)


def quantize_granular(fmt: Granular, w: Tensor, seed: int | None, where: str = "weight") -> Parts:
    """w [N, K] -> parts, by rounding to nearest."""
    return _encoded(fmt, w, None, (), where)


def scale_search_granular(fmt: Granular, w: Tensor, weights: Tensor | None, where: str = "weight") -> Parts:
    """w [N, K], weights of columns [K] or None -> parts under the best scales."""
    return _encoded(fmt, w, weights, fmt.factors, where)


def _encoded(fmt: Granular, w: Tensor, weights: Tensor | None, factors: tuple[float, ...], where: str) -> Parts:
    source, columns, parts = encoders.begin(fmt, w, weights, where)
    n, k = source.shape
    tile = fmt.block_size if fmt.granularity == "block" else (1, k)
    tried = torch.tensor(factors, dtype=torch.float32)
    finite = native.module().quantize_granular(
        source.data_ptr(), DTYPES[source.dtype], n, k, _GRIDS[fmt.name], fmt.granularity == "tensor", *tile,
        tried.data_ptr(), len(factors), address(columns), parts["qdata"].data_ptr(), parts["scale"].data_ptr(),
        native.threads(),
    )  # fmt: skip
    return encoders.finished(parts, source, where, finite=finite)


for _name in _GRIDS:
    kernel("quantize", format=_name, backend="cpu", refuses=_refuses_quantize)(quantize_granular)
    kernel("scale_search", format=_name, backend="cpu", refuses=_refuses_search)(scale_search_granular)
