"""Quantized weights and banks of experts on another device: what a plain tensor does there, they do there, too.

Without a GPU a stand-in refuses what a GPU would (`tests.support.other_device`).
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit import QuantizedTensor
from lowbit.dispatch import use_backend
from lowbit.experts import QuantizedBank, grouped_linear, quantize_bank
from lowbit.formats import Format, parse_spec
from lowbit.formats.parts import raw_bytes
from lowbit.layouts.base import Layout, layouts
from lowbit.tensor import repacked
from tests.support import gaussian
from tests.support.other_device import DEVICE, Elsewhere, back, elsewhere, needs_stand_in, other_device

pytestmark = needs_stand_in
N, K = 64, 256
SPECS = {
    "fp8 rows": "fp8_e4m3(granularity=row)",
    "int8 blocks": "int8(granularity=block,block_size=16x32)",
    "rotated int8": "int8(rotation=256)",
    "nvfp4": "nvfp4",
    "wna16": "wna16(group_size=32,zero_point=true)",
    "awq": "awq_w4a16(group_size=32)",
    "svdquant": "svdquant_w4a4(rank=16)",
    "gguf": "gguf(type=Q4_K)",
    "mxfp8": "mxfp8",
    "codebook": "w4a8_codebook",
}
PACKED = (
    "awq_w4a16",
    "wna16(group_size=64,zero_point=true)",
    "wna16",
    "nvfp4",
    "mxfp4",
    "int8",
    "fp8_e4m3",
    "svdquant_w4a4(rank=16)",
    "gguf(type=Q4_K)",
    "gguf(type=Q6_K)",
    "gguf(type=Q8_0)",
    "w4a8_codebook",
    "mxfp8",
    "convrot_w4a4",
)
X, G, I = torch.randn(5, K), torch.randn(5, N), torch.tensor([[1, 47], [0, 3]])


def there(x: Tensor) -> Elsewhere:
    """An operand on the stand-in."""
    return elsewhere(x)


def weight(spec: str) -> QuantizedTensor:
    """On the CPU."""
    return QuantizedTensor.quantize(gaussian(N, K, seed=1), spec)


def bits(found: object) -> list[Tensor]:
    """The values of a result on the stand-in, or of one on the CPU; of a quantized one its parts'."""
    if isinstance(found, QuantizedTensor | QuantizedBank):
        return [part for each in found.part_list for part in bits(each)]
    if isinstance(found, list | tuple):
        return [part for each in found for part in bits(each)]
    if not isinstance(found, Tensor):
        return [torch.tensor(found)]
    return [raw_bytes(found.inner if isinstance(found, Elsewhere) else found)]


def on(found: object) -> set[str]:
    """The devices of a result and of all its parts."""
    if isinstance(found, QuantizedTensor | QuantizedBank):
        return {found.device.type, *(part.device.type for part in found.part_list)}
    if isinstance(found, list | tuple):
        return {place for each in found for place in on(each)}
    return {found.device.type} if isinstance(found, Tensor) else {DEVICE.type}


OPS = {
    "linear": lambda w, at: F.linear(at(X), w, at(torch.ones(N))),
    "linear of one token": lambda w, at: F.linear(at(X[0]), w),
    "linear of bfloat16": lambda w, at: F.linear(at(X.bfloat16()), w, at(torch.ones(N))),
    "mm": lambda w, at: at(X) @ w.t(),
    "mm with the weight first": lambda w, at: w @ at(X).t(),
    "transposed product": lambda w, at: at(G) @ w,
    "addmm": lambda w, at: torch.addmm(at(torch.ones(N)), at(X), w.t(), beta=0.5, alpha=2.0),
    "mv": lambda w, at: torch.mv(w, at(X)[0]),
    "embedding": lambda w, at: F.embedding(at(I), w),
    "index": lambda w, at: w.index_select(0, at(I[0])),
    "index of the CPU": lambda w, _: w[I[0]].dequantize() if isinstance(w[I[0]], QuantizedTensor) else w[I[0]],
    "dequantize": lambda w, _: w.dequantize(torch.float32),
    "dtype": lambda w, _: w.to(torch.bfloat16),
    "t": lambda w, _: w.t(),
    "view": lambda w, _: w.view(4, 16, K),
    "slice": lambda w, _: w[16:32],
    "slice inside a block": lambda w, _: w[3:9],
    "slice with a step": lambda w, _: w[::2],
    "narrow": lambda w, _: w.narrow(0, 8, 24),
    "split": lambda w, _: w.split([10, 22, 32]),
    "chunk": lambda w, _: w.chunk(2),
    "cat": lambda w, _: torch.cat([w, w]),
    "cat of pieces": lambda w, _: torch.cat(w.split(32)),
    "unbind": lambda w, _: w.unbind(0)[3],
    "columns": lambda w, _: w[:, :64],
    "clone": lambda w, _: w.clone(),
    "detach": lambda w, _: w.detach(),
    "deepcopy": lambda w, _: copy.deepcopy(w),
    "new rows": lambda w, _: w.new_zeros((3, K)),
    "copy of a plain weight": lambda w, at: w.clone().copy_(at(gaussian(N, K, seed=2))),
    "copy of a weight": lambda w, _: w.new_zeros((N, K)).copy_(w),
    "into a plain tensor": lambda w, at: at(torch.zeros(N, K)).copy_(w),
    "equal": lambda w, _: torch.equal(w, w.clone()),
    "merge": lambda w, at: w.merge(at(gaussian(N, K, seed=2)) * 0.1),
    "add": lambda w, at: w.clone().add_(at(gaussian(N, K, seed=2)) * 0.1),
    "finite": lambda w, _: torch.isfinite(w).all(),
}


@pytest.mark.filterwarnings("ignore::lowbit.tensor.LowbitFallbackWarning")
@pytest.mark.parametrize("kind", SPECS)
def test_what_a_weight_does(kind):
    """Every operation gives on the device what it gives on the CPU, and gives it there."""
    w = weight(SPECS[kind])
    with use_backend("eager"):
        with other_device():
            moved = w.to(DEVICE)
            assert on(moved) == {DEVICE.type}
            assert torch.equal(moved.cpu(), w)
            assert on(moved.cpu()) == {"cpu"}
        for name, op in OPS.items():
            expected = op(w, lambda x: x)
            with other_device():
                found = op(moved, there)
            assert on(found) == {DEVICE.type}, name
            assert type(found) is not Tensor, name
            pairs = zip(bits(found), bits(expected), strict=True)
            assert all(torch.equal(mine, other) for mine, other in pairs), name


@pytest.mark.parametrize("kind", SPECS)
def test_gradients_reach_the_input(kind):
    """Through a linear, with those of the bias."""
    w = weight(SPECS[kind])

    def gradients(w: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        x, bias = x.requires_grad_(), bias.requires_grad_()
        F.linear(x, w, bias).square().sum().backward()
        return x.grad, bias.grad

    with use_backend("eager"):
        expected = gradients(w, X.clone(), torch.ones(N))
        with other_device():
            found = gradients(w.to(DEVICE), there(X), there(torch.ones(N)))

    assert all(torch.equal(back(mine), other) for mine, other in zip(found, expected, strict=True))


def packable() -> list[tuple[str, str]]:
    """Every layout with every format that it takes; coalesced_int4 holds rounded offsets of awq_w4a16 only."""
    pairs = [(name, spec) for name, layout in layouts().items() for spec in PACKED if fits(layout, parse_spec(spec))]
    return [pair for pair in pairs if pair != ("coalesced_int4", "awq_w4a16")]


def fits(layout: Layout, fmt: Format) -> bool:
    """Whether a weight [128, 256] of a format can be in a layout."""
    return fmt.name in layout.formats and layout.refuses(fmt, 128, 256) is None


@pytest.mark.parametrize(("name", "spec"), packable())
def test_packing_happens_where_the_weight_is(name, spec):
    """Packed parts are there, have the bits of those packed on the CPU, and come back."""
    w = QuantizedTensor.quantize(gaussian(128, 256, seed=1), spec)
    packed, refusal = repacked(w, name)
    assert not refusal
    x = gaussian(3, 256, seed=2)
    with use_backend("eager"):
        product, whole = F.linear(x, packed), packed.dequantize()
        with other_device():
            moved = w.to(DEVICE)
            made, refusal = repacked(moved, name)
            assert not refusal
            assert on(made) == on(made.in_layout("")) == {DEVICE.type}
            assert all(torch.equal(a, b) for a, b in zip(bits(made), bits(packed), strict=True))
            assert torch.equal(made.in_layout(""), moved)
            assert torch.equal(back(F.linear(there(x), made)), product)
            assert torch.equal(back(made.dequantize()), whole)
            assert made.cpu().device.type == "cpu"
            assert torch.equal(packed.to(DEVICE).dequantize(), made.dequantize())


BANK_OPS = {
    "dequantize": lambda b, _: b.dequantize(torch.bfloat16),
    "expert": lambda b, _: b[1],
    "slice": lambda b, _: b[1:],
    "unbind": lambda b, _: b.unbind(0),
    "split": lambda b, _: b.split(2),
    "select": lambda b, at: b.index_select(0, at(torch.tensor([2, 0]))),
    "index": lambda b, at: b[at(torch.tensor([2, 0]))],
    "index of the CPU": lambda b, _: b[torch.tensor([2, 0])],
    "cat": lambda b, _: torch.cat([b, b]),
    "clone": lambda b, _: b.clone(),
    "dtype": lambda b, _: b.to(torch.bfloat16),
    "equal": lambda b, _: torch.equal(b, b.clone()),
    "copy": lambda b, at: b.clone().copy_(at(gaussian(3, N * K, seed=3).view(3, N, K))),
    "bmm": lambda b, at: torch.bmm(at(X).expand(3, 5, K), b.transpose(1, 2)),
    "by token": lambda b, at: grouped_linear(at(X), b, expert_of_token=at(torch.tensor([2, 0, 1, 2, -1]))),
    "by offsets": lambda b, at: grouped_linear(
        at(X), b, offsets=at(torch.tensor([1, 3, 5], dtype=torch.int32)), bias=at(torch.ones(3, N))
    ),
}


@pytest.mark.parametrize("kind", SPECS)
def test_what_a_bank_of_experts_does(kind):
    """It is made where its weights are, and every operation gives there what it gives on the CPU."""
    fmt = parse_spec(SPECS[kind])
    plain = gaussian(3, N * K, seed=1).view(3, N, K)
    solver = "auto" if fmt.name == "svdquant_w4a4" else "rtn"
    with use_backend("eager"):
        bank = quantize_bank(plain, fmt, solver=solver)
        with other_device():
            moved = quantize_bank(there(plain), fmt, solver=solver)
        assert on(moved) == {DEVICE.type}
        assert all(torch.equal(a, b) for a, b in zip(bits(moved), bits(bank), strict=True))
        for name, op in BANK_OPS.items():
            expected = op(bank, lambda x: x)
            with other_device():
                found = op(moved, there)
            assert on(found) == {DEVICE.type}, name
            pairs = zip(bits(found), bits(expected), strict=True)
            assert all(torch.equal(mine, other) for mine, other in pairs), name
        with other_device():
            assert torch.equal(bank.to(DEVICE).cpu(), bank)


def test_a_module_moves_and_comes_back():
    """`.to` of a whole module, its state dict, and copying one of the CPU into it."""
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K, bias=False))
    lowbit.quantize_(model, "int8")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with use_backend("eager"):
        expected = model(X)
        with other_device():
            model.to(DEVICE)
            assert {place for value in model.state_dict().values() for place in on(value)} == {DEVICE.type}
            assert torch.equal(back(model(there(X)).detach()), expected)
            model.load_state_dict(state)
            assert {place for value in model.state_dict().values() for place in on(value)} == {DEVICE.type}
            model.to("cpu")
        assert torch.equal(model(X), expected)
