"""The JSON files beside the weights of a folder that is written again."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.dequantize import dequantize
from lowbit.checkpoint.migrate import migrate
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from tests.support import gaussian


def test_nothing_of_an_old_description_outlives_its_layers(tmp_path):
    """Converted again or migrated, files say what the layers are now, and nothing of what they were."""
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file({"up.weight": gaussian(128, 128, dtype=torch.float16)}, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps({"hidden_size": 128}))
    with open_source(plain) as source:
        convert(source, tmp_path / "gptq", make_plan(source, "wna16(group_size=64)", dialect="gptq"))
    own = tmp_path / "gptq" / "quantize_config.json"
    own.write_text(json.dumps({**json.loads(own.read_text()), "damp_percent": 0.01}))

    with open_source(tmp_path / "gptq") as source:
        plan = make_plan(source, "wna16(bits=8,group_size=64)", dialect="gptq", requantize=True)
        convert(source, tmp_path / "again", plan)
        migrate(source, tmp_path / "comfy", "comfy")
    again = json.loads((tmp_path / "again" / "quantize_config.json").read_text())
    assert (again["bits"], "damp_percent" in again) == (8, False)
    comfy = json.loads((tmp_path / "comfy" / "config.json").read_text())
    assert comfy == {"hidden_size": 128, "quantization_config": {"quant_method": "lowbit"}}
    assert not (tmp_path / "comfy" / "quantize_config.json").exists()


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dialect", ["comfy", "compressed_tensors"])
def test_a_decoded_folder_names_the_dtype_of_its_weights(tmp_path, name, dialect):
    """config.json and its parts say what the weights are now, in the spelling that they had."""
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file({"up.weight": gaussian(128, 128, dtype=torch.bfloat16)}, plain / "model.safetensors")
    config = {
        name: "bfloat16",
        "hidden_size": 128,
        "text_config": {name: "torch.bfloat16", "depth": 2},
        "vision_config": {name: "float32"},
    }
    (plain / "config.json").write_text(json.dumps(config))
    with open_source(plain) as source:
        convert(source, tmp_path / "int8", make_plan(source, "int8(granularity=row)", dialect=dialect))

    found = {}
    with open_source(tmp_path / "int8") as source:
        for dtype in (None, torch.float16):
            dequantize(source, tmp_path / str(dtype), dtype=dtype)
            found[dtype] = json.loads((tmp_path / str(dtype) / "config.json").read_text())

    assert found[None] == config
    assert found[torch.float16] == {
        **config,
        name: "float16",
        "text_config": {name: "float16", "depth": 2},
    }  # no weight is known to have left float32


def test_a_decoded_folder_of_8_bit_floats_is_named_as_16_bits(tmp_path):
    """Weights that were cast to 8-bit floats, which config.json says, are bfloat16. Only a part may name one."""
    cast = tmp_path / "cast"
    cast.mkdir()
    weight = gaussian(64, 64).to(torch.float8_e4m3fn)
    save_file({"up.weight": weight, "norm.weight": torch.ones(64)}, cast / "model.safetensors")
    (cast / "config.json").write_text(json.dumps({"torch_dtype": "float8_e4m3fn"}))
    parts = tmp_path / "parts"
    parts.mkdir()
    save_file({"up.weight": weight}, parts / "model.safetensors")
    (parts / "config.json").write_text(json.dumps({"text_config": {"dtype": "bfloat16"}}))

    for folder, dtype in ((cast, None), (parts, torch.float32)):
        with open_source(folder) as source:
            dequantize(source, tmp_path / f"{folder.name}-out", dtype=dtype)

    made = [json.loads((tmp_path / f"{name}-out" / "config.json").read_text()) for name in ("cast", "parts")]
    assert made == [{"torch_dtype": "bfloat16"}, {"text_config": {"dtype": "float32"}}]
