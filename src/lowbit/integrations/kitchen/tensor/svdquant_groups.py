"""Several SVDQuant projections of one input: its quantization and low-rank activations are computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit import ops
from lowbit.errors import LowbitError, PartsError
from lowbit.integrations.kitchen.tensor.quantized import QuantizedTensor
from lowbit.integrations.kitchen.tensor.svdquant_w4a4 import LAYOUT, TensorCoreSVDQuantW4A4Layout
from lowbit.numerics.int4_matmul import GELU_SHIFT


class NotSvdquantError(LowbitError, TypeError):
    """A weight is not one of the SVDQuant layout."""


def svdquant_w4a4_can_share_quant(weights: Sequence[Tensor], *, validate: bool = False, trust: bool = False) -> bool:
    """Whether SVDQuant weights have the same smoothing factors, down projection and `act_unsigned`.

    The same memory is the same; otherwise `validate` compares values and `trust` takes them for equal.
    """
    if not weights or not all(_is_svdquant(weight) for weight in weights):
        return False
    first = weights[0].params  # type: ignore[attr-defined]
    return all(_shares(weight.params, first, validate, trust) for weight in weights[1:])  # type: ignore[attr-defined]


def svdquant_w4a4_grouped_linear(
    input_tensor: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    validate_shared_quant: bool = False,
    assume_shared_quant: bool = False,
) -> tuple[Tensor, ...]:
    """linear(input [..., K], weight, bias) for each weight. Raises `PartsError` when they share nothing."""
    if not weights:
        return ()
    added = _biases(weights, biases)
    _check_shared(weights, validate_shared_quant, assume_shared_quant)
    x = input_tensor.reshape(-1, input_tensor.shape[-1]).float()
    first = weights[0].params  # type: ignore[attr-defined]
    shifted = x + GELU_SHIFT if first.act_unsigned else x
    codes, scales, low = ops.quantize_svdquant_w4a4(
        shifted, first.smooth_factor, first.proj_down, 1, first.act_unsigned, x
    )
    outputs = []
    for weight, bias in zip(weights, added, strict=True):
        qdata, wscales, _, _, up = TensorCoreSVDQuantW4A4Layout.get_plain_tensors(weight)  # type: ignore[arg-type]
        up = up if up.dtype == input_tensor.dtype else up.float()  # the result has its dtype: rounded once
        out = ops.scaled_mm_svdquant_w4a4(codes, qdata, scales, wscales, low, up, bias, first.act_unsigned)
        outputs.append(out.to(input_tensor.dtype).reshape(*input_tensor.shape[:-1], out.shape[1]))
    return tuple(outputs)


def svdquant_w4a4_fuse_linear_weights(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    validate_shared_quant: bool = False,
    assume_shared_quant: bool = False,
) -> tuple[QuantizedTensor, Tensor | None, tuple[int, ...]]:
    """One wide weight, its bias (None if no weight has one), and the number of rows each contributed.

    Raises `PartsError` when the weights share nothing, or are partly in tiles.
    """
    if not weights:
        raise PartsError("expected at least one weight")
    added = _biases(weights, biases)
    _check_shared(weights, validate_shared_quant, assume_shared_quant)
    plain = [TensorCoreSVDQuantW4A4Layout.get_plain_tensors(weight) for weight in weights]  # type: ignore[arg-type]
    if len({qdata.dim() for qdata, *_ in plain}) > 1:
        raise PartsError("cannot fuse plain and tile-packed SVDQuant weights; repack them alike first")
    rows = tuple(TensorCoreSVDQuantW4A4Layout.get_out_features_from_storage(qdata) for qdata, *_ in plain)
    tiled, first = plain[0][0].dim() == 4, weights[0].params  # type: ignore[attr-defined]
    params = TensorCoreSVDQuantW4A4Layout.Params(
        scale=torch.cat([scale for _, scale, *_ in plain], dim=0 if tiled else 1),
        orig_dtype=first.orig_dtype,
        orig_shape=(sum(rows), first.orig_shape[1]),
        proj_down=first.proj_down,
        proj_up=torch.cat([up for *_, up in plain]),
        smooth_factor=first.smooth_factor,
        act_unsigned=first.act_unsigned,
    )
    weight = QuantizedTensor(torch.cat([qdata for qdata, *_ in plain]), LAYOUT, params)
    if all(bias is None for bias in added):
        return weight, None, rows
    whole = [params.proj_up.new_zeros(n) if bias is None else bias for bias, n in zip(added, rows, strict=True)]
    return weight, torch.cat(whole), rows


def svdquant_w4a4_fused_grouped_linear(
    input_tensor: Tensor, fused_weight: Tensor, fused_bias: Tensor | None, output_features: Sequence[int]
) -> tuple[Tensor, ...]:
    """linear with a weight from `svdquant_w4a4_fuse_linear_weights`, split into its parts."""
    if not isinstance(fused_weight, QuantizedTensor) or not _is_svdquant(fused_weight):
        raise NotSvdquantError(f"fused_weight must be a {LAYOUT} QuantizedTensor, not {type(fused_weight).__name__}")
    out = TensorCoreSVDQuantW4A4Layout.product(input_tensor, fused_weight, fused_bias)
    return tuple(out.split(tuple(output_features), dim=-1))


def _is_svdquant(weight: Tensor) -> bool:
    return (
        isinstance(weight, QuantizedTensor)
        and issubclass(weight.layout_cls, TensorCoreSVDQuantW4A4Layout)
        and not weight.params.transposed
    )


def _shares(params: TensorCoreSVDQuantW4A4Layout.Params, first: object, validate: bool, trust: bool) -> bool:
    if params.act_unsigned != first.act_unsigned:  # type: ignore[attr-defined]
        return False
    for name in ("smooth_factor", "proj_down"):
        mine, other = getattr(params, name), getattr(first, name)
        if (mine.shape, mine.dtype, mine.device) != (other.shape, other.dtype, other.device):
            return False
        if trust or mine.data_ptr() == other.data_ptr():
            continue
        if not validate or not torch.equal(mine, other):
            return False
    return True


def _biases(weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None) -> Sequence[Tensor | None]:
    added = (None,) * len(weights) if biases is None else biases
    if len(added) != len(weights):
        raise PartsError(f"got {len(weights)} weights but {len(added)} biases")
    return added


def _check_shared(weights: Sequence[Tensor], validate: bool, trust: bool) -> None:
    if not svdquant_w4a4_can_share_quant(weights, validate=validate, trust=trust):
        raise PartsError(
            "SVDQuant weights do not share quantization parameters (smooth_factor, proj_down, act_unsigned); "
            "run them one by one, or pass validate_shared_quant=True if only their memory differs"
        )
