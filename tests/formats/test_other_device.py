"""Every format on the tensors of another device: nothing is mixed with the CPU's, and results are there and the same.

Without a GPU a stand-in refuses what a GPU would (`tests.support.other_device`).
"""

from __future__ import annotations

import pytest
import torch

from lowbit.dispatch import use_backend
from lowbit.formats import Parts, parse_spec
from lowbit.formats.parts import raw_bytes
from lowbit.ops import generic
from tests.support import gaussian
from tests.support.other_device import back, elsewhere, needs_stand_in, other_device, there
from tests.support.specs import ALL_SPECS, READ_ONLY_SPECS, any_parts, weight_shape

pytestmark = needs_stand_in
BOTH_SCALES = [
    f"{name}({more}pre_quant_scale=true,input_scale=true)"
    for name, more in (("fp8_e4m3", ""), ("int8", ""), ("nvfp4", ""), ("awq_w4a16", "group_size=32,"))
]
SPECS = [*ALL_SPECS, *READ_ONLY_SPECS, *BOTH_SCALES]
STOCHASTIC = [spec for spec in ALL_SPECS if parse_spec(spec).stochastic and parse_spec(spec).encodable]


def parts_of(spec: str) -> Parts:
    """Parts on the CPU, of a weight of `weight_shape`."""
    fmt = parse_spec(spec)
    n, k = weight_shape(fmt)
    if not fmt.encodable:
        return any_parts(fmt, (n, k))
    parts = fmt.plain.quantize(gaussian(n, k, seed=1))
    if fmt.pre_quant_scale:
        parts |= {"pre_quant_scale": gaussian(1, k, seed=2)[0].abs() + 0.5, "input_scale": torch.tensor(0.02)}
    return {name: parts[name] for name in fmt.part_names}


def same(found: object, expected: torch.Tensor) -> bool:
    """Whether a tensor is on the stand-in and has these bits."""
    value = back(found)
    return value.dtype == expected.dtype and torch.equal(raw_bytes(value), raw_bytes(expected))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if parse_spec(spec).encodable and spec in ALL_SPECS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_quantized_where_they_are(spec, dtype):
    """All parts of a rounded weight."""
    w = gaussian(*weight_shape(parse_spec(spec)), seed=1).to(dtype)
    with use_backend("eager"):
        expected = generic.quantize(w, spec, None)
        with other_device():
            found = generic.quantize(elsewhere(w), spec, None)

    assert all(same(part, other) for part, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("spec", STOCHASTIC)
def test_chance_is_the_same_everywhere(spec):
    """A seed gives the same bits on the device as on the CPU."""
    w = gaussian(*weight_shape(parse_spec(spec)), seed=1)
    with use_backend("eager"):
        expected = generic.quantize(w, spec, 7)
        with other_device():
            found = generic.quantize(elsewhere(w), spec, 7)

    assert all(same(part, other) for part, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("spec", SPECS)
def test_weights_are_decoded_where_they_are(spec):
    """The whole weight, some rows by index, and the share of the bias."""
    fmt, parts = parse_spec(spec), parts_of(spec)
    n, k = weight_shape(fmt)
    indices = torch.tensor([[3, 0], [n - 1, 3]])
    with use_backend("eager"):
        whole = generic.dequantize(list(parts.values()), spec, [n, k], torch.bfloat16)
        rows = generic.embedding(indices, list(parts.values()), k, spec, torch.float32)
        share = fmt.bias_share(parts)
        with other_device():
            held = there(parts)
            assert same(generic.dequantize(list(held.values()), spec, [n, k], torch.bfloat16), whole)
            assert same(generic.embedding(elsewhere(indices), list(held.values()), k, spec, torch.float32), rows)
            assert share is None or same(fmt.bias_share(held), share)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 20])
def test_products_are_made_where_the_input_is(spec, dtype, tokens):
    """A linear with a bias, and the gradient of its input."""
    parts = parts_of(spec)
    n, k = weight_shape(parse_spec(spec))
    x, bias = gaussian(tokens, k, seed=3).to(dtype), gaussian(1, n, seed=4)[0].to(dtype)
    grad = gaussian(tokens, n, seed=5).to(dtype)
    with use_backend("eager"):
        product = generic.linear(x, list(parts.values()), bias, spec)
        gradient = generic.linear_input_gradient(grad, list(parts.values()), k, spec)
        with other_device():
            held = list(there(parts).values())
            assert same(generic.linear(elsewhere(x), held, elsewhere(bias), spec), product)
            assert same(generic.linear_input_gradient(elsewhere(grad), held, k, spec), gradient)
