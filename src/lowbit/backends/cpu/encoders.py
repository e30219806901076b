"""What the launchers of quantize and scale_search share: which weights they take, and what a bad weight raises."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.cpu.operands import DTYPES
from lowbit.errors import WeightError
from lowbit.formats.base import Format, check_finite
from lowbit.formats.parts import Parts


def refuses_quantize(fmt: Format, w: Tensor, seed: int | None, where: str = "weight") -> str | None:
    """Why no encoder here takes this weight, or None."""
    if seed is not None:
        return "a seed asks for stochastic rounding; the kernels round to nearest"
    return _refuses(fmt, w)


def refuses_search(fmt: Format, w: Tensor, weights: Tensor | None, where: str = "weight") -> str | None:
    """Why no search for scales here takes this weight, or None."""
    why = _refuses(fmt, w)
    if why is None and weights is not None and weights.shape != w.shape[1:]:  # K of them are read
        return f"weights of columns of shape {list(weights.shape)}; the kernels take [{w.shape[1]}], one a column"
    return why


def _refuses(fmt: Format, w: Tensor) -> str | None:
    if w.dim() != 2 or w.dtype not in DTYPES:
        kind = f"{w.dim()}-D {str(w.dtype).removeprefix('torch.')}"
        return f"the weight is {kind}; the kernels take matrices of float32, bfloat16 and float16"
    if not w.numel():
        return "the weight is empty"
    return None


def begin(fmt: Format, w: Tensor, weights: Tensor | None, where: str) -> tuple[Tensor, Tensor | None, Parts]:
    """The weight without gaps, the weights of its columns as float32, and room for its parts.

    Raises what `Format.quantize` does for a weight that the format cannot store.
    """
    fmt.check_encodable(where)
    fmt.check_weight(w, where)
    parts = fmt.plain.empty_parts((w.shape[0], w.shape[1]), w.device, w.dtype)
    columns = None if weights is None else weights.to(w.device, torch.float32).contiguous()
    return w.detach().contiguous(), columns, parts


def finished(parts: Parts, w: Tensor, where: str, *, finite: bool) -> Parts:
    """The parts; `WeightError`, naming `where`, when the kernel met NaN or infinity, or made it by rotating."""
    if not finite:
        check_finite(w, where)
        raise WeightError(f"{where}: its rotated values exceed float32; repair the source or keep this layer")
    return parts
