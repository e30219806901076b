"""The steps of a search for the parameters of a W4A4 weight, by the kernels of their device.

Functions and not operators: none of them is traced. What they compute is defined in `numerics.w4a4_search`. All that
they are given is finite: what NaN spreads to depends on the kernel.
"""

from __future__ import annotations

from torch import Tensor

from lowbit.dispatch import ANY_FORMAT, select
from lowbit.formats.parts import Parts
from lowbit.formats.svdquant_w4a4 import SvdquantW4A4
from lowbit.numerics.low_rank import Passes
from lowbit.numerics.w4a4_search import Steps


def rounding_passes(w: Tensor, factor: Tensor, weights: Tensor, noise: Tensor | None) -> Passes:
    """The way to go through w * factor, rounded to nearest by groups of 64.

    w             [N, K]   float32, bfloat16 or float16
    factor        [K]      float32, of columns
    weights       [K]      float32, of squared errors
    noise         [K]      float32 or None, of squares of the rounded part
    """
    args = (w, factor, weights, noise)
    passes: Passes = select("rounding_passes", ANY_FORMAT, "", w.device.type, args).run(*args)
    return passes


def input_noise(x: Tensor, smooth: Tensor, unsigned: bool) -> Tensor:
    """The mean square of what quantization takes from x / smooth in each channel: float32 [K].

    x        float32 [T, K]
    smooth   float32 [K]
    """
    args = (x, smooth, unsigned)
    noise: Tensor = select("input_noise", ANY_FORMAT, "", x.device.type, args).run(*args)
    return noise


def lost_to_lowest(m: Tensor, rest: Tensor, out: Tensor) -> None:
    """out = m - rounded(rest), with steps that put the largest weight of a group of 64 at about code -8.

    m      float32 [n, K]
    rest   float32 [n, K]   may be written over
    out    float32 [n, K]   may be m
    """
    args = (m, rest, out)
    select("lost_to_lowest", ANY_FORMAT, "", m.device.type, args).run(*args)


def searched_scales(fmt: SvdquantW4A4, rows: Tensor, params: Parts, weights: Tensor) -> Tensor:
    """For each group of some rows the scale with the least squared error: [K/64, n] in the dtype of `proj_up`.

    rows      float32 [n, K]   of the weight
    params    smooth_factor [K], proj_down [K, R] and proj_up [n, R], as they are stored
    weights   float32 [K]      of squared errors in the columns of the weight
    """
    args = (fmt, rows, params, weights)
    scale: Tensor = select("searched_scales", fmt.name, "", rows.device.type, args).run(*args)
    return scale


STEPS = Steps(rounding_passes, input_noise)
