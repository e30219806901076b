from __future__ import annotations

import os
import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from lowbit.backends.triton import gguf_blocks, gguf_rows
from lowbit.backends.triton.compile_ahead import Compiled, compile_launch
from lowbit.backends.triton.device import Target, assume
from lowbit.backends.triton.tuning import record
from lowbit.formats import parse_spec
from lowbit.numerics.gguf_blocks import READABLE

HOPPER = Target("cuda", (9, 0))


def compiled(name: str) -> Compiled:
    """What decodes a large weight of a type to bfloat16, in its first config."""
    fmt, shape = parse_spec(f"gguf(type={name})"), (4096, 3072)
    parts = fmt.empty_parts(shape, torch.device("meta"))
    with assume(HOPPER), record() as launches:
        gguf_rows.dequantize(fmt, parts, shape, torch.bfloat16)
    return compile_launch(launches[0], launches[0].configs[0], HOPPER)


@pytest.mark.parametrize(
    ("name", "loads"), [("Q8_0", "b16"), ("Q4_1", "b32"), ("Q4_K", "v2.b32"), ("Q6_K", "b16"), ("MXFP4", "b8")]
)
def test_memory_is_accessed_in_whole_pieces(name, loads):
    """Every store is of 16 bytes, codes are loaded as wide as the size of a block allows, and no value moves about."""
    made = compiled(name)
    assert set(re.findall(r"st\.global\.(?:L\w+::\w+\.)*([\w.]+)", made.assembly)) == {"v4.b32"}
    assert loads in re.findall(r"ld\.global\.(?:L\w+::\w+\.)*([\w.]+)", made.assembly)
    assert made.spills == made.shared == 0


def test_product_and_sum_are_rounded_one_after_the_other():
    """The compiler joins no product with the sum after it, as that would round once where ggml rounds twice."""
    found = compiled("Q4_K").assembly
    assert "mul.rn.f32" in found
    assert "fma." not in found


def test_every_type_that_is_read_is_decoded():
    """The kernels know all types of the format."""
    assert set(gguf_blocks.TYPES) == set(READABLE)
