"""The steps of a search for W4A4 parameters: passes over the weight, the rounding of inputs and of what is left.

Sums are made in another order than in the reference's matrix products, and quotients are products with a reciprocal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import memory
from lowbit.backends.cpu import native
from lowbit.backends.cpu.operands import DTYPES, refuses_unlike
from lowbit.dispatch import kernel
from lowbit.formats.parts import Parts
from lowbit.formats.svdquant_w4a4 import FACTORS, SvdquantW4A4
from lowbit.numerics.int4_matmul import GELU_SHIFT, GROUP
from lowbit.numerics.low_rank import Passes, Products
from lowbit.numerics.w4a4_search import Steps

_SLABS = 16  # runs of rows whose sums are added up: fixed, so that these do not depend on the number of threads
_LEAST_ROWS = 128  # of a slab: its sums are cleared and added to the others', whatever it holds
_TOLERANCE = 1e-3  # a value between two codes may go the other way


class NativePasses(Passes):
    """Of w * factor [N, K], w without gaps; see `numerics.w4a4_search.rounding_passes`."""

    def __init__(self, w: Tensor, factor: Tensor, weights: Tensor, noise: Tensor | None = None) -> None:
        self._w, self._factor, self._weights = w, factor.contiguous(), weights.contiguous()
        self._noise = None if noise is None else noise.contiguous()
        self._slabs = max(1, min(_SLABS, w.shape[0] // _LEAST_ROWS))
        self._room = torch.empty(0, dtype=torch.float32, device="cpu")

    def step(self, basis: Tensor) -> Products:
        """See `Passes`."""
        return self._pass(basis.contiguous(), 0, step=True)[1]

    def refinement(self, basis: Tensor, rank: int, *, step: bool) -> tuple[float, Products | None]:
        """See `Passes`."""
        error, products = self._pass(basis.contiguous(), rank, step=step)
        return error, products if step else None

    def _pass(self, basis: Tensor, rank: int, *, step: bool) -> tuple[float, Products]:
        (n, k), columns = self._w.shape, basis.shape[1]
        if self._room.numel() < self._slabs * k * columns:
            self._room = memory.empty((self._slabs, k, columns), torch.float32)
        image = torch.zeros((k, columns) if step else (0, columns), dtype=torch.float32, device="cpu")
        error = torch.zeros((), dtype=torch.float64, device="cpu")
        native.module().svdquant_pass(
            self._w.data_ptr(), DTYPES[self._w.dtype], n, k, self._factor.data_ptr(), self._weights.data_ptr(),
            0 if self._noise is None else self._noise.data_ptr(), basis.data_ptr(), columns, rank, step, self._slabs,
            self._room.data_ptr(), image.data_ptr(), error.data_ptr(), native.threads(),
        )  # fmt: skip
        return float(error), Products(image, basis[: image.shape[0]].t() @ image)


def refuses_passes(w: Tensor, factor: Tensor, weights: Tensor, noise: Tensor | None) -> str | None:
    """Why these passes cannot run here, or None."""
    if w.dtype not in DTYPES:
        return f"the weight is {str(w.dtype).removeprefix('torch.')}; the kernel takes float32, bfloat16 and float16"
    of_columns = {"factor": factor, "weights": weights} | ({} if noise is None else {"noise": noise})
    return _uneven(w.shape[1]) or refuses_unlike(w.shape[1:], **of_columns)


def refuses_noise(x: Tensor, smooth: Tensor, unsigned: bool) -> str | None:
    """Why this noise cannot be measured here, or None."""
    return _uneven(x.shape[1]) or refuses_unlike(x.shape, x=x) or refuses_unlike(x.shape[1:], smooth=smooth)


def refuses_lost(m: Tensor, rest: Tensor, out: Tensor) -> str | None:
    """Why these rows cannot be rounded here, or None."""
    if not (m.is_contiguous() and rest.is_contiguous() and out.is_contiguous()):
        return "not all rows are without gaps"
    return _uneven(m.shape[1]) or refuses_unlike(m.shape, m=m, rest=rest, out=out)


def refuses_scales(fmt: SvdquantW4A4, rows: Tensor, params: Parts, weights: Tensor) -> str | None:
    """Why these scales cannot be searched here, or None."""
    n, k = rows.shape
    rank = params["proj_down"].shape[1:]
    shapes = {"smooth_factor": (k,), "proj_down": (k, *rank), "proj_up": (n, *rank)}
    for name, shape in shapes.items():
        part = params[name]
        if part.dtype not in DTYPES or part.device.type != "cpu" or part.shape != shape:
            return f"{name} is {part.dtype} {list(part.shape)} on {part.device}, not {list(shape)} of at most 32 bits"
    return _uneven(k) or refuses_unlike(rows.shape, rows=rows) or refuses_unlike((k,), weights=weights)


def _uneven(columns: int) -> str | None:
    return f"{columns} columns are no multiple of {GROUP}" if columns % GROUP else None


@kernel("rounding_passes", backend="cpu", refuses=refuses_passes, tolerance=_TOLERANCE)
def rounding_passes(w: Tensor, factor: Tensor, weights: Tensor, noise: Tensor | None) -> Passes:
    """See `lowbit.ops.w4a4_search`."""
    return NativePasses(w.detach().contiguous(), factor, weights, noise)


@kernel("input_noise", backend="cpu", refuses=refuses_noise, tolerance=_TOLERANCE)
def input_noise(x: Tensor, smooth: Tensor, unsigned: bool) -> Tensor:
    """See `lowbit.ops.w4a4_search`."""
    rows, inverse, noise = x.contiguous(), smooth.reciprocal(), torch.empty_like(smooth)
    native.module().input_noise(
        rows.data_ptr(), *rows.shape, inverse.data_ptr(), GELU_SHIFT if unsigned else 0.0, unsigned, noise.data_ptr(),
        native.threads(),
    )  # fmt: skip
    return noise


@kernel("lost_to_lowest", backend="cpu", refuses=refuses_lost, tolerance=_TOLERANCE)
def lost_to_lowest(m: Tensor, rest: Tensor, out: Tensor) -> None:
    """See `lowbit.ops.w4a4_search`."""
    native.module().lost_to_lowest(m.data_ptr(), rest.data_ptr(), *m.shape, out.data_ptr(), native.threads())


@kernel("searched_scales", format="svdquant_w4a4", backend="cpu", refuses=refuses_scales, tolerance=_TOLERANCE)
def searched_scales(fmt: SvdquantW4A4, rows: Tensor, params: Parts, weights: Tensor) -> Tensor:
    """See `lowbit.ops.w4a4_search`. Where scales are not finite, the factors were not."""
    source, stored = rows.contiguous(), params["proj_up"].dtype
    (n, k), smooth = source.shape, params["smooth_factor"].float().contiguous()
    down, up = (params[name].float().contiguous() for name in ("proj_down", "proj_up"))
    searched = (weights / smooth.square()).contiguous()
    tried, scale = (
        torch.tensor(FACTORS, dtype=torch.float32, device="cpu"),
        torch.empty((k // GROUP, n), dtype=stored, device="cpu"),
    )
    native.module().svdquant_scales(
        source.data_ptr(), n, k, smooth.data_ptr(), down.data_ptr(), up.data_ptr(), up.shape[1], tried.data_ptr(),
        searched.data_ptr(), len(FACTORS), DTYPES[stored], scale.data_ptr(), native.threads(),
    )  # fmt: skip
    return scale


STEPS = Steps(rounding_passes, input_noise)
