"""Models of diffusers on another device: quantized while they load there, and loaded there from a quantized folder.

Without a GPU a stand-in refuses what a GPU would (`tests.support.other_device`).
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", "0.42", reason="needs diffusers 0.42")
pytest.importorskip("accelerate", reason="diffusers loads quantized models with accelerate")

from lowbit.dispatch import use_backend
from lowbit.formats.parts import raw_bytes
from lowbit.integrations.diffusers import LowbitConfig
from lowbit.layer_kinds import quantized_layers
from tests.support.other_device import DEVICE, back, needs_stand_in, other_device
from tests.support.tiny_diffusers import flux, saved

pytestmark = needs_stand_in


@pytest.mark.parametrize("spec", ["awq_w4a16", "svdquant_w4a4(rank=16,act_unsigned=true)"])
def test_a_model_is_loaded_on_its_device(spec, tmp_path):
    """From a plain folder and from a quantized one, with the weights and biases that it has on the CPU."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    plain, place = saved(flux(), tmp_path / "plain"), {"": str(DEVICE)}
    with use_backend("eager"):
        asked = {"quantization_config": LowbitConfig(spec)}
        here = FluxTransformer2DModel.from_pretrained(plain, torch_dtype=torch.float32, **asked)
        for folder, options in ((plain, asked), (saved(here, tmp_path / "quantized"), {})):
            with other_device():
                there = FluxTransformer2DModel.from_pretrained(
                    folder, torch_dtype=torch.float32, device_map=place, **options
                )
            expected = dict(quantized_layers(here))
            for name, layer in quantized_layers(there):
                one = expected.pop(name)
                pairs = [(layer.weight.parts[part], tensor) for part, tensor in one.weight.parts.items()]
                pairs += [(layer.bias, one.bias)] if one.bias is not None else []
                assert all(torch.equal(raw_bytes(back(mine)), raw_bytes(other)) for mine, other in pairs), name
            assert not expected
