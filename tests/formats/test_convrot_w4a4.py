"""convrot_w4a4: kitchen's bits, and a linear that is closer to the exact one than kitchen's."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import FormatError, WeightError
from lowbit.formats import parse_spec
from lowbit.formats.convrot_w4a4 import ConvrotW4A4
from lowbit.formats.parts import narrow_rows
from lowbit.numerics.rotations import regular_hadamard
from lowbit.solvers import solver
from lowbit.solvers.descent import sweep
from tests.solvers.test_descent import check, error, made
from tests.support import gaussian, outlier_weight, sqnr

SHAPE = (48, 512)


def kitchen():
    """kitchen's eager functions."""
    return pytest.importorskip("comfy_kitchen.backends.eager.convrot_w4a4")


@pytest.mark.parametrize("rotation", [16, 64, 256])
def test_codes_and_scales_are_those_of_kitchen(rotation):
    """Rounding a float32 weight to nearest gives kitchen's scales and codes, but where a sum differs in a last bit."""
    w = outlier_weight(*SHAPE).float()
    theirs, scales = kitchen().quantize_convrot_w4a4_weight(w, rotation)

    parts = ConvrotW4A4(rotation=rotation).quantize(w)

    torch.testing.assert_close(parts["scale"], scales, rtol=1e-6, atol=0)
    assert (parts["qdata"] == theirs).float().mean() > 0.999


@pytest.mark.parametrize("rotation", [16, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kitchen_weights_decode_to_its_values(rotation, dtype):
    """What kitchen quantized is decoded as kitchen does: the codes to the bit, turned back up to the order of sums."""
    w = outlier_weight(*SHAPE).to(dtype)
    qdata, scales = kitchen().quantize_convrot_w4a4_weight(w, rotation)
    fmt, parts = ConvrotW4A4(rotation=rotation), {"qdata": qdata, "scale": scales}
    theirs = kitchen().dequantize_convrot_w4a4_weight(qdata, scales, rotation)

    fmt.check(parts, SHAPE)
    turned = ConvrotW4A4(rotation=0).dequantize(parts, SHAPE, torch.float32)
    unturned = kitchen()._unpack_int4_row_major(qdata).float() * scales.reshape(-1, 1)

    assert torch.equal(turned, unturned)
    torch.testing.assert_close(fmt.dequantize(parts, SHAPE, torch.float32), theirs, rtol=1e-5, atol=1e-6)


def exact(fmt: ConvrotW4A4, x: torch.Tensor, parts: dict, bias: torch.Tensor) -> torch.Tensor:
    """The linear in float64 from the same codes: the activations of each row rounded, then one product."""
    h = torch.kron(torch.eye(x.shape[1] // fmt.rotation), regular_hadamard(fmt.rotation)).double()
    turned = x.double() @ h
    largest = 7 if fmt.linear_dtype == "int4" else 127
    scale = turned.abs().amax(1, keepdim=True) / largest
    acts = (turned / scale).round()
    codes = fmt.unpack(parts["qdata"], x.shape[1]).double()
    return (acts @ codes.t()) * scale * parts["scale"].double() + bias.double()


@pytest.mark.parametrize("linear_dtype", ["int4", "int8"])
def test_linear_is_the_stated_formula(linear_dtype):
    """In float32 the linear is its formula in float64, but for float32 sums and a rounding that falls the other way."""
    fmt = ConvrotW4A4(rotation=64, linear_dtype=linear_dtype)
    parts, x, bias = fmt.quantize(gaussian(*SHAPE)), gaussian(9, SHAPE[1], seed=3), gaussian(1, SHAPE[0])[0]

    got = fmt.linear(x.reshape(3, 3, -1), parts, bias).reshape(9, -1).double()

    wanted = exact(fmt, x, parts, bias)
    near = (got - wanted).abs().amax(1) < 1e-4 * wanted.abs().max()
    assert near.sum() >= 8
    assert sqnr(wanted, got) > 30


def test_linear_is_that_of_kitchen_in_float32():
    """With float32 inputs the linear equals kitchen's eager one, but where a tie of the rounding fell the other way."""
    fmt = ConvrotW4A4()
    parts, x, bias = fmt.quantize(gaussian(*SHAPE)), gaussian(16, SHAPE[1], seed=3), gaussian(1, SHAPE[0])[0]

    theirs = kitchen().convrot_w4a4_linear(x, parts["qdata"], parts["scale"], bias, 256)

    same = torch.isclose(fmt.linear(x, parts, bias), theirs, rtol=1e-5, atol=1e-4).all(dim=1)
    assert same.sum() >= 15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_is_closer_to_the_formula_than_kitchen_in_16_bits(dtype):
    """kitchen's eager linear rotates, divides and sums in the input's dtype; ours is 3 dB nearer to the formula."""
    fmt = ConvrotW4A4()
    parts, x = fmt.quantize(gaussian(*SHAPE)), gaussian(64, SHAPE[1], seed=3).to(dtype)
    bias = gaussian(1, SHAPE[0])[0].to(dtype)
    theirs = kitchen().convrot_w4a4_linear(x, parts["qdata"], parts["scale"], bias, 256)

    wanted = exact(fmt, x, parts, bias)

    assert sqnr(wanted, fmt.linear(x, parts, bias)) > sqnr(wanted, theirs) + 3


def test_8_bit_activations_lose_less():
    """linear_dtype=int8 is nearer to the product with the decoded weight than int4, by some 24 dB for 4 bits."""
    four, eight = ConvrotW4A4(), ConvrotW4A4(linear_dtype="int8")
    parts, x = four.quantize(gaussian(*SHAPE)), gaussian(16, SHAPE[1], seed=3)
    wanted = x @ four.dequantize(parts, SHAPE, torch.float32).t()

    assert sqnr(wanted, eight.linear(x, parts, None)) > sqnr(wanted, four.linear(x, parts, None)) + 20


def test_scale_search_gains_two_decibels():
    """Clipping the peak of a long row: the scale search is two decibels above absmax / 7."""
    fmt, w = ConvrotW4A4(), gaussian(256, 1024)
    plain, searched = (
        fmt.dequantize(solver(name)(w, fmt), (256, 1024), torch.float32) for name in ("rtn", "scale_search")
    )

    assert sqnr(w, searched) > sqnr(w, plain) + 1.8


@pytest.mark.parametrize("start", ["rtn", "scale_search"])
def test_descent_lowers_the_error_of_the_output(start):
    """Sweeps over codes and scales lower tr(E H E^T), stay on the grid, and what is stored has that error."""
    draft, fmt, params = made("convrot_w4a4(rotation=64)", 24, 128, seed=1, start=start)
    before = error(draft)
    sweep(draft, codes=True, scales=True)
    check(draft, fmt, params)

    assert error(draft) < before


def test_code_minus_eight_is_read_and_never_written():
    """A file's code -8 means -8; our encoder stops at -7, as the format's kernels expect."""
    fmt = ConvrotW4A4(rotation=0)
    parts = {"qdata": torch.tensor([[0x78]], dtype=torch.uint8).view(torch.int8), "scale": torch.tensor([0.5])}

    assert fmt.dequantize(parts, (1, 2), torch.float32).tolist() == [[-4.0, 3.5]]
    assert fmt.encode(torch.tensor([[-4.0, 3.5]]), narrow_rows(fmt.param_rules, parts, 0, 1)).tolist() == [[-7, 7]]


@pytest.mark.parametrize("spec", ["convrot_w4a4(rotation=32)", "convrot_w4a4(linear_dtype=fp8)"])
def test_bad_fields_are_refused(spec):
    """A rotation that is no power of four and an unknown linear_dtype are errors that list what there is."""
    with pytest.raises(FormatError, match="expected one of"):
        parse_spec(spec)


@pytest.mark.parametrize(
    ("spec", "k"), [("convrot_w4a4", 320), ("convrot_w4a4(rotation=16)", 80), ("convrot_w4a4(rotation=0)", 33)]
)
def test_columns_that_do_not_fit_are_refused(spec, k):
    """Columns that the rotation, kitchen's kernels or the packing cannot hold are named."""
    with pytest.raises(WeightError, match=f"has {k} columns"):
        parse_spec(spec).quantize(torch.zeros(4, k), where="w")
