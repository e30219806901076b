from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import use_backend
from lowbit.errors import UnsupportedError
from tests.support.cpu_linear import packed_weight
from tests.support.triton_linear import DEVICE, DTYPES, ROWS, TOKENS, check_linear, check_properties, require

require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero_point", ["False", "True"])
@pytest.mark.parametrize("group", [0, 16, 32, 128, 256, 1000])
def test_product(group, zero_point, dtype):
    """The product equals that of the dequantized weight for groups of every size, up to a whole row and past it."""
    spec = f"wna16(group_size={group},zero_point={zero_point})"
    for n in ROWS[:: 1 if group == 32 else 3]:
        check_linear(spec, n, 256, 3, dtype, layout="words128")
    for m in TOKENS[:: 1 if group == 32 else 3]:
        check_linear(spec, 35, 384, m, dtype, layout="words128", bias=m % 2 == 0)


@pytest.mark.parametrize("zero_point", ["False", "True"])
def test_properties(zero_point):
    """Gaps, leading axes and no tokens change nothing, and every call gives the same bits."""
    check_properties(f"wna16(zero_point={zero_point})", 36, 384, layout="words128")


def test_groups_across_blocks_are_refused():
    """Groups that begin inside a run of sixteen columns are refused in words."""
    packed, _ = packed_weight("wna16(group_size=96)", 8, 384, "words128")
    x = torch.zeros(1, 384, dtype=torch.float16, device=DEVICE)
    if DEVICE.type != "cpu":
        packed = packed.in_layout("").to(DEVICE).in_layout("words128")
    with use_backend("triton"), torch.inference_mode(), pytest.raises(UnsupportedError, match="groups of 96 columns"):
        torch.nn.functional.linear(x, packed)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["wna16", "wna16(group_size=32,zero_point=True)"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large(dtype, spec):
    """Shapes of real layers give the right product, for numbers of tokens on both sides of every crossover."""
    for m in (1, 7, 16, 33, 300, 1500):
        check_linear(spec, 12288, 3072, m, dtype, layout="words128")
