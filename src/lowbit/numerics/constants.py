"""Tensors that are always the same and made once: rotations, where searches begin."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, update_wrapper

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


class KeptTensor:
    """A function whose tensors are kept by its arguments, which must be hashable; nobody may write to them.

    They are made outside inference mode, so that autograd takes them later. Under a dispatch mode (`FakeTensorMode`,
    say) they are made anew and not kept: its tensors would outlive it, and it may refuse plain ones.
    """

    def __init__(self, make: Callable[..., Tensor], maxsize: int | None) -> None:
        self._make = make
        self._kept = lru_cache(maxsize)(make)
        update_wrapper(self, make)

    def __call__(self, *args: Hashable, **kwargs: Hashable) -> Tensor:
        """The tensor for these arguments."""
        with torch.inference_mode(False):
            if _get_current_dispatch_mode() is not None:
                return self._make(*args, **kwargs)
            return self._kept(*args, **kwargs)

    def cache_clear(self) -> None:
        """Forget all of them."""
        self._kept.cache_clear()


def kept(maxsize: int | None) -> Callable[[Callable[..., Tensor]], KeptTensor]:
    """Decorates a function as a `KeptTensor` of so many tensors, None for all."""
    return lambda make: KeptTensor(make, maxsize)
