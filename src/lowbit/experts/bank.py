"""QuantizedBank: the weights of many experts, [E, N, K], as one tensor in few bits.

Its parts are those of a `QuantizedTensor` with a leading axis E, so that each expert keeps what its weight shares as a
whole (nvfp4's global scale). `bank[e]` is a `QuantizedTensor` over views of the parts and goes wherever one goes. Like
that one it has the logical shape and dtype, is frozen, and dequantizes visibly for ops that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import PartsError
from lowbit.formats.base import Format
from lowbit.formats.parts import Parts, raw_bytes
from lowbit.formats.registry import as_format
from lowbit.ops.generic import join_spec, split_spec
from lowbit.tensor import QuantizedTensor, handlers

BANK: dict[Any, handlers.Handler] = {}  # aten overload -> handler(func, args, kwargs); filled by bank_ops


class QuantizedBank(torch.Tensor):
    """A frozen bank of experts. Make one with `quantize_bank`, or with `stack` from weights of one format.

    Attributes: `format`, `kernel_layout`, `matrix` (N, K of one expert), `transposed` (the shape is [E, K, N]: experts
    that are multiplied as `x @ w`), and one attribute a part, with E in front.
    """

    format: Format
    kernel_layout: str
    matrix: tuple[int, int]
    spec: str
    transposed: bool

    @staticmethod
    def __new__(
        cls: type[QuantizedBank],
        parts: Mapping[str, Tensor],
        fmt: Format | str,
        matrix: tuple[int, int],
        dtype: torch.dtype,
        *,
        layout: str = "",
        transposed: bool = False,
    ) -> QuantizedBank:
        """Wrap stacked parts, unchecked."""
        n, k = matrix
        experts, device = parts["qdata"].shape[0], parts["qdata"].device
        shape, strides = ((experts, k, n), (n * k, 1, k)) if transposed else ((experts, n, k), (n * k, k, 1))
        with torch._C._InferenceMode(False):  # noqa: SLF001  (as QuantizedTensor: never an inference tensor)
            return torch.Tensor._make_wrapper_subclass(
                cls, shape, strides=strides, dtype=dtype, device=device, requires_grad=False
            )

    def __init__(
        self,
        parts: Mapping[str, Tensor],
        fmt: Format | str,
        matrix: tuple[int, int],
        dtype: torch.dtype,
        *,
        layout: str = "",
        transposed: bool = False,
    ) -> None:
        self.format = as_format(fmt)
        self.kernel_layout, self.matrix, self.transposed = layout, matrix, transposed
        self.spec = join_spec(self.format, layout)
        for name in self.format.part_names:
            setattr(self, name, parts[name])

    @classmethod
    def stack(cls, weights: Sequence[Tensor], *, transposed: bool = False) -> QuantizedBank:
        """The bank of these `QuantizedTensor` matrices [N, K], copied. `PartsError` unless all are of one kind.

        With `transposed` the bank's shape is [E, K, N].
        """
        first = weights[0] if weights else None
        if not isinstance(first, QuantizedTensor):
            raise PartsError("a bank is made of at least one QuantizedTensor [N, K]; quantize the experts first")
        for index, other in enumerate(weights):
            if not isinstance(other, QuantizedTensor) or other.transposed or not other.is_matrix:
                raise PartsError(f"expert {index} is not a quantized matrix [N, K]; quantize the experts first")
            if (other.spec, other.matrix, other.dtype) != (first.spec, first.matrix, first.dtype):
                raise PartsError(f"expert {index} is {other!r}, expert 0 {first!r}; a bank holds one format and shape")
        held = [weight.parts for weight in weights if isinstance(weight, QuantizedTensor)]
        parts = {
            name: torch.stack([raw_bytes(one[name]) for one in held]).view(part.dtype)
            for name, part in first.parts.items()
        }
        return cls(parts, first.format, first.matrix, first.dtype, layout=first.kernel_layout, transposed=transposed)

    # ---- parts ------------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> Parts:
        """The stacked tensors by name, in the format's order."""
        return {name: getattr(self, name) for name in self.format.part_names}

    @property
    def part_list(self) -> list[Tensor]:
        """The stacked tensors as ops take them."""
        return [getattr(self, name) for name in self.format.part_names]

    def nbytes_stored(self) -> int:
        """Bytes of all parts together."""
        return sum(part.numel() * part.element_size() for part in self.part_list)

    def expert(self, index: int) -> QuantizedTensor:
        """One expert as a view: [N, K], or [K, N] in a transposed bank."""
        parts = {name: part[index] for name, part in self.parts.items()}
        shape = self.matrix[::-1] if self.transposed else self.matrix
        return QuantizedTensor(
            parts,
            self.format,
            shape,
            self.dtype,
            layout=self.kernel_layout,
            matrix=self.matrix,
            transposed=self.transposed,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The plain tensor of this shape, in `dtype` or the logical dtype."""
        out = torch.empty((self.shape[0], *self.matrix), dtype=dtype or self.dtype, device=self.device)
        plain = self.transpose(-1, -2) if self.transposed else self
        for index in range(self.shape[0]):
            out[index] = plain.expert(index).dequantize(dtype)  # type: ignore[attr-defined]
        return out.transpose(-1, -2) if self.transposed else out

    def in_layout(self, name: str) -> QuantizedBank:
        """This bank with each expert's parts repacked for a kernel, or back to the plain parts with ""."""
        if name == self.kernel_layout:
            return self
        plain = QuantizedBank(self.parts, self.format, self.matrix, self.dtype, layout=self.kernel_layout)
        packed = [plain.expert(index).in_layout(name) for index in range(self.shape[0])]
        return QuantizedBank.stack(packed, transposed=self.transposed)

    def with_parts(self, parts: Mapping[str, Tensor], **changes: Any) -> QuantizedBank:
        """A bank like this one over other parts; `changes` override what `__init__` takes."""
        options = {"dtype": self.dtype, "layout": self.kernel_layout, "transposed": self.transposed, **changes}
        return QuantizedBank(parts, self.format, self.matrix, **options)

    def map_parts(self, function: Callable[[Tensor], Tensor], **changes: Any) -> QuantizedBank:
        """A bank like this one with `function` applied to each part."""
        return self.with_parts({name: function(part) for name, part in self.parts.items()}, **changes)

    # ---- PyTorch protocols ------------------------------------------------------------------------------------------

    storage = handlers.refuse_storage

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        where = "" if self.device.type == "cpu" else f", device={self.device}"
        return f"QuantizedBank({self.spec}, shape={tuple(self.shape)}, dtype={self.dtype}{where})"

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        meta = {"spec": self.spec, "dtype": self.dtype, "matrix": self.matrix, "transposed": self.transposed}
        return list(self.format.part_names), meta

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], meta: dict[str, Any], outer_size: Any, outer_stride: Any
    ) -> QuantizedBank:
        fmt, layout = split_spec(meta["spec"])
        return QuantizedBank(inner, fmt, meta["matrix"], meta["dtype"], layout=layout, transposed=meta["transposed"])

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        # One-byte parts go as uint8: PyTorch's float8 tensors survive torch.save but not a plain pickle.
        stored = {name: (raw_bytes(part), part.dtype) for name, part in self.parts.items()}
        is_param = bool(getattr(self, "_is_param", False))
        return rebuild_quantized_bank, (stored, self.spec, self.matrix, self.dtype, self.transposed, is_param)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedBank:
        if id(self) not in memo:
            memo[id(self)] = _mark(self.map_parts(torch.clone), is_param=bool(getattr(self, "_is_param", False)))
        return memo[id(self)]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return handlers.run(cls, func, args, kwargs or {}, BANK)


def rebuild_quantized_bank(
    stored: dict[str, tuple[Tensor, torch.dtype]],
    spec: str,
    matrix: tuple[int, int],
    dtype: torch.dtype,
    transposed: bool,
    is_param: bool,
) -> QuantizedBank:
    """Unpickle a `QuantizedBank`; takes plain values only, so that `torch.load(weights_only=True)` can run it."""
    fmt, layout = split_spec(spec)
    parts = {name: part.view(kind) for name, (part, kind) in stored.items()}
    made = QuantizedBank(parts, fmt, (matrix[0], matrix[1]), dtype, layout=layout, transposed=transposed)
    return _mark(made, is_param=is_param)


rebuild_quantized_bank.__module__ = "lowbit.experts"  # the name that files carry
torch.serialization.add_safe_globals([rebuild_quantized_bank])


def _mark(bank: QuantizedBank, *, is_param: bool) -> QuantizedBank:
    return torch.nn.Parameter(bank, requires_grad=False) if is_param else bank  # type: ignore[return-value]
