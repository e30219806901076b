"""The generic ops under PyTorch's own operator checks, for every registered format."""

import pytest
import torch
from torch.library import opcheck

import lowbit
from lowbit.errors import PartsError, UnsupportedError
from lowbit.ops import generic
from tests.support import gaussian
from tests.support.specs import ALL_SPECS, weight_shape

pytestmark = pytest.mark.usefixtures("_compare_float8")


@pytest.fixture(params=ALL_SPECS)
def case(request):
    """A format, a weight and its parts."""
    fmt = lowbit.parse_spec(request.param)
    w = gaussian(*weight_shape(fmt), seed=4)
    return fmt, w, [part.contiguous() for part in generic.quantize(w, fmt.spec, None)]


@pytest.mark.real_empty
def test_opcheck(case):
    """Schema, autograd registration, fake tensors and AOT dispatch of all generic ops are sound."""
    fmt, w, parts = case
    n, k = w.shape
    x, bias = torch.randn(3, k, requires_grad=True), torch.randn(n, requires_grad=True)
    ops = torch.ops.lowbit

    opcheck(ops.quantize.default, (w, fmt.spec, None))
    opcheck(ops.dequantize.default, (parts, fmt.spec, [n, k], torch.bfloat16))
    opcheck(ops.linear.default, (x, parts, bias, fmt.spec))
    opcheck(ops.linear.default, (x.detach(), parts, None, fmt.spec))
    opcheck(ops.linear_input_gradient.default, (torch.randn(3, n), parts, k, fmt.spec))
    if fmt.supports_embedding:
        opcheck(ops.embedding.default, (torch.tensor([[0, 3]]), parts, k, fmt.spec, torch.float32))


def test_the_wrong_number_of_parts_is_named(case):
    """An op called with too few parts says how many the format takes and which."""
    fmt, w, parts = case

    with pytest.raises(PartsError, match=rf"takes {len(parts)} parts \(qdata.*\), not {len(parts) - 1}"):
        generic.linear(torch.randn(1, w.shape[1]), parts[:-1], None, fmt.spec)


def test_shapes_that_do_not_fit_the_parts_are_refused(case):
    """Too short an x, too long a gradient or another shape of the result is an error, never a part of the product."""
    fmt, w, parts = case
    n, k = w.shape

    with pytest.raises(UnsupportedError, match="as the shape of x says"):
        generic.linear(torch.randn(2, k // 2 - 8), parts, None, fmt.spec)
    for rows in (n - 1, n + 1):
        with pytest.raises(UnsupportedError, match="as the shape of the gradient says"):
            generic.linear_input_gradient(torch.randn(2, rows), parts, k, fmt.spec)
        with pytest.raises(UnsupportedError, match="as the shape of the result says"):
            generic.dequantize(parts, fmt.spec, [rows, k], torch.float32)


def test_gradient_of_many_chunks(monkeypatch, case):
    """The input's gradient summed over pieces of the weight equals the one in a single piece."""
    fmt, w, parts = case
    grad = torch.randn(2, w.shape[0])
    whole = generic.linear_input_gradient(grad, parts, w.shape[1], fmt.spec)

    monkeypatch.setattr("lowbit.backends.eager.linear_input_gradient.DECODE_ELEMENTS", 16 * w.shape[1])
    pieces = generic.linear_input_gradient(grad, parts, w.shape[1], fmt.spec)

    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)
