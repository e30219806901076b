"""Whether Hopper's own instructions do on a GPU what the kernels that use them take them to do: tried once, by a sum.

These kernels are written from the documents of the instructions, and tested by simulating those. A descriptor that was
misread would not fail but give wrong numbers, so the first call on a device compares a small product with plain loops.
"""

from __future__ import annotations

from contextvars import Context

import torch
from torch import Tensor

from lowbit.backends.cuda import device_check, kernels
from lowbit.backends.gpu import assumed, target_of

ARCHITECTURE = "sm_90a"
SOURCE, NAME = "hopper_check.cu", "lowbit::hopper_products"
THREADS, TOKENS, COLUMNS = 128, 32, 64
SHARED = 3 * TOKENS * COLUMNS + 8
_CAPABILITY = (9, 0)
_PIECE = 16  # bytes that the swizzle moves

_WRONG = "{} sums of a product that was tried on this GPU were wrong; please report it with `lowbit doctor`"
_found: dict[torch.device, str | None] = {}


def is_hopper(device: torch.device) -> bool:
    """Whether these instructions are the device's own."""
    return target_of(device).capability == _CAPABILITY


def refuses(device: torch.device) -> str | None:
    """Why no kernel of Hopper's own instructions can run on a device, or None. Free after the first call for a GPU."""
    if _found.get(device, "") is None and assumed() is None:  # the usual case first: the rest costs more
        return None
    if not is_hopper(device):
        return "the GPU is not of compute capability 9.0, whose products the kernel uses"
    if why := device_check.refuses(device, _CAPABILITY):
        return why
    if device.type != "cuda" or assumed() is not None:
        return None
    if device not in _found:
        if torch.cuda.is_current_stream_capturing():
            return "its products were not tried on this GPU yet, and a graph is being captured: call once before"
        try:
            wrong = Context().run(wrong_sums, device)  # in a context of its own: within `kernels.record()` it runs, too
        except Exception as error:  # noqa: BLE001  (such as too little memory: the next call tries again)
            return f"its products cannot be tried on this GPU: {' '.join(str(error).split())}"
        _found[device] = _WRONG.format(wrong) if wrong else None
    return _found[device]


def tile() -> Tensor:
    """Operand B as int8 [32, 64], its pieces of 16 bytes swizzled as the kernel reads them."""
    token, column = torch.arange(TOKENS).unsqueeze(1), torch.arange(COLUMNS)
    values = ((5 * token + 3 * column) % 19 - 9).to(torch.int8)
    pieces = values.view(TOKENS, COLUMNS // _PIECE, _PIECE)
    order = torch.arange(COLUMNS // _PIECE) ^ (token // 2) % (COLUMNS // _PIECE)  # its own inverse
    return pieces.gather(1, order.unsqueeze(2).expand_as(pieces)).reshape(TOKENS, COLUMNS)


def wrong_sums(device: torch.device) -> int:
    """How many of the sums are wrong. Waits for the GPU."""
    counts = torch.full((THREADS,), -1, dtype=torch.int32, device=device)
    kernels.launch(SOURCE, NAME, device, 1, THREADS, [tile().to(device), counts], SHARED)
    return int(counts.abs().sum())
