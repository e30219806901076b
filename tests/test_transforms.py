"""torch.func on layers with packed weights: grad, vmap, jvp and what is made of them give what plain calls give."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

import lowbit
from tests.support.specs import ALL_SPECS, weight_shape


@pytest.fixture(params=ALL_SPECS)
def layer(request):
    """A quantized linear of each format."""
    n, k = weight_shape(lowbit.parse_spec(request.param))
    made = nn.Linear(k, n)
    lowbit.quantize_(made, request.param)
    return made


def test_gradients_are_those_of_autograd(layer):
    """By grad, by vjp, for one sample at a time, and for the bias by functional_call."""
    x = torch.randn(3, layer.in_features, requires_grad=True)
    wanted, wanted_bias = torch.autograd.grad(layer(x).square().sum(), (x, layer.bias))
    x = x.detach()

    def loss(x):
        return layer(x).square().sum()

    def loss_of(bias, x):
        return functional_call(layer, {"bias": bias}, (x,)).square().sum()

    torch.testing.assert_close(grad(loss)(x), wanted)
    torch.testing.assert_close(vjp(loss, x)[1](torch.tensor(1.0))[0], wanted)
    torch.testing.assert_close(vmap(grad(loss))(x), wanted)
    torch.testing.assert_close(grad(loss_of)(layer.bias.detach(), x), wanted_bias)


def test_batches_are_those_of_one_call(layer):
    """Samples as vectors and as matrices; a bias for each."""
    x = torch.randn(5, layer.in_features)
    wanted = layer(x)

    torch.testing.assert_close(vmap(layer)(x), wanted)
    torch.testing.assert_close(vmap(layer)(x.unsqueeze(1)), wanted.unsqueeze(1))
    biases = torch.randn(2, layer.out_features)
    each = vmap(lambda bias: functional_call(layer, {"bias": bias}, (x,)))(biases)
    torch.testing.assert_close(each, (wanted - layer.bias) + biases.unsqueeze(1), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::lowbit.tensor.LowbitFallbackWarning")
def test_batches_along_another_axis():
    """PyTorch expands the weight for them, which decodes it."""
    layer = nn.Linear(64, 48)
    lowbit.quantize_(layer, "nvfp4")
    x = torch.randn(5, 64)

    torch.testing.assert_close(vmap(layer, in_dims=1, out_dims=1)(x.t().contiguous()), layer(x).t())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_derivatives_and_jacobians():
    """Of int8 weights, whose product is linear in x: both are the weight itself."""
    layer = nn.Linear(64, 48)
    lowbit.quantize_(layer, "int8(activations=none)")
    x, along = torch.randn(2, 3, 64)

    weight = layer.weight.dequantize()
    torch.testing.assert_close(jvp(layer, (x,), (along,))[1], along @ weight.t())
    torch.testing.assert_close(jacrev(layer)(x[0]), weight)


def test_lookups_in_batches():
    """An embedding looks batched indices up, and gradients pass by it."""
    table = nn.Embedding(48, 64)
    lowbit.quantize_(table, "int8(activations=none)")
    indices = torch.randint(0, 48, (4, 3))

    assert torch.equal(vmap(table)(indices), table(indices))
    scaled = grad(lambda scale: (table(indices) * scale).sum())(torch.tensor(2.0))
    torch.testing.assert_close(scaled, table(indices).sum())
