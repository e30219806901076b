"""The two ops of an SVDQuant W4A4 linear: quantize the activations, multiply and add the low-rank branch.

Contracts: comfy-kitchen 0.2, with these differences. M is padded only when asked (`pad_size` is 1 by default, 256
there). All arithmetic is float32, `lora_act` included. Every result is a new tensor. A smoothing factor of 0 switches
its channel off. The ops know nothing of the shift of unsigned activations: the caller passes x + 0.171875 as `x` and x
itself as `lora_x`, and the bias already contains the shift's share (`SvdquantW4A4.bias_share`).

They have no gradients: `lowbit::linear` over the parts of a `svdquant_w4a4` weight has.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from lowbit.errors import PartsError, UnsupportedError
from lowbit.layouts import svdquant_tiles as tiles
from lowbit.numerics.groups import round_up
from lowbit.numerics.int4_matmul import GROUP
from lowbit.ops.library import declare, run


def quantize_svdquant_w4a4(
    x: Tensor,
    smooth: Tensor,
    lora_down: Tensor,
    pad_size: int = 1,
    act_unsigned: bool = False,
    lora_x: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] -> codes int8 [Mp, K/2], scales [K/64, Mp] in the dtype of x, and x @ lora_down as float32 [Mp, R].

    x / smooth [K] is quantized by groups of 64: signed, absmax / 7, codes in [-7, 7], or unsigned, absmax / 15, codes
    in [0, 15]; two codes a byte, the even column in the low nibble. lora_down: [K, R]. lora_x [M, K], x by default, is
    what lora_down multiplies. Mp is M rounded up to `pad_size`; rows of padding hold zeros in all three results. A
    scale is rounded to the dtype of x after the codes are chosen. Raises `PartsError` for tensors that do not fit
    together.
    """
    return _quantize_op(x, smooth, lora_down, pad_size, act_unsigned, lora_x)


def scaled_mm_svdquant_w4a4(
    act: Tensor,
    wgt: Tensor,
    ascales: Tensor,
    wscales: Tensor,
    lora_act_in: Tensor,
    lora_up: Tensor,
    bias: Tensor | None = None,
    act_unsigned: bool = False,
) -> Tensor:
    """deq(act) @ deq(wgt).T + lora_act_in @ lora_up.T + bias: [Mp, N] in the dtype of lora_up.

    act: int8 [Mp, K/2]; ascales: [K/64, Mp]; lora_act_in: [Mp, R], all from `quantize_svdquant_w4a4`. wgt, wscales,
    lora_up: int8 [N, K/2], [K/64, N], [N, R], or in tiles [N/128, K/64, 32, 128], [N/128, K/64, 128], [N/128, R, 128]
    (kitchen_tile_packed_w4a4). bias: [N]. Integer products are exact, everything else is float32, rounded once at the
    end. Raises `PartsError` for tensors that do not fit together.
    """
    return _mm_op(act, wgt, ascales, wscales, lora_act_in, lora_up, bias, act_unsigned)


def _check_quantize(x: Tensor, smooth: Tensor, down: Tensor, pad_size: int, lora_x: Tensor | None) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise PartsError(f"x is {_kind(x)}, expected floating-point [M, K]; flatten the tokens first")
    k = x.shape[1]
    if k % GROUP:
        raise PartsError(f"x has K = {k} columns, not a multiple of the group size {GROUP}")
    if tuple(smooth.shape) != (k,):
        raise PartsError(f"smooth has shape {list(smooth.shape)}, expected [{k}]")
    if down.dim() != 2 or down.shape[0] != k:
        raise PartsError(f"lora_down has shape {list(down.shape)}, expected [{k}, R]")
    if pad_size < 1:
        raise PartsError(f"pad_size is {pad_size}, expected at least 1")
    if lora_x is not None and lora_x.shape != x.shape:
        raise PartsError(f"lora_x has shape {list(lora_x.shape)}, expected that of x, {list(x.shape)}")


def _quantize(
    x: Tensor, smooth: Tensor, down: Tensor, pad_size: int, unsigned: bool, lora_x: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check_quantize(x, smooth, down, pad_size, lora_x)
    return run("quantize_svdquant_w4a4", x.device, x, smooth, down, pad_size, unsigned, lora_x)


def _quantize_fake(
    x: Tensor, smooth: Tensor, down: Tensor, pad_size: int, unsigned: bool, lora_x: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check_quantize(x, smooth, down, pad_size, lora_x)
    m, k = round_up(x.shape[0], pad_size), x.shape[1]
    return (
        x.new_empty((m, k // 2), dtype=torch.int8),
        x.new_empty((k // GROUP, m)),
        x.new_empty((m, down.shape[1]), dtype=torch.float32),
    )


def _check_mm(
    act: Tensor, wgt: Tensor, ascales: Tensor, wscales: Tensor, low: Tensor, up: Tensor, bias: Tensor | None
) -> None:
    if act.dim() != 2 or act.dtype != torch.int8 or act.shape[1] % (GROUP // 2):
        raise PartsError(f"act is {_kind(act)}, expected int8 [M, K / 2] with K a multiple of {GROUP}")
    m, half = act.shape
    groups = 2 * half // GROUP
    if wgt.dtype != torch.int8 or wgt.dim() not in (2, 4):
        raise PartsError(f"wgt is {_kind(wgt)}, expected int8 [N, K / 2] or [N/128, K/64, 32, 128]")
    if wgt.dim() == 4:
        tiles.check_tiles(wgt, wscales, up)
    n, rank = _rows(wgt), up.shape[1] if up.dim() > 1 else -1
    fits = wgt.shape[1] == (half if wgt.dim() == 2 else groups)
    if not fits:
        raise PartsError(f"wgt has shape {list(wgt.shape)}, which does not fit act {list(act.shape)}: K differs")
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "ascales": (ascales, (groups, m)),
        "lora_act_in": (low, (m, rank)),
    }
    if wgt.dim() == 2:
        expected |= {"wscales": (wscales, (groups, n)), "lora_up": (up, (n, rank))}
    if bias is not None:
        expected["bias"] = (bias, (n,))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise PartsError(
                f"{name} has shape {list(tensor.shape)}, expected {list(shape)} for act {list(act.shape)}, N = {n}"
            )


def _rows(wgt: Tensor) -> int:
    return wgt.shape[0] * (tiles.ROWS if wgt.dim() == 4 else 1)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _mm(*args: Any) -> Any:
    _check_mm(*args[:7])
    return run("scaled_mm_svdquant_w4a4", args[0].device, *args)


def _mm_fake(*args: Any) -> Tensor:
    _check_mm(*args[:7])
    act, wgt, up = args[0], args[1], args[5]
    out: Tensor = up.new_empty((act.shape[0], _rows(wgt)))
    return out


def _no_gradient(ctx: Any, *grads: Tensor) -> NoReturn:
    raise UnsupportedError("the svdquant ops have no gradients; use lowbit::linear over the weight's parts, which has")


def _nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Nothing to keep for the backward pass."""


_quantize_op = declare(
    "quantize_svdquant_w4a4(Tensor x, Tensor smooth, Tensor lora_down, int pad_size, bool act_unsigned, Tensor? lora_x)"
    " -> (Tensor, Tensor, Tensor)",
    _quantize,
    _quantize_fake,
    _no_gradient,
    _nothing,
)
_mm_op = declare(
    "scaled_mm_svdquant_w4a4(Tensor act, Tensor wgt, Tensor ascales, Tensor wscales, Tensor lora_act_in, "
    "Tensor lora_up, Tensor? bias, bool act_unsigned) -> Tensor",
    _mm,
    _mm_fake,
    _no_gradient,
    _nothing,
)
