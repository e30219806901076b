"""A stand-in for another device: tensors that hold their values in plain memory and refuse to be mixed with the CPU's.

As on a GPU, an operation whose tensors are on two devices is an error, unless one is a scalar, an index, or it copies
from one to the other; `numpy` is not to be had, addresses are of no use, and what CUDA has no kernel for is refused:
products of integers, and `_int_mm` of sizes that cuBLAS does not take. A quotient by a number, or by a scalar of the
CPU, is the product with its inverse, as on CUDA, and so rounded twice. The implementations of lowbit's own operations
run on these tensors, too, not on their values. What it cannot show are kernels: code that picks one by the device gets
the eager one, which runs here.

The device is the one that PyTorch leaves to others. It has needed no C++ since 2.10; tests of an older one skip.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("privateuseone", 0)
_NOWHERE = 1 << 62  # added to addresses: whoever reads them crashes, as on the addresses of a GPU
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.addmm_.default, _aten.bmm.default, _aten.mv.default}
_PRODUCTS |= {_aten.baddbmm.default, _aten.addmv.default, _aten.dot.default, _aten.addmm.out, _aten.mm.out}
_DIVISIONS = {_aten.div.Tensor: _aten.mul.Tensor, _aten.div_.Tensor: _aten.mul_.Tensor}
_MADE = (
    "empty.memory_format",
    "empty_strided",
    "arange",
    "arange.start",
    "arange.start_step",
    "eye",
    "eye.m",
    "randperm",
)


class MixedDevicesError(RuntimeError):
    """An operation got tensors of two devices, or what the other device does not offer."""


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
        return run(func, types, args, kwargs or {})

    def numpy(self, **_: Any) -> Any:
        """Not from another device."""
        raise MixedDevicesError("numpy() of a tensor that is not on the CPU")

    def tolist(self) -> Any:
        """The values, which a GPU's tensor gives too."""
        return self.inner.tolist()

    def data_ptr(self) -> int:
        """An address that is as well aligned, and that nobody here may read."""
        return self.inner.data_ptr() and self.inner.data_ptr() + _NOWHERE

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = parameter(self) if isinstance(self, nn.Parameter) else elsewhere(self.inner)
        return memo[id(self)]


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def run(func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the values, and its results on the device where they belong."""
    if not all(kind in (Tensor, nn.Parameter, Elsewhere) for kind in types):
        return NotImplemented  # of another subclass, whose parts may be on the stand-in
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    if func.namespace == "lowbit" and there:
        kernel = torch.library.get_kernel(func, "CPU")  # the same for all devices
        return kernel.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
    if func._can_decompose():  # below autograd nobody has taken it apart yet
        return func.decompose(*args, **kwargs)
    asked = kwargs.get("device")
    _refuse(func, tensors, args, kwargs)
    back = bool(there) if asked is None else _is_there(asked)
    if func is _aten.copy_.default:
        back = isinstance(args[0], Elsewhere)
    if func is _aten._local_scalar_dense.default:
        back = False
    if there and (product := _DIVISIONS.get(func)) and (divisor := _number(args[1])) is not None:
        func, args = product, (args[0], (1.0 / torch.tensor(divisor, dtype=args[0].dtype)).item())
    known = {id(x.inner): x for x in there}
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, (args, kwargs))
    if _is_there(asked):
        inner_kwargs = {**inner_kwargs, "device": torch.device("cpu")}
    with torch._C.DisableTorchFunctionSubclass():
        found = func(*inner_args, **inner_kwargs)
    if not back:
        return found
    return tree_map(lambda x: known[id(x)] if id(x) in known else Elsewhere(x) if isinstance(x, Tensor) else x, found)


def _number(x: Any) -> float | None:
    """The value of a number or of a scalar of the CPU; None for a tensor of the stand-in."""
    if isinstance(x, Tensor):
        return None if isinstance(x, Elsewhere) or x.dim() else float(x)
    return float(x)


def _refuse(func: Any, tensors: list[Tensor], args: Any, kwargs: dict[str, Any]) -> None:
    """Raise `MixedDevicesError` for what a GPU refuses."""
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    here = [x for x in tensors if not isinstance(x, Elsewhere)]
    generator = kwargs.get("generator")
    if generator is not None and (there or _is_there(kwargs.get("device"))) and not _is_there(generator.device):
        raise MixedDevicesError(f"{func}: a generator of {generator.device} for numbers on {DEVICE}")
    if not there or func in _COPIES:
        return
    written = [x for x in _written(func, args, kwargs) if not isinstance(x, Elsewhere)]
    mixed = [x for x in here if x.dim()]
    if func in _INDEXED:  # indices may come from the CPU; what is indexed and what is put there may not
        mixed = [x for x in (args[0], *args[2:3]) if isinstance(x, Tensor) and not isinstance(x, Elsewhere) and x.dim()]
    if mixed or written:
        raise MixedDevicesError(f"{func}: of {len(there)} tensors on {DEVICE} and {len(here)} on the CPU")
    if func in _PRODUCTS and not there[0].dtype.is_floating_point:
        raise MixedDevicesError(f"{func}: a GPU has no matrix products of {there[0].dtype}")
    if func is _aten._int_mm.default:
        (m, k), n = there[0].shape, there[1].shape[1]
        if m <= 16 or k % 8 or n % 8:
            raise MixedDevicesError(f"{func}: cuBLAS does not take [{m}, {k}] times [{k}, {n}]")


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes into."""
    found: list[Any] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[index] if index < len(args) else kwargs.get(argument.name))
    return [x for x in tree_flatten(found)[0] if isinstance(x, Tensor)]


def elsewhere(x: Tensor) -> Elsewhere:
    """A copy of a tensor on the stand-in."""
    return Elsewhere((x.inner if isinstance(x, Elsewhere) else x).detach().clone())


def parameter(x: Tensor) -> nn.Parameter:
    """A copy of a parameter on the stand-in."""
    return nn.Parameter(elsewhere(x), requires_grad=x.requires_grad)


def there(x: Any) -> Any:
    """Copies of all tensors in lists and dictionaries on the stand-in."""
    return tree_map(lambda leaf: elsewhere(leaf) if isinstance(leaf, Tensor) else leaf, x)


def moved(module: nn.Module) -> nn.Module:
    """A module with its plain parameters and buffers on the stand-in, in place; what was shared stays shared."""
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, weight in list(owner.named_parameters(recurse=False)):
            known = made.setdefault(id(weight), parameter(weight))
            made[id(known)] = known
            owner.register_parameter(name, known)
        for name, buffer in list(owner.named_buffers(recurse=False)):
            owner.register_buffer(name, elsewhere(buffer), persistent=name not in owner._non_persistent_buffers_set)
    return module


def back(x: Any) -> Any:
    """The values of tensors on the stand-in; fails for a tensor that is not."""
    assert isinstance(x, Elsewhere), f"{type(x).__name__} on {getattr(x, 'device', 'no device')}"
    return x.inner


class _Hooks(torch._C._acc.PrivateUse1Hooks if hasattr(torch._C, "_acc") else object):  # type: ignore[misc]
    """What PyTorch asks of a device's own code. Other tests find no accelerator: it is there in `other_device` only."""

    used = 0

    def is_available(self) -> bool:
        return bool(self.used)

    def is_built(self) -> bool:
        return True

    def has_primary_context(self, index: int) -> bool:
        return True


class _Guard(torch._C._acc.DeviceGuard if hasattr(torch._C, "_acc") else object):  # type: ignore[misc]
    """Switches to nothing."""

    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


class _Module:
    """`torch.privateuseone`, which is asked before a tensor is made."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return bool(_Hooks.used)

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass


def _maker(name: str) -> Any:
    """An operation that makes a tensor without being given one. PyTorch makes all others of these and of copies."""
    packet, _, overload = name.partition(".")
    op = getattr(getattr(_aten, packet), overload or "default")

    def make(*args: Any, **kwargs: Any) -> Elsewhere:
        if kwargs.get("generator") is not None:
            raise MixedDevicesError(f"{op}: a generator of the CPU for numbers on {DEVICE}")
        return Elsewhere(op(*args, **{**kwargs, "device": torch.device("cpu"), "pin_memory": False}))

    return make


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """The copy between devices that `torch.tensor` makes beside the subclass."""
    mine, other = (x.inner if isinstance(x, Elsewhere) else x for x in (target, source))
    mine.copy_(other)
    return target


def _set_up() -> bool:
    """Once in a process; whether this PyTorch can."""
    known = hasattr(torch._C, "_acc") and hasattr(torch.library, "get_kernel")
    if known and not _KEPT:
        _KEPT.extend([_Hooks(), _Guard()])
        torch._register_device_module(DEVICE.type, _Module())
        torch.utils.rename_privateuse1_backend(DEVICE.type)  # to its own name: makes autograd ask the hooks
        torch._C._acc.register_python_privateuseone_hook(_KEPT[0])
        torch._C._acc.register_python_privateuseone_device_guard(_KEPT[1])
        library = torch.library.Library("aten", "IMPL")
        for name in _MADE:
            library.impl(name, _maker(name), "PrivateUse1")
        library.impl("_copy_from", _copy_from, "PrivateUse1")  # which constants come by
        _KEPT.append(library)
    return known


_KEPT: list[Any] = []
needs_stand_in = pytest.mark.skipif(not _set_up(), reason="this PyTorch leaves no device to Python")


@contextmanager
def other_device() -> Iterator[None]:
    """For the time of a with block, PyTorch takes the stand-in for a device that is there, as gradients need it."""
    _Hooks.used += 1
    try:
        yield
    finally:
        _Hooks.used -= 1
