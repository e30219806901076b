"""ComfyUI on the CPU alone: weights packed for lowbit's kernels, and all else as it was."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
from lowbit.integrations.comfyui import lowbit_ops
from lowbit.integrations.comfyui.layout import parts_of
from tests.support.comfy_tree import BOTH, install, loaded, same_tensors, stored_linear
from tests.support.toy_layout import CALLS, toy_backend

SPECS = ("awq_w4a16", "fp8_e4m3(granularity=row)", "svdquant_w4a4(rank=16,act_unsigned=true)", "nvfp4")


@pytest.fixture(params=BOTH)
def comfy(request, monkeypatch):
    """ComfyUI: the stand-in, and the source tree where there is one."""
    return install(request.param, monkeypatch)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("spec", SPECS)
def test_a_packed_weight_works_and_is_saved_like_a_plain_one(comfy, spec, mode):
    """The kernel of the layout runs; products, the decoded weight and the saved tensors are those of plain parts."""
    tensors, _, parts, _ = stored_linear(spec, dtype=torch.float32)
    x = torch.randn(3, 256)
    ops = lowbit_ops(torch.float32, kernels="lowbit")
    with toy_backend():
        plain = loaded(ops, tensors)
        with mode():
            expected = plain(x)
    with toy_backend("linear"):
        model = loaded(ops, tensors)
        with mode():
            assert torch.equal(model(x), expected)
        assert CALLS == ["linear"]
        assert model.lin.lowbit_layout.KERNEL_LAYOUT == "toy"
        assert torch.equal(model.lin.weight.dequantize(), plain.lin.weight.dequantize())
        assert all(torch.equal(part.float(), parts[name].float()) for name, part in parts_of(model.lin.weight).items())
        assert same_tensors(model.state_dict(), tensors)


def test_a_lora_is_baked_into_a_packed_weight(comfy):
    """The changed weight is packed again and is that of plain parts."""
    tensors, *_ = stored_linear("awq_w4a16", dtype=torch.float32)
    changed = []
    for kernels, layout in (((), ""), (("linear",), "toy")):
        with toy_backend(*kernels):
            lin = loaded(lowbit_ops(torch.float32, kernels="lowbit"), tensors).lin
            lin.set_weight(lin.weight.dequantize() + 0.01, seed=3)
            assert layout == lin.weight.layout_cls.KERNEL_LAYOUT
            changed.append(lin.weight.dequantize())
    assert torch.equal(*changed)


def test_with_an_accelerator_weights_stay_plain(comfy, monkeypatch):
    """ComfyUI moves them there part by part, past lowbit."""
    tensors, *_ = stored_linear("awq_w4a16")
    with toy_backend("linear"):
        ops = lowbit_ops()
        monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cuda"))
        assert loaded(ops, tensors).lin.lowbit_layout.KERNEL_LAYOUT == ""
