"""QuantizedTensor: a weight in few bits that behaves like the tensor it stands for.

It has the logical shape (N, K) and dtype of the original, never those of the packed bytes; the bytes live in its
parts. The ops it understands run on the parts (`lowbit.tensor_ops`). Any other op dequantizes, is counted in
`fallbacks()` and warns once.

The dtype is the one that results are computed in: `.to(dtype)` changes it and leaves the parts alone. The weight is
frozen: gradients pass through it to the input, not into it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lowbit.formats.base import Format
from lowbit.formats.parts import Parts, raw_bytes
from lowbit.formats.registry import as_format
from lowbit.layouts.base import get_layout
from lowbit.ops import generic, packing
from lowbit.tensor import handlers, sharding


class QuantizedTensor(torch.Tensor):
    """A frozen quantized weight. Make one with `QuantizedTensor.quantize` or from parts that a checkpoint holds.

    Attributes: `format`, `kernel_layout` ("" for plain parts), one attribute a part (`qdata`, `scale`, ...) and
    `matrix`, the (N, K) that the parts describe; `shape` may be any view of it. `view_of` says what writing reaches: ""
    this weight, "rows" these rows of another one, "shared" rows beside them or nobody, "copy" nobody. `room` is the
    number of rows of the weight that this is the beginning of, or 0.

    In a kernel's layout only whole weights are held: what cuts or joins rows works on the plain parts, and its result
    has plain parts. A piece is then a copy (`view_of` is "copy"), and writing into it is refused.
    """

    format: Format
    kernel_layout: str
    matrix: tuple[int, int]
    spec: str
    transposed: bool
    is_matrix: bool
    view_of: str
    room: int

    @staticmethod
    def __new__(
        cls: type[QuantizedTensor],
        parts: Mapping[str, Tensor],
        fmt: Format | str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        layout: str = "",
        matrix: tuple[int, int] | None = None,
        transposed: bool = False,
        view_of: str = "",
        room: int = 0,
    ) -> QuantizedTensor:
        """Wrap parts, unchecked. `from_parts` checks them first."""
        device, strides = parts["qdata"].device, _strides(shape, transposed)
        # A view of an ordinary tensor is an ordinary tensor in inference mode too: autograd counts its versions.
        with torch._C._InferenceMode(False):  # noqa: SLF001  (the public one costs a microsecond more)
            return torch.Tensor._make_wrapper_subclass(
                cls, shape, strides=strides, dtype=dtype, device=device, requires_grad=False
            )

    def __init__(
        self,
        parts: Mapping[str, Tensor],
        fmt: Format | str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        layout: str = "",
        matrix: tuple[int, int] | None = None,
        transposed: bool = False,
        view_of: str = "",
        room: int = 0,
    ) -> None:
        self.format = as_format(fmt)
        self.kernel_layout = layout
        self.matrix = matrix or (torch.Size(shape[:-1]).numel(), shape[-1])
        self.spec = generic.join_spec(self.format, layout)
        self.transposed = transposed
        self.view_of, self.room = view_of, room
        # Python attributes: reading a wrapper's own shape would go through __torch_function__ at every call.
        self.is_matrix = tuple(shape) == (self.matrix[::-1] if transposed else self.matrix)
        for name in self.format.part_names:
            setattr(self, name, parts[name])

    @classmethod
    def quantize(
        cls, w: Tensor, fmt: Format | str, *, seed: int | None = None, dtype: torch.dtype | None = None
    ) -> QuantizedTensor:
        """Quantize a floating-point weight [..., K] by rounding to nearest (or stochastically with a `seed`).

        `dtype` is the logical dtype, that of `w` by default. Raises `WeightError` for a weight the format cannot hold.
        """
        fmt = as_format(fmt)
        matrix = w.detach().reshape(-1, w.shape[-1]) if w.dim() != 2 else w.detach()
        parts = generic.quantize(matrix, fmt.spec, seed)
        return cls(generic.named(fmt, parts), fmt, tuple(w.shape), dtype or w.dtype)

    @classmethod
    def from_parts(
        cls,
        parts: Mapping[str, Tensor],
        fmt: Format | str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        where: str = "weight",
    ) -> QuantizedTensor:
        """Wrap stored plain parts after checking names, dtypes and shapes; `PartsError` names `where`."""
        fmt = as_format(fmt)
        fmt.check(parts, (torch.Size(shape[:-1]).numel(), shape[-1]), where)
        return cls(parts, fmt, shape, dtype)

    # ---- parts ------------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> Parts:
        """The stored tensors by name, in the format's order."""
        parts: Parts = {}
        for name in self.format.part_names:  # a comprehension is a call of its own before Python 3.12
            parts[name] = getattr(self, name)
        return parts

    @property
    def part_list(self) -> list[Tensor]:
        """The stored tensors as ops take them."""
        return [getattr(self, name) for name in self.format.part_names]

    def nbytes_stored(self) -> int:
        """Bytes of all parts together."""
        return sum(part.numel() * part.element_size() for part in self.part_list)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The plain tensor of this shape, in `dtype` or the logical dtype."""
        flat = generic.dequantize(self.part_list, self.spec, list(self.matrix), dtype or self.dtype)
        if self.transposed:
            return flat.view((*self.shape[:-2], self.shape[-1], self.shape[-2])).transpose(-1, -2)
        return flat.view(self.shape)

    def with_parts(self, parts: Mapping[str, Tensor], **changes: Any) -> QuantizedTensor:
        """A tensor like this one over other parts; `changes` override what `__init__` takes."""
        options: dict[str, Any] = {
            "fmt": self.format,
            "shape": tuple(self.shape),
            "dtype": self.dtype,
            "layout": self.kernel_layout,
            "matrix": self.matrix,
            "transposed": self.transposed,
            "view_of": self.view_of,
            "room": self.room,
        }
        return QuantizedTensor(parts, **{**options, **changes})

    def map_parts(self, function: Callable[[Tensor], Tensor], **changes: Any) -> QuantizedTensor:
        """A tensor like this one with `function` (which copies) applied to each part."""
        made = {name: function(part) for name, part in self.parts.items()}
        return self.with_parts(made, **{"view_of": "", **changes})

    def in_layout(self, name: str) -> QuantizedTensor:
        """This weight with its parts repacked for a kernel, or back to the plain parts with "".

        Parts that the layout leaves as they are, are shared: clone before writing into one of the two.
        """
        if name == self.kernel_layout:
            return self
        plain = self
        if self.kernel_layout:
            plain = self.with_parts(packing.unpack(self.format, self.parts, self.kernel_layout), layout="")
        if not name:
            return plain
        get_layout(name, self.format)  # says which layouts there are, where this is none
        return plain.with_parts(packing.pack(self.format, plain.parts, name), layout=name, view_of="", room=0)

    def unpacked(self) -> QuantizedTensor:
        """This weight over plain parts: itself, or of one in a kernel's layout a copy that is known to be one."""
        if not self.kernel_layout:
            return self
        plain = self.in_layout("")
        plain.view_of = "copy"
        return plain

    def merge(self, delta: Tensor, *, seed: int | None = 0) -> QuantizedTensor:
        """A new quantized weight near `self + delta`, rounded stochastically so that small (LoRA) updates survive.

        `seed=None` rounds to nearest, which loses updates smaller than half a step. Formats without stochastic rounding
        always round to nearest.
        """
        total = self.dequantize(torch.float32) + delta.float()
        if self.transposed:
            total = total.transpose(-1, -2)
        usable = seed if self.format.stochastic else None
        made = QuantizedTensor.quantize(total.reshape(self.matrix), self.format, seed=usable)
        return self.with_parts(made.parts, layout="", view_of="", room=0)

    # ---- PyTorch protocols ------------------------------------------------------------------------------------------

    storage = handlers.refuse_storage

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        where = "" if self.device.type == "cpu" else f", device={self.device}"
        return f"QuantizedTensor({self.spec}, shape={tuple(self.shape)}, dtype={self.dtype}{where})"

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return list(self.format.part_names), {
            "spec": self.spec,
            "dtype": self.dtype,
            "matrix": self.matrix,
            "transposed": self.transposed,
        }

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], meta: dict[str, Any], outer_size: Any, outer_stride: Any
    ) -> QuantizedTensor:
        fmt, layout = generic.split_spec(meta["spec"])
        return QuantizedTensor(
            inner,
            fmt,
            tuple(outer_size),
            meta["dtype"],
            layout=layout,
            matrix=meta["matrix"],
            transposed=meta["transposed"],
        )

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        flags = (bool(getattr(self, "_is_param", False)), self.requires_grad)
        state = (self.spec, tuple(self.shape), self.dtype, self.matrix, self.transposed, flags)
        # One-byte parts go as uint8: PyTorch's float8 tensors survive torch.save but not a plain pickle.
        stored = {name: (raw_bytes(part), part.dtype) for name, part in self.parts.items()}
        return rebuild_quantized_tensor, (stored, *state)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        if id(self) in memo:
            return memo[id(self)]
        copied = _mark(self.map_parts(torch.clone), bool(getattr(self, "_is_param", False)), self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The short way: one Python call instead of the several aten ops that F.linear becomes. Not while tracing, where
        # the aten ops are what the compiler must see.
        handler = None if is_compiling() else handlers.TORCH.get(func)
        if handler is not None:
            result = handler(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return handlers.run(cls, func, args, kwargs or {})

    # ---- FSDP2 ------------------------------------------------------------------------------------------------------

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], Any]:
        """What each rank contributes: see `sharding.py`."""
        return sharding.gather_inputs(self.in_layout("")), None

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """The whole weight from the gathered rows of all ranks, or put into `out`, which an earlier call made."""
        parts = sharding.gathered_parts(self.in_layout(""), outputs)
        if isinstance(out, QuantizedTensor):
            sharding.refill(out, parts)
            return None
        rows, columns = self.format.rows_of(parts), self.matrix[1]
        shape = (rows, *self.shape[1:]) if self.shape[0] == self.matrix[0] else (rows, columns)
        return QuantizedTensor(parts, self.format, shape, param_dtype, matrix=(rows, columns)), outputs


def rebuild_quantized_tensor(
    stored: dict[str, tuple[Tensor, torch.dtype]],
    spec: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    matrix: tuple[int, int],
    transposed: bool,
    flags: tuple[bool, bool],
) -> QuantizedTensor:
    """Unpickle a `QuantizedTensor`; takes plain values only, so that `torch.load(weights_only=True)` can run it."""
    fmt, layout = generic.split_spec(spec)
    parts = {name: part.view(kind) for name, (part, kind) in stored.items()}
    made = QuantizedTensor(
        parts, fmt, tuple(shape), dtype, layout=layout, matrix=(matrix[0], matrix[1]), transposed=transposed
    )
    return _mark(made, *flags)


rebuild_quantized_tensor.__module__ = "lowbit.tensor"  # the name that files carry
torch.serialization.add_safe_globals([rebuild_quantized_tensor])


def _strides(shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    order = (*shape[:-2], shape[-1], shape[-2]) if transposed else tuple(shape)
    strides, step = [], 1
    for size in reversed(order):
        strides.append(step)
        step = step * size
    strides.reverse()
    if transposed:
        strides[-1], strides[-2] = strides[-2], strides[-1]
    return tuple(strides)


def _mark(tensor: QuantizedTensor, is_param: bool, requires_grad: bool) -> QuantizedTensor:
    if is_param:
        return torch.nn.Parameter(tensor, requires_grad=requires_grad)  # type: ignore[return-value]
    return tensor.requires_grad_(requires_grad)  # type: ignore[return-value]
