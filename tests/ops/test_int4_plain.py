"""int4_plain_mm: the arithmetic of ExecuTorch's op, its refusals, gradients, and PyTorch's own operator checks."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn import functional as F

from lowbit.errors import PartsError
from lowbit.layouts.coalesced_int4 import TAG
from lowbit.numerics import w4a8
from lowbit.numerics.w4a8 import quantize_blocks
from lowbit.ops import int4_plain_mm

LEADS = [(), (1,), (0,), (5,), (2, 3), (2, 0, 3)]


def operands(n=24, k=256, group=32, dtype=torch.bfloat16, qdata_dtype=torch.uint8):
    """Random codes, scales, and zero points that are not integers."""
    generator = torch.Generator().manual_seed(k + group)
    qdata = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator).view(qdata_dtype)
    scale = (torch.rand(n, k // group, generator=generator) + 0.5).to(dtype)
    zero = (torch.rand(n, k // group, generator=generator) * 15).to(dtype)
    return qdata, scale, zero


def decoded(qdata, scale, zero):
    """The weight in float64."""
    raw = qdata.view(torch.uint8)
    codes = torch.stack([raw & 15, raw >> 4], dim=-1).flatten(1).double().unflatten(1, (scale.shape[1], -1))
    return ((codes - zero.double().unsqueeze(-1)) * scale.double().unsqueeze(-1)).flatten(1)


def rounded(x):
    """x [M, K] as blocks of 32 in int8 leave it, number by number in plain Python, in float64."""
    rows = []
    for row in x.float().tolist():
        values = []
        for start in range(0, len(row), 32):
            block = torch.tensor(row[start : start + 32])
            d = block.abs().max() / torch.tensor(127.0)
            inverse = 1 / d if d > 0 else torch.tensor(0.0)
            values += [min(max(round(float(v * inverse)), -128), 127) * float(d) for v in block]
        rows.append(values)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("group", [8, 16, 32, 64, 256])
@pytest.mark.parametrize("qdata_dtype", [torch.uint8, torch.int8])
def test_equals_the_formula(group, qdata_dtype):
    """Rounded activations times the decoded weight, to the rounding of float32 sums, in whatever group."""
    x, weight = torch.randn(3, 256), operands(group=group, qdata_dtype=qdata_dtype)
    expected = rounded(x) @ decoded(*weight).t()
    y = int4_plain_mm(x, *weight, group_size=group, layout=TAG)
    assert (y.double() - expected).norm() / expected.norm() < 1e-6


def test_integers_are_exact():
    """With scales of 1 every value is an integer below 2**24, and the result is the integer product itself."""
    qdata, scale, zero = operands()
    x = torch.randint(-127, 128, (4, 256)).float()
    x[:, ::32] = 127  # a scale of 1 for every block
    ones, zero = torch.ones_like(scale), zero.round()
    y = int4_plain_mm(x, qdata, ones, zero, group_size=32, layout=TAG)
    assert torch.equal(y.double(), x.double() @ decoded(qdata, ones, zero).t())


def test_activations_are_rounded_half_to_even_by_blocks():
    """Each block of 32 has its own scale, amax / 127; ties go to even; a zero block stays zero."""
    x = torch.zeros(1, 96)
    x[0, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])
    x[0, 32:34] = torch.tensor([-254.0, 1.0])
    codes, scale = quantize_blocks(x)
    assert scale.tolist() == [[1.0, 2.0, 0.0]]
    assert codes[0, :4].tolist() == [127, 0, 2, -2]
    assert codes[0, 32:34].tolist() == [-127, 0]
    assert codes.dtype == torch.int8
    assert not codes[0, 64:].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-44])
def test_extreme_activations(value):
    """What is not finite makes its own row not finite and no other; the smallest numbers count as zero."""
    x, weight = torch.ones(2, 256), operands()
    x[0] = 0.0
    x[0, 40] = value
    y = int4_plain_mm(x, *weight, group_size=32, layout=TAG)
    assert bool(y[1].isfinite().all())
    assert bool(y[0].isfinite().any()) == (value == 1e-44)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_leading_axes_and_dtype(lead, dtype):
    """The result has the leading axes and the dtype of x, and lies within 1 % of the product with x as it is."""
    x, bias, (qdata, scale, zero) = torch.randn(*lead, 256).to(dtype), torch.randn(24).to(dtype), operands()
    scale = scale / 16  # within float16
    y = int4_plain_mm(x, qdata, scale, zero, bias, group_size=32, layout=TAG)
    assert y.shape == (*lead, 24)
    assert y.dtype == dtype
    if y.numel():
        expected = F.linear(x.double(), decoded(qdata, scale, zero), bias.double())
        assert (y.double() - expected).norm() / expected.norm() < 0.01


def test_pieces_cover_everything(monkeypatch):
    """However small the temporaries are, every row, column and group counts once."""
    x, weight, bias = torch.randn(5, 256), operands(), torch.randn(24)
    whole = int4_plain_mm(x, *weight, bias, group_size=32, layout=TAG)
    monkeypatch.setattr(w4a8, "_PIECE", 600)
    torch.testing.assert_close(int4_plain_mm(x, *weight, bias, group_size=32, layout=TAG), whole, rtol=1e-6, atol=1e-5)


def test_rejects_native_layout():
    """K = 256, groups of 32, N = 16: scales [8, 16] are the native layout, and the remedy is named."""
    qdata, scale, zero = operands(n=16)
    native = scale.t().contiguous(), zero.t().contiguous()
    assert native[0].shape == (8, 16)
    with pytest.raises(PartsError, match=r"expected \[16, 8\].*\[n_groups, N\] layout is not supported; repack"):
        int4_plain_mm(torch.randn(1, 256), qdata, *native, group_size=32, layout=TAG)


@pytest.mark.parametrize("layout", ["", "native", "coalesced_int4", "coalesced_int4:0", "coalesced_int4:2"])
def test_a_square_native_layout_is_rejected_by_its_name(layout):
    """N = n_groups = 8: shapes cannot tell, so a caller has to say which layout, and an unknown version is refused."""
    qdata, scale, zero = operands(n=8)
    x, native = torch.randn(1, 256), (scale.t().contiguous(), zero.t().contiguous())
    assert native[0].shape == scale.shape
    with pytest.raises(PartsError, match=r"reads 'coalesced_int4:1' alone.*repacked once, at load"):
        int4_plain_mm(x, qdata, *native, group_size=32, layout=layout)
    with pytest.raises(TypeError, match="layout"):
        int4_plain_mm(x, qdata, *native, group_size=32)
    y = int4_plain_mm(x, qdata, scale, zero, group_size=32, layout=TAG)
    assert not torch.equal(y, int4_plain_mm(x, qdata, *native, group_size=32, layout=TAG))


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "coalesced_int4:2"}, "reads 'coalesced_int4:1' alone"),
        ({"layout": "native"}, "repacked once, at load"),
        ({"group_size": 4}, "groups of 4; expected a power of two from 8"),
        ({"group_size": 48}, "groups of 48"),
    ],
)
def test_layout_version_and_group_are_checked_first(change, message, fake, monkeypatch):
    """Of several things wrong these are named, the tag before the group, and no kernel is asked, nor while tracing."""
    monkeypatch.setattr("lowbit.ops.library.select", lambda *_: pytest.fail("a kernel was asked for"))
    qdata, scale, zero = operands(n=8)
    wrong = {"x": torch.randn(1, 7), "bias": torch.zeros(3), "group_size": 4 if "layout" in change else 32, **change}
    tensors = {"qdata": qdata, "scale": scale.t(), "zero": zero[:3]}
    with (
        FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext(),
        pytest.raises(PartsError, match=message),
    ):
        int4_plain_mm(**{"layout": TAG, **tensors, **wrong})


@pytest.mark.parametrize("name", ["x", "qdata", "scale", "zero"])
def test_missing_tensors_are_named(name):
    """None in place of any operand is one clear error."""
    arguments = dict(zip(("qdata", "scale", "zero"), operands(), strict=True), x=torch.randn(1, 256))
    with pytest.raises(PartsError, match=f"{name} is None, expected a tensor"):
        int4_plain_mm(**{**arguments, name: None}, group_size=32, layout=TAG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qdata": torch.zeros(24, 128)}, "qdata is float32"),
        ({"qdata": torch.zeros(24, 1, 128, dtype=torch.uint8)}, "qdata is uint8"),
        ({"x": torch.randn(5, 255)}, r"x is float32 \[5, 255\], expected floating-point \[..., 256\]"),
        ({"x": torch.zeros(5, 256, dtype=torch.int8)}, "x is int8"),
        ({"group_size": 48}, "groups of 48"),
        ({"group_size": 0}, "groups of 0"),
        ({"group_size": 512}, "not a multiple of the group size 512"),
        ({"group_size": 64}, r"scale is bfloat16 \[24, 8\], expected \[24, 4\]"),
        ({"zero": torch.zeros(24, 8, dtype=torch.uint8)}, "zero is uint8"),
        ({"zero": torch.zeros(24, 8)}, "one floating dtype"),
        ({"zero": torch.zeros(192)}, r"zero is float32 \[192\]"),
        ({"bias": torch.zeros(23)}, "bias has shape"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message):
    """One error names the tensor, what it is and what was expected, before anything is computed."""
    arguments = dict(zip(("qdata", "scale", "zero"), operands(), strict=True), x=torch.randn(5, 256), group_size=32)
    with pytest.raises(PartsError, match=message):
        int4_plain_mm(**{**arguments, **change}, layout=TAG)


def test_gradients_pass_through_the_frozen_weight():
    """x and bias get the gradients of the dense linear, as if x were not rounded."""
    weight = operands(dtype=torch.float32)
    x, bias = torch.randn(2, 3, 256, requires_grad=True), torch.randn(24, requires_grad=True)
    grad = torch.randn(2, 3, 24)
    int4_plain_mm(x, *weight, bias, group_size=32, layout=TAG).backward(grad)
    torch.testing.assert_close(x.grad, grad @ decoded(*weight).float())
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))


@pytest.mark.real_empty
@pytest.mark.parametrize("rows", [0, 3])
def test_opcheck(rows):
    """Schema, autograd registration, fake tensors and AOT dispatch are sound, gradients included."""
    weight, x, bias = operands(), torch.randn(rows, 256, requires_grad=True), torch.randn(24, requires_grad=True)
    opcheck(torch.ops.lowbit.int4_plain_mm.default, (x, *weight, bias, 32, TAG))
    opcheck(torch.ops.lowbit.int4_plain_mm.default, (x.detach(), *weight, None, 32, TAG))
    opcheck(torch.ops.lowbit.int4_plain_mm_input_gradient.default, (torch.randn(rows, 24), *weight, 32))


@pytest.mark.real_empty
def test_compile_without_graph_breaks():
    """One graph runs forward and backward with the results of eager mode."""
    weight = operands()

    def function(x):
        return int4_plain_mm(x, *weight, group_size=32, layout=TAG).square().sum()

    x = torch.randn(3, 256, requires_grad=True)
    function(x).backward()
    expected, x.grad = x.grad.clone(), None
    torch.compile(function, backend="aot_eager", fullgraph=True)(x).backward()
    torch.testing.assert_close(x.grad, expected)
