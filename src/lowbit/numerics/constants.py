"""Tensors that are always the same and made once: rotations, where searches begin."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, update_wrapper

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .cuda_graphs import made_apart


class KeptTensor:
    """A function whose tensors are kept by its arguments, which must be hashable; nobody may write to them.

    Those that are kept for good may be read by CUDA graphs, and are no part of the one that needs them first.

    They are made outside inference mode, so that autograd takes them later. Under a dispatch mode (`FakeTensorMode`,
    say) they are made anew and not kept: its tensors would outlive it, and it may refuse plain ones.
    """

    def __init__(self, make: Callable[..., Tensor], maxsize: int | None) -> None:
        self._make, self._for_good = make, maxsize is None
        self._kept = lru_cache(maxsize)(self._made)
        update_wrapper(self, make)

    def __call__(self, *args: Hashable, **kwargs: Hashable) -> Tensor:
        """The tensor for these arguments."""
        with torch.inference_mode(False):
            if _get_current_dispatch_mode() is not None:
                return self._make(*args, **kwargs)
            return self._kept(*args, **kwargs)

    def _made(self, *args: Hashable, **kwargs: Hashable) -> Tensor:
        where = next((x for x in args if isinstance(x, torch.device) and x.type == "cuda"), None)
        if where is None or not self._for_good or torch.compiler.is_compiling():
            return self._make(*args, **kwargs)
        return made_apart(lambda: self._make(*args, **kwargs), where)

    def cache_clear(self) -> None:
        """Forget all of them."""
        self._kept.cache_clear()


def kept(maxsize: int | None) -> Callable[[Callable[..., Tensor]], KeptTensor]:
    """Decorates a function as a `KeptTensor` of so many tensors, None for all."""
    return lambda make: KeptTensor(make, maxsize)
