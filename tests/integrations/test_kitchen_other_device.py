"""comfy_kitchen's tensors and functions on another device.

Without a GPU a stand-in refuses what a GPU would (`tests.support.other_device`).
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import lowbit.integrations.kitchen as comfy_kitchen
from lowbit.dispatch import use_backend
from lowbit.formats.parts import raw_bytes
from lowbit.integrations.kitchen.tensor import QuantizedTensor
from tests.support import gaussian
from tests.support.kitchen import LAYOUTS
from tests.support.other_device import DEVICE, back, elsewhere, needs_stand_in, other_device

pytestmark = needs_stand_in
N, K = 48, 192
X, BIAS = gaussian(5, K, seed=3), gaussian(1, N, seed=4)[0]
OPS = {
    "linear": lambda w, at: F.linear(at(X), w, at(BIAS)),
    "linear of bfloat16": lambda w, at: F.linear(at(X.bfloat16()), w, at(BIAS.bfloat16())),
    "linear of one token": lambda w, at: F.linear(at(X[:1]), w),
    "mm": lambda w, at: at(X) @ w.t(),
    "addmm": lambda w, at: torch.addmm(at(BIAS), at(X), w.t()),
    "dequantize": lambda w, _: w.dequantize(),
    "dtype": lambda w, _: w.to(torch.bfloat16).dequantize(),
    "clone": lambda w, _: w.clone().dequantize(),
    "deepcopy": lambda w, _: copy.deepcopy(w).dequantize(),
    "detach": lambda w, _: w.detach().dequantize(),
    "into a plain tensor": lambda w, at: at(torch.zeros(N, K)).copy_(w),
    "state": lambda w, _: list(w.state_dict("w.").values()),
    "again": lambda w, _: w.requantize_from_float(w.dequantize() * 2).dequantize(),
    "input act": lambda w, at: _unless_absent(w.linear_input_act(at(X), at(BIAS), "gelu_tanh"), w),
}


def _unless_absent(found: object, w: Tensor) -> object:
    return w.qdata if found is NotImplemented else found


def same(found: object, expected: object) -> bool:
    """Whether all tensors are on the stand-in, with these bits."""
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    return all(torch.equal(raw_bytes(back(mine)), raw_bytes(other)) for mine, other in pairs)


@pytest.mark.filterwarnings("ignore::lowbit.tensor.LowbitFallbackWarning")
@pytest.mark.parametrize("case", LAYOUTS)
def test_a_tensor_of_every_layout(case):
    """It is made where the float tensor is, moves and comes back, and does there what it does on the CPU."""
    layout, options = LAYOUTS[case]
    plain = gaussian(N, K, seed=1)
    with use_backend("eager"):
        w = QuantizedTensor.from_float(plain, layout, **options)
        with other_device():
            made = QuantizedTensor.from_float(elsewhere(plain), layout, **options)
            moved = w.to(DEVICE)
            home = moved.cpu()
        assert made.device == moved.device == DEVICE
        assert same(list(made.state_dict("w.").values()), list(w.state_dict("w.").values()))
        assert torch.equal(home.dequantize(), w.dequantize())
        for name, op in OPS.items():
            expected = op(w, lambda x: x)
            for tensor in (made, moved):
                with other_device():
                    found = op(tensor, elsewhere)
                assert same(found, expected), name


def codes(x: Tensor) -> Tensor:
    """int8."""
    return (x * 30).to(torch.int8)


FUNCTIONS = {
    "mm_int8": lambda at: comfy_kitchen.mm_int8(at(codes(X)), at(codes(gaussian(K, N)))),
    "int8_linear": lambda at: comfy_kitchen.int8_linear(
        at(X), at(codes(gaussian(N, K))), at(torch.tensor(0.02)), at(BIAS)
    ),
    "stochastic_rounding_fp8": lambda at: comfy_kitchen.stochastic_rounding_fp8(
        at(X), at(torch.randint(0, 256, X.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8))
    ),
    "pack_uint4": lambda at: comfy_kitchen.float_utils.pack_uint4(at(codes(X.abs()).view(torch.uint8) & 15)),
    "to_blocked": lambda at: comfy_kitchen.to_blocked(at(gaussian(130, 5))),
    "from_blocked": lambda at: comfy_kitchen.from_blocked(at(gaussian(256, 8)), 130, 5),
    "fp4_x2_to_f32": lambda at: comfy_kitchen.float_utils.fp4_x2_to_f32(at(codes(X).view(torch.uint8))),
    "f32_to_e8m0": lambda at: comfy_kitchen.float_utils.f32_to_e8m0(at(X.abs())),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_by_its_name(name):
    """Those that no tensor calls."""
    with use_backend("eager"):
        expected = FUNCTIONS[name](lambda x: x)
        with other_device():
            assert same(FUNCTIONS[name](elsewhere), expected)
