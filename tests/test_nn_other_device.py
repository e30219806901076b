"""Modules on another device: quantized, smoothed, compared and run there.

Without a GPU a stand-in refuses what a GPU would (`tests.support.other_device`).
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.dispatch import use_backend
from lowbit.formats import parse_spec
from lowbit.integrations.compare_blocks import Pair
from lowbit.report.end_to_end import EmbeddingMeter, LanguageMeter, PredictionMeter, psnr
from lowbit.report.metrics import compare_embeddings
from lowbit.smoothing import fold_scales_, modules, smooth_
from tests.support import gaussian
from tests.support.module_state import assert_same_there, state
from tests.support.other_device import back, elsewhere, moved, needs_stand_in, other_device
from tests.support.specs import SMALL_SPECS

pytestmark = needs_stand_in
MORE = ("int8(rotation=256)", "svdquant_w4a4(rank=16,act_unsigned=true)", "gguf(type=Q4_K)")
SPECS = [spec for spec in (*SMALL_SPECS, *MORE) if parse_spec(spec).encodable]
CALIBRATED = ("int8", "svdquant_w4a4(rank=8)", "awq_w4a16(group_size=32,pre_quant_scale=true)")


class Block(nn.Module):
    """A table, linears with and without a bias, a kernel and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 256)
        self.norm = nn.LayerNorm(256)
        self.up = nn.Linear(256, 64)
        self.down = nn.Linear(64, 256, bias=False)
        self.conv = nn.Conv1d(256, 16, 2)

    def forward(self, x: Tensor) -> Tensor:
        """int [B, T] -> [B, 16, T - 1]."""
        hidden = self.tokens(x)
        hidden = hidden + self.down(nn.functional.gelu(self.up(self.norm(hidden))))
        return self.conv(hidden.movedim(-1, -2))


TOKENS = torch.tensor([[3, 1, 19, 0], [7, 7, 2, 5]])


def block() -> Block:
    """The same weights each time."""
    torch.manual_seed(0)
    return Block().eval().requires_grad_(False)


@pytest.mark.parametrize("spec", SPECS)
def test_modules_are_quantized_where_they_are(spec):
    """And then they run there, and repacking leaves them there."""
    with use_backend("eager"):
        here, there = block(), moved(block())
        changes = lowbit.quantize_(here, spec)
        expected = here(TOKENS)
        with other_device():
            assert lowbit.quantize_(there, spec) == changes
            assert_same_there(state(there), state(here))
            assert torch.equal(back(there(elsewhere(TOKENS))), expected)
            lowbit.repack_(there)
            assert_same_there(state(there), state(here))


@pytest.mark.parametrize("spec", CALIBRATED)
def test_statistics_may_be_of_the_cpu(spec):
    """As those of files are."""
    known, rules = lowbit.calibrate(block(), [TOKENS]), {"up|down": spec}
    with use_backend("eager"):
        here, there = block(), moved(block())
        changes = lowbit.quantize_(here, rules, statistics=known)
        with other_device():
            assert lowbit.quantize_(there, rules, statistics=known) == changes
    assert_same_there(state(there), state(here))


def test_a_layer_on_the_device_gets_its_bias_there():
    """A layer without a bias, for a format that needs one."""
    layer = nn.Linear(256, 64, bias=False)
    there = moved(copy.deepcopy(layer))
    spec = "svdquant_w4a4(rank=16,act_unsigned=true)"
    with use_backend("eager"):
        lowbit.quantize_(layer, spec)
        with other_device():
            lowbit.quantize_(there, spec)
    assert_same_there(state(there), state(layer))


@pytest.mark.parametrize("on_device", [False, True])
def test_scales_are_folded_where_the_module_is(on_device, monkeypatch):
    """`smooth_` with statistics, and `fold_scales_` with a scale of either device."""
    monkeypatch.setattr(modules, "_check", lambda *_: None)  # which refuses parameters of a subclass, as these are
    torch.manual_seed(0)
    model = nn.ModuleDict({"norm": nn.LayerNorm(64), "up": nn.Linear(64, 128)}).requires_grad_(False)
    rows = gaussian(256, 64) * torch.linspace(0.1, 8, 64)[torch.randperm(64)]
    known = lowbit.calibrate(nn.Sequential(model["up"]), [rows])
    statistics = {"up": known["0"]}
    there, scale = moved(copy.deepcopy(model)), torch.linspace(0.5, 2, 64)
    with use_backend("eager"):
        expected = smooth_(model, statistics, "awq_w4a16(group_size=32)", [("norm", ["up"])])
        assert expected.scales
        fold_scales_(model["norm"], [model["up"]], scale)
        with other_device():
            found = smooth_(there, statistics, "awq_w4a16(group_size=32)", [("norm", ["up"])])
            fold_scales_(there["norm"], [there["up"]], elsewhere(scale) if on_device else scale)
            assert_same_there(state(there), state(model))
            assert torch.equal(back(found.scales["norm"]), expected.scales["norm"])
            lowbit.quantize_(there, "awq_w4a16(group_size=32)", statistics=found.statistics)
        lowbit.quantize_(model, "awq_w4a16(group_size=32)", statistics=expected.statistics)
    assert_same_there(state(there), state(model))


def test_outputs_are_compared_where_they_are():
    """Errors of a model's outputs and of its blocks."""
    one, two = gaussian(40, 8), gaussian(40, 8, seed=2)
    times = torch.linspace(0, 1, 40)

    def measured(at) -> list[object]:
        found: list[object] = [psnr(at(one), at(two), 2.0), compare_embeddings(at(one), at(two))]
        for meter in (EmbeddingMeter(), LanguageMeter(), PredictionMeter()):
            meter.add(at(one), at(two))
            found.append(meter.result())
        timed = PredictionMeter()
        timed.add(at(one), at(two), times)
        return [*found, timed.result()]

    expected = measured(lambda x: x)
    with other_device():
        assert measured(elsewhere) == expected


def test_blocks_are_compared_where_the_models_are():
    """A model beside a quantized one, with a mask of the CPU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)]))
    model.forward = lambda x: model[0][1](model[0][0](x))
    mask, x = torch.tensor([[1, 1, 0]]), gaussian(3, 32).view(1, 3, 32)

    def compared(model: nn.Module, x: Tensor) -> object:
        other = copy.deepcopy(model)
        other.forward = lambda x: other[0][1](other[0][0](x))
        lowbit.quantize_(other, "int8")
        pair = Pair(model, other)
        pair.run(((x,), {}), mask)
        return pair.blocks()

    with use_backend("eager"):
        expected = compared(model, x)
        there = moved(copy.deepcopy(model))
        there.forward = lambda x: there[0][1](there[0][0](x))
        with other_device():
            assert compared(there, elsewhere(x)) == expected
