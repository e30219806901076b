"""Experts that are layers of their own, `experts.0.up_proj` ..., as vLLM's dialects have them: ordinary layers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowbit
from lowbit.checkpoint.banks import experts_of
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.dequantize import dequantize
from lowbit.checkpoint.migrate import migrate
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.quantized_source import look_for_layers
from lowbit.checkpoint.source import open_source
from lowbit.checkpoint.verify import verify
from lowbit.formats.parts import raw_bytes
from tests.support.tensors import outlier_weight

EXPERTS = [f"model.layers.0.mlp.experts.{index}" for index in range(3)]
CASES = [
    ("compressed_tensors", "wna16(group_size=32)", "weight_packed"),
    ("compressed_tensors", "nvfp4(global_scale_divides=true)", "weight_packed"),
    ("modelopt", "nvfp4", "weight"),
    ("comfy", "nvfp4", "weight"),
]


class Model(nn.Module):
    """A layer of experts that are modules."""

    def __init__(self):
        super().__init__()
        experts = nn.ModuleList(
            nn.ModuleDict({"up_proj": nn.Linear(128, 64, bias=False), "down_proj": nn.Linear(64, 128, bias=False)})
            for _ in EXPERTS
        )
        mlp = nn.ModuleDict({"experts": experts, "gate": nn.Linear(128, 3, bias=False)})
        self.model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": mlp})])})
        self.to(torch.bfloat16)


@pytest.fixture
def folder(tmp_path):
    """A tiny Mixtral-like model folder with two-dimensional weights an expert."""
    tensors = {"model.layers.0.mlp.gate.weight": torch.ones(3, 128, dtype=torch.bfloat16)}
    for seed, expert in enumerate(EXPERTS):
        tensors[f"{expert}.up_proj.weight"] = outlier_weight(64, 128, seed=seed, dtype=torch.bfloat16)
        tensors[f"{expert}.down_proj.weight"] = outlier_weight(128, 64, seed=seed, dtype=torch.bfloat16)
    path = tmp_path / "model"
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}))
    return path


@pytest.mark.parametrize(("dialect", "spec", "suffix"), CASES)
def test_each_expert_is_a_layer(dialect, spec, suffix, folder, tmp_path):
    """Converted, verified, loaded, decoded and taken to comfy and back: the same bits an expert, and no bank."""
    with open_source(folder) as source:
        convert(source, tmp_path / "out", make_plan(source, spec, dialect=dialect, preset="none", solver="rtn"))
        with open_source(tmp_path / "out") as output:
            result = verify(source, output)
            held = look_for_layers(output, output.components[0])
            parts = {name: held.load(stored) for name, stored in held.layers.items()}
            dequantize(output, tmp_path / "plain")
            migrate(output, tmp_path / "comfy", "comfy")
    assert [*result.problems, *result.failing(12)] == []
    assert held.dialect.name == dialect
    assert held.layers.keys() == {f"{expert}.{name}" for expert in EXPERTS for name in ("up_proj", "down_proj")}
    assert not any(experts_of(stored) for stored in held.layers.values())
    assert f"{EXPERTS[2]}.up_proj.{suffix}" in load_file(tmp_path / "out" / "model.safetensors")

    model, plain = Model(), load_file(tmp_path / "plain" / "model.safetensors")
    lowbit.load(model, tmp_path / "out")
    with open_source(tmp_path / "comfy") as comfy:
        again = look_for_layers(comfy, comfy.components[0])
        for name, made in parts.items():
            weight, back = model.get_submodule(name).weight, again.load(again.layers[name])
            for part, tensor in made.items():
                assert torch.equal(raw_bytes(weight.in_layout("").parts[part]), raw_bytes(tensor))
            assert torch.equal(weight.dequantize(), plain[f"{name}.weight"])
            assert torch.equal(raw_bytes(back["qdata"]), raw_bytes(made["qdata"]))
