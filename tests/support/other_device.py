"""A stand-in for another device: tensors that say "meta", hold their values in plain memory and refuse to be mixed.

As on a GPU, an operation whose tensors are on two devices is an error, unless one is a scalar, an index, or it copies
from one to the other; `numpy` and raw pointers are not to be had. What it cannot show are kernels: code that picks one
by the device gets the eager one, which runs here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")  # of all devices the one that PyTorch neither sets up nor lacks a guard for
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}


class MixedDevicesError(RuntimeError):
    """An operation got tensors of two devices."""


class Elsewhere(Tensor):
    """A tensor on the stand-in; `inner` has its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:  # noqa: D102
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def numpy(self, **_: Any) -> Any:
        """Not from another device."""
        raise MixedDevicesError("numpy() of a tensor that is not on the CPU")

    def tolist(self) -> Any:
        """The values, which a GPU's tensor gives too."""
        return self.inner.tolist()

    def data_ptr(self) -> int:
        """Not of use to a kernel of the CPU."""
        raise MixedDevicesError("data_ptr() of a tensor on the stand-in")


class _Factories(TorchDispatchMode):
    """Makes what is asked for on the stand-in there, and copies to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Constants(TorchFunctionMode):
    """`torch.tensor` and `as_tensor` do not ask for an operation where the device is the stand-in's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_there(kwargs.get("device")):
            return Elsewhere(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the values, and its results on the device where they belong."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    here = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim()]
    if func in _INDEXED:  # indices may come from the CPU, what is indexed may not
        here = [x for x in here if x.dtype not in (torch.int64, torch.bool)]
    if there and here and func not in _COPIES:
        raise MixedDevicesError(f"{func}: of {len(there)} tensors on {DEVICE} and {len(here)} on the CPU")
    asked = kwargs.get("device")
    back = bool(there) if asked is None else _is_there(asked)
    if func is _aten.copy_.default:
        back = isinstance(args[0], Elsewhere)
    if func is _aten._local_scalar_dense.default:
        back = False
    known = {id(x.inner): x for x in there}
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, (args, kwargs))
    if _is_there(asked):
        inner_kwargs = {**inner_kwargs, "device": torch.device("cpu")}
    with torch._C.DisableTorchFunctionSubclass():
        found = func(*inner_args, **inner_kwargs)
    if not back:
        return found
    return tree_map(lambda x: known[id(x)] if id(x) in known else Elsewhere(x) if isinstance(x, Tensor) else x, found)


def elsewhere(x: Tensor) -> Elsewhere:
    """A copy of a tensor on the stand-in."""
    return Elsewhere(x.detach().clone())


@contextmanager
def other_device() -> Iterator[None]:
    """For the time of a with block, "meta" is the stand-in."""
    with _Constants(), _Factories():
        yield
