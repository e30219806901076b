"""torchao's Int4Tensor: two codes a byte, the even column in the low nibble, and what its zero points mean.

    zero_point                  codes      weight                          format
    [K/g, N] floats             signed     w = q * scale + zero_point      awq_w4a16
    [K/g, N] integers           unsigned   w = (q - zero_point) * scale    wna16

The second are ExecuTorch's, which used this class in that way for a while. Integer dtypes show it; zero points that are
integers by value alone could be either, so they are refused, and read when that dialect is named.
"""

# ruff: noqa: D102  (the methods are documented in `TensorClass`)

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.dialects.base import Read, StoredLayer
from lowbit.checkpoint.dialects.torchao_classes import TensorClass, integers, matrix, vector
from lowbit.checkpoint.dialects.torchao_description import Described, dtype_json
from lowbit.errors import PartsError
from lowbit.formats import Parts
from lowbit.formats.awq_w4a16 import AwqW4A16
from lowbit.formats.wna16 import WNA16
from lowbit.numerics.bit_packing import CODES

_LARGEST = 15  # of 4 bits
_FLIP = 0x88  # a two's-complement nibble and the same plus 8 differ in its highest bit


class Int4(TensorClass):
    """Int4Tensor; with `integer_zeros` all of them are ExecuTorch's."""

    kind = "Int4Tensor"
    formats = ("awq_w4a16",)
    required = ("qdata", "scale", "zero_point")
    config = ("Int4WeightOnlyConfig", 2)

    def __init__(self, *, integer_zeros: bool = False) -> None:
        self._integer_zeros = integer_zeros

    def find(self, found: Described, read: Read) -> StoredLayer:
        n, half = matrix(found)
        shape = found.sizes("shape") or (n, 2 * half)
        block, scale = found.sizes("block_size"), found.tensors.specs["scale"]
        if block is None or block[0] != 1 or shape != (n, 2 * half):
            raise found.tensors.error(
                f"is Int4Tensor of {list(shape)} in blocks of {block} with qdata {found.tensors.specs['qdata']}; only "
                "groups along K are read. Take the 16-bit model"
            )
        dtypes = {"scale": scale.dtype, "pre_quant_scale": torch.float32}
        scaled = vector(found, "act_pre_scale", shape[1])
        if scaled:
            dtypes["pre_quant_scale"] = found.tensors.specs["act_pre_scale"].dtype
        zero = found.tensors.specs["zero_point"].dtype
        if self._integer_zeros or not zero.is_floating_point:
            fmt: WNA16 | AwqW4A16 = WNA16(group_size=block[1], zero_point=True, pre_quant_scale=scaled)
            return self.layer(found, fmt, shape, scale.dtype, dtypes, ["zero points are integers, as ExecuTorch's"])
        fmt = AwqW4A16(group_size=block[1], pre_quant_scale=scaled)
        return self.layer(found, fmt, shape, scale.dtype, {**dtypes, "zero": zero})

    def why_not(self, stored: StoredLayer) -> str | None:
        if isinstance(stored.format, WNA16) and stored.shape[1] % CODES:
            return f"it has {stored.shape[1]} columns, and only multiples of {CODES} are read"
        if isinstance(stored.format, AwqW4A16) and stored.format.wzeros != "none":
            return "torchao does not say that its wzeros are exact in 16 bits; use awq_w4a16 without wzeros"
        return "torchao has no static scale for the input of Int4Tensor" if stored.format.input_scale else None

    def read(self, stored: StoredLayer, data: Mapping[str, Tensor]) -> Parts:
        qdata = data["qdata"].view(torch.uint8)
        extra = {name: data[name].reshape(-1) for name in ("pre_quant_scale",) if name in data}
        if isinstance(stored.format, WNA16):
            zeros = integers(stored, data["zero_point"], 0, _LARGEST).to(torch.uint8)
            by_row = {"scale": data["scale"].t().contiguous(), "zero_point": zeros.t().contiguous()}
            return {"qdata": qdata, **by_row, **extra}
        _refuse_either_reading(stored, data["zero_point"])
        return {
            "qdata": (qdata ^ _FLIP).view(torch.int8),
            "scale": data["scale"],
            "zero": data["zero_point"],
            **extra,
        }

    def write(self, stored: StoredLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        qdata = parts["qdata"].view(torch.uint8)
        if isinstance(stored.format, WNA16):
            data = {"scale": parts["scale"].t(), "zero_point": parts["zero_point"].t()}
        else:
            qdata = qdata ^ _FLIP
            data = {"scale": parts["scale"], "zero_point": parts["zero"]}
        unsigned = self.had(stored, "qdata") and self.kept(stored)["tensors"]["qdata"][0] == "uint8"
        written = {"qdata": qdata if unsigned else qdata.view(torch.int8), **data}
        written["zero_point"] = self.as_found(stored, "zero_point", written["zero_point"])
        if "pre_quant_scale" in parts:
            written["act_pre_scale"] = self.as_found(stored, "act_pre_scale", parts["pre_quant_scale"])
        return written

    def attributes(self, stored: StoredLayer) -> dict[str, Any]:
        return {
            "activation_dtype": self.attribute(stored, "activation_dtype", dtype_json(torch.bfloat16)),
            "block_size": [1, stored.format.config()["group_size"]],
            "shape": list(stored.shape),
        }


def _refuse_either_reading(stored: StoredLayer, zeros: Tensor) -> None:
    """Raise `PartsError` for floating zero points that torchao and ExecuTorch would read differently."""
    could = zeros.numel() and bool(zeros.any()) and torch.equal(zeros, zeros.round())
    if could and float(zeros.min()) >= 0 and float(zeros.max()) <= _LARGEST:
        raise PartsError(
            f"{stored.place}: all its zero points are integers from 0 to {_LARGEST}. To torchao they are offsets, "
            "w = q * scale + zero_point with signed q; in ExecuTorch's Int4Tensor they are codes, w = (q - zero_point) "
            "* scale with unsigned q, and nothing in the file says which. If ExecuTorch wrote it, name its dialect "
            "(--source-dialect executorch); else take the 16-bit model"
        )
