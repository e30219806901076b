"""The one scale of a whole tensor: given by the caller, or fitted."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats.base import whole_amax
from lowbit.numerics.floats import divisor


def given_or_fitted(tensor: Tensor, scale: Tensor | float | str | None, largest: float) -> Tensor:
    """A float32 scale [] (or as given) on the device of a tensor.

    None and "recalculate" give absmax / largest, in float32 and at least the smallest normal number, so that zeros
    decode to zeros. Raises `FormatError` for another word.
    """
    if isinstance(scale, Tensor):
        return scale.to(device=tensor.device, dtype=torch.float32)
    if isinstance(scale, str) and scale != "recalculate":
        raise FormatError(f'scale is {scale!r}, expected a number, a tensor of one value, None or "recalculate"')
    if scale is None or isinstance(scale, str):
        amax = whole_amax(tensor.detach().reshape(-1, tensor.shape[-1] if tensor.dim() else 1))
        return (amax / divisor(largest, amax)).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.tensor(scale, dtype=torch.float32, device=tensor.device)
