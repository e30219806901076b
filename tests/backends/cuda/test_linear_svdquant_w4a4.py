from __future__ import annotations

import pytest
import torch

from tests.support import cuda_simulator
from tests.support.cpu_linear import activations, packed_weight

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import kernels, linear_svdquant_w4a4 as cuda
from lowbit.backends.gpu import Target, assume
from lowbit.formats import parse_spec
from lowbit.layouts import svdquant_fragments
from lowbit.layouts.base import get_layout

BF16, F16 = torch.bfloat16, torch.float16
GPUS = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_120": (12, 0)}


def _packed(spec: str, n: int, k: int, dtype: torch.dtype):
    """A format, the parts of a weight in the dtype of a model, plain and packed."""
    fmt = parse_spec(spec)
    weight, _ = packed_weight(spec, n, k, "")
    plain = {name: part.to(dtype) if part.is_floating_point() else part for name, part in weight.parts.items()}
    return fmt, plain, get_layout(svdquant_fragments.NAME, fmt).packed(fmt, plain)


@pytest.mark.parametrize(
    ("gpu", "spec", "dtype", "lead"),
    [
        ("sm_80", "svdquant_w4a4(rank=16)", BF16, (3,)),
        ("sm_90", "svdquant_w4a4(rank=16)", BF16, (3,)),
        ("sm_120", "svdquant_w4a4(rank=5,act_unsigned=True)", F16, (2, 9)),
    ],
)
def test_linear(gpu, spec, dtype, lead, monkeypatch):
    """Every kind of GPU, simulated, gives eager's product of the same parts, rounded once, with a bias and without."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    fmt, plain, parts = _packed(spec, 70, 128, dtype)
    x = activations(torch.Size(lead).numel(), 128, dtype).view(*lead, 128)
    bias = torch.randn(70).to(dtype) if len(lead) == 1 else None
    with assume(Target("cuda", GPUS[gpu], 1)):
        assert cuda.refuses(fmt, x, parts, bias) is None
        found = cuda.linear_svdquant_w4a4(fmt, x, parts, bias)
    wanted = fmt.linear(x.float(), plain, None if bias is None else bias.float()).double()
    assert (found.shape, found.dtype) == (wanted.shape, dtype)
    half_ulp = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(found.double(), wanted, rtol=1.01 * half_ulp, atol=2e-5 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("gpu", "storage", "gemm"),
    [
        ("sm_80", "kFragments4", "svdquant_gemm_mma.cu"),
        ("sm_90", "kSwizzled8", "svdquant_gemm_wgmma.cu"),
        ("sm_120", "kFragments8", "svdquant_gemm_mma.cu"),
    ],
)
def test_what_runs(gpu, storage, gemm):
    """Codes are written as the products of the GPU take them, and those are the ones that run."""
    fmt = parse_spec("svdquant_w4a4")
    meta = torch.device("meta")
    parts = get_layout(svdquant_fragments.NAME, fmt).empty_parts(fmt, (3072, 3072), meta, BF16)
    with assume(Target("cuda", GPUS[gpu])), kernels.record() as launches:
        cuda.linear_svdquant_w4a4(fmt, torch.empty(4096, 3072, dtype=BF16, device=meta), parts, None)
    assert storage in launches[0].name
    assert {launch.source for launch in launches[1:]} == {gemm}


def test_nothing_to_do(monkeypatch):
    """No tokens give an empty result without a launch."""
    monkeypatch.setattr(kernels, "launch", lambda *_, **__: pytest.fail("launched"))
    fmt, _, parts = _packed("svdquant_w4a4(rank=4)", 16, 64, BF16)
    with assume(Target("cuda", (8, 0))):
        assert cuda.linear_svdquant_w4a4(fmt, torch.zeros(2, 0, 64).bfloat16(), parts, None).shape == (2, 0, 16)


def test_refusals():
    """What the kernels cannot take is refused in words that name it."""
    fmt, _, parts = _packed("svdquant_w4a4(rank=4)", 16, 64, BF16)
    x = activations(2, 64, BF16)
    with assume(Target("cuda", (8, 6))):
        assert cuda.refuses(fmt, x, parts, None) is None
        assert "x is float32" in cuda.refuses(fmt, x.float(), parts, None)
        assert "bias is float32, x bfloat16" in cuda.refuses(fmt, x, parts, torch.zeros(16))
        assert "proj_up is float32" in cuda.refuses(fmt, x, {**parts, "proj_up": parts["proj_up"].float()}, None)
        assert "scale is on meta" in cuda.refuses(fmt, x, {**parts, "scale": parts["scale"].to("meta")}, None)
    with assume(Target("cuda", (7, 5))):
        assert "7.5" in cuda.refuses(fmt, x, parts, None)
    with assume(Target("hip")):
        assert "NVIDIA" in cuda.refuses(fmt, x, parts, None)


def test_which_weights_are_packed():
    """No weight is put into the layout for a GPU that cannot read it."""
    for target, packs in ((Target("cuda", (8, 0)), True), (Target("cuda", (7, 5)), False), (Target("hip"), False)):
        with assume(target):
            assert cuda._packs() == packs
