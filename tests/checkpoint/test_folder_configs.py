"""The JSON files beside the weights of a folder that is written again."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from lowbit.checkpoint.convert import convert
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
