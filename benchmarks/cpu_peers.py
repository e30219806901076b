"""What our linears are compared with: PyTorch's own products, and other people's for the same formats.

comfy-kitchen's products of nvfp4 and mxfp8 raise on a CPU, so what stands here is what a program does instead, as it
does for fp8: decode the weight, then multiply. torchao has no CPU kernels in its package for 4 bits; its tensor for
them calls `_weight_int4pack_mm_for_cpu`, which is here by itself.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import cpu_ggml
from benchmarks.cpu_linears import W4A8, Drawn, Entry, WrongResultError, check_error, copies_for, group_of
from lowbit.layouts.scale_128x4 import swizzle
from lowbit.numerics.packing import swap_nibbles, unpack_nibbles

LIMIT = 0.05  # of a relative error: to notice a peer that multiplies something else, not to judge its rounding
KITCHEN, TORCHAO = "comfy_kitchen", "torchao"
SLOW_ROUNDS = 2
COLUMNS = 256
BF16, FLOAT32 = "bf16 F.linear", "float32 F.linear"
INT4PACK, INT8PACK, INT_MM = "_weight_int4pack_mm_for_cpu", "_weight_int8pack_mm", "_int_mm"
FOUR_BITS = ("awq_w4a16", "nvfp4", W4A8, "svdquant_w4a4")
INT8 = ("int8", "int8(granularity=tensor)", "int8(rotation=256)")
ROTATION = 256


def peers(drawn: Mapping[str, Drawn], n: int, k: int, cache: int, *, others: bool = True) -> list[Entry]:
    """All peers of the formats drawn; without `others`, PyTorch's own alone."""
    found = list(_torch(drawn, n, k, cache))
    if others and importlib.util.find_spec(KITCHEN):
        found += _kitchen(drawn, cache)
    if others and importlib.util.find_spec(TORCHAO) and set(drawn) & set(INT8):
        found.append(_torchao_int8(n, k, cache))
    if others and cpu_ggml.why_not() is None:
        found += [cpu_ggml.product(spec, one, cache) for spec, one in drawn.items() if one.fmt.name == "gguf"]
    return found


def missing() -> dict[str, str]:
    """Peers that are not there, and why."""
    found = {name: "not installed" for name in (KITCHEN, TORCHAO) if importlib.util.find_spec(name) is None}
    why = cpu_ggml.why_not()
    return found if why is None else {**found, "ggml": why}


def _copied(parts: Any, cache: int) -> tuple[list[Any], int]:
    """Copies of a tuple of tensors that together exceed the cache, and the bytes of one."""
    nbytes = sum(part.numel() * part.element_size() for part in parts)
    return [parts, *(tuple(p.clone() for p in parts) for _ in range(copies_for(nbytes, cache) - 1))], nbytes


def _entry(
    name: str, parts: tuple[Tensor, ...], cache: int, run: Callable[..., Tensor], right: Callable[..., Tensor], **more
) -> Entry:
    weights, nbytes = _copied(parts, cache)

    def check(x: Tensor, y: Tensor) -> float:
        return check_error(name, y, right(x), LIMIT)

    return Entry(name, lambda x, own: run(x, *own), weights, nbytes, check, **more)


def _dense(n: int, k: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1)).mul_(k**-0.5).bfloat16()


def _check_some(name: str, x: Tensor, y: Tensor, w: Tensor) -> float:
    """The error in some columns that are spread over all: a whole float64 product takes longer than what it checks."""
    some = slice(None, None, max(1, w.shape[0] // COLUMNS))
    return check_error(name, y[:, some], x.double() @ w[some].double().t(), LIMIT)


def _torch(drawn: Mapping[str, Drawn], n: int, k: int, cache: int) -> Iterator[Entry]:
    w = _dense(n, k)
    for name, weight, dtype in ((BF16, w, torch.bfloat16), (FLOAT32, w.float(), torch.float32)):
        weights, nbytes = _copied((weight,), cache)
        check = partial(_check_some, name, w=w)
        yield Entry(name, lambda x, own: F.linear(x, *own), weights, nbytes, check, input=partial(_cast, dtype))
    if "awq_w4a16" in drawn:
        yield _int4pack(drawn["awq_w4a16"], cache)
    if "int8" in drawn:
        one = drawn["int8"]
        codes, scale = one.weight.parts["qdata"], one.weight.parts["scale"].flatten().bfloat16()
        yield _entry(INT8PACK, (codes, scale), cache, torch._weight_int8pack_mm, one.exact, of=INT8)  # noqa: SLF001
        yield _int_mm(codes, cache)


def _int4pack(drawn: Drawn, cache: int) -> Entry:
    """PyTorch's 4-bit product with the very weight of our awq_w4a16: its formula is the same."""
    parts, group = drawn.weight.parts, group_of(drawn.fmt)
    codes = unpack_nibbles(parts["qdata"]).int()
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)  # noqa: SLF001
    scales = torch.stack((parts["scale"], parts["zero"]), dim=-1).contiguous()

    def run(x: Tensor, weight: Tensor, scale_and_zero: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(x, weight, group, scale_and_zero)  # noqa: SLF001

    return _entry(INT4PACK, (packed, scales), cache, run, drawn.exact, of=FOUR_BITS)


def _int_mm(codes: Tensor, cache: int) -> Entry:
    """The integer product alone, of an input that is int8 already: no rounding of activations, no scales."""
    weights, nbytes = _copied((codes,), cache)

    def check(x: Tensor, y: Tensor) -> float:
        some = slice(None, None, max(1, codes.shape[0] // COLUMNS))
        if not torch.equal(y[:, some].double(), _codes(x).double() @ codes[some].double().t()):
            raise WrongResultError("_int_mm: its result is not the exact product; nothing is reported")
        return 0.0

    return Entry(INT_MM, lambda x, own: torch._int_mm(x, own[0].t()), weights, nbytes, check, of=INT8, input=_codes)


def _cast(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x.to(dtype)


def _codes(x: Tensor) -> Tensor:
    return (x.float() * (127 / x.abs().amax())).round().to(torch.int8)


def _kitchen(drawn: Mapping[str, Drawn], cache: int) -> Iterator[Entry]:
    from comfy_kitchen.backends.eager import awq, quantization as kitchen

    def entry(of: str, title: str, parts: tuple[Tensor, ...], run: Callable[..., Tensor], right, **more) -> Entry:
        name = f"comfy-kitchen {title}"
        return _entry(name, parts, cache, run, right, of=(of,), least=SLOW_ROUNDS, **more)

    for spec, one in drawn.items():
        parts, family = one.weight.parts, one.fmt.name
        if spec == "awq_w4a16":
            own = (parts["qdata"], parts["scale"], parts["zero"])
            group = group_of(one.fmt)
            yield entry(
                spec, "gemv_awq_w4a16", own, lambda x, *w, g=group: awq.gemv_awq_w4a16(x, *w, None, g), one.exact
            )
        elif spec in ("int8", "int8(rotation=256)"):
            turn = (None, torch.bfloat16, spec != "int8", ROTATION)
            title = "int8_linear" if spec == "int8" else "int8_linear, convrot"
            own = (parts["qdata"], parts["scale"])
            yield entry(spec, title, own, lambda x, *w, t=turn: kitchen.int8_linear(x, *w, *t), one.rounded)
        elif spec == "fp8_e4m3":
            own = (parts["qdata"], parts["scale"])
            yield entry(spec, "fp8, decoded", own, partial(_decoded, kitchen.dequantize_per_tensor_fp8), one.exact)
        elif spec == "nvfp4":
            own = (swap_nibbles(parts["qdata"]), parts["global_scale"], swizzle(parts["scale"]))
            yield entry(spec, "nvfp4, decoded", own, partial(_decoded, kitchen.dequantize_nvfp4), one.exact)
        elif spec == "mxfp8":
            own = (parts["qdata"], swizzle(parts["scale"]).view(torch.float8_e8m0fnu))
            yield entry(spec, "mxfp8, decoded", own, partial(_decoded, kitchen.dequantize_mxfp8), one.exact)
        elif family == "svdquant_w4a4" and not one.fmt.folds_bias:
            yield entry(spec, "svdquant_w4a4", tuple(parts.values()), _kitchen_svdquant, one.rounded)


def _decoded(decode: Callable[..., Tensor], x: Tensor, *weight: Tensor) -> Tensor:
    return F.linear(x, decode(*weight, torch.bfloat16))


def _kitchen_svdquant(x: Tensor, q: Tensor, scale: Tensor, smooth: Tensor, down: Tensor, up: Tensor) -> Tensor:
    from comfy_kitchen.backends.eager import svdquant

    act, scales, low = svdquant.quantize_svdquant_w4a4(x, smooth, down, 1)
    return svdquant.scaled_mm_svdquant_w4a4(act, q, scales, scale, low, up)


def _torchao_int8(n: int, k: int, cache: int) -> Entry:
    """torchao's int8 weights with activations rounded to int8 by row."""
    logging.disable(logging.WARNING)  # it tells what it cannot load for GPUs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            w = _dense(n, k)
            layer = nn.Linear(k, n, bias=False, device="meta")
            layer.weight = nn.Parameter(w.clone(), requires_grad=False)
            quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    finally:
        logging.disable(logging.NOTSET)
    name, nbytes = "torchao int8 dynamic", n * k + 2 * n

    layers = [layer, *(copy.deepcopy(layer) for _ in range(copies_for(nbytes, cache) - 1))]
    return Entry(
        name, lambda x, own: own(x), layers, nbytes, partial(_check_some, name, w=w), of=INT8, least=SLOW_ROUNDS
    )
