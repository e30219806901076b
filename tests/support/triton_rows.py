"""Weights for the kernels that decode rows: parts of any content, and comparison by bits."""

from __future__ import annotations

import numpy as np
import torch

from lowbit.dispatch import explain, select, use_backend
from lowbit.formats import Parts, parse_spec
from lowbit.formats.base import Format
from lowbit.layouts.base import get_layout
from tests.support.triton_linear import DEVICE

WORDS_SPECS = (
    "awq_w4a16", "awq_w4a16(group_size=8)", "awq_w4a16(group_size=24)", "awq_w4a16(group_size=384)", "wna16",
    "wna16(group_size=0)", "wna16(group_size=32,zero_point=True)", "wna16(group_size=256,zero_point=True)", "nvfp4",
    "nvfp4(global_scale_divides=True)", "nvfp4(row_global_scale=True,pre_quant_scale=True)", "mxfp4",
)  # fmt: skip
PLAIN_SPECS = (
    *WORDS_SPECS, "awq_w4a16(group_size=6)", "wna16(bits=2,group_size=24,zero_point=True)",
    "wna16(bits=8,group_size=0)",
    "wna16(bits=8,group_size=20,zero_point=True)", "nvfp4(global_scale_divides=True,row_global_scale=True)",
    "fp8_e4m3", "fp8_e4m3(granularity=row)", "fp8_e4m3(granularity=block,block_size=5x7)", "fp8_e5m2",
    "fp8_e5m2(granularity=block)", "mxfp8", "int8", "int8(granularity=tensor)", "int8(granularity=block)",
    "int8(pre_quant_scale=True)",
)  # fmt: skip


def random_parts(fmt: Format, n: int, k: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Parts:
    """Parts of a weight [n, k] with any code and, where scales are bytes, any scale: NaN and subnormal ones, too."""
    generator = torch.Generator().manual_seed(seed)
    parts = fmt.empty_parts((n, k), torch.device("cpu"), dtype)
    for name, part in parts.items():
        if part.dtype.itemsize == 1:
            most = 9 if name == "zero_point" else 256
            made = torch.randint(0, most, part.shape, generator=generator, dtype=torch.uint8).view(part.dtype)
        else:
            made = (torch.rand(part.shape, generator=generator) + 0.01).to(part.dtype)
        parts[name] = made
    return parts


def in_layout(fmt: Format, parts: Parts, layout: str) -> Parts:
    """The parts where kernels run, in a layout ("" leaves them plain)."""
    packed = get_layout(layout, fmt).packed(fmt, parts) if layout else parts
    return {name: part.to(DEVICE) for name, part in packed.items()}


def run(op: str, spec: str, layout: str, *args: object) -> torch.Tensor:
    """What the Triton kernel of an op gives, on the CPU; fails where it refuses."""
    with use_backend("triton"), np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN are meant
        return select(op, parse_spec(spec).name, layout, DEVICE.type, args).run(*args).cpu()


def refusal(op: str, spec: str, layout: str, *args: object) -> str:
    """What the Triton kernel of an op says to a call."""
    with use_backend("triton"):
        said = explain(op, parse_spec(spec).name, layout, DEVICE.type, args)
    return next(why for name, why in said.items() if name.startswith("triton:") and "reads layout" not in why)


def assert_same_bits(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Assert that two tensors are equal, bit by bit but for what a NaN holds."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert torch.equal(found.isnan(), wanted.isnan())
    bits = {2: torch.int16, 4: torch.int32}[wanted.dtype.itemsize]
    differ = (found.contiguous().view(bits) != wanted.contiguous().view(bits)) & ~wanted.isnan()
    assert not differ.any(), (int(differ.sum()), found[differ][:4], wanted[differ][:4])
