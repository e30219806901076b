from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowbit.numerics import int8_matmul
from lowbit.numerics.integers import round_clamp, uniform_noise
from lowbit.numerics.rotations import REGULAR_SIZES, regular_hadamard
from tests.support.cpu_linear import activations
from tests.support.triton_linear import DEVICE, DTYPES, require

require()
from lowbit.backends.triton.quantize_rows import quantize_rows  # noqa: E402  (only where Triton is)

SHAPES = ((1, 3072), (5, 96), (70, 64), (9, 1000), (3, 17), (2, 1), (2, 16400))


def wanted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's codes and scales, of a CPU."""
    return int8_matmul.quantize_rows(x.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype):
    """Codes and scales are the reference's, bit for bit, for rows of any length, zero and tiny ones among them."""
    for m, k in SHAPES:
        x = activations(m, k, dtype)
        if m > 2:
            x[0], x[1] = 0, x[1] * 1e-4
        codes, scales = quantize_rows(x.to(DEVICE))
        right, right_scales = wanted(x)
        assert torch.equal(codes.cpu(), right), (m, k)
        assert torch.equal(scales.cpu(), right_scales), (m, k)


def test_quotients_on_both_sides_of_a_tie():
    """Values next to half a step, the hard case of a division, are rounded as IEEE division rounds them."""
    generator = torch.Generator().manual_seed(5)
    largest = 1 + torch.rand(64, 1, generator=generator)
    x = (torch.randint(-127, 127, (64, 500), generator=generator) + 0.5) * (largest / 127)
    x = (x.view(torch.int32) + torch.randint(-1, 2, x.shape, generator=generator, dtype=torch.int32)).view(
        torch.float32
    )
    x = torch.cat([largest, x], dim=1)
    codes, scales = quantize_rows(x.to(DEVICE))
    right, right_scales = wanted(x)
    assert torch.equal(scales.cpu(), right_scales)
    assert torch.equal(codes.cpu(), right)


@pytest.mark.parametrize("blocks", [32, 128, 1024])
def test_blocks(blocks):
    """Every block of columns of a row is quantized as a row of its own; the last one may be short."""
    for m, k in ((1, 3072), (5, 700), (33, 130), (2, 20)):
        x = activations(m, k, torch.float16)
        codes, scales = quantize_rows(x.to(DEVICE), blocks=blocks)
        for number, piece in enumerate(x.split(blocks, dim=1)):
            right, right_scales = wanted(piece)
            left = number * blocks
            assert torch.equal(codes[:, left : left + blocks].cpu(), right), (m, k, number)
            assert torch.equal(scales[:, number : number + 1].cpu(), right_scales), (m, k, number)
        assert scales.shape == (m, number + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotation", REGULAR_SIZES)
def test_rotation(rotation, dtype):
    """Codes are those of a rotation in float64, except where that lies within float32's error of a tie."""
    for m, k in ((1, rotation), (5, 3 * rotation), (2, 17 * 1024)):
        x = activations(m, k, dtype)
        rotated = (x.double().view(-1, rotation) @ regular_hadamard(rotation).double()).view(m, k)
        codes, scales = (found.cpu() for found in quantize_rows(x.to(DEVICE), rotation=rotation))
        assert torch.allclose(scales.double(), rotated.abs().amax(dim=1, keepdim=True) / 127, rtol=1e-6, atol=0)
        assert ((rotated / scales.double() - codes).abs() <= 0.5 + 1e-4).all(), (m, k)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, of an exponential, in the interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotation", [0, 64])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "swiglu"])
def test_activation(name, rotation, dtype):
    """The activation is that of float64, rounded to the dtype of x, up to the last bits of an exponential."""
    m, k = 5, 128
    x = activations(m, 2 * k if name == "swiglu" else k, dtype)
    if name == "swiglu":
        value = F.silu(x[:, :k].double()) * x[:, k:].double()
    else:
        value = F.gelu(x.double(), approximate="tanh" if name == "gelu_tanh" else "none")
    steps = value @ torch.block_diag(*[regular_hadamard(64).double()] * 2) if rotation else value
    codes, scales = (found.cpu() for found in quantize_rows(x.to(DEVICE), activation=name, rotation=rotation))
    error = codes * scales.double() - steps
    rounding = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]  # of the largest value
    assert (error.abs() <= scales.double() * 0.5 + rounding * value.abs().amax(dim=1, keepdim=True)).all()
    assert torch.allclose(scales.double(), steps.abs().amax(dim=1, keepdim=True) / 127, rtol=4 * rounding, atol=0)


def test_stochastic_rounding():
    """The noise is that of the reference, drawn from the number of the first row of each piece."""
    m, k = 700, 512  # two pieces of rows
    x = activations(m, k, torch.float32)
    codes, scales = quantize_rows(x.to(DEVICE), seed=3)
    noise = torch.cat([uniform_noise((512, k), 3, 0, x.device), uniform_noise((m - 512, k), 3, 512, x.device)])
    _, right_scales = wanted(x)
    assert torch.equal(scales.cpu(), right_scales)
    assert torch.equal(codes.cpu(), round_clamp(x / right_scales, -127, 127, noise).to(torch.int8))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_rows_that_are_not_finite():
    """A NaN or an infinity makes the scale of its row not finite, and touches no other row."""
    x = activations(4, 200, torch.float32)
    x[1, 5], x[2, 199] = float("nan"), float("-inf")
    codes, scales = quantize_rows(x.to(DEVICE))
    assert scales.isfinite().flatten().tolist() == [True, False, False, True]
    assert torch.equal(codes[[0, 3]].cpu(), wanted(x)[0][[0, 3]])


def test_shapes():
    """Gaps and leading axes change nothing; no tokens and no columns are shapes like any other."""
    x = activations(12, 64, torch.float32)
    gaps = torch.stack([x, x], dim=-1).flatten(1)[:, ::2]
    for given in (x.view(3, 4, 64), gaps):
        codes, scales = quantize_rows(given.to(DEVICE))
        assert codes.shape == (12, 64)
        assert torch.equal(codes.cpu(), wanted(x)[0])
        assert torch.equal(scales.cpu(), wanted(x)[1])
    assert quantize_rows(x[:0].to(DEVICE))[1].shape == (0, 1)
    assert torch.equal(quantize_rows(x[:, :0].to(DEVICE))[1].cpu(), wanted(x[:, :0])[1])


@pytest.mark.gpu
@pytest.mark.parametrize("rotation", [0, 16, 64, 256, 1024])
def test_large(rotation):
    """Rows of real layers, in bfloat16, have the reference's codes, or with a rotation float64's but for ties."""
    for m, k in ((4096, 3072), (333, 12288), (64, 32768)):
        x = activations(m, k, torch.bfloat16)
        codes, scales = (found.cpu() for found in quantize_rows(x.to(DEVICE), rotation=rotation))
        if not rotation:
            assert torch.equal(codes, wanted(x)[0])
            assert torch.equal(scales, wanted(x)[1])
        else:
            rotated = (x.double().view(-1, rotation) @ regular_hadamard(rotation).double()).view(m, k)
            assert ((rotated / scales.double() - codes).abs() <= 0.5 + 1e-4).all()
