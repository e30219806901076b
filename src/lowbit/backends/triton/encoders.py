"""What the launchers of quantize share: which weights they take, their noise, and what a bad weight raises."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.triton import device
from lowbit.formats.base import Format, check_finite
from lowbit.formats.parts import Parts
from lowbit.numerics.integers import uniform_noise


def refuses(fmt: Format, w: Tensor, seed: int | None, where: str = "weight") -> str | None:
    """Why no encoder here takes this weight, or None."""
    if w.dim() != 2 or not w.is_floating_point():
        return f"the weight is {w.dim()}-D {str(w.dtype).removeprefix('torch.')}; the kernels take matrices of floats"
    if not w.numel():
        return "the weight is empty"
    if seed is not None and not fmt.stochastic:
        return f"{fmt.name} has no stochastic rounding; leave the seed out"
    return refuses_values(weight=w)


def refuses_values(**tensors: Tensor) -> str | None:
    """Why no quantizer takes these values and scales, or None.

    All are cast to float32 at once. That is right for bfloat16, too, in the interpreter, which rounds to it wrongly.
    """
    first = next(iter(tensors.values()))
    return device.refuses(first.new_empty((0,), dtype=torch.float32), **tensors)


def refuses_result(dtype: torch.dtype) -> str | None:
    """Why no kernel here gives values of this dtype, or None."""
    if dtype not in device.DTYPES:
        return f"the result is {str(dtype).removeprefix('torch.')}; the kernels give float32, bfloat16 and float16"
    if dtype == torch.bfloat16 and device.INTERPRETED:
        return "the result is bfloat16, to which Triton's interpreter rounds wrongly; test with float16 or float32"
    return None


def begin(fmt: Format, w: Tensor, where: str) -> tuple[Tensor, Parts, Tensor]:
    """The weight without gaps, room for its parts, and a flag that a kernel sets when it meets NaN or infinity.

    Raises what `Format.quantize` does for a weight that the format cannot store.
    """
    fmt.check_encodable(where)
    fmt.check_weight(w, where)
    parts = fmt.plain.empty_parts((w.shape[0], w.shape[1]), w.device, w.dtype)
    return w.detach().contiguous(), parts, torch.zeros((), dtype=torch.int32, device=w.device)


def noise_for(fmt: Format, w: Tensor, seed: int | None) -> Tensor | None:
    """The noise that eager draws, piece by piece: float32 [N, K], or None without a seed."""
    if seed is None:
        return None
    noise = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    for start, stop in fmt.row_ranges(w.shape[0], w.shape[1]):
        noise[start:stop] = uniform_noise((stop - start, w.shape[1]), seed, start, w.device)
    return noise


def finished(parts: Parts, flag: Tensor, w: Tensor, where: str) -> Parts:
    """The parts; `WeightError`, naming `where`, when the flag is set. Waits for the kernels."""
    if not flag.is_meta and bool(flag):
        check_finite(w, where)
    return parts


def stored(scale: Tensor) -> Tensor:
    """A scale as kernels write it, see `rounding.store_rounded`."""
    return scale.view(torch.int16) if scale.dtype == torch.bfloat16 else scale


def power_of_two(size: int) -> int:
    """The next power of two: what a block of that many values takes."""
    return 1 << max(0, size - 1).bit_length()


def converts(where: torch.device) -> bool:
    """Whether Triton rounds to float8 in one instruction: from Hopper on. For Ada, Triton 3.6 truncates on the way."""
    target = device.target_of(where)
    return target.kind == "cuda" and target.capability >= (9, 0)
