"""What the integrations of Hugging Face libraries share: choices by rules, flat states, descriptions of files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit.checkpoint.save import save
from lowbit.errors import CheckpointError, PlanError, SolverError, WeightError
from lowbit.formats import parse_spec
from lowbit.integrations.hf_files import describe_files, fitted_to, restored_parameter
from lowbit.integrations.hf_layers import (
    LayerRules,
    choose_formats,
    dequantize_module_,
    flat_state,
    quantized_parameter,
    repack_loaded_,
    stored_bytes,
)
from lowbit.nn import quantize_
from lowbit.tensor import QuantizedTensor
from tests.support.toy_layout import toy_backend

INT8 = parse_spec("int8")


class Model(nn.Module):
    """Two blocks of two linears, a table, a small linear, a convolution and a head that may share its weight."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(128, 64)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(64, 128), "down": nn.Linear(128, 64, bias=False)}) for _ in range(2)
        )
        self.small = nn.Linear(64, 32)
        self.conv = nn.Conv2d(64, 64, 3)
        self.head = nn.Linear(64, 128, bias=False)
        if tied:
            self.head.weight = self.table.weight


def chosen(model, **options):
    """Layer -> spec or None."""
    ties = options.pop("ties", None)
    heads = options.pop("heads", ())
    found = choose_formats(model, LayerRules(INT8, **options), ties=ties, heads=heads)
    return {name: choice.format.spec if choice.format else None for name, choice in found.items()}


def test_the_order_of_what_decides():
    """Names to keep come before rules, rules before a head, the preset and the size; the rest gets the format."""
    with torch.device("meta"):
        model = Model()
    found = chosen(
        model,
        rules=((r"up$", parse_spec("awq_w4a16")), ("small", INT8), ("table", None)),
        keep=("blocks.1",),
        heads={"head"},
    )

    assert found == {
        "table": None,
        "blocks.0.up": "awq_w4a16",
        "blocks.0.down": "int8",
        "blocks.1.up": None,
        "blocks.1.down": None,
        "small": "int8",
        "head": None,
    }


def test_names_to_keep_are_whole():
    """A name holds from a dot to a dot, so "head" keeps no "heads" and "up" keeps every "up"."""
    model = nn.ModuleDict({"heads": nn.Linear(64, 64), "up": nn.Linear(64, 64), "upper": nn.Linear(64, 64)})

    assert chosen(model, keep=("head", "up")) == {"heads": "int8", "up": None, "upper": "int8"}


def test_presets():
    """The generic preset keeps a head by its name, "none" does not, and small weights stay under both."""
    assert chosen(Model())["head"] is None
    assert chosen(Model(), preset="none")["head"] == "int8"
    assert chosen(Model(), preset="none")["small"] is None


@pytest.mark.parametrize(
    ("options", "table", "head"),
    [
        ({}, None, None),  # the head is kept by its name, and the table with it
        ({"preset": "none"}, "int8", "int8"),
        ({"rules": (("table", INT8),)}, "int8", "int8"),
        ({"rules": (("head", INT8),)}, "int8", "int8"),
        ({"preset": "none", "keep": ("head",)}, None, None),
    ],
)
def test_layers_that_share_a_weight_get_one_choice(options, table, head):
    """A rule for one holds for both; without one, both are kept where one is."""
    found = chosen(Model(tied=True), ties={"head": "table"}, **options)

    assert (found["table"], found["head"]) == (table, head)


def test_choices_that_cannot_be():
    """A pattern that matches nothing, rules that part a shared weight, and a format that cannot hold a layer."""
    with pytest.raises(PlanError, match="matches no layer"):
        chosen(Model(), rules=(("upp", None),))
    with pytest.raises(PlanError, match="share one weight"):
        chosen(Model(), ties={"head": "table"}, rules=(("head", INT8), ("table", None)))
    with pytest.raises(WeightError, match="not a multiple"):
        chosen(Model(), rules=(("table", parse_spec("awq_w4a16(group_size=96)")),))
    with pytest.raises(PlanError, match=r"no nn\.Linear"):
        chosen(nn.Sequential(nn.ReLU()))


def test_a_quantized_parameter():
    """It is frozen, of the weight's shape and dtype; a bad weight or solver is an error with the layer's name."""
    parameter = quantized_parameter(torch.randn(64, 64, dtype=torch.bfloat16), INT8, where="a.b")

    assert isinstance(parameter, nn.Parameter)
    assert isinstance(parameter, QuantizedTensor)
    assert (parameter.requires_grad, parameter.dtype, tuple(parameter.shape)) == (False, torch.bfloat16, (64, 64))
    with pytest.raises(WeightError, match=r"^a\.b: holds NaN"):
        quantized_parameter(torch.full((64, 64), float("nan")), INT8, where="a.b")
    with pytest.raises(SolverError, match=r"a\.b"):
        quantized_parameter(torch.randn(64, 64), INT8, "gptq", where="a.b")


@pytest.mark.parametrize("tied", [False, True])
def test_a_flat_state_is_what_a_file_holds(tied, tmp_path):
    """The tensors are those that `save` writes, so the description of that file finds the layers and their weights."""
    model = Model(tied=tied)
    quantize_(model, {"table|head|up|down": "int8"})
    flat = flat_state(model, ties={"head.weight": "table.weight"} if tied else None)
    files = describe_files([save(model, tmp_path / "model.safetensors")])

    assert {name: tuple(t.shape) for name, t in flat.items()} == {n: spec.shape for n, spec in files.specs.items()}
    assert ("head.comfy_quant" in flat) is not tied
    for name, stored in files.found.layers.items():
        layer = model.get_submodule(name)
        restored = restored_parameter(layer, fitted_to(stored, layer, name), files.dialect, flat, torch.float16)
        assert restored.dtype == torch.float16
        held = layer.weight.in_layout("")
        assert torch.equal(restored.qdata, held.qdata)
        assert torch.equal(restored.scale, held.scale)


def test_owners_know_every_tensor_of_a_layer(tmp_path):
    """Codes, scales and marker are a layer's; a bias is not."""
    model = Model()
    quantize_(model, {r"blocks\.0\.up": "int8"})
    files = describe_files([save(model, tmp_path / "model.safetensors")])
    owners = {key: (stored.layer, role) for key, (stored, role) in files.owners().items()}

    assert owners == {
        "blocks.0.up.weight": ("blocks.0.up", "qdata"),
        "blocks.0.up.weight_scale": ("blocks.0.up", "scale"),
        "blocks.0.up.comfy_quant": ("blocks.0.up", "marker"),
    }
    assert "blocks.0.up.bias" in files.found.plain


def test_a_place_that_does_not_fit(tmp_path):
    """Another shape, and a layer that is no linear, are refused with file and layer."""
    model = Model()
    quantize_(model, {r"blocks\.0\.up": "int8"})
    stored = describe_files([save(model, tmp_path / "model.safetensors")]).found.layers["blocks.0.up"]

    with pytest.raises(CheckpointError, match=r"model\.safetensors: layer 'blocks\.0\.up'.*\[128, 64\].*\[64, 64\]"):
        fitted_to(stored, nn.Linear(64, 64), "x")
    with pytest.raises(CheckpointError, match="is a ReLU"):
        fitted_to(stored, nn.ReLU(), "x")


def test_files_that_are_not_right(tmp_path):
    """No file, another kind of file, and one tensor in two files."""
    path = save(Model(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no weight files"):
        describe_files([])
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        describe_files([tmp_path / "model.bin"])
    with pytest.raises(CheckpointError, match=r"has 'blocks\.0\.down\.weight', which"):
        describe_files([path, save(Model(), tmp_path / "other.safetensors")])


def test_taking_the_weights_apart():
    """Dequantizing leaves plain weights of the same values, the bias without the format's share, and shared weights."""
    model = Model(tied=True)
    x, bias = torch.randn(3, 64), model.blocks[0]["up"].bias.detach().clone()
    quantize_(model, {r"up$": "svdquant_w4a4(rank=16,act_unsigned=true)", "table|head": "int8"})
    small = stored_bytes(model)
    effective = model.head.weight.dequantize()
    dequantize_module_(model)

    assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())
    assert torch.allclose(model.blocks[0]["up"].bias, bias, atol=1e-6)
    assert model.head.weight is model.table.weight
    assert torch.equal(model.head(x), x @ effective.t())
    assert small < stored_bytes(model) == sum(p.numel() * 4 for p in model.parameters())


@pytest.mark.parametrize(
    ("accelerator", "places", "layout"),
    [
        (False, None, "toy"),
        (True, None, ""),
        (True, {"": "cpu"}, "toy"),
        (True, {"": torch.device("cpu")}, "toy"),
        (True, {"table": 0, "up": "cpu"}, ""),
        (True, {"table": "cuda:0", "up": "disk"}, ""),
    ],
)
def test_a_loaded_model_is_packed_where_it_stays(accelerator, places, layout, monkeypatch):
    """On the CPU for good it is; one that is to be moved to an accelerator, or offloaded from one, is not."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    model = Model()
    if places is not None:
        model.hf_device_map = places
    with toy_backend("linear"):
        quantize_(model, {"up|down": "int8"}, layout="plain")
        repack_loaded_(model)
    block = model.blocks[0]
    assert block.up.weight.kernel_layout == block.down.weight.kernel_layout == layout
