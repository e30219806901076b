"""Solvers and calibration on the tensors of another device: nothing is mixed with the CPU's, and the results are there.

Without a GPU a stand-in refuses what a GPU would (`tests.support.other_device`); tests marked `gpu` use a real one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.dispatch import use_backend
from lowbit.formats import formats, parse_spec
from lowbit.solvers import Member, Statistics, refinements, solve, solve_shared, solvers
from lowbit.solvers.error_lora import error_lora
from tests.support.layers import Layer
from tests.support.other_device import Elsewhere, MixedDevicesError, elsewhere, needs_stand_in, other_device

SHORT = "(iterations=3)"
STARTS = {
    "awq": "awq_w4a16(group_size=32,pre_quant_scale=true)",
    "svdquant": "svdquant_w4a4(rank=8)",
}
SPECS = [name for name, kind in formats().items() if kind().encodable and not kind().pre_quant_scale]


def pipelines() -> list[tuple[str, str]]:
    """Every start and every refinement, each with a format that it applies to."""
    found = []
    for name in solvers():
        short = SHORT if name.startswith("learned_rounding_") else ""
        found.append((name + short, STARTS.get(name, "int8")))
    found += [(f"rtn+{step}+bias", "awq_w4a16(group_size=32)") for step in refinements()]
    return found


def statistics(layer: Layer, n: int) -> Statistics:
    """Of all kinds, with gradients."""
    output = Layer.make(1, n, seed=9).statistics(256)
    known = layer.statistics(256, kept=64)
    return replace(known, output_hessian=output.hessian, output_held_out=output.held_out)


def moved(known: Statistics, there: Callable[[Tensor], Tensor]) -> Statistics:
    """All tensors on the other device."""
    tensors = {field.name: getattr(known, field.name) for field in fields(known)}
    return replace(known, **{name: there(x) for name, x in tensors.items() if isinstance(x, Tensor)})


def model() -> nn.Sequential:
    """Two linears."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))


@needs_stand_in
def test_the_stand_in_refuses_what_a_gpu_does():
    """Two devices in one operation, numpy and pointers are errors; copies, scalars and indices are not."""
    there, here = elsewhere(torch.arange(6.0).view(2, 3)), torch.ones(2, 3)
    with other_device():
        for mixed in (lambda: there + here, lambda: there @ here.t(), lambda: torch.cat([there, here])):
            with pytest.raises(MixedDevicesError):
                mixed()
        index = elsewhere(torch.tensor([1]))
        for raw in (there.numpy, lambda: here.add_(there), lambda: torch.tensor(1.0).add_(there.sum())):
            with pytest.raises(MixedDevicesError):
                raw()
        for indexed in (lambda: torch.arange(3)[index], lambda: there[0].index_select(0, torch.tensor([1]))):
            with pytest.raises(MixedDevicesError):
                indexed()
        for lacking in (
            lambda: there.int() @ there.int().t(),
            lambda: torch._int_mm(elsewhere(torch.ones(16, 8).char()), elsewhere(torch.ones(8, 8).char())),
            lambda: torch.rand(3, device=there.device, generator=torch.Generator()),
        ):
            with pytest.raises(MixedDevicesError):
                lacking()
        assert there.data_ptr() > 1 << 62
        assert isinstance(there + torch.tensor(1.0), Elsewhere)
        assert isinstance(there[torch.tensor([1])], Elsewhere)
        assert isinstance(torch.zeros(3, device=there.device) + there[0], Elsewhere)
        assert isinstance(torch.tensor([1.0], device=there.device), Elsewhere)
        assert isinstance(here.to(there.device), Elsewhere)
        assert type(there.to("cpu")) is Tensor
        assert float(there.add_(1).sum()) == 21.0


@needs_stand_in
@pytest.mark.parametrize(("name", "spec"), pipelines())
def test_every_solver_stays_on_the_device_of_the_weight(name, spec):
    """With statistics of the CPU and of the device, its parts and its bias are there and those of the CPU."""
    layer, fmt = Layer.make(64, 128, 1.0, mean=0.3), parse_spec(spec)
    known = statistics(layer, 64)
    with use_backend("eager"):
        expected = solve(layer.weight, fmt, name, known, has_bias=True)
        for given in (known, moved(known, elsewhere)):
            with other_device():
                found = solve(elsewhere(layer.weight), fmt, name, given, has_bias=True)
            assert all(isinstance(part, Elsewhere) for part in found.parts.values())
            assert all(torch.equal(found.parts[key].inner, expected.parts[key]) for key in expected.parts)
            assert (found.solver, found.note) == (expected.solver, expected.note)
            assert (found.bias is None) == (expected.bias is None)
            assert found.bias is None or isinstance(found.bias, Elsewhere)


@needs_stand_in
@pytest.mark.parametrize("spec", SPECS)
def test_every_format_stays_on_the_device_of_the_weight(spec):
    """What auto takes, without statistics and with them."""
    n = 16 if spec == "w4a8_codebook" else 64  # whose eager columns take their time
    layer, fmt = Layer.make(n, 256, 1.0, mean=0.3), parse_spec(spec)
    for known in (None, statistics(layer, n)):
        with other_device(), use_backend("eager"):
            found = solve(elsewhere(layer.weight), fmt, "auto", known, has_bias=True)
        assert all(isinstance(part, Elsewhere) for part in found.parts.values())


@needs_stand_in
def test_what_layers_share_stays_on_their_device():
    """Factors that several layers share, and the LoRA for what was lost."""
    layer, fmt = Layer.make(64, 128, 1.0), parse_spec("svdquant_w4a4(rank=8)")
    known = layer.statistics(256, kept=64)
    with other_device(), use_backend("eager"):
        done = solve_shared([Member(elsewhere(layer.weight)), Member(elsewhere(layer.weight * 0.5))], fmt, known)
        down, up = error_lora(elsewhere(layer.weight), 4, known)

    assert done.shared
    assert all(isinstance(part, Elsewhere) for found in done.solutions for part in found.parts.values())
    assert isinstance(down, Elsewhere)
    assert isinstance(up, Elsewhere)


@needs_stand_in
@pytest.mark.parametrize("gradients", [False, True])
def test_calibration_runs_where_the_model_is(gradients, tmp_path):
    """Its sums are on the device, what comes back is on the CPU, and no different from that of the CPU."""
    batches = [torch.randn(8, 64) for _ in range(6)]
    there = model()
    for module in list(there.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(elsewhere(weight), requires_grad=False))
    with use_backend("eager"):
        expected = lowbit.calibrate(model(), batches, gradients=gradients)["2"]
        with other_device():
            found = lowbit.calibrate(there, [elsewhere(x) for x in batches], gradients=gradients)["2"]

    for field in fields(found):
        value = getattr(found, field.name)
        assert not isinstance(value, Elsewhere)
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, getattr(expected, field.name))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "spec"), [*pipelines(), *(("auto", spec) for spec in SPECS)])
def test_every_solver_on_a_gpu(name, spec):
    """Parts and bias are on the GPU, and about as good as those of the CPU, whose sums round differently."""
    layer, fmt = Layer.make(64, 256, 1.0, mean=0.3), parse_spec(spec)
    known = statistics(layer, 64)
    expected = solve(layer.weight, fmt, name, known, has_bias=True)
    for given in (known, moved(known, Tensor.cuda)):
        found = solve(layer.weight.cuda(), fmt, name, given, has_bias=True)
        assert all(part.is_cuda for part in found.parts.values())
        assert found.bias is None or found.bias.is_cuda
        assert found.solver == expected.solver
        assert found.error == pytest.approx(expected.error, rel=0.02)
        assert found.unseen_error == pytest.approx(expected.unseen_error, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("gradients", [False, True])
def test_calibration_on_a_gpu(gradients):
    """Statistics of a model on the GPU come back on the CPU, as those of the same model there."""
    batches = [torch.randn(8, 64) for _ in range(6)]
    expected = lowbit.calibrate(model(), batches, gradients=gradients)["2"]
    found = lowbit.calibrate(model().cuda(), [x.cuda() for x in batches], gradients=gradients)["2"]

    for field in fields(found):
        value = getattr(found, field.name)
        if isinstance(value, Tensor) and field.name != "magnitudes":  # values at the edge of a bin
            assert not value.is_cuda
            torch.testing.assert_close(value, getattr(expected, field.name), rtol=1e-3, atol=1e-4)
