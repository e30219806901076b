"""Whether CUDA kernels run on a GPU at all: one that does nothing is compiled, loaded and started there, once.

So a driver that is too old for the compiler's code, or a GPU that the compiler does not know, is a refusal before the
first real launch, and the next backend runs. `refuses` of every launcher asks `usable`; where no GPU of the machine can
be used, `check` takes the whole backend away, so that no weight is packed for it either.
"""

from __future__ import annotations

from contextvars import Context

import torch

from lowbit.backends.cuda import compiler, kernels
from lowbit.backends.gpu import assumed, target_of

SOURCE, NAME = "device_check.cu", "lowbit::nothing"
_OLDEST = (7, 5)  # the first that the compiler knows
_CAPTURING = "the GPU has not run a CUDA kernel yet, and a graph is being captured: call once before"

_found: dict[torch.device, str | None] = {}


def usable(device: torch.device) -> str | None:
    """Why no CUDA kernel can run on this device, in words, or None. Free after the first call for a GPU.

    Of what is no GPU (the meta device), and of one that is assumed, nothing can be said: None.
    """
    if _found.get(device, _CAPTURING) is None:  # the usual case first: asking a device for its type costs more
        return None
    if device.type != "cuda" or assumed() is not None:
        return None
    return _found[device] if device in _found else _look(device)


def refuses(device: torch.device, oldest: tuple[int, int] = _OLDEST) -> str | None:
    """Why a kernel for GPUs from this compute capability on cannot run on a device, or None."""
    target = target_of(device)
    if target.kind != "cuda":
        return "the GPU is not one of NVIDIA's"
    if target.capability < oldest:
        have, need = (".".join(map(str, pair)) for pair in (target.capability, oldest))
        return f"the GPU has compute capability {have}; the kernel needs {need} or later"
    return usable(device)


def check() -> None:
    """Raise `ImportError`, with the reason, where there are GPUs and CUDA kernels run on none of them."""
    if not torch.cuda.is_available():
        return
    first = torch.cuda.current_device()
    others = [index for index in range(torch.cuda.device_count()) if index != first]
    reasons = []
    for device in (torch.device("cuda", index) for index in (first, *others)):
        why = usable(device)
        if why is None or device not in _found:
            return
        reasons.append(f"{device}: {why}")
    raise ImportError("; ".join(reasons))


def _look(device: torch.device) -> str | None:
    if torch.cuda.is_current_stream_capturing():
        return _CAPTURING
    why = _found[device] = _try(device)
    return why


def _try(device: torch.device) -> str | None:
    target = target_of(device)
    if target.kind != "cuda":
        return "the GPU is not one of NVIDIA's"
    if target.capability < _OLDEST:
        have, need = (".".join(map(str, pair)) for pair in (target.capability, _OLDEST))
        return f"the GPU has compute capability {have}; CUDA kernels need {need} or later"
    try:
        # In a context of its own: within `kernels.record()` it is to be run all the same.
        Context().run(kernels.launch, SOURCE, NAME, device, 1, 32, ())
    except Exception as error:  # noqa: BLE001  (cuda.bindings raises kinds of its own, by its version)
        said = " ".join(str(error).split()) or type(error).__name__
        return f"CUDA kernels do not run on {torch.cuda.get_device_name(device)}: {said}. {_remedy()}"
    return None


def _remedy() -> str:
    """What to do, from the versions of the driver and of the compiler."""
    try:
        driver, nvrtc = compiler.driver_version(), compiler.nvrtc_version()
    except Exception as error:  # noqa: BLE001  (the same)
        return f"{error}; {compiler.INSTALL}"
    versions = f"The driver is for CUDA {driver}, the compiler is of CUDA {nvrtc}"
    if [int(part) for part in driver.split(".")] < [int(part) for part in nvrtc.split(".")]:
        return f"{versions}: update the driver to one for CUDA {nvrtc}, or install an nvidia-cuda-nvrtc of the driver's"
    return f"{versions}: update nvidia-cuda-nvrtc and cuda-bindings, and report this if it stays"
