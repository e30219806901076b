"""Who handles an operation on a QuantizedTensor, and what happens where nobody does: the visible fallback."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.ops.generic import FALLBACKS as _FALLBACKS

Handler = Callable[..., Any]

ATEN: dict[Any, Handler] = {}  # aten overload -> handler(func, args, kwargs); filled by tensor_ops
TORCH: dict[Any, Handler] = {}  # torch function -> handler(*args, **kwargs), the short way in eager mode


class LowbitFallbackWarning(UserWarning):
    """An op without a handler dequantized a whole quantized weight."""


def fallbacks() -> dict[str, int]:
    """How often each op dequantized a weight, since the program started, because it has no handler.

    Also counted: weights that were unpacked for one call, because no kernel could take it in the weight's layout.
    """
    return dict(_FALLBACKS)


def implements(*overloads: Any, table: dict[Any, Handler] = ATEN) -> Callable[[Handler], Handler]:
    """Register a handler(func, args, kwargs) for aten overloads; NotImplemented means: dequantize."""

    def add(handler: Handler) -> Handler:
        table.update(dict.fromkeys(overloads, handler))
        return handler

    return add


def shortcut(*functions: Any) -> Callable[[Handler], Handler]:
    """Register a handler(*args, **kwargs) for torch functions in eager mode; NotImplemented takes the aten way."""

    def add(handler: Handler) -> Handler:
        TORCH.update(dict.fromkeys(functions, handler))
        return handler

    return add


def run(kind: type, func: Any, args: Any, kwargs: Any, table: dict[Any, Handler] = ATEN) -> Any:
    """Run an aten op on tensors of `kind`: by its handler, by the ops it is made of, or on dequantized weights."""
    handler = table.get(func)
    if handler is not None:
        result = handler(func, args, kwargs)
        if result is not NotImplemented:
            return result
    if _is_composite(func):  # in inference mode and inside handlers nobody has taken it apart yet
        return func.decompose(*args, **kwargs)
    return _dequantize_and_run(kind, func, args, kwargs)


def refuse_storage(self: Tensor) -> NoReturn:
    """Their `storage`: several tensors have no single one.

    Nobody asks for it but safetensors, and through it every `save_pretrained`, which would else end in torch's "invalid
    python storage". No `NotImplementedError`: safetensors takes that for a tensor without values.
    """
    raise CheckpointError(
        f"{self!r}: is several tensors, which safetensors and save_pretrained cannot write as one; write the module "
        "with lowbit.save(module, 'model.safetensors') and read it with lowbit.load(module, 'model.safetensors'), or "
        "let from_pretrained quantize it (lowbit.integrations.transformers, .diffusers) and call save_pretrained"
    ) from None


def _is_composite(func: Any) -> bool:
    return bool(func._can_decompose())  # noqa: SLF001  (there is no public way to ask)


def _dequantize_and_run(kind: type, func: Any, args: Any, kwargs: Any) -> Any:
    name = str(func)
    for value in _written(func, args, kwargs):
        if isinstance(value, kind):
            raise UnsupportedError(
                f"{name} would write into {value!r}; use QuantizedTensor.merge for an update, or dequantize() first"
            )
    if name not in _FALLBACKS:
        message = f"{name} has no low-bit implementation: the whole weight is dequantized at each call"
        warnings.warn(message, LowbitFallbackWarning, stacklevel=5)
    _FALLBACKS[name] += 1
    with _as_view_source() if _is_view(func) else contextlib.nullcontext():
        args, kwargs = tree_map_only(kind, lambda tensor: tensor.dequantize(), (args, kwargs))
        return func(*args, **kwargs)


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments of a call that the op writes into."""
    found: list[Any] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += value if isinstance(value, list | tuple) else [value]
    return found


def _is_view(func: Any) -> bool:
    return any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)


@contextlib.contextmanager
def _as_view_source() -> Any:
    """Results as ordinary tensors even in inference mode: autograd takes them for views of the ordinary weight."""
    with torch.inference_mode(mode=False), torch.no_grad():
        yield
