"""Models of transformers on another device: quantized while they load there, and loaded there from folders.

Without a GPU a stand-in refuses what a GPU would (`tests.support.other_device`).
"""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers", "5.21", reason="needs transformers 5.21")

from transformers import AutoModelForCausalLM

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.dispatch import use_backend
from lowbit.formats.parts import raw_bytes
from lowbit.integrations.transformers import LowbitConfig
from lowbit.layer_kinds import quantized_layers
from tests.support.other_device import DEVICE, back, elsewhere, needs_stand_in, other_device
from tests.support.tiny_transformers import TOKENS, answer, llama, saved

pytestmark = needs_stand_in
FOLDERS = {"comfy": "awq_w4a16", "torchao": "wna16(group_size=64)"}  # their files describe layers themselves


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a plain language model."""
    torch.manual_seed(0)
    return saved(llama(layers=1), tmp_path_factory.mktemp("plain"))


def assert_same_on_the_device(folder, **options) -> None:
    """Assert that a model that is loaded on the stand-in has the weights of one on the CPU, and answers as it does."""
    with use_backend("eager"):
        here = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        with other_device(), torch.no_grad():
            place = {"": str(DEVICE)}
            there = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=place, **options)
            logits = back(there(elsewhere(TOKENS)).logits)
        torch.testing.assert_close(logits, answer(here), rtol=1e-4, atol=1e-5)  # attention is computed otherwise
    expected = dict(quantized_layers(here))
    assert expected
    for name, layer in quantized_layers(there):
        for part, tensor in expected.pop(name).weight.parts.items():
            assert torch.equal(raw_bytes(back(layer.weight.parts[part])), raw_bytes(tensor)), (name, part)
    assert not expected


@pytest.mark.parametrize("spec", ["int8", "svdquant_w4a4(rank=16,act_unsigned=true)"])
def test_a_model_is_quantized_on_its_device(spec, plain):
    """While it loads."""
    assert_same_on_the_device(plain, quantization_config=LowbitConfig(spec))


@pytest.mark.parametrize("dialect", FOLDERS)
def test_a_folder_is_loaded_on_the_device(dialect, plain, tmp_path):
    """Of tensors that transformers has put there, by lowbit's own quantizer."""
    with open_source(plain) as source:
        convert(source, tmp_path / "made", make_plan(source, FOLDERS[dialect], dialect=dialect), jobs=1)
    config = tmp_path / "made" / "config.json"
    told = json.loads(config.read_text("utf-8"))
    told["quantization_config"] = {"quant_method": "lowbit"}
    config.write_text(json.dumps(told), "utf-8")
    assert_same_on_the_device(tmp_path / "made")
