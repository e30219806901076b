"""What every layout does with an op: the ones that move or copy codes, and the fallback.

An op is looked up here, then among the handlers of the layout; a composite op is taken apart; what is left runs on
dequantized tensors, which warns once an op and layout.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from lowbit.errors import LowbitError, PartsError, UnsupportedError
from lowbit.integrations.kitchen.tensor.base import get_layout_class, layout_handler
from lowbit.tensor.handlers import LowbitFallbackWarning

aten = torch.ops.aten
_GENERIC: dict[Any, Callable[..., Any]] = {}
_WARNED: set[tuple[str, str]] = set()


class LayoutMismatchError(LowbitError, TypeError):
    """A tensor was to be copied into a quantized one of another kind."""


def dequantize_args(args: Any) -> Any:
    """Arguments of any nesting with every quantized tensor dequantized."""
    return tree_map_only(_is_quantized, lambda tensor: tensor.dequantize(), args)


def run(kind: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """Run an aten op on arguments of which some are quantized tensors."""
    handler = _GENERIC.get(func)
    if handler is not None:
        return handler(args, kwargs)
    first = next((arg for arg in args if isinstance(arg, kind)), None)
    if first is None:  # in a list, or given by name
        first = next(leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, kind))
    layout: str = first.layout_name
    layout_op = layout_handler(func, get_layout_class(layout))
    if layout_op is not None:
        return layout_op(args[0] if args else None, args, kwargs)
    if func._can_decompose():  # noqa: SLF001  (no public way to ask; in inference mode nobody has decomposed it)
        return func.decompose(*args, **kwargs)
    return fall_back(func, layout, args, kwargs)


def fall_back(func: Any, layout: str, args: Any, kwargs: Any) -> Any:
    """Run an op on dequantized tensors. Raises `UnsupportedError` where it would write into a quantized one."""
    for index, argument in enumerate(func._schema.arguments):
        written = argument.alias_info is not None and argument.alias_info.is_write
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        if written and _is_quantized(value):
            raise UnsupportedError(f"{func} would write into {value!r}; dequantize() it, or use requantize_from_float")
    if (str(func), layout) not in _WARNED:
        _WARNED.add((str(func), layout))
        message = f"{func} has no low-bit implementation for {layout}: the whole tensor is dequantized at each call"
        warnings.warn(message, LowbitFallbackWarning, stacklevel=4)
    return func(*dequantize_args(args), **dequantize_args(kwargs))


def _is_quantized(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "layout_name") and hasattr(value, "qdata")


def _generic(*overloads: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(handler: Callable[..., Any]) -> Callable[..., Any]:
        _GENERIC.update(dict.fromkeys(overloads, handler))
        return handler

    return add


@_generic(aten.detach.default, aten.alias.default)
def _alias(args: Any, kwargs: Any) -> Any:
    """The same memory, scales included."""
    return args[0].copy_with(qdata=args[0].qdata.detach(), clone_params=False)


@_generic(aten.clone.default)
def _clone(args: Any, kwargs: Any) -> Any:
    return args[0].copy_with(qdata=args[0].qdata.clone())


@_generic(aten.to.dtype, aten.to.dtype_layout)
def _to(args: Any, kwargs: Any) -> Any:
    device, dtype = _target(args, kwargs)
    tensor = args[0]
    same = device in (None, tensor.qdata.device) and dtype in (None, tensor.params.orig_dtype)
    return tensor if same and not kwargs.get("copy") else _moved(tensor, device, dtype)


@_generic(aten._to_copy.default)
def _to_copy(args: Any, kwargs: Any) -> Any:
    return _moved(args[0], *_target(args, kwargs))


def _target(args: Any, kwargs: Any) -> tuple[torch.device | None, torch.dtype | None]:
    dtype = kwargs.get("dtype") or next((arg for arg in args[1:] if isinstance(arg, torch.dtype)), None)
    device = kwargs.get("device") or next((arg for arg in args[1:] if isinstance(arg, torch.device)), None)
    return None if device is None else torch.device(device), dtype


def _moved(tensor: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """A copy on a device; a dtype changes only what the tensor is said to have been."""
    if device is None or device == tensor.qdata.device:
        qdata, params = tensor.qdata.clone(), tensor.params.clone()
    else:
        qdata, params = tensor.qdata.to(device=device), tensor.params.to_device(device)
    params = params if dtype is None else dataclasses.replace(params, orig_dtype=dtype)
    return tensor.copy_with(qdata=qdata, params=params)


@_generic(aten.contiguous.default)
def _contiguous(args: Any, kwargs: Any) -> Any:
    qdata = args[0].qdata
    return args[0] if qdata.is_contiguous() else args[0].copy_with(qdata=qdata.contiguous())


@_generic(aten.is_contiguous.default)
def _is_contiguous(args: Any, kwargs: Any) -> Any:
    return args[0].qdata.is_contiguous()


@_generic(aten.copy_.default)
def _copy(args: Any, kwargs: Any) -> Any:
    """Codes and parameters into those of a tensor of the same layout, or values into a plain tensor."""
    target, source = args[0], args[1]
    if not _is_quantized(target):
        return target.copy_(source.dequantize(), *args[2:], **kwargs)
    if not _is_quantized(source):
        raise LayoutMismatchError(
            f"Cannot copy {type(source).__name__} to QuantizedTensor; quantize it first, with requantize_from_float"
        )
    if target.layout_name != source.layout_name:
        raise LayoutMismatchError(f"Layout mismatch: {target.layout_name} vs {source.layout_name}")
    if target.shape != source.shape or target.qdata.shape != source.qdata.shape:
        raise PartsError(f"copy_: {source!r} does not have the shape of {target!r}")
    non_blocking = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking", False))
    taken = target.params
    names = taken._tensor_fields()  # noqa: SLF001  (comfy_kitchen's name of a method that layouts override)
    for name in names:
        getattr(taken, name).copy_(getattr(source.params, name), non_blocking=non_blocking)
    target.qdata.copy_(source.qdata, non_blocking=non_blocking)
    tensors = {name: getattr(taken, name) for name in names}
    target.params = dataclasses.replace(source.params, orig_dtype=taken.orig_dtype, **tensors)
    return target


@_generic(aten.empty_like.default)
def _empty_like(args: Any, kwargs: Any) -> Any:
    """Codes of the same kind, uninitialised, with copies of the parameters."""
    tensor, device, dtype = args[0], kwargs.get("device"), kwargs.get("dtype")
    params = tensor.params.clone() if device is None else tensor.params.to_device(torch.device(device)).clone()
    params = params if dtype is None else dataclasses.replace(params, orig_dtype=dtype)
    return tensor.copy_with(qdata=torch.empty_like(tensor.qdata, device=device), params=params)


@_generic(aten._has_compatible_shallow_copy_type.default)  # noqa: SLF001  (an aten op)
def _compatible(args: Any, kwargs: Any) -> Any:
    return True
