"""TensorCoreSVDQuantW4A4Layout: 4-bit weights and activations beside a low-rank branch, plain or in tiles.

`dequantize()` gives the effective weight, exactly (comfy_kitchen multiplies by an identity that it rounds to 4 bits).
With `act_unsigned` the stored bias of a layer holds the shift's share, so a product with the dequantized weight needs
`SvdquantW4A4.bias_share` on top of it; products with the tensor itself are right as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit import ops
from lowbit.errors import UnsupportedError
from lowbit.formats.parts import Parts
from lowbit.formats.svdquant_w4a4 import SvdquantW4A4
from lowbit.integrations.kitchen.tensor.base import BaseLayoutParams
from lowbit.integrations.kitchen.tensor.products import Multiplied, register
from lowbit.integrations.kitchen.tensor.quantized import QuantizedTensor
from lowbit.layouts import svdquant_tiles as tiles
from lowbit.numerics.int4_matmul import GROUP

LAYOUT = "TensorCoreSVDQuantW4A4Layout"


class TensorCoreSVDQuantW4A4Layout(Multiplied):
    """svdquant_w4a4. Weights can be quantized here too, from the weight alone."""

    MIN_SM_VERSION = (8, 0)
    QUANTIZES_INPUT = False

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """`scale` [K/64, N], `proj_down` [K, R], `proj_up` [N, R], `smooth_factor` [K]; tiles have their own shapes."""

        proj_down: Tensor
        proj_up: Tensor
        smooth_factor: Tensor
        act_unsigned: bool = False
        transposed: bool = False

        def _tensor_fields(self) -> list[str]:
            return ["scale", "proj_down", "proj_up", "smooth_factor"]

        def _validate_tensor_fields(self) -> None:
            """All stay in the dtype of the weight."""

    @classmethod
    def quantize(cls, tensor: Tensor, **kwargs: Any) -> tuple[Tensor, Params]:
        """Codes of a weight [N, K]: `rank` (32), `stochastic_rounding` (a seed above 0).

        Given `smooth_factor` and `proj_down` are kept, so that projections that shared them go on sharing. Raises
        `UnsupportedError` with `act_unsigned`, whose stored bias depends on the codes.
        """
        if kwargs.get("act_unsigned"):
            raise UnsupportedError(
                "an act_unsigned layer keeps a share of its weight in the bias, which new codes would contradict; "
                "quantize the layer with lowbit.quantize_, or apply the LoRA at run time"
            )
        weight, seed = tensor.detach(), kwargs.get("stochastic_rounding") or None
        smooth, down = kwargs.get("smooth_factor"), kwargs.get("proj_down")
        if smooth is None or down is None:
            parts = SvdquantW4A4(rank=int(kwargs.get("rank", 32))).quantize(weight, seed=seed)
        else:
            fmt = SvdquantW4A4(rank=down.shape[1])
            parts = fmt.quantize(weight, params=_fitted(fmt, weight, smooth, down), seed=seed)
        sides = parts["proj_down"], parts["proj_up"], parts["smooth_factor"]
        return parts["qdata"], cls.Params(parts["scale"], tensor.dtype, tuple(tensor.shape), *sides)

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        """deq(W4) / smooth + proj_up proj_down^T, in float32, cast once."""
        shape = cls.get_logical_shape_from_storage(tuple(qdata.shape))
        return ops.dequantize(_parts(qdata, params), _spec(qdata, params), shape, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Codes, scales, smoothing factors, down and up projection."""
        params = qtensor.params
        return qtensor.qdata, params.scale, params.smooth_factor, params.proj_down, params.proj_up

    @classmethod
    def get_out_features_from_storage(cls, qdata: Tensor) -> int:
        """N, of plain codes or tiles."""
        return cls.get_logical_shape_from_storage(tuple(qdata.shape))[0]

    @classmethod
    def get_logical_shape_from_storage(cls, storage_shape: tuple[int, ...]) -> tuple[int, ...]:
        """(N, K) of codes [N, K/2] or of tiles [N/128, K/64, 32, 128]."""
        if len(storage_shape) == 4:
            return storage_shape[0] * tiles.ROWS, storage_shape[1] * GROUP
        return storage_shape[0], 2 * storage_shape[1]

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Params) -> dict[str, Tensor]:
        """All five by suffix."""
        return {
            "": qdata,
            "_scale": params.scale,
            "_proj_down": params.proj_down,
            "_proj_up": params.proj_up,
            "_smooth_factor": params.smooth_factor,
        }

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """Its smoothing factors and down projection."""
        params = qtensor.params
        return {
            "smooth_factor": params.smooth_factor,
            "proj_down": params.proj_down,
            "act_unsigned": params.act_unsigned,
        }

    @classmethod
    def product(cls, x: Any, weight: QuantizedTensor, bias: Tensor | None) -> Any:
        """The two 4-bit operands and the low-rank branch; with `act_unsigned` the shift is added here."""
        x, params, qdata = x.dequantize() if isinstance(x, QuantizedTensor) else x, weight.params, weight.qdata
        return ops.linear(x, _parts(qdata, params), bias, _spec(qdata, params))


def _parts(qdata: Tensor, params: Any) -> list[Tensor]:
    return [qdata, params.scale, params.smooth_factor, params.proj_down, params.proj_up]


def _spec(qdata: Tensor, params: Any) -> str:
    layout = f"@{tiles.NAME}" if qdata.dim() == 4 else ""
    return f"svdquant_w4a4(rank={params.proj_down.shape[1]},act_unsigned={params.act_unsigned}){layout}"


def _fitted(fmt: SvdquantW4A4, weight: Tensor, smooth: Tensor, down: Tensor) -> Parts:
    """Scales and up projection that fit a weight beside given smoothing factors and down projection."""
    shared: Parts = {"smooth_factor": smooth, "proj_down": down}
    fmt.check_weight(weight, "weight")
    pieces = []
    for start, stop in fmt.row_ranges(weight.shape[0], weight.shape[1]):
        rows = fmt.prepared(weight, start, stop, "weight")
        pieces.append(fmt.fit_stored(rows, shared, weight.dtype))
    scale = torch.cat([piece["scale"] for piece in pieces], dim=1)
    return {"scale": scale, "proj_up": torch.cat([piece["proj_up"] for piece in pieces]), **shared}


register(LAYOUT, TensorCoreSVDQuantW4A4Layout)
