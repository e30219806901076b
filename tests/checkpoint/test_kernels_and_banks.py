"""Convolutions, transposed linears, tied weights and banks of experts through files."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowbit
from lowbit import QuantizedTensor
from lowbit.checkpoint.banks import load_bank
from lowbit.checkpoint.dequantize import dequantize
from lowbit.checkpoint.dialects.comfy import COMFY
from lowbit.checkpoint.dialects.comfy_marker import marker_tensor
from lowbit.checkpoint.quantized_source import look_for_layers
from lowbit.checkpoint.source import open_source
from lowbit.errors import CheckpointError, PartsError
from lowbit.experts import QuantizedBank, grouped_linear, quantize_bank
from lowbit.formats import parse_spec
from lowbit.formats.parts import raw_bytes
from tests.support.specs import ALL_SPECS

BANK_SPECS = [spec for spec in ALL_SPECS if parse_spec(spec).encodable and not parse_spec(spec).folds_bias]


class Convolutions(nn.Module):
    """One of each kind."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(64, 32, 3)
        self.two = nn.Conv2d(64, 32, 3, groups=2, bias=False)
        self.three = nn.Conv3d(64, 32, (1, 2, 2))
        self.up = nn.ConvTranspose2d(8, 8, 2)


class Experts(nn.Module):
    """Banks in both orientations, and a plain bias."""

    def __init__(self, transposed=False):
        super().__init__()
        self.up = nn.Parameter(torch.randn((4, 64, 48) if transposed else (4, 48, 64)), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(4, 48), requires_grad=False)
        self.router = nn.Linear(64, 4)

    def forward(self, x):
        """Each token to its best expert."""
        return grouped_linear(x, self.up, expert_of_token=self.router(x).argmax(-1), bias=self.bias)


def _with_bank(spec, *, transposed=False):
    model = nn.ModuleDict({"experts": Experts(transposed)})
    bank = quantize_bank(model.experts.up, spec, transposed=transposed)
    model.experts.up = nn.Parameter(bank, requires_grad=False)
    return model


def _equal(a, b):
    return a.spec == b.spec and all(
        torch.equal(raw_bytes(p), raw_bytes(q)) for p, q in zip(a.part_list, b.part_list, strict=True)
    )


@pytest.mark.parametrize("spec", ["nvfp4", "mxfp8", "int8", "awq_w4a16(group_size=32)", "svdquant_w4a4(rank=8)"])
def test_convolutions_come_back_bit_for_bit(spec, tmp_path):
    """Kernels are stored as matrices with their shape in the marker, and load into the same modules."""
    model, fresh = Convolutions(), Convolutions()
    lowbit.quantize_(model, spec)

    path = lowbit.save(model, tmp_path / "model.safetensors")
    report = lowbit.load(fresh, path)

    assert {"one", "two", "three"} >= report.quantized.keys() >= {"one", "three"}
    for name in report.quantized:
        mine, theirs = fresh.get_submodule(name), model.get_submodule(name)
        assert mine.weight.shape == theirs.weight.shape
        assert _equal(mine.weight, theirs.weight)
        marker = json.loads(load_file(path)[f"{name}.comfy_quant"].numpy().tobytes())
        assert marker["kernel_shape"] == list(theirs.weight.shape)
    x = torch.randn(1, 64, 5, 5, 5)
    assert torch.equal(fresh.three(x), model.three(x))
    assert lowbit.save(fresh, tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_decoded_file_has_the_weights_that_the_modules_have(tmp_path):
    """Dequantizing a file gives kernels their shape and a Conv1D its orientation again, so that it loads anywhere."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(nn.Conv2d(8, 16, (1, 3)), conv1d(32, 32))
    lowbit.quantize_(model, "int8(activations=none)")
    path = lowbit.save(model, tmp_path / "model.safetensors")

    with open_source(path) as source:
        dequantize(source, tmp_path / "plain.safetensors", dtype=torch.float32)

    plain = load_file(tmp_path / "plain.safetensors")
    for index in (0, 1):
        assert torch.equal(plain[f"{index}.weight"], model[index].weight.dequantize())


def test_a_marker_with_an_impossible_kernel_is_refused(tmp_path):
    """A kernel shape that is not one of the stored matrix is an error that names the layer and both."""
    model = nn.Sequential(nn.Conv2d(8, 16, (1, 3)))
    lowbit.quantize_(model, "int8(activations=none)")
    tensors = load_file(lowbit.save(model, tmp_path / "good.safetensors"))
    for kernel in ([16, 8, 3, 3], "16x8", [16, 24]):
        marker = {**json.loads(tensors["0.comfy_quant"].numpy().tobytes()), "kernel_shape": kernel}
        tensors["0.comfy_quant"] = marker_tensor(marker)
        save_file(tensors, tmp_path / "bad.safetensors")

        with pytest.raises(CheckpointError, match=r"layer '0': kernel_shape is .* no kernel of the matrix \[16, 24\]"):
            lowbit.load(nn.Sequential(nn.Conv2d(8, 16, (1, 3))), tmp_path / "bad.safetensors")


def test_a_kernel_loads_only_where_it_belongs(tmp_path):
    """Another kernel size of the same matrix, a linear for a kernel, or a kernel for a linear, is refused by name."""
    model = nn.Sequential(nn.Conv2d(8, 16, (1, 3)), nn.Linear(24, 16))
    lowbit.quantize_(model, "int8(activations=none)")
    path = lowbit.save(model, tmp_path / "model.safetensors")

    for other, message in (
        (nn.Sequential(nn.Conv2d(8, 16, (3, 1)), nn.Linear(24, 16)), r"kernel of shape \[16, 8, 1, 3\]"),
        (nn.Sequential(nn.Linear(24, 16), nn.Linear(24, 16)), "'0' is a Linear"),
        (nn.Sequential(nn.Conv2d(8, 16, (1, 3)), nn.Conv1d(24, 16, 1)), "'1' is a Conv1d"),
    ):
        with pytest.raises(CheckpointError, match=message):
            lowbit.load(other, path)


def test_the_conv1d_of_transformers_comes_back(tmp_path):
    """A weight [K, N] is stored turned over, says so, and loads into a Conv1D again; a square one, too."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    for n, k in ((96, 64), (64, 64)):
        layer, fresh, x = conv1d(n, k), conv1d(n, k), torch.randn(3, k)
        lowbit.quantize_(layer, "awq_w4a16(group_size=32)")

        lowbit.load(fresh, lowbit.save(layer, tmp_path / "layer.safetensors"))

        assert fresh.weight.shape == (k, n)
        assert torch.equal(fresh(x), layer(x))
        with pytest.raises(CheckpointError, match="is a Linear"):
            lowbit.load(nn.Linear(k, n), tmp_path / "layer.safetensors")


@pytest.mark.parametrize("head_first", [False, True])
def test_tied_weights_are_stored_once(head_first, tmp_path):
    """Whichever of table and head comes first, the file holds one set of parts, and loading ties again."""
    table, head = nn.Embedding(24, 64), nn.Linear(64, 24, bias=False)
    head.weight = table.weight
    model = nn.Sequential(head, table) if head_first else nn.Sequential(table, head)
    fresh = copy.deepcopy(model)
    lowbit.quantize_(model, "nvfp4")

    path = lowbit.save(model, tmp_path / "model.safetensors")
    report = lowbit.load(fresh, path)

    assert list(report.quantized) == ["0"]
    assert not any(key.startswith("1.") for key in load_file(path))
    assert fresh[0].weight is fresh[1].weight
    assert _equal(fresh[0].weight, model[1].weight)
    again = lowbit.save(fresh, tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_a_tied_table_must_be_able_to_look_up(tmp_path, monkeypatch):
    """A head in a format without lookup does not load into a module where a table shares its weight."""
    monkeypatch.setattr(type(parse_spec("svdquant_w4a4")), "supports_embedding", False)
    head = nn.ModuleDict({"head": nn.Linear(64, 64, bias=False)})
    lowbit.quantize_(head, "svdquant_w4a4(rank=8)")
    path = lowbit.save(head, tmp_path / "model.safetensors")
    tied = nn.ModuleDict({"head": nn.Linear(64, 64, bias=False), "table": nn.Embedding(64, 64)})
    tied.table.weight = tied.head.weight

    with pytest.raises(CheckpointError, match=r"'table\.weight' belongs to an embedding table, and svdquant_w4a4 has"):
        lowbit.load(tied, path)


@pytest.mark.parametrize("spec", BANK_SPECS)
def test_banks_come_back_bit_for_bit(spec, tmp_path):
    """Every format's bank is stored with a leading axis and num_experts in its marker, and loads as it was."""
    model = nn.ModuleDict({"experts": nn.Module()})
    k = next(k for k in (64, 256, 1024) if parse_spec(spec).check_shape(48, k) is None)
    model.experts.up = nn.Parameter(quantize_bank(torch.randn(3, 48, k), spec), requires_grad=False)
    fresh = nn.ModuleDict({"experts": nn.Module()})
    fresh.experts.up = nn.Parameter(torch.zeros(3, 48, k), requires_grad=False)

    path = lowbit.save(model, tmp_path / "model.safetensors")
    report = lowbit.load(fresh, path)

    stored = load_file(path)
    marker = json.loads(stored["experts.up.comfy_quant"].numpy().tobytes())
    assert marker["num_experts"] == 3
    assert all(key.endswith("comfy_quant") or tensor.shape[0] == 3 for key, tensor in stored.items())
    assert report.quantized == {"experts.up": model.experts.up.spec}
    assert isinstance(fresh.experts.up, QuantizedBank)
    assert isinstance(fresh.experts.up, nn.Parameter)
    assert _equal(fresh.experts.up, model.experts.up)
    assert lowbit.save(fresh, tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("transposed", [False, True])
def test_models_with_experts_compute_the_same_after_loading(transposed, tmp_path):
    """Banks in both orientations, the prefix found by them, plain tensors beside them; meta modules work too."""
    model, x = _with_bank("nvfp4", transposed=transposed), torch.randn(5, 64)
    path = lowbit.save(model, tmp_path / "model.safetensors")

    for fresh in (Experts(transposed), Experts(transposed).to("meta")):
        lowbit.load(fresh, path)
        assert fresh.up.shape == model.experts.up.shape
        assert torch.equal(fresh(x), model.experts(x))


def test_a_shared_bank_is_stored_once(tmp_path):
    """Two names for one bank: one set of tensors in the file, one object after loading."""
    model = nn.ModuleDict({"a": _with_bank("int8")["experts"], "b": Experts()})
    model.b.up = model.a.up
    fresh = copy.deepcopy(model)

    path = lowbit.save(model, tmp_path / "model.safetensors")
    lowbit.load(fresh, path)

    assert "b.up.weight" not in load_file(path)
    assert fresh.b.up is fresh.a.up


def test_a_bank_that_does_not_fit_is_refused(tmp_path):
    """Other numbers of experts, other shapes, no parameter of that name, and other dialects are errors by name."""
    path = lowbit.save(_with_bank("nvfp4"), tmp_path / "model.safetensors")
    other, lacking = Experts(), nn.ModuleDict({"up": nn.Identity()})
    other.up = nn.Parameter(torch.zeros(5, 48, 64))

    with pytest.raises(CheckpointError, match=r"holds a bank of shape \[4, 48, 64\], the module expects \[5, 48, 64\]"):
        lowbit.load(other, path)
    with pytest.raises(CheckpointError, match="is a bank of experts, and the module has no parameter 'up'"):
        lowbit.load(lacking, path, prefix="experts.")


def test_other_readers_say_that_a_bank_is_one(tmp_path):
    """Asking the dialect for the matrix of a bank is an error; its experts are read by load_bank."""
    model = _with_bank("nvfp4")
    path = lowbit.save(model, tmp_path / "model.safetensors")

    with open_source(path) as source:
        content = look_for_layers(source, source.components[0])
        stored = content.layers["experts.up"]
        with pytest.raises(PartsError, match="is a bank of 4 experts"):
            content.load(stored)
        assert _equal(load_bank(COMFY, stored, content.read, torch.float32), model.experts.up)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"experts.up.weight": t["experts.up.weight"][:3]}), "the marker says 4 experts"),
        (lambda t: t.update({"experts.up.weight_scale_2": torch.tensor(1.0)}), "the marker says 4 experts"),
        (lambda t: t.pop("experts.up.weight_scale_2"), "weight_scale_2"),
    ],
    ids=["an expert short", "one scale for all", "no global scale"],
)
def test_a_damaged_bank_is_refused(change, message, tmp_path):
    """Tensors without the leading axis, or missing ones, are errors that name file, layer and tensor."""
    tensors = load_file(lowbit.save(_with_bank("nvfp4"), tmp_path / "good.safetensors"))
    change(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")

    with pytest.raises(PartsError, match=rf"bad\.safetensors: layer 'experts\.up'.*{message}"):
        lowbit.load(Experts(), tmp_path / "bad.safetensors", prefix="experts.")


def test_a_quantized_view_is_not_saved(tmp_path):
    """Half of a quantized matrix as a weight is refused, not written as something else."""
    layer = nn.Linear(64, 32)
    weight = QuantizedTensor.quantize(torch.randn(64, 32), "int8")
    layer.weight = nn.Parameter(weight.t(), requires_grad=False)

    with pytest.raises(CheckpointError, match="is a view of a quantized matrix"):
        lowbit.save(layer, tmp_path / "layer.safetensors")
