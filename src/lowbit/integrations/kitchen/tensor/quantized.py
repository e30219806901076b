"""QuantizedTensor as comfy_kitchen has it: codes, the name of a layout, and that layout's parameters.

It differs from theirs where theirs goes wrong: it can be pickled, deep-copied and copied into a plain tensor; writing
through a detached alias reaches the scales too; an op without a handler warns once, and one that would write into the
codes is refused rather than lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from lowbit.errors import PartsError
from lowbit.formats.parts import raw_bytes
from lowbit.integrations.kitchen.tensor import generic
from lowbit.integrations.kitchen.tensor.base import LAYOUTS, get_layout_class


class QuantizedTensor(torch.Tensor):
    """A tensor in few bits. `shape` and `dtype` are those of the original; `storage_shape` is that of the codes."""

    @staticmethod
    def __new__(cls: type[QuantizedTensor], qdata: Tensor, layout_cls: str, params: Any) -> QuantizedTensor:
        """Wrap codes and parameters, unchecked."""
        # A view of an ordinary tensor is an ordinary tensor in inference mode too: autograd counts its versions.
        with torch._C._InferenceMode(False):  # noqa: SLF001  (the public one costs a microsecond more)
            return torch.Tensor._make_wrapper_subclass(
                cls, params.orig_shape, device=qdata.device, dtype=params.orig_dtype, requires_grad=False
            )

    def __init__(self, qdata: Tensor, layout_cls: str, params: Any) -> None:
        get_layout_class(layout_cls)  # an unknown name is an error here, not in some later op
        self._qdata = qdata
        self._layout_cls = layout_cls
        self._params = params

    @classmethod
    def from_float(cls, tensor: Tensor, layout_cls: str | type[Any], **kwargs: Any) -> QuantizedTensor:
        """Quantize a float tensor; `layout_cls`: the layout or its name, `kwargs` are the layout's."""
        if isinstance(layout_cls, type):
            layout_cls = next((name for name, known in LAYOUTS.items() if known is layout_cls), layout_cls.__name__)
        qdata, params = get_layout_class(layout_cls).quantize(tensor, **kwargs)
        return cls(qdata, layout_cls, params)

    def requantize_from_float(self, tensor: Tensor, **kwargs: Any) -> QuantizedTensor:
        """Quantize another float tensor as this one was; `kwargs` take precedence."""
        return self.from_float(tensor, self._layout_cls, **{**self.layout_cls.requantize_kwargs(self), **kwargs})

    def dequantize(self) -> Tensor:
        """The float tensor [shape] in `dtype`."""
        params, shape = self._params, tuple(self._params.orig_shape)
        transposed = getattr(params, "transposed", False)
        stored = shape[::-1] if transposed else shape
        full = self.layout_cls.dequantize(self._qdata.contiguous(), params)
        if tuple(full.shape) != stored:  # padded
            full = full[tuple(slice(0, size) for size in stored)]
        return full.t() if transposed else full

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """What is saved, by key."""
        tensors = self.layout_cls.state_dict_tensors(self._qdata, self._params)
        return {f"{prefix}{suffix}": tensor for suffix, tensor in tensors.items()}

    def linear_input_act(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        input_act: str | None = None,
        input_act_weight: Tensor | None = None,
        input_act_eps: float = 0.0,
        residual: Tensor | None = None,
        residual_scale: Tensor | None = None,
    ) -> Any:
        """linear(act(x), self, bias) and a residual in one call, or NotImplemented where the layout has none."""
        after = residual, residual_scale
        return self.layout_cls.linear_input_act(self, x, bias, input_act, input_act_weight, input_act_eps, *after)

    def optimize_for_gemv(self, storage: Tensor) -> QuantizedTensor:
        """See `QuantizedLayout.optimize_for_gemv`."""
        return self.layout_cls.optimize_for_gemv(self, storage)

    # ---- what it is -------------------------------------------------------------------------------------------------

    @property
    def layout_cls(self) -> Any:
        """The layout's class."""
        return get_layout_class(self._layout_cls)

    @property
    def layout_name(self) -> str:
        """The name of the layout."""
        return self._layout_cls

    @property
    def qdata(self) -> Tensor:
        """The codes as they are stored."""
        return self._qdata

    @property
    def params(self) -> Any:
        """The layout's parameters."""
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        self._params = params

    @property
    def storage_shape(self) -> tuple[int, ...]:
        """The shape of the codes as they are stored."""
        return tuple(self._qdata.shape)

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype of the codes as they are stored."""
        return self._qdata.dtype

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """The bytes of the codes; scales are not counted."""
        return self._qdata.nbytes

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """The shape of what the codes unpack to."""
        return tuple(self.layout_cls.unpacked_shape(self))

    @property
    def is_padded(self) -> bool:
        """Whether the codes hold more than the tensor."""
        shape = tuple(self._params.orig_shape)
        return self.padded_shape != (shape[::-1] if getattr(self._params, "transposed", False) else shape)

    def data_ptr(self) -> int:
        """Where the codes lie."""
        return self._qdata.data_ptr()

    def is_pinned(self) -> bool:  # type: ignore[override]
        """Whether the codes lie in pinned memory."""
        return self._qdata.is_pinned()

    def storage(self) -> NoReturn:
        """Refused: it would be shorter than shape and dtype say, and what copies it (safetensors) reads beyond it."""
        raise PartsError(
            f"{self!r} has no storage of its shape and dtype; save the tensors of its state_dict(prefix), or use "
            "storage_shape, data_ptr() and nbytes for what it holds"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return (
            f"QuantizedTensor(shape={tuple(self.shape)}, storage_shape={self.storage_shape}, "
            f"layout={self._layout_cls}, dtype={self._params.orig_dtype})"
        )

    # ---- copies -----------------------------------------------------------------------------------------------------

    def copy_with(
        self, qdata: Tensor | None = None, params: Any | None = None, clone_params: bool = True
    ) -> QuantizedTensor:
        """This tensor with other codes or parameters; parameters that are not given are copied, or shared."""
        if params is None:
            params = self._params.clone() if clone_params else self._params
        return QuantizedTensor(self._qdata if qdata is None else qdata, self._layout_cls, params)

    _copy_with = copy_with  # comfy_kitchen's name for it, which programs use

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        """The names of the inner tensors, and the rest: torch.compile's and offloaders' protocol."""
        names, tensors, others = ["_qdata"], {}, {}
        for field in dataclasses.fields(self._params):
            value = getattr(self._params, field.name)
            if isinstance(value, Tensor):
                tensors[field.name] = attribute = f"_param_{field.name}"
                object.__setattr__(self, attribute, value)
                names.append(attribute)
            else:
                others[field.name] = value
        return names, {
            "layout_cls": self._layout_cls,
            "params_class": type(self._params),
            "tensor_fields": tensors,
            "non_tensor_fields": others,
        }

    @staticmethod
    def __tensor_unflatten__(
        inner_tensors: Mapping[str, Tensor], ctx: Mapping[str, Any], outer_size: Any, outer_stride: Any
    ) -> QuantizedTensor:
        """The inverse of `__tensor_flatten__`."""
        tensors = {field: inner_tensors[name] for field, name in ctx["tensor_fields"].items()}
        params = ctx["params_class"](**ctx["non_tensor_fields"], **tensors)
        return QuantizedTensor(inner_tensors["_qdata"], ctx["layout_cls"], params)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = self.copy_with(qdata=self._qdata.clone())
            memo[id(self)] = _marked(copied, bool(getattr(self, "_is_param", False)), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        fields = {field.name: getattr(self._params, field.name) for field in dataclasses.fields(self._params)}
        flags = bool(getattr(self, "_is_param", False)), self.requires_grad
        stored = {name: _stored(value) for name, value in fields.items()}
        return rebuild_kitchen_tensor, (_stored(self._qdata), self._layout_cls, stored, *flags)

    # ---- ops --------------------------------------------------------------------------------------------------------

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return generic.run(cls, func, args, kwargs or {})


def _stored(value: Any) -> Any:
    # One-byte tensors go as uint8: PyTorch's float8 tensors survive torch.save but not a plain pickle.
    return (raw_bytes(value), value.dtype) if isinstance(value, Tensor) else value


def rebuild_kitchen_tensor(
    qdata: tuple[Tensor, torch.dtype], layout: str, stored: dict[str, Any], is_param: bool, requires_grad: bool
) -> Any:
    """Unpickle a `QuantizedTensor`; takes plain values only, so that `torch.load(weights_only=True)` can run it."""
    fields = {name: _restored(value) for name, value in stored.items()}
    made = QuantizedTensor(_restored(qdata), layout, get_layout_class(layout).Params(**fields))
    return _marked(made, is_param, requires_grad)


def _restored(value: Any) -> Any:
    is_tensor = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Tensor)
    return value[0].view(value[1]) if is_tensor else value


def _marked(tensor: QuantizedTensor, is_param: bool, requires_grad: bool) -> Any:
    return torch.nn.Parameter(tensor, requires_grad) if is_param else tensor.requires_grad_(requires_grad)


torch.serialization.add_safe_globals([rebuild_kitchen_tensor])
