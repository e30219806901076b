"""int4_plain_mm: 4-bit weights in the layout coalesced_int4 times activations that are rounded to int8 (W4A8).

Three ways, by the number of tokens: products of four bytes with weights that are read once (`int4_plain_few`), tensor
cores with int8 (`int4_plain_tiles`), and, for many tokens of 16 bits, pieces of the weight decoded for PyTorch's own
product (`int4_plain_many`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lowbit.backends import coalesced_linear
from lowbit.backends.cuda import device_check, int4_plain_few, int4_plain_many, int4_plain_tiles
from lowbit.backends.cuda.int4_plain_operands import DTYPES, Operands
from lowbit.backends.gpu import target_of
from lowbit.dispatch import kernel

# Where one way becomes better than the next: reasoned from instructions and bytes, not measured.
FEW = 4  # tokens up to which four products an instruction cost less time than the weights take to arrive
MANY = 256  # tokens from which decoding the weight pays; with float32 activations it never does

_TOLERANCE = 4e-3  # for many tokens both operands are rounded to 16 bits, and so is the result
_LARGEST = 1 << 33  # weights of which 32 bits count the bytes


def refuses(
    x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int
) -> str | None:
    """Why this call cannot run here, or None."""
    if why := device_check.refuses(x.device):
        return why
    target = target_of(x.device)
    for name, tensor in (("x", x), ("scale", scale), ("zero", zero), ("bias", bias)):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name} is {_kind(tensor)}; the kernel takes float32, bfloat16 and float16"
    if zero is not None and zero.dtype != scale.dtype:
        return f"zeros are {_kind(zero)}, scales {_kind(scale)}; the kernel takes one dtype"
    if bias is not None and bias.dtype != x.dtype:
        return f"the bias is {_kind(bias)}, x {_kind(x)}; the kernel takes one dtype"
    if not qdata.shape[1]:
        return "no columns; the kernel takes 32 and more"
    if 2 * qdata.numel() >= _LARGEST:
        return f"{2 * qdata.numel()} weights; the kernel takes fewer than {_LARGEST}"
    many = x.shape[:-1].numel() > int4_plain_few.MOST and target.capability < int4_plain_tiles.OLDEST
    if many and (why := int4_plain_many.refuses(x, target.capability)):
        return f"more than {int4_plain_few.MOST} tokens, for which {why}"
    return _refuses_storage(x, qdata=qdata, scale=scale, zero=zero, bias=bias)


def _refuses_storage(x: Tensor, **others: Tensor | None) -> str | None:
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}; move one of them"
        if not tensor.is_contiguous() or (tensor.device.type != "meta" and name == "qdata" and tensor.data_ptr() % 16):
            return f"{name} has gaps, or does not begin at a multiple of 16 bytes; clone it once, at load"
    return None


@kernel("int4_plain_mm", backend="cuda", refuses=refuses, tolerance=_TOLERANCE)
def int4_plain_mm(
    x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """x [..., K], bytes [N, K/2], scale and zero [N, K/g], bias [N] or None -> [..., N] as x. No zeros: 8 for all."""
    rows, out = _rows(x), x.new_empty((*x.shape[:-1], qdata.shape[0]))
    if out.numel():
        _way(rows)(rows, Operands(qdata, scale, zero, group_size), bias, out.view(-1, qdata.shape[0]))
    return out


def _way(rows: Tensor) -> Callable[[Tensor, Operands, Tensor | None, Tensor], None]:
    m, capability = rows.shape[0], target_of(rows.device).capability
    tiles = capability >= int4_plain_tiles.OLDEST
    if m <= (min(FEW, int4_plain_few.MOST) if tiles else int4_plain_few.MOST):
        return int4_plain_few.product
    if (m >= MANY or not tiles) and int4_plain_many.refuses(rows, capability) is None:
        return int4_plain_many.product
    return int4_plain_tiles.product


def product_of_native(x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """The same for up to 8 tokens with scale and zero [K/g, N], as awq_w4a16 has them: what the layout saves, measured.

    No op runs it. Its reads of scales are scattered: 32 of them come from as many lines of memory.
    """
    rows, out = _rows(x), x.new_empty((*x.shape[:-1], qdata.shape[0]))
    operands = Operands(qdata, scale, zero, group_size)
    int4_plain_few.product(rows, operands, None, out.view(-1, qdata.shape[0]), native=True)
    return out


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return rows.clone() if rows.device.type != "meta" and rows.data_ptr() % 16 else rows


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


coalesced_linear.serve("cuda", int4_plain_mm, refuses, tolerance=_TOLERANCE, fills=False)
