"""What the integrations do with layers on another device: load, run, change and save them there.

Without a GPU a stand-in refuses what a GPU would (`tests.support.other_device`).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.dispatch import use_backend
from lowbit.formats import parse_spec
from lowbit.formats.parts import raw_bytes
from lowbit.integrations.hf_layers import dequantize_module_, flat_state, quantized_parameter, repack_loaded_
from lowbit.integrations.nvfp4_serving import TRTLLM, Nvfp4WeightOnly
from tests.integrations.nvfp4_layers import checkpoint, load
from tests.support import gaussian
from tests.support.comfy_tree import STAND_IN, install, loaded, stored_linear
from tests.support.other_device import DEVICE, Elsewhere, back, elsewhere, moved, needs_stand_in, other_device
from tests.support.specs import SMALL_SPECS

pytestmark = needs_stand_in
SPECS = [
    spec
    for spec in (*SMALL_SPECS, "int8(rotation=256)", "svdquant_w4a4(rank=16,act_unsigned=true)")
    if parse_spec(spec).encodable
]


def values(x: Tensor) -> Tensor:
    """Of a tensor of either device."""
    return raw_bytes(x.inner if isinstance(x, Elsewhere) else x)


@pytest.mark.parametrize("spec", SPECS)
def test_layers_of_hugging_face_models(spec):
    """Quantized, flattened for saving, and made plain again."""
    layer = nn.Sequential(nn.Linear(256, 64))
    there = moved(nn.Sequential(nn.Linear(256, 64)))
    there[0].weight.inner.copy_(layer[0].weight.detach())
    there[0].bias.inner.copy_(layer[0].bias.detach())

    def run(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        module[0].weight = quantized_parameter(module[0].weight, parse_spec(spec), where="0")
        lowbit.nn.fold_bias_(module[0])
        repack_loaded_(module)
        flat = flat_state(module)
        return flat, dict(dequantize_module_(module, torch.bfloat16).state_dict())

    with use_backend("eager"):
        flat, plain = run(layer)
        with other_device():
            found, made = run(there)
    assert flat.keys() == found.keys()
    assert all(torch.equal(values(found[key]), values(flat[key])) for key in flat)
    assert all(torch.equal(back(made[key]), plain[key]) for key in plain)


@pytest.mark.parametrize("sizes", [(16,), (16, 32, 16)])
def test_layers_of_serving_engines(sizes):
    """Parameters are made on the current device; shards come from files, on the CPU."""
    shards = checkpoint(sizes, 64)
    x, bias = gaussian(3, 64), gaussian(1, sum(sizes))[0]

    def run(at) -> Tensor:
        layer, scheme = nn.Module(), Nvfp4WeightOnly(alignment=TRTLLM)
        scheme.create_weights(layer, list(sizes), 64, torch.float32)
        load(layer, scheme, shards)
        scheme.process_weights_after_loading(layer)
        return scheme.apply_weights(layer, at(x), at(bias))

    with use_backend("eager"):
        expected = run(lambda x: x)
        with other_device(), torch.device(DEVICE):
            found = run(elsewhere)
    assert torch.equal(back(found), expected)


@pytest.mark.parametrize(
    "spec",
    ["awq_w4a16", "svdquant_w4a4(rank=16,act_unsigned=true)", "int8(granularity=row,rotation=64)", "nvfp4", "mxfp8",
     "convrot_w4a4", "w4a8_codebook", "wna16(group_size=64)"],
)  # fmt: skip
def test_layers_of_comfyui(spec, monkeypatch):
    """A state dict on the device, products there, a LoRA baked in, and what is saved."""
    pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
    from lowbit.integrations.comfyui import lowbit_ops

    install(STAND_IN, monkeypatch)
    tensors, *_ = stored_linear(spec)
    x = gaussian(5, 256).bfloat16()
    change = gaussian(128, 256, seed=7) * 0.01

    def run(tensors: dict[str, Tensor], at) -> tuple[list[Tensor], dict[str, Tensor]]:
        model = loaded(lowbit_ops(kernels="lowbit", disabled=()), dict(tensors))
        model.lin.bias = nn.Parameter(at(model.lin.bias.detach()), requires_grad=False)  # as ComfyUI moves it
        before = model(at(x))
        wanted = model.lin.weight.dequantize().float() + at(change)
        kind = type(model.lin.weight)
        again = model.lin.weight.layout_cls.quantize(wanted, stochastic_rounding=3, like=model.lin.weight)
        model.lin.weight = nn.Parameter(kind(again[0], model.lin.weight._layout_cls, again[1]), requires_grad=False)
        return [before, model(at(x))], model.state_dict()

    with use_backend("eager"):
        products, state = run(tensors, lambda x: x)
        with other_device():
            made, saved = run({name: elsewhere(tensor) for name, tensor in tensors.items()}, elsewhere)
    assert all(torch.equal(back(mine), other) for mine, other in zip(made, products, strict=True))
    assert saved.keys() == state.keys()
    assert all(torch.equal(values(saved[key]), values(state[key])) for key in state)
