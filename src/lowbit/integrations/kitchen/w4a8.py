"""The W4A8 (and W6A8) functions of comfy_kitchen, on the format `w4a8_codebook`."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import ops
from lowbit.errors import FormatError, PartsError, UnsupportedError
from lowbit.formats.parts import Parts
from lowbit.formats.w4a8_codebook import W4A8Codebook
from lowbit.integrations.kitchen.input_act import activated, with_residual

_BETWEEN = (1.0, 0.96, 0.98, 1.02, 1.04)  # float8 neighbours are 1.06 to 1.125 apart
Quantized = tuple[Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None"]


def quantize_w4a8_int8_weight(
    weight: Tensor,
    group_size: int = 16,
    convrot_groupsize: int = 256,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float8_e4m3fn,
    codebook: bool = True,
    codebook_tensor: Tensor | None = None,
    stochastic_rounding: int = 0,
    bits: int = 4,
    scale_search: bool = True,
) -> Quantized:
    """weight [N, K] -> (bytes, s_rel [N, K/g], s_channel [N], correction [K/g, N] or None, codebook [16] or None).

    `symmetric=False` stores a correction and no codebook. `codebook_tensor` is used as it is. Group scales are the best
    of their float8 neighbours; with `scale_dtype=float32` values in between are tried too, unless `scale_search` is
    False. Raises `FormatError` for options that do not go together, `WeightError` for a weight that cannot be held.
    """
    if scale_dtype not in (torch.float32, torch.float8_e4m3fn):
        raise FormatError(f"scale_dtype must be float32 or float8_e4m3fn, got {scale_dtype}")
    if bits == 6 and not symmetric:
        raise FormatError("6-bit storage is symmetric only")
    fmt = _format(bits, group_size, convrot_groupsize, symmetric and codebook and bits == 4, not symmetric)
    weight, params = weight.detach(), None
    if fmt.codebook and codebook_tensor is not None:
        params = _fitted(fmt, weight, codebook_tensor)
    seed = stochastic_rounding or None
    parts = fmt.quantize(weight, params=params, seed=seed)
    if scale_dtype == torch.float32:
        parts["s_rel"] = _finer(fmt, weight, parts) if scale_search else parts["s_rel"].float()
        parts = fmt.quantize(weight, params={name: parts[name] for name in fmt.part_names[1:]}, seed=seed)
    correction = parts.get("correction")
    correction = None if correction is None else correction.to(weight.dtype)
    return parts["qdata"], parts["s_rel"], parts["s_channel"], correction, parts.get("codebook")


def dequantize_w4a8_int8_weight(
    qdata: Tensor,
    s_rel: Tensor,
    s_channel: Tensor,
    codebook: Tensor | None = None,
    correction: Tensor | None = None,
    group_size: int = 16,
    convrot_groupsize: int = 256,
    output_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The weight [N, K] in its own basis: decoded and rotated back in float32, cast once."""
    fmt, parts = described(qdata, s_rel, s_channel, codebook, correction, group_size, convrot_groupsize)
    shape = (qdata.shape[0], s_rel.shape[1] * group_size)
    return ops.dequantize(parts, str(fmt), shape, output_dtype)


def w4a8_int8_linear(
    x: Tensor,
    qdata: Tensor,
    s_rel: Tensor,
    s_channel: Tensor,
    codebook: Tensor | None = None,
    correction: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 16,
    convrot_groupsize: int = 256,
    out_dtype: torch.dtype = torch.bfloat16,
    mma_packed: bool = False,
    input_act: str | None = None,
    input_act_weight: Tensor | None = None,
    input_act_eps: float = 0.0,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
) -> Tensor:
    """act(x) [..., K] @ W.T + bias [..., N] in `out_dtype`, with a `residual` residual + residual_scale * that.

    Each row of the rotated input is rounded to 8 bits, unless there is a correction. `mma_packed` weights exist only
    on comfy_kitchen's CUDA backend: `UnsupportedError`.
    """
    if mma_packed:
        raise UnsupportedError("this weight is in comfy_kitchen's resident CUDA order; pass the stored tensors")
    x = activated(x, input_act, input_act_weight, input_act_eps)
    fmt, parts = described(qdata, s_rel, s_channel, codebook, correction, group_size, convrot_groupsize)
    k = s_rel.shape[1] * group_size
    if x.shape[-1] != k:
        raise PartsError(f"Input K={x.shape[-1]} does not match qdata K={k}")
    direct = residual is None and x.dtype == out_dtype  # otherwise the result is rounded once, after all of it
    out = ops.linear(x if direct else x.float(), parts, bias, str(fmt))
    return out.to(out_dtype) if residual is None else with_residual(out, residual, residual_scale, out_dtype)


def described(
    qdata: Tensor,
    s_rel: Tensor,
    s_channel: Tensor,
    codebook: Tensor | None,
    correction: Tensor | None,
    group_size: int,
    rotation: int,
) -> tuple[W4A8Codebook, list[Tensor]]:
    """The format that these tensors are stored in, its bits read from their widths, and its parts.

    Raises `PartsError` for tensors that do not fit together.
    """
    if qdata.dim() != 2 or qdata.dtype != torch.int8 or s_rel.dim() != 2:
        raise PartsError(
            f"packed weight is {qdata.dtype} {list(qdata.shape)} with s_rel {list(s_rel.shape)}, expected int8 "
            "[N, K/2] or [N, 3K/4] and [N, K/group_size]"
        )
    n, k = qdata.shape[0], s_rel.shape[1] * group_size
    bits = 8 * qdata.shape[1] // k if k else 0
    if bits not in (4, 6) or bits * k != 8 * qdata.shape[1]:
        raise PartsError(f"packed row width {qdata.shape[1]} does not match K={k} at 4 or 6 bits")
    fmt = _format(bits, group_size, rotation, codebook is not None, correction is not None)
    why = fmt.check_shape(n, k)
    if why:
        raise PartsError(f"a weight [{n}, {k}] {why}")
    given = {"qdata": qdata, "s_rel": s_rel, "s_channel": s_channel, "codebook": codebook, "correction": correction}
    for name, shape in fmt.part_shapes(n, k).items():
        part = given[name]
        if part is not None and tuple(part.shape) != tuple(shape):
            raise PartsError(f"{name} must have shape {list(shape)}, got {list(part.shape)}")
    if codebook is not None:
        given["codebook"] = codebook.float()
    return fmt, [part for name in fmt.part_names if (part := given[name]) is not None]


def _finer(fmt: W4A8Codebook, weight: Tensor, parts: Parts) -> Tensor:
    """For each group the float32 scale near its float8 one that loses least of the weight, [N, K/g]."""
    out = torch.empty(parts["s_rel"].shape, dtype=torch.float32, device=weight.device)
    shared = {name: parts[name] for name in ("codebook",) if name in parts}
    for start, stop in fmt.row_ranges(weight.shape[0], weight.shape[1]):
        rows = fmt.prepared(weight, start, stop, "weight")
        params: Parts = {"s_channel": parts["s_channel"][start:stop], **shared}
        if "correction" in parts:
            params["correction"] = parts["correction"][:, start:stop]
        base = parts["s_rel"][start:stop].float()
        best, least = base, torch.full_like(base, torch.inf)
        for factor in _BETWEEN:
            made = fmt.project(rows, {**params, "s_rel": base * factor})
            error = (made - rows).square_().unflatten(1, (base.shape[1], fmt.group_size)).sum(dim=-1)
            best = torch.where(error < least, base * factor, best)
            least = torch.minimum(error, least)
        out[start:stop] = best
    return out


def _format(bits: int, group_size: int, rotation: int, codebook: bool, correction: bool) -> W4A8Codebook:
    return W4A8Codebook(bits=bits, group_size=group_size, rotation=rotation, codebook=codebook, correction=correction)


def _fitted(fmt: W4A8Codebook, weight: Tensor, codebook: Tensor) -> Parts:
    """The scales that fit a weight under a given codebook."""
    table = codebook.to(device=weight.device, dtype=torch.float32)
    if tuple(table.shape) != (16,):
        raise PartsError(f"codebook_tensor has shape {list(table.shape)}, expected [16]")
    fmt.check_weight(weight, "weight")
    pieces = []
    for start, stop in fmt.row_ranges(weight.shape[0], weight.shape[1]):
        rows = fmt.prepared(weight, start, stop, "weight")
        pieces.append(fmt.fit_stored(rows, {"codebook": table}, weight.dtype))
    s_rel = torch.cat([piece["s_rel"].view(torch.uint8) for piece in pieces]).view(torch.float8_e4m3fn)
    return {"s_rel": s_rel, "s_channel": torch.cat([piece["s_channel"] for piece in pieces]), "codebook": table}
