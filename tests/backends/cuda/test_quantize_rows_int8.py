from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowbit.numerics import int8_matmul
from lowbit.numerics.rotations import REGULAR_SIZES, regular_hadamard
from tests.support import cuda_simulator
from tests.support.cpu_linear import activations

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import compiler, kernels, quantize_rows_int8
from lowbit.backends.cuda.quantize_rows_int8 import quantize_rows
from lowbit.backends.gpu import Target, assume

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ARCHITECTURES = {"sm_80": (8, 0), "sm_90a": (9, 0), "sm_120a": (12, 0)}


@pytest.fixture(autouse=True)
def _simulated(monkeypatch):
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    with assume(Target("cuda", (9, 0))):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype):
    """Codes and scales are the reference's, bit for bit, for rows of any length, zero and tiny ones among them."""
    for m, k in ((1, 3072), (5, 96), (9, 1000), (3, 17), (2, 1), (2, 1032)):
        x = activations(m, k, dtype)
        if m > 2:
            x[0], x[1] = 0, x[1] * 1e-4
        codes, scales = quantize_rows(x)
        right, right_scales = int8_matmul.quantize_rows(x)
        assert torch.equal(codes, right), (m, k)
        assert torch.equal(scales, right_scales), (m, k)


@pytest.mark.parametrize(("k", "dtype"), [(16384, torch.float32), (16392, torch.float32), (20488, torch.bfloat16)])
def test_long_rows(k, dtype):
    """Rows of as many columns as a block holds, and of more, have the reference's codes and scales."""
    x = activations(1, k, dtype)
    codes, scales = quantize_rows(x)
    right, right_scales = int8_matmul.quantize_rows(x)
    assert torch.equal(codes, right)
    assert torch.equal(scales, right_scales)


def test_quotients_on_both_sides_of_a_tie():
    """Values next to half a step, the hard case of a division, are rounded as IEEE division rounds them."""
    generator = torch.Generator().manual_seed(5)
    largest = 1 + torch.rand(16, 1, generator=generator)
    x = (torch.randint(-127, 127, (16, 503), generator=generator) + 0.5) * (largest / 127)
    x = (x.view(torch.int32) + torch.randint(-1, 2, x.shape, generator=generator, dtype=torch.int32)).view(
        torch.float32
    )
    x = torch.cat([largest, x], dim=1)
    codes, scales = quantize_rows(x)
    right, right_scales = int8_matmul.quantize_rows(x)
    assert torch.equal(scales, right_scales)
    assert torch.equal(codes, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotation", REGULAR_SIZES)
def test_rotation(rotation, dtype):
    """Codes are those of a rotation in float64, except where that lies within float32's error of a tie."""
    for m, k in ((1, rotation), (5, 3 * rotation), (1, 21 * 1024 if dtype == torch.bfloat16 else 2048)):
        x = activations(m, k, dtype)
        rotated = (x.double().view(-1, rotation) @ regular_hadamard(rotation).double()).view(m, k)
        codes, scales = quantize_rows(x, rotation=rotation)
        assert torch.allclose(scales.double(), rotated.abs().amax(dim=1, keepdim=True) / 127, rtol=1e-6, atol=0)
        assert ((rotated / scales.double() - codes).abs() <= 0.5 + 1e-4).all(), (m, k)


@pytest.mark.parametrize("rotation", REGULAR_SIZES)
def test_rotated_columns(rotation):
    """A single column that is not zero gives the row of the matrix that it selects, exactly: no sum is rounded."""
    x = torch.eye(rotation)[:: max(1, rotation // 32)]
    codes, scales = quantize_rows(x, rotation=rotation)
    assert torch.equal(codes, (regular_hadamard(rotation)[:: max(1, rotation // 32)] * rotation**0.5 * 127).char())
    assert torch.equal(scales, torch.full_like(scales, 1 / rotation**0.5) / 127)


@pytest.mark.parametrize(("name", "rotation", "dtype"), [
    ("gelu", 0, torch.float32), ("gelu", 64, torch.bfloat16), ("gelu_tanh", 0, torch.float16),
    ("gelu_tanh", 64, torch.float32), ("swiglu", 64, torch.bfloat16), ("swiglu", 0, torch.float32),
])  # fmt: skip
def test_activation(name, rotation, dtype):
    """The activation is that of float64, rounded to the dtype of x, up to the last bits of an exponential."""
    for m, k in ((5, 128), (1, 20544 if name == "swiglu" and rotation else 1088)):
        x = activations(m, 2 * k if name == "swiglu" else k, dtype)
        if name == "swiglu":
            value = F.silu(x[:, :k].double()) * x[:, k:].double()
        else:
            value = F.gelu(x.double(), approximate="tanh" if name == "gelu_tanh" else "none")
        steps = (value.view(-1, 64) @ regular_hadamard(64).double()).view(m, k) if rotation else value
        codes, scales = quantize_rows(x, activation=name, rotation=rotation)
        error = codes * scales.double() - steps
        rounding = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]  # of the largest value
        assert (error.abs() <= scales.double() * 0.5 + rounding * value.abs().amax(dim=1, keepdim=True)).all()
        assert torch.allclose(scales.double(), steps.abs().amax(dim=1, keepdim=True) / 127, rtol=4 * rounding, atol=0)


def test_rows_of_odd_length_with_activation():
    """SwiGLU of rows whose halves begin at odd addresses reads the right ones."""
    x = activations(3, 2 * 37, torch.float16)
    codes, scales = quantize_rows(x, activation="swiglu")
    value = F.silu(x[:, :37].float()) * x[:, 37:].float()
    assert ((codes * scales - value).abs() <= scales * 0.5 + 2**-10 * value.abs().amax(dim=1, keepdim=True)).all()


@pytest.mark.parametrize("rotation", [0, 16, 1024])
def test_rows_that_are_not_finite(rotation):
    """A NaN or an infinity makes the scale of its row not finite and its codes zero, and touches no other row."""
    x = activations(4, 2048, torch.float32)
    wanted, _ = quantize_rows(x, rotation=rotation)
    x[1, 5], x[2, 2047] = float("nan"), float("-inf")
    codes, scales = quantize_rows(x, rotation=rotation)
    assert scales.isfinite().flatten().tolist() == [True, False, False, True]
    assert torch.equal(codes[[0, 3]], wanted[[0, 3]])
    assert not codes[1:3].any()


def test_shapes():
    """Gaps, odd addresses and leading axes change nothing; no tokens and no columns are shapes like any other."""
    x = activations(12, 64, torch.float32)
    right, right_scales = int8_matmul.quantize_rows(x)
    gaps = torch.stack([x, x], dim=-1).flatten(1)[:, ::2]
    odd = torch.cat([torch.zeros(1), x.flatten()])[1:].view(12, 64)
    for given in (x.view(3, 4, 64), gaps, odd):
        codes, scales = quantize_rows(given)
        assert torch.equal(codes, right)
        assert torch.equal(scales, right_scales)
    assert quantize_rows(x[:0])[1].shape == (0, 1)
    assert torch.equal(quantize_rows(x[:, :0])[1], int8_matmul.quantize_rows(x[:, :0])[1])


def test_named_op():
    """quantize_int8_rowwise gives codes in the shape of x and a scale a row."""
    x = activations(6, 32, torch.bfloat16)
    codes, scales = quantize_rows_int8.quantize_int8_rowwise(x.view(2, 3, 32), 0, 0)
    assert codes.shape == (2, 3, 32)
    assert scales.shape == (2, 3, 1)
    assert torch.equal(codes.view(6, 32), int8_matmul.quantize_rows(x)[0])


def test_refusals():
    """What the kernel cannot take is refused in words that name it."""
    x = torch.zeros(2, 64)
    assert quantize_rows_int8.refuses(x, 64, 0) is None
    assert "stochastic" in quantize_rows_int8.refuses(x, 0, 3)
    assert "groups of 4;" in quantize_rows_int8.refuses(x, 4, 0)
    assert "x is float64" in quantize_rows_int8.refuses(x.double(), 0, 0)
    with assume(Target("cuda", (7, 0))):
        assert "7.0" in quantize_rows_int8.refuses(x, 0, 0)
    with assume(Target("hip")):
        assert "NVIDIA" in quantize_rows_int8.refuses(x, 0, 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles(architecture, monkeypatch):
    """Variants of every dtype, size of rotation and length of rows compile without a warning or a spill."""
    monkeypatch.undo()
    calls = [
        (torch.bfloat16, 3072, 256, None), (torch.float32, 3072, 1024, None), (torch.float16, 3071, 0, None),
        (torch.float32, 65536, 64, "swiglu"),
    ]  # fmt: skip
    with assume(Target("cuda", ARCHITECTURES[architecture])), kernels.record() as made:
        for dtype, k, rotation, activation in calls:
            x = torch.empty(8, 2 * k if activation == "swiglu" else k, dtype=dtype, device="meta")
            quantize_rows(x, rotation=rotation, activation=activation)
    assert len(set(made)) == len(calls)
    for launch in made:
        found = compiler.compile_now(launch.source, launch.name, architecture)
        assert not found.warnings
        assert not found.spills, launch.name
