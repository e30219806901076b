"""What every launcher asks before it runs: whether Triton can compile for this device, and for these dtypes.

On a CPU the kernels run in Triton's interpreter, for testing, when TRITON_INTERPRET=1 is set before Python starts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit.backends import gpu
from lowbit.backends.gpu import Target, assume

__all__ = [
    "DTYPES", "INTERPRETED", "Target", "assume", "capturing", "on", "refuses", "refuses_product", "target_of",
    "tensor_memory",
]  # fmt: skip

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (7, 5)  # the first with integer tensor cores
_FIRST_WITH_BFLOAT16 = (8, 0)
_TENSOR_MEMORY = (10, 11)  # major compute capabilities


def target_of(device: torch.device) -> Target:
    """The target of a device: in the interpreter that, whatever the device, unless one is assumed."""
    return Target("interpreter") if INTERPRETED and gpu.assumed() is None else gpu.target_of(device)


def tensor_memory(target: Target) -> bool:
    """Whether products of 64 rows and more go through tensor memory, whose 512 columns hold all sums of a program."""
    return target.kind == "cuda" and target.capability[0] in _TENSOR_MEMORY


def refuses(x: Tensor, **others: Tensor | None) -> str | None:
    """Why no kernel here takes x and these other tensors, or None: their devices, the GPU's age, their dtypes."""
    target = target_of(x.device)
    if target.kind == "cuda" and target.capability < _OLDEST:
        have, need = (".".join(map(str, pair)) for pair in (target.capability, _OLDEST))
        return f"the GPU has compute capability {have}; Triton's tensor-core code needs {need} or later"
    for name, tensor in {"x": x, **others}.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}; move one of them"
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and (why := _refuses_dtype(target, name, tensor)):
            return why
    return None


def refuses_product(x: Tensor, **others: Tensor | None) -> str | None:
    """Why no product of x [..., K] runs here, or None: what `refuses` says, and no columns.

    Of rows without elements no shape tells how many there are, and no tile holds any: eager gives the bias, or zeros.
    """
    return refuses(x, **others) or (None if x.shape[-1] else "no columns; there is nothing to multiply")


def _refuses_dtype(target: Target, name: str, tensor: Tensor) -> str | None:
    if tensor.dtype not in DTYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
        return f"{name} is {kind}; the kernels take float32, bfloat16 and float16"
    if tensor.dtype == torch.bfloat16:
        if target.kind == "interpreter" and name == "x":
            return f"{name} is bfloat16, which Triton's interpreter rounds wrongly; test with float16 or float32"
        if target.kind == "cuda" and target.capability < _FIRST_WITH_BFLOAT16:
            return f"{name} is bfloat16, which this GPU does not multiply; use float16"
    return None


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device: make it that of the tensors."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        yield
    else:
        with torch.cuda.device(device):
            yield


def capturing(device: torch.device) -> bool:
    """Whether what is launched on a device goes into a CUDA graph instead of running."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
