"""What a layout is: how a class of weights is stored, by name, with its parameters as a frozen dataclass.

A program may register its own: a `QuantizedLayout` subclass with a `Params` dataclass, under a name, and handlers for
the aten ops it understands. Handlers are looked up along the class's bases, so a subclass inherits them.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.errors import UnknownFormatError

if TYPE_CHECKING:
    from lowbit.integrations.kitchen.tensor.quantized import QuantizedTensor

LAYOUTS: dict[str, type[Any]] = {}
LAYOUT_OPS: dict[Any, dict[type[Any], Callable[..., Any]]] = {}


def register_layout_class(name: str, cls: type[Any]) -> None:
    """Make a layout known by a name; a later one of that name takes its place."""
    LAYOUTS[name] = cls


def get_layout_class(name: str) -> Any:
    """The layout of that name. Raises `UnknownFormatError`, a KeyError, that lists the known ones."""
    try:
        return LAYOUTS[name]
    except (KeyError, TypeError):
        raise UnknownFormatError(name, LAYOUTS, "the layouts of QuantizedTensor") from None


def register_layout_op(torch_op: Any, layout_cls: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `handler(first_argument, args, kwargs)` is what an aten overload does on tensors of a layout."""

    def add(handler: Callable[..., Any]) -> Callable[..., Any]:
        LAYOUT_OPS.setdefault(torch_op, {})[layout_cls] = handler
        return handler

    return add


def layout_handler(torch_op: Any, layout_cls: type[Any]) -> Callable[..., Any] | None:
    """The handler of an aten overload for a layout or the nearest of its bases."""
    handlers = LAYOUT_OPS.get(torch_op, {})
    return next((handlers[base] for base in layout_cls.__mro__ if base in handlers), None)


@lru_cache(maxsize=1)
def get_cuda_capability() -> tuple[int, int] | None:
    """(major, minor) of the current CUDA device, or None; asked once."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


@dataclass(frozen=True)
class BaseLayoutParams:
    """The parameters that all layouts have: the scale, and what the tensor looked like before."""

    scale: Tensor
    orig_dtype: torch.dtype
    orig_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        self._validate_tensor_fields()

    def _validate_tensor_fields(self) -> None:
        """Check or convert tensors of a new instance; a subclass may."""

    def _tensor_fields(self) -> list[str]:
        """The names of the fields that hold tensors now."""
        return [field.name for field in dataclasses.fields(self) if isinstance(getattr(self, field.name), Tensor)]

    def to_device(self, device: torch.device) -> Any:
        """These parameters with all tensors on a device."""
        return self._mapped(lambda tensor: tensor.to(device=device))

    def clone(self) -> Any:
        """These parameters with all tensors copied."""
        return self._mapped(torch.clone)

    def copy_from(self, src: Any, non_blocking: bool = False) -> None:
        """Take over the values of another instance of this class, its tensors into the memory of these."""
        tensors = self._tensor_fields()
        for field in dataclasses.fields(self):
            value = getattr(src, field.name)
            if field.name in tensors:
                getattr(self, field.name).copy_(value, non_blocking=non_blocking)
            else:
                object.__setattr__(self, field.name, value)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Any:
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in self._tensor_fields()}
        return dataclasses.replace(self, **changed)


class QuantizedLayout(ABC):
    """How one class of weights is stored. Never instantiated: all methods are class methods."""

    Params: type[Any]
    MIN_SM_VERSION: tuple[int, int] | None = None
    """The first CUDA generation whose tensor cores multiply this layout; None: any."""

    @classmethod
    @abstractmethod
    def quantize(cls, tensor: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        """The codes and parameters of a float tensor."""
        raise NotImplementedError

    @classmethod
    @abstractmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        """The float tensor that codes and parameters mean, with its padding where the storage has any."""
        raise NotImplementedError

    @classmethod
    @abstractmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        """The codes and the tensors that a product with them needs."""
        raise NotImplementedError

    @classmethod
    @abstractmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
        """What is saved, by the suffix of its key."""
        raise NotImplementedError

    @classmethod
    def unpacked_shape(cls, qtensor: QuantizedTensor) -> tuple[int, ...]:
        """The shape of what the codes unpack to: by `get_logical_shape_from_storage` where the layout has it."""
        unpack = getattr(cls, "get_logical_shape_from_storage", None)
        return qtensor.storage_shape if unpack is None else unpack(qtensor.storage_shape)

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """The options of `quantize` that make another tensor like this one."""
        return {}

    @classmethod
    def linear_input_act(
        cls,
        weight: QuantizedTensor,
        x: Tensor,
        bias: Tensor | None = None,
        input_act: str | None = None,
        input_act_weight: Tensor | None = None,
        input_act_eps: float = 0.0,
        residual: Tensor | None = None,
        residual_scale: Tensor | None = None,
    ) -> Any:
        """linear(act(x)) and a residual in one call, or NotImplemented."""
        return NotImplemented

    @classmethod
    def optimize_for_gemv(cls, weight: QuantizedTensor, storage: Tensor) -> QuantizedTensor:
        """The weight as it is: no layout is rearranged in place."""
        return weight

    @classmethod
    def supports_fast_matmul(cls) -> bool:
        """Whether the current CUDA device has tensor cores for this layout."""
        if cls.MIN_SM_VERSION is None:
            return True
        capability = get_cuda_capability()
        return capability is not None and capability >= cls.MIN_SM_VERSION

    @classmethod
    def get_requirements(cls) -> dict[str, Any]:
        """What `supports_fast_matmul` compares."""
        return {
            "layout": cls.__name__,
            "min_sm_version": cls.MIN_SM_VERSION,
            "current_sm_version": get_cuda_capability(),
            "fast_matmul_supported": cls.supports_fast_matmul(),
        }
