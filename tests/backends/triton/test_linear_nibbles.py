from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import preferred_layout
from lowbit.formats import parse_spec
from tests.support.triton_linear import DEVICE, DTYPES, ON_GPU, check_linear, check_properties, require
from tests.support.triton_rows import in_layout, random_parts, refusal

require()
from lowbit.backends.triton import linear_nibbles, linear_plain  # noqa: E402  (needs Triton)
from lowbit.backends.triton.device import Target, assume  # noqa: E402
from lowbit.backends.triton.tuning import record  # noqa: E402

SPECS = (
    "awq_w4a16(group_size=8)", "awq_w4a16", "awq_w4a16(group_size=256)", "wna16", "wna16(group_size=0,zero_point=True)",
    "wna16(group_size=32,zero_point=True)", "nvfp4", "nvfp4(global_scale_divides=True,row_global_scale=True)", "mxfp4",
)  # fmt: skip
DECODED = ("awq_w4a16(group_size=24)", "wna16(bits=8,zero_point=True)", "wna16(bits=2)")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_product(spec, dtype):
    """The product equals that of the dequantized weight, for odd numbers of rows and of tokens."""
    for n, m in ((1, 3), (70, 9)):
        check_linear(spec, n, 768 if m == 3 else 256, m, dtype, layout="", bias=m != 3)


@pytest.mark.parametrize("spec", ["awq_w4a16", "nvfp4"])
def test_numbers_of_tokens(spec):
    """Every number of tokens gives the same product, on both sides of where the weight is decoded first."""
    for m in (5, 17, linear_plain.FEW, linear_plain.FEW + 1):
        check_linear(spec, 20, 128, m, torch.float16, layout="", bias=m % 2 == 0)


@pytest.mark.parametrize("spec", [*SPECS, *DECODED])
def test_ragged_columns(spec):
    """Numbers of columns that are no multiple of a block, a word or a group give the right product."""
    for k in (90, 136, 264):
        if parse_spec(spec).check_shape(5, k) is None:
            check_linear(spec, 5, k, 4, torch.float16, layout="")


@pytest.mark.parametrize("spec", DECODED)
def test_what_the_fused_kernel_does_not_take(spec):
    """Other codes and groups are decoded first, with the same result."""
    check_linear(spec, 33, 240, 3, torch.float16, layout="")


@pytest.mark.parametrize("zero", [torch.bfloat16, torch.float32], ids=str)
def test_zeros_of_another_dtype(zero):
    """Weights are made in 16 bits only where neither scales nor zeros are rounded by that."""
    fmt = parse_spec("awq_w4a16")
    parts = fmt.empty_parts((64, 256), torch.device("meta"), torch.bfloat16)
    parts["zero"] = parts["zero"].to(zero)
    x = torch.empty((3, 256), dtype=torch.bfloat16, device="meta")
    with assume(Target("cuda", (9, 0))), record() as launches:
        linear_plain.linear_plain(fmt, x, parts, None)
    assert launches[0].arguments["HALF_SCALES"] == (zero == torch.bfloat16)


def test_turing_multiplies_the_decoded_weight():
    """Triton has no tensor-core code for compute capability 7.5, so there nothing but the decoder is launched."""
    fmt = parse_spec("awq_w4a16")
    parts = fmt.empty_parts((64, 256), torch.device("meta"), torch.float16)
    x = torch.empty((3, 256), dtype=torch.float16, device="meta")
    for capability, name in (((7, 5), "_decode_rows"), ((8, 0), "_linear_nibbles")):
        with assume(Target("cuda", capability)), record() as launches:
            linear_plain.linear_plain(fmt, x, parts, None)
        assert launches[0].kernel.name == name


@pytest.mark.parametrize("spec", ["awq_w4a16", "nvfp4"])
def test_properties(spec):
    """Gaps, leading axes and no tokens change nothing, and every call gives the same bits."""
    check_properties(spec, 20, 128, layout="")


@pytest.mark.parametrize("spec", ["awq_w4a16", "wna16(zero_point=True)"])
def test_memory(spec):
    """Rows with gaps, odd addresses and transposed scales are multiplied like any other."""
    fmt = parse_spec(spec)
    parts = in_layout(fmt, random_parts(fmt, 9, 256), "")
    x = torch.randn(3, 256).half().to(DEVICE)
    wanted = linear_plain.linear_plain(fmt, x, parts, None)
    codes = parts["qdata"].view(torch.uint8)
    for offset in (4, 1):
        room = torch.zeros((9, codes.shape[1] + 8), dtype=torch.uint8, device=DEVICE)[:, offset:][:, : codes.shape[1]]
        room.copy_(codes)
        moved = {**parts, "qdata": room.view(parts["qdata"].dtype), "scale": parts["scale"].t().contiguous().t()}
        assert linear_nibbles.fits(64, moved["qdata"]) == (offset == 4)
        torch.testing.assert_close(linear_plain.linear_plain(fmt, x, moved, None), wanted, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("spec", ["awq_w4a16", "wna16", "nvfp4", "mxfp4"])
def test_words128_is_still_preferred(spec):
    """A kernel for plain parts does not change the layout that weights are loaded in."""
    assert preferred_layout("linear", parse_spec(spec), 48, 256, DEVICE.type) == "words128"
    assert preferred_layout("linear", parse_spec(spec), 48, 192, DEVICE.type) == ""


@pytest.mark.parametrize(
    ("spec", "dtype", "why"),
    [
        ("wna16(bits=3)", torch.float16, "codes of 3 bits"),
        ("wna16(act_order=True)", torch.float16, "scattered"),
        ("awq_w4a16(group_size=3)", torch.float16, "groups of 3 columns"),
        ("nvfp4", torch.float64, "x is float64"),
    ],
)
def test_refusals(spec, dtype, why):
    """What cannot be multiplied is refused in words."""
    fmt = parse_spec(spec)
    x = torch.zeros((1, 384), dtype=dtype, device=DEVICE)
    assert why in refusal("linear", spec, "", fmt, x, in_layout(fmt, random_parts(fmt, 4, 384), ""), None)


@pytest.mark.skipif(ON_GPU, reason="a GPU rounds bfloat16 correctly")
def test_bfloat16_in_the_interpreter_is_refused():
    """The interpreter's bfloat16 is not the reference's, and it says so."""
    fmt = parse_spec("mxfp4")
    x = torch.zeros((1, 64), dtype=torch.bfloat16)
    assert "bfloat16" in refusal("linear", "mxfp4", "", fmt, x, random_parts(fmt, 4, 64), None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", ["awq_w4a16", "wna16(group_size=32,zero_point=True)", "nvfp4", "mxfp4"])
def test_large(spec, dtype):
    """The shape of a real layer gives the right product, for numbers of tokens on both sides of every crossover."""
    for m in (1, 33, 256, 300):
        check_linear(spec, 2048, 3072, m, dtype, layout="")
