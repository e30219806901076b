"""A folder that lowbit writes against diffusers' own Nunchaku Lite: its modules have these tensors and no others."""

from __future__ import annotations

import importlib
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source

diffusers = pytest.importorskip("diffusers", minversion="0.42")

from tests.support.tiny_diffusers import qwen, saved  # noqa: E402  (needs diffusers)


@pytest.fixture
def model():
    """A small Qwen-Image in bfloat16."""
    torch.manual_seed(0)
    return qwen().bfloat16()


@pytest.fixture
def nunchaku(model, monkeypatch):
    """diffusers' module of the quantized linears, without the kernels, which only running them needs."""
    name = "diffusers.quantizers.nunchaku.utils"
    fake = ModuleType("kernels")
    fake.get_kernel = lambda *_, **__: SimpleNamespace(ops=None)
    try:
        with monkeypatch.context() as patch:  # only while that module is imported
            patch.setitem(sys.modules, "kernels", fake)
            patch.setattr("diffusers.utils.is_kernels_available", lambda: True)
            patch.setattr("diffusers.utils.is_kernels_version", lambda *_: True, raising=False)
            patch.setattr("diffusers.utils.constants.DIFFUSERS_TRUST_REMOTE_KERNELS", True, raising=False)
            found = importlib.import_module(name)
    except ModuleNotFoundError:
        pytest.skip("a diffusers without Nunchaku Lite")
    yield found
    sys.modules.pop(name, None)


def test_diffusers_finds_every_tensor_in_its_place(model, nunchaku, tmp_path):
    """Its quantizer replaces the listed modules, and names, shapes and dtypes of all tensors are what these have."""
    from diffusers.quantizers.quantization_config import NunchakuLiteQuantizationConfig

    with open_source(saved(model, tmp_path / "in")) as source:
        rules = [("_mod", "awq_w4a16")]
        plan = make_plan(source, "svdquant_w4a4(rank=16)", solver="rtn", dialect="nunchaku", layer_rules=rules)
        convert(source, tmp_path / "out", plan)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    said = NunchakuLiteQuantizationConfig.from_dict(config["quantization_config"])
    count = nunchaku.replace_with_nunchaku_linear(model, said.to_dict(), said.compute_dtype)
    tensors = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")

    assert count == plan.count("quantize") > 10
    nunchaku.check_strict_state_dict_match(model, tensors)
    for name, parameter in model.state_dict().items():
        assert (tensors[name].shape, tensors[name].dtype) == (parameter.shape, parameter.dtype), name
    linear = model.get_submodule("transformer_blocks.0.attn.to_q")
    assert (type(linear).__name__, linear.rank, linear.act_unsigned) == ("SVDQW4A4Linear", 16, False)
    assert type(model.get_submodule("transformer_blocks.1.img_mod.1")).__name__ == "AWQW4A16Linear"
