"""The tests' own tools do what the tests rely on."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support import INTEGER_POISON, assert_sqnr_within, gaussian, outlier_weight, sqnr

FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.complex64,
]


class Wrapper(torch.Tensor):
    """A minimal wrapper subclass, as QuantizedTensor is one."""

    @staticmethod
    def __new__(cls, inner):
        """Wrap a tensor."""
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Run every op on the inner tensor; it is the op that must not be given the wrapper."""
        args = [a.inner if isinstance(a, cls) else a for a in args]
        return cls(func(*args, **(kwargs or {})))


def from_empty(x):
    """A function that allocates in four ways and writes everything."""
    total = torch.zeros_like(x)
    for out in (torch.empty(x.shape), torch.empty_like(x), x.new_empty(x.shape), torch.empty_strided(x.shape, (3, 1))):
        total = total + out.copy_(x)
    return total


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_unwritten_floats_are_nan(dtype):
    """Each way to allocate gives NaN in every floating dtype, the eight-bit ones included."""
    made = [
        torch.empty(2, 3, dtype=dtype),
        torch.empty((2, 3), dtype=dtype, memory_format=torch.contiguous_format),
        torch.empty_like(torch.zeros(2, 3, dtype=torch.uint8), dtype=dtype),
        torch.empty_strided((2, 3), (1, 2), dtype=dtype),
        torch.empty_permuted((2, 3), (1, 0), dtype=dtype),
        torch.zeros(1).new_empty(2, 3, dtype=dtype),
        torch.zeros(1).new_empty_strided((2, 3), (1, 2), dtype=dtype),
    ]

    for tensor in made:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        assert torch.isnan(tensor.to(wide)).all()


@pytest.mark.parametrize("dtype", INTEGER_POISON, ids=str)
def test_unwritten_integers_are_recognisable(dtype):
    """Every byte of an integer that nobody wrote is 0xA5, whatever its width."""
    tensor = torch.empty(5, dtype=dtype)

    assert tensor.view(torch.uint8).tolist() == [0xA5] * 5 * dtype.itemsize


def test_packed_float4_is_poisoned_bytewise():
    """A packed float4 has no NaN and no fill: its bytes are 0xA5."""
    assert torch.empty(4, dtype=torch.float4_e2m1fn_x2).view(torch.uint8).tolist() == [0xA5] * 4


@pytest.mark.real_empty
def test_the_mark_leaves_the_real_functions():
    """A test marked `real_empty` gets torch's own functions."""
    assert not hasattr(torch.empty, "__wrapped__")
    assert not hasattr(torch.Tensor.new_empty, "__wrapped__")


def test_special_arguments_and_tensors_pass():
    """Gradients, inference mode, out=, meta, sparse, nothing at all, and device contexts work as with the real ones."""
    leaf = torch.empty(3, requires_grad=True)
    assert leaf.is_leaf
    assert leaf.requires_grad
    with torch.inference_mode():
        assert torch.isnan(torch.empty(3)).all()
    out = torch.zeros(3)
    assert torch.empty(3, out=out) is out
    assert torch.isnan(out).all()
    assert torch.empty(3, device="meta").is_meta
    assert torch.empty(3, 3, layout=torch.sparse_coo).is_sparse
    assert torch.empty(0).shape == (0,)
    with torch.device("meta"):
        assert torch.empty(3).is_meta
    assert torch.nn.Linear(4, 4).weight.isfinite().all()


def test_wrapper_subclasses_are_left_alone():
    """What a subclass returns from empty_like and new_empty is its own business, and reaches its dispatch unchanged."""
    wrapped = Wrapper(torch.ones(2, 3))

    for out in (torch.empty_like(wrapped), wrapped.new_empty(2, 3)):
        assert type(out) is Wrapper
        assert out.shape == (2, 3)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_allocates_as_users_programs_do(backend):
    """torch.compile(fullgraph=True) goes through the replaced functions and gives the same values."""
    torch._dynamo.reset()
    x = torch.arange(6.0).view(2, 3)

    assert torch.equal(torch.compile(from_empty, fullgraph=True, backend=backend)(x), 4 * x)


@pytest.mark.real_empty
def test_compiled_code_knows_the_real_functions_too():
    """Replacing the functions in one test does not make the compiler forget the real ones in the next."""
    torch._dynamo.reset()
    x = torch.arange(6.0).view(2, 3)

    assert torch.equal(torch.compile(from_empty, fullgraph=True, backend="eager")(x), 4 * x)


def test_sqnr_by_hand():
    """A tenth of the amplitude lost is 20 dB; the corner cases are the documented ones."""
    r = torch.tensor([3.0, -4.0])

    assert sqnr(r, 0.9 * r) == pytest.approx(20, abs=1e-5)
    assert sqnr(r, r) == math.inf
    assert sqnr(torch.zeros(2), torch.zeros(2)) == math.inf
    assert sqnr(torch.zeros(2), r) == -math.inf
    assert math.isnan(sqnr(r, torch.tensor([math.nan, 1.0])))
    with pytest.raises(ValueError, match="shapes differ"):
        sqnr(r, r[:1])
    with pytest.raises(ValueError, match="not finite"):
        sqnr(torch.tensor([math.inf]), torch.tensor([1.0]))


@pytest.mark.parametrize("factor", [0.899, 0.901, math.nan])
def test_sqnr_is_asserted_to_both_sides(factor):
    """Better than expected fails as worse does, and so does NaN."""
    r = torch.ones(4)
    assert_sqnr_within(r, 0.9 * r, 20)

    with pytest.raises(AssertionError, match="expected 20"):
        assert_sqnr_within(r, factor * r, 20)


def test_weights_are_the_same_every_time_and_have_the_shape_they_claim():
    """The generators depend on their arguments only; Gaussian is Gaussian, the outlier weight has heavy tails."""
    torch.manual_seed(123)
    g, o = gaussian(256, 384), outlier_weight(256, 384)
    assert torch.equal(g, gaussian(256, 384))
    assert torch.equal(o, outlier_weight(256, 384))
    assert not torch.equal(g, gaussian(256, 384, seed=1))
    assert torch.equal(g.bfloat16(), gaussian(256, 384, dtype=torch.bfloat16))

    def kurtosis(w):
        return (w**4).mean() / (w**2).mean() ** 2

    assert kurtosis(g).item() == pytest.approx(3, abs=0.1)
    assert kurtosis(o).item() > 10
    columns = o.abs().median(dim=0).values
    assert (columns.max() / columns.median()).item() > 3
