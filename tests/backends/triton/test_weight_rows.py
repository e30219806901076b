from __future__ import annotations

import os
import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from lowbit.backends.triton import weight_rows
from lowbit.backends.triton.compile_ahead import compile_launch
from lowbit.backends.triton.device import Target, assume
from lowbit.backends.triton.tuning import record
from lowbit.formats import parse_spec
from lowbit.layouts.base import get_layout

HOPPER = Target("cuda", (9, 0))
N, K = 4096, 12288


def assembly(spec: str, layout: str, dtype: torch.dtype) -> str:
    """The PTX that decodes a large weight, in its first config."""
    fmt = parse_spec(spec)
    parts = fmt.empty_parts((N, K), torch.device("meta"), torch.bfloat16)
    if layout:
        parts = get_layout(layout, fmt).pack(fmt, parts)
    with assume(HOPPER), record() as launches:
        out = torch.empty((N, K), dtype=dtype, device="meta")
        weight_rows.describe(fmt, parts, K, layout).decode(out, 0, N)
    made = compile_launch(launches[0], launches[0].configs[0], HOPPER)
    assert made.spills == 0
    return made.assembly


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("spec", "layout", "loads"),
    [("nvfp4", "", "b32"), ("nvfp4", "words128", "v4.b32"), ("int8", "", "b64"), ("awq_w4a16", "words128", "v4.b32")],
)
def test_memory_is_accessed_in_whole_pieces(spec, layout, loads, dtype):
    """Every store is of 16 bytes, and a thread loads the codes of its columns at once."""
    found = assembly(spec, layout, dtype)
    assert set(re.findall(r"st\.global\.(?:L\w+::\w+\.)*([\w.]+)", found)) == {"v4.b32"}
    assert loads in re.findall(r"ld\.global\.(?:L\w+::\w+\.)*([\w.]+)", found)


def test_product_and_sum_are_rounded_one_after_the_other():
    """The compiler joins no product with the sum after it, as that would round once where the format rounds twice."""
    found = assembly("awq_w4a16", "", torch.bfloat16)
    assert "mul.rn.f32" in found
    assert "fma." not in found
