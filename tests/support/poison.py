"""Fill the memory that torch.empty and its kin return, so that a value nobody wrote fails its test.

Floating dtypes get NaN (for the 8-bit ones that means 0x7f, 0x80 or 0xff, whichever is theirs), integers get bytes of
0xA5, booleans get True. Only plain tensors are filled: a wrapper subclass such as QuantizedTensor holds plain tensors,
and those were filled when they were made. Inside torch.compile the real functions are traced, because the compiler must
see what users' programs contain; calls from C++ do not pass through these Python names and are not changed either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch

# The compiler learns the names of torch's functions once, when it is imported, and keeps a set of tensor constructors
# from the first use of a device context. Both must see the real functions, so both happen here, before any is replaced.
import torch._dynamo
from torch import Tensor

with torch.device("cpu"):
    torch.empty(0)

POISON_BYTE = 0xA5


def _integer_poison(dtype: torch.dtype) -> int:
    pattern = bytes([POISON_BYTE]) * dtype.itemsize
    return int.from_bytes(pattern, "little", signed=dtype.is_signed)


INTEGER_POISON = {
    dtype: _integer_poison(dtype)
    for dtype in (
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
    )
}
"""The value that an unwritten element of an integer tensor has in tests."""


def poison(t: Tensor) -> Tensor:
    """Overwrite all of a plain, allocated, strided tensor with the poison of its dtype; leave any other alone."""
    if type(t) is not Tensor or t.layout is not torch.strided or t.is_nested or t.is_meta or not t.numel():
        return t
    with torch.no_grad():
        if t.dtype == torch.bool:
            t.fill_(True)
        elif t.dtype in INTEGER_POISON:
            t.fill_(INTEGER_POISON[t.dtype])
        elif t.dtype.is_complex or (t.dtype.is_floating_point and t.dtype != torch.float4_e2m1fn_x2):
            t.fill_(float("nan"))
        elif t.dtype == torch.float4_e2m1fn_x2:  # has no NaN and no fill_
            t.view(torch.uint8).fill_(POISON_BYTE)
    return t


def _poisoned(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(real)
    def wrapper(*args: object, **kwargs: object) -> Tensor:
        out = real(*args, **kwargs)
        return out if torch.compiler.is_compiling() else poison(out)

    return wrapper


_REPLACEMENTS = [
    (owner, name, getattr(owner, name), _poisoned(getattr(owner, name)))
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
        (Tensor, ("new_empty", "new_empty_strided")),
    )
    for name in names
]


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Replace the functions for the time of a with block."""
    for owner, name, _, wrapper in _REPLACEMENTS:
        setattr(owner, name, wrapper)
    try:
        yield
    finally:
        for owner, name, real, _ in _REPLACEMENTS:
            if owner is Tensor:
                delattr(owner, name)  # the real one is inherited
            else:
                setattr(owner, name, real)
