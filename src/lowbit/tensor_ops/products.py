"""Products with a quantized weight, and lookups in one: all lead to the ops of `lowbit.ops.generic`.

`F.linear` reaches `__torch_dispatch__` as `aten.linear` only in inference mode; elsewhere it is `t` and `mm` or
`addmm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from lowbit.errors import UnsupportedError
from lowbit.ops import generic
from lowbit.tensor import QuantizedTensor, implements, shortcut

aten = torch.ops.aten
_modes = torch._C._len_torch_dispatch_stack  # noqa: SLF001
_transforms = torch._C._are_functorch_transforms_active  # noqa: SLF001
_autocasts = torch._C._is_any_autocast_enabled  # noqa: SLF001  (the public ones refuse devices such as meta)


def _linear(x: Tensor, w: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """Multiply x [..., K] with the weight [N, K] transposed."""
    _check_columns(x, w.matrix[1], w)
    return generic.linear(x, w.part_list, bias, w.spec)


def _check_columns(x: Tensor, wanted: int, w: QuantizedTensor) -> None:
    """The parts of some formats are padded: a product over the wrong length would go unnoticed."""
    if not x.dim() or x.shape[-1] != wanted:
        raise _wrong_columns(x, wanted, w)


def _wrong_columns(x: Tensor, wanted: int, w: QuantizedTensor) -> UnsupportedError:
    return UnsupportedError(
        f"a tensor of shape {list(x.shape)} cannot be multiplied with {w!r}: its last axis must be {wanted} long"
    )


def _is_matrix(w: object) -> bool:
    """Whether this is a quantized [N, K], or [K, N] seen transposed, whose shape is that of its parts."""
    return isinstance(w, QuantizedTensor) and w.is_matrix


@shortcut(F.linear)
def _short_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    x = input
    if not isinstance(weight, QuantizedTensor) or not weight.is_matrix or weight.transposed:
        return NotImplemented
    # FakeTensorMode and its like must see the op, autocast a tensor of the region's dtype, and forward derivatives and
    # torch.func's transforms matrix products.
    watched = _modes() or _autocasts() or _transforms() or forward_ad._current_level >= 0  # noqa: SLF001
    if watched or type(x) is not Tensor:
        return _watched_linear(x, weight, bias)
    # Nobody watches: the kernel is called without PyTorch's dispatcher, which would take longer than a small product.
    (n, k), shape = weight.matrix, x.shape
    if not shape or shape[-1] != k:
        raise _wrong_columns(x, k, weight)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if (x.requires_grad or (bias is not None and bias.requires_grad)) and torch.is_grad_enabled():
        return _ShortLinear.apply(x, bias, weight.spec, *weight.part_list)  # type: ignore[no-untyped-call]
    return generic.multiply(x, weight.format, weight.kernel_layout, weight.parts, bias, n, k)


def _watched_linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Any:
    """F.linear by the op `linear`; by matrix products for forward derivatives and torch.func, which it has not."""
    if isinstance(x, QuantizedTensor) or _transforms() or forward_ad._current_level >= 0:  # noqa: SLF001
        return NotImplemented
    if _autocasts():
        x = autocast_input(x)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return _linear(x, weight, bias)


class _ShortLinear(torch.autograd.Function):
    """The op `linear` with its gradients, without the 90 microseconds that a registered formula takes in Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, spec: str, *parts: Tensor) -> Tensor:
        generic.remember_linear(ctx, (x, parts, bias, spec), None)
        return generic.run_linear(x, parts, bias, spec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_bias = ctx.needs_input_grad[:2]
        grad_x, grad_bias = generic.linear_gradients(ctx, grad, needs_x=needs_x, needs_bias=needs_bias)
        return grad_x, grad_bias, *(None for _ in ctx.needs_input_grad[2:])


def autocast_input(x: Tensor) -> Tensor:
    """The input as a plain linear would cast it in this region: float64 and integers stay."""
    device = x.device.type
    if not x.is_floating_point() or x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return x
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


@implements(aten.linear.default)
def _aten_linear(func: Any, args: Any, kwargs: Any) -> Any:
    x, w, bias = (*args, None)[:3]
    bias = kwargs.get("bias", bias)
    if isinstance(x, QuantizedTensor) or not _is_matrix(w) or w.transposed:
        return NotImplemented
    return _linear(x, w, bias)


@implements(aten.mm.default)
def _mm(func: Any, args: Any, kwargs: Any) -> Any:
    return _product(args[0], args[1])


def _product(a: Tensor, b: Tensor) -> Any:
    """Compute a @ b with one quantized matrix: on either side, transposed or not, it is linear or its transpose."""
    if isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor):
        return NotImplemented
    if isinstance(a, QuantizedTensor):  # a @ b = (b.T @ a.T).T
        swapped = _product(b.t(), a.t())
        return swapped if swapped is NotImplemented else swapped.t()
    if not _is_matrix(b):
        return NotImplemented
    if b.transposed:  # type: ignore[attr-defined]
        return _linear(a, b, None)  # type: ignore[arg-type]
    _check_columns(a, b.matrix[0], b)  # type: ignore[attr-defined, arg-type]
    return generic.linear_input_gradient(a, b.part_list, b.shape[1], b.spec)  # type: ignore[attr-defined]


@implements(aten.addmm.default)
def _addmm(func: Any, args: Any, kwargs: Any) -> Any:
    bias, a, b = args
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    if isinstance(bias, QuantizedTensor):
        return NotImplemented
    weight_last = _is_matrix(b) and b.transposed and not isinstance(a, QuantizedTensor)
    if weight_last and beta == 1 and alpha == 1 and bias.dim() == 1 and bias.shape[0] == b.shape[1]:
        return _linear(a, b, bias.to(a.dtype))
    return _scaled_sum(_product(a, b), bias, beta, alpha)


def _scaled_sum(product: Any, bias: Tensor, beta: float, alpha: float) -> Any:
    if product is NotImplemented:
        return NotImplemented
    if alpha != 1:
        product = product * alpha
    # With beta 0 even a NaN bias must not count.
    return product if beta == 0 else (product + beta * bias).to(product.dtype)


@shortcut(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def _short_matmul(input: Tensor, other: Tensor) -> Any:
    """PyTorch folds leading axes into rows only where that needs no copy of x; it would expand the weight instead."""
    if isinstance(input, QuantizedTensor) or not _is_matrix(other) or input.dim() < 3:
        return NotImplemented
    return torch.mm(input.flatten(0, -2), other).unflatten(0, input.shape[:-1])


@implements(aten.matmul.default)
def _matmul(func: Any, args: Any, kwargs: Any) -> Any:
    return _short_matmul(*args)


@implements(aten.mv.default)
def _mv(func: Any, args: Any, kwargs: Any) -> Any:
    w, x = args
    if isinstance(x, QuantizedTensor):
        return NotImplemented
    product = _product(x.unsqueeze(0), w.t())
    return product if product is NotImplemented else product.squeeze(0)


@implements(aten.addmv.default)
def _addmv(func: Any, args: Any, kwargs: Any) -> Any:
    bias, w, x = args
    if isinstance(bias, QuantizedTensor):
        return NotImplemented
    return _scaled_sum(_mv(func, (w, x), {}), bias, kwargs.get("beta", 1), kwargs.get("alpha", 1))


@implements(aten.bmm.default)
def _bmm(func: Any, args: Any, kwargs: Any) -> Any:
    a, b = args
    if isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor):
        return NotImplemented
    products = [_product(a[i], b[i]) for i in range(a.shape[0])]
    if not products or any(product is NotImplemented for product in products):
        return NotImplemented
    return torch.stack(products)


@implements(aten.baddbmm.default)
def _baddbmm(func: Any, args: Any, kwargs: Any) -> Any:
    bias, a, b = args
    if isinstance(bias, QuantizedTensor):
        return NotImplemented
    return _scaled_sum(_bmm(func, (a, b), {}), bias, kwargs.get("beta", 1), kwargs.get("alpha", 1))


@shortcut(F.embedding)
def _short_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    options = dict(zip(("max_norm", "norm_type", "scale_grad_by_freq", "sparse"), args, strict=False)) | kwargs
    if _transforms():  # which take the aten op apart; lowbit's has no rule for batches
        return NotImplemented
    if not _is_matrix(weight) or weight.transposed or options.get("max_norm") is not None:  # type: ignore[attr-defined]
        return NotImplemented
    return _lookup(weight, input)  # type: ignore[arg-type]


@implements(aten.embedding.default)
def _embedding(func: Any, args: Any, kwargs: Any) -> Any:
    weight, indices = args[:2]
    return _lookup(weight, indices) if _is_matrix(weight) and not weight.transposed else NotImplemented


def _lookup(weight: QuantizedTensor, indices: Tensor) -> Tensor:
    if indices.dtype not in (torch.int64, torch.int32):
        raise UnsupportedError(f"indices into {weight!r} are {indices.dtype}, expected torch.int64 or torch.int32")
    return generic.embedding(indices, weight.part_list, weight.matrix[1], weight.spec, weight.dtype)
