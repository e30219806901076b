"""Encoding a weight, decoding and judging the result by the kernels of its device: what conversion is made of.

Functions and not operators: none of them is traced, and their errors name the layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.dispatch import select
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts, narrow_rows
from lowbit.numerics.groups import row_chunks
from lowbit.numerics.row_energies import beyond_float32, exact_row_energies


def encode(w: Tensor, fmt: Format, *, where: str = "weight", seed: int | None = None) -> Parts:
    """The parts of a weight [N, K], rounded to nearest or, with a `seed`, stochastically. See `Format.quantize`."""
    return select("quantize", fmt.name, "", w.device.type, (fmt, w, seed, where)).run(fmt, w, seed, where)


def encode_searched(w: Tensor, fmt: Format, weights: Tensor | None = None, *, where: str = "weight") -> Parts:
    """The same under the scales of least squared error that the format proposes; `weights` [K] of columns, or None."""
    args = (fmt, w, weights, where)
    return select("scale_search", fmt.name, "", w.device.type, args).run(*args)


def decode_rows(
    fmt: Format, parts: Mapping[str, Tensor], k: int, start: int, stop: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows [start, stop) of the weight [N, k] that plain parts mean, in `dtype`: see `Format.dequantize_rows`."""
    args = (fmt, narrow_rows(fmt.rules, parts, start, stop), (stop - start, k), dtype)
    return select("dequantize", fmt.name, "", parts["qdata"].device.type, args).run(*args)


def multiply(fmt: Format, x: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """x [..., K] by the linear of a format, plain parts, bias [N] or None -> [..., N] in the dtype of x."""
    args = (fmt, x, dict(parts), bias)
    return select("linear", fmt.name, "", x.device.type, args).run(*args)


def row_errors(fmt: Format, parts: Mapping[str, Tensor], w: Tensor) -> Tensor:
    """[3, N]: sums over each row of w [N, K] squared, of what the parts mean minus w, and of the former.

    They are float32, or float64 where the squares of a row need that.
    """
    args = (fmt, dict(parts), w)
    sums = select("row_errors", fmt.name, "", w.device.type, args).run(*args)
    lost = beyond_float32(sums, w)
    return _measured_again(fmt, parts, w, sums.double(), lost) if bool(lost.any()) else sums


def _measured_again(fmt: Format, parts: Mapping[str, Tensor], w: Tensor, sums: Tensor, lost: Tensor) -> Tensor:
    """The sums with those of the rows `lost` taken in float64."""
    n, k = w.shape
    for start, stop in row_chunks(n, k, fmt.row_multiple):
        which = lost[start:stop]
        if bool(which.any()):
            approx = decode_rows(fmt, parts, k, start, stop)
            sums[:, start:stop][:, which] = exact_row_energies(w[start:stop][which], approx[which])
    return sums
