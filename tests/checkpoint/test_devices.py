"""Conversions whose weights are solved on another device: the same file, and no device's tensor where it is written.

Without a GPU a stand-in refuses what a GPU would (`tests.support.other_device`); the test marked `gpu` uses a real one.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoint import compare_layer, convert_group, convert_layer, pipeline, sensitivity
from lowbit.checkpoint.compare import compare
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.error_lora import write_error_lora
from lowbit.checkpoint.layer_statistics import InMemory
from lowbit.checkpoint.mixed_precision import find_choices
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.devices import enough_memory, usable_device
from lowbit.dispatch import use_backend
from lowbit.errors import PlanError, SolverError
from tests.support import outlier_weight
from tests.support.layers import Layer
from tests.support.other_device import DEVICE, Elsewhere, needs_stand_in, other_device

K = 128
QKV = tuple(f"blocks.0.attn.to_{name}" for name in "qkv")
BANK = "layers.0.mlp.experts.gate_up_proj"


def tensors() -> dict[str, torch.Tensor]:
    """Three linears with one input, two with their own, of which one has a bias, and a bank of two experts."""
    made = {f"{name}.weight": outlier_weight(32, K, seed=i) for i, name in enumerate((*QKV, "up", "unknown"))}
    return made | {"up.bias": torch.linspace(-1, 1, 32), BANK: outlier_weight(2 * 32, K, seed=9).view(2, 32, K)}


def known() -> InMemory:
    """What is known of their inputs, and of the gradient at one's output."""
    seen = Layer.make(1, K, 1.0, 3, mean=0.4).statistics(512, kept=64)
    return InMemory(dict.fromkeys(QKV, seen) | {"up": Layer.make(1, K, 1.0, 4, mean=0.5).statistics(512)})


pytestmark = needs_stand_in


@pytest.fixture
def source(tmp_path):
    """The open file."""
    save_file(tensors(), tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as opened:
        yield opened


@pytest.fixture(autouse=True)
def eager_everywhere(monkeypatch):
    """In worker threads, too: the kernels of the CPU give other bits, and do not run on the stand-in."""
    work_off = pipeline._Run._work_off

    def work_off_eagerly(self):
        with use_backend("eager"):
            work_off(self)

    monkeypatch.setattr(pipeline._Run, "_work_off", work_off_eagerly)
    with use_backend("eager"):
        yield


@contextmanager
def elsewhere(monkeypatch, *modules):
    """The stand-in is a device, in worker threads too; yields the weights that `solve` of these modules gets."""
    seen = []
    work_off = pipeline._Run._work_off

    def watched(real):
        def solve(w, *arguments, **options):
            seen.extend([member.w for member in w] if isinstance(w, list) else [w])
            return real(w, *arguments, **options)

        return solve

    def work_off_there(self):
        with other_device():
            work_off(self)

    with monkeypatch.context() as patched, other_device():
        patched.setattr(pipeline._Run, "_work_off", work_off_there)
        for module in modules:
            name = "solve_shared" if hasattr(module, "solve_shared") else "solve"
            patched.setattr(module, name, watched(getattr(module, name)))
        yield seen


@pytest.mark.parametrize(
    ("spec", "options", "with_statistics"),
    [("int8", {}, True), ("nvfp4", {}, False), ("awq_w4a16", {}, True),
     ("svdquant_w4a4(rank=8)", {"keep": ["experts"]}, True), ("mxfp8", {}, False),
     ("svdquant_w4a4(rank=8)", {"share_low_rank": True, "keep": ["experts"]}, True),
     ("svdquant_w4a4(rank=8)", {"share_low_rank": True, "keep": ["experts"]}, False)],
)  # fmt: skip
def test_the_file_is_that_of_the_cpu(source, tmp_path, monkeypatch, spec, options, with_statistics):
    """Bit for bit, each weight having been solved on the device; so is the report."""
    statistics = known() if with_statistics else None
    plan = make_plan(source, spec, preset="none", statistics=statistics, **options)
    here = convert(source, tmp_path / "here.safetensors", plan, statistics=statistics)
    with elsewhere(monkeypatch, convert_layer, convert_group) as seen:
        there = convert(source, tmp_path / "there.safetensors", plan, statistics=statistics, device=DEVICE)

    assert len(seen) == 5 + 2 * ("keep" not in options)
    assert all(isinstance(w, Elsewhere) for w in seen)
    assert (tmp_path / "here.safetensors").read_bytes() == (tmp_path / "there.safetensors").read_bytes()
    timeless = [[replace(layer, seconds=0.0) for layer in report.layers] for report in (here, there)]
    assert timeless[0] == timeless[1]


def test_stochastic_rounding_there(source, tmp_path, monkeypatch):
    """A generator of the device is made from the seed."""
    plan = make_plan(source, "int8", solver="rtn", preset="none")
    with elsewhere(monkeypatch, convert_layer):
        report = convert(source, tmp_path / "x.safetensors", plan, seed=3, device=DEVICE)
    assert all(layer.accuracy.sqnr > 30 for layer in report.layers)


@pytest.mark.parametrize("with_statistics", [False, True])
def test_sensitivities_are_those_of_the_cpu(source, monkeypatch, with_statistics):
    """Measured on the device, of every layer in every format."""
    statistics = known() if with_statistics else None
    found = find_choices(source, ("int8", "nvfp4"), preset="none", statistics=statistics)
    here = sensitivity.measure(source, found.candidates, statistics)
    with elsewhere(monkeypatch, sensitivity) as seen:
        there = sensitivity.measure(source, found.candidates, statistics, device=DEVICE)
    assert seen
    assert all(isinstance(w, Elsewhere) for w in seen)
    assert here == there


def test_the_correcting_lora_is_that_of_the_cpu(source, tmp_path, monkeypatch):
    """Found on the device, with statistics and a corrected bias."""
    statistics = known()
    plan = make_plan(source, "awq_w4a16", preset="none", keep=["experts"], statistics=statistics)
    convert(source, tmp_path / "x.safetensors", plan, statistics=statistics)
    options = {"statistics": statistics, "bias_corrected": ["up"]}
    with open_source(tmp_path / "x.safetensors") as converted:
        here = write_error_lora(source, converted, tmp_path / "a.safetensors", 4, **options)
        with elsewhere(monkeypatch):
            there = write_error_lora(source, converted, tmp_path / "b.safetensors", 4, **options, device=DEVICE)
    assert here == there
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_comparison_is_that_of_the_cpu(source, tmp_path, monkeypatch):
    """Products with second moments are taken on the device; of layers without, and all else, nothing is there."""
    convert(source, tmp_path / "x.safetensors", make_plan(source, "int8", preset="none"))
    seen, real = [], compare_layer.LayerReference.energy

    def energy(self, rows):
        seen.append(isinstance(self.hessian, Elsewhere))
        return real(self, rows)

    with open_source(tmp_path / "x.safetensors") as converted:
        here = compare(source, [converted], statistics=known())
        monkeypatch.setattr(compare_layer.LayerReference, "energy", energy)
        with elsewhere(monkeypatch):
            there = compare(source, [converted], statistics=known(), device=DEVICE)
    assert here == there
    assert seen
    assert all(seen)


def test_too_little_memory_for_a_comparison(monkeypatch):
    """One error that names the layer and what helps."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(torch.Tensor, "__matmul__", full)
    reference = compare_layer.LayerReference(torch.ones(2, 2), torch.eye(2), "in.safetensors: layer 'up'")
    with pytest.raises(SolverError, match=r"in\.safetensors: layer 'up'.*cpu.*--jobs 1"):
        reference.energy(reference.w)


@pytest.mark.parametrize("share", [False, True])
def test_too_little_memory_there(source, tmp_path, monkeypatch, share):
    """One error that names the layer and what helps; nothing is left behind."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(convert_group if share else convert_layer, "solve_shared" if share else "solve", full)
    plan = make_plan(source, "svdquant_w4a4(rank=8)", preset="none", only=["attn"], share_low_rank=share)
    with pytest.raises(SolverError, match=r"in\.safetensors.*blocks\.0\.attn\.to_[kqv].*--jobs 1"):
        convert(source, tmp_path / "x.safetensors", plan, jobs=1)
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:99", "hpu", ""])
def test_a_device_that_is_not_there(name):
    """Is one error that names it."""
    with pytest.raises(PlanError, match=f"device '{name}': cannot be used: .*name another"):
        usable_device(name)


def test_other_failures_there_are_not_taken_for_it():
    """What is no lack of memory is raised as it is; what cuBLAS says of one is."""
    device = torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="illegal"), enough_memory(device, "layer 'a'"):
        raise RuntimeError("an illegal memory access was encountered")
    with pytest.raises(SolverError, match=r"layer 'a'.*cuda:0"), enough_memory(device, "layer 'a'"):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")


@pytest.mark.gpu
def test_converting_on_a_gpu(source, tmp_path):
    """Layers lose about as much as those that were solved on the CPU, whose sums round differently."""
    statistics = known()
    for spec in ("int8", "awq_w4a16", "svdquant_w4a4(rank=8)"):
        share = spec.startswith("svdquant")
        plan = make_plan(source, spec, preset="none", keep=["experts"], statistics=statistics, share_low_rank=share)
        here = convert(source, tmp_path / f"{spec}-cpu.safetensors", plan, statistics=statistics)
        there = convert(source, tmp_path / f"{spec}-gpu.safetensors", plan, statistics=statistics, device="cuda")
        for one, other in zip(here.layers, there.layers, strict=True):
            assert other.accuracy.sqnr == pytest.approx(one.accuracy.sqnr, abs=0.5)
            assert (other.error is None) == (one.error is None)
