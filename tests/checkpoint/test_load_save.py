"""lowbit.save and lowbit.load: modules with quantized layers through files, all or nothing."""

import copy
import json
import warnings

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowbit
from lowbit import QuantizedTensor
from lowbit.errors import CheckpointError
from lowbit.formats.parts import raw_bytes
from tests.support.specs import ALL_SPECS


class Block(nn.Module):
    """A small model with everything that can be met: table, linears with and without bias, a norm, a buffer."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20, 128)
        self.up = nn.Linear(128, 1024)
        self.down = nn.Linear(1024, 128, bias=False)
        self.norm = nn.LayerNorm(128)
        self.register_buffer("positions", torch.arange(4))

    def forward(self, x):
        """Look up, widen, narrow, normalise."""
        return self.norm(self.down(nn.functional.gelu(self.up(self.tokens(x)))))


def _blank(model):
    blank = copy.deepcopy(model)
    for value in blank.state_dict().values():
        if value.is_floating_point() and not isinstance(value, QuantizedTensor):
            value.zero_()
    return blank


@pytest.fixture
def model():
    """A fresh block."""
    return Block()


@pytest.mark.parametrize("write", [safetensors.torch.save_file, safetensors.torch.save_model])
@pytest.mark.parametrize("bank", [False, True])
def test_safetensors_itself_is_refused_with_the_way_to_save(write, bank, model, tmp_path):
    """Its writers meet a weight of several tensors: one error that says what to call, and no warning before it."""
    if bank:
        model.experts = nn.Parameter(lowbit.quantize_bank(torch.randn(2, 64, 64), "int8"), requires_grad=False)
    else:
        lowbit.quantize_(model, "int8")

    written = model if write is safetensors.torch.save_model else model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match=r"lowbit\.save\(module, 'model.*load\(module"):
            write(written, tmp_path / "m.safetensors")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spec", ALL_SPECS)
def test_round_trip_is_bit_exact(spec, model, tmp_path):
    """Every format comes back with the same bytes, spec and outputs."""
    original = _blank(model)
    lowbit.quantize_(model, spec)
    path = lowbit.save(model, tmp_path / "model.safetensors")

    report = lowbit.load(original, path)

    assert report.quantized["down"] == model.down.weight.format.spec
    assert not report.missing
    for name in report.quantized:
        mine, theirs = original.get_submodule(name).weight, model.get_submodule(name).weight
        assert mine.format == theirs.format
        for part, other in zip(mine.part_list, theirs.part_list, strict=True):
            assert torch.equal(raw_bytes(part), raw_bytes(other))
    x = torch.tensor([[1, 2, 19]])
    assert torch.equal(original(x), model(x))
    again = lowbit.save(original, tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_the_prefix_of_a_file_is_found(model, tmp_path):
    """A file whose keys carry a prefix loads without naming it, and with naming it."""
    wrapper = nn.ModuleDict({"diffusion_model": model})
    lowbit.quantize_(wrapper, "fp8_e4m3(granularity=row)")
    path = lowbit.save(wrapper, tmp_path / "model.safetensors")

    for prefix in (None, "diffusion_model."):
        fresh = Block()
        lowbit.load(fresh, path, prefix=prefix)
        assert torch.equal(fresh.up.weight, model.up.weight)


@pytest.mark.parametrize("layer", [nn.Linear(64, 8), nn.Embedding(8, 64)])
def test_a_bare_layer(layer, tmp_path):
    """A single layer is saved and loaded by itself."""
    fresh = copy.deepcopy(layer)
    lowbit.quantize_(layer, "fp8_e4m3")

    lowbit.load(fresh, lowbit.save(layer, tmp_path / "layer.safetensors"))

    assert torch.equal(fresh.weight, layer.weight)


def test_a_module_on_the_meta_device_is_materialised(model, tmp_path):
    """Loading into a model without memory gives it the file's tensors."""
    lowbit.quantize_(model, "int8")
    path = lowbit.save(model, tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = Block()

    lowbit.load(empty, path)

    x = torch.tensor([[3]])
    assert torch.equal(empty(x), model(x))


def test_tied_weights_are_written_once_and_come_back_tied(tmp_path):
    """A head tied to the table shares one set of parts in the file, and one parameter after loading."""
    tied = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 20, bias=False))
    tied[1].weight = tied[0].weight
    fresh = copy.deepcopy(tied)
    lowbit.quantize_(tied, "fp8_e4m3(granularity=row)")

    path = lowbit.save(tied, tmp_path / "model.safetensors")
    lowbit.load(fresh, path)

    assert not any(key.startswith("1.") for key in load_file(path))
    assert fresh[0].weight is fresh[1].weight
    assert isinstance(fresh[1].weight, QuantizedTensor)


def test_a_plain_file_loads_too(model, tmp_path):
    """A checkpoint without quantized layers is loaded like any, in the module's dtype."""
    save_file({key: value.clone() for key, value in model.state_dict().items()}, tmp_path / "plain.safetensors")
    fresh = Block().bfloat16()

    report = lowbit.load(fresh, tmp_path / "plain.safetensors")

    assert not report.quantized
    assert torch.equal(fresh.up.weight, model.up.weight.bfloat16())


def _saved(model, tmp_path, change):
    """A quantized file with its tensors changed by hand, header metadata kept out so that markers decide."""
    lowbit.quantize_(model, {"up": "fp8_e4m3(granularity=row)"})
    tensors = load_file(lowbit.save(model, tmp_path / "good.safetensors"))
    change(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    return tmp_path / "bad.safetensors"


def _rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


DEFECTS = {
    "missing scale": (lambda t: t.pop("up.weight_scale"), "up.*scale is missing"),
    "misshapen scale": (lambda t: t.update({"up.weight_scale": torch.ones(7)}), r"up.*\[7"),
    "wrong dtype": (lambda t: t.update({"up.weight_scale": t["up.weight_scale"].long()}), "up.*int64"),
    "unknown format": (
        lambda t: t.update({"up.comfy_quant": torch.tensor(list(b'{"format": "int3"}'), dtype=torch.uint8)}),
        "unknown format 'int3'.*known formats",
    ),
    "missing bias": (lambda t: t.pop("up.bias"), "lacks up.bias"),
    "extra tensor": (lambda t: t.update({"head.weight": torch.ones(2, 2)}), "head.weight that the module lacks"),
    "misshapen norm": (lambda t: t.update({"norm.weight": torch.ones(3)}), r"'norm.weight' has shape \[3\]"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_file_that_does_not_fit_changes_nothing(defect, model, tmp_path):
    """One error names the file, the layer and what was expected; the module is as before."""
    change, message = DEFECTS[defect]
    fresh = Block()
    before = copy.deepcopy(fresh.state_dict())
    path = _saved(model, tmp_path, change)

    with pytest.raises(lowbit.LowbitError, match=message) as caught:
        lowbit.load(fresh, path)

    assert "bad.safetensors" in str(caught.value)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in before.items())


def test_the_wrong_model_is_refused_with_both_shapes(model, tmp_path):
    """A layer of another shape names the layer, its shape and the expected one."""
    lowbit.quantize_(model, {"up": "fp8_e4m3"})
    path = lowbit.save(model, tmp_path / "model.safetensors")
    other = Block()
    other.up = nn.Linear(128, 320)

    with pytest.raises(CheckpointError, match=r"up.*shape \[1024, 128\], the module expects \[320, 128\]"):
        lowbit.load(other, path)


def test_a_quantized_layer_needs_a_linear_or_embedding(model, tmp_path):
    """A marker on what is another kind of layer in the module is refused by name and class."""
    lowbit.quantize_(model, {"up": "fp8_e4m3"})
    path = lowbit.save(model, tmp_path / "model.safetensors")
    other = Block()
    other.up = nn.Conv1d(128, 256, 1)

    with pytest.raises(CheckpointError, match=r"'up' is a Conv1d"):
        lowbit.load(other, path)


def test_saving_leaves_no_half_file(model, tmp_path, monkeypatch):
    """An error while writing leaves the folder as it was."""
    lowbit.quantize_(model, "fp8_e4m3")

    def broken(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("lowbit.checkpoint.save.CheckpointWriter.write", broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        lowbit.save(model, tmp_path / "model.safetensors")

    assert not list(tmp_path.iterdir())


def test_plain_tensors_are_copied_into_the_ones_that_are_there(model, tmp_path):
    """An optimizer made before loading still holds the module's parameters, with the loaded values."""
    path = lowbit.save(model, tmp_path / "plain.safetensors")
    fresh = Block()
    before = dict(fresh.named_parameters())

    lowbit.load(fresh, path)

    assert all(before[name] is parameter for name, parameter in fresh.named_parameters())
    assert torch.equal(fresh.up.weight, model.up.weight)


def test_a_named_prefix_is_not_guessed_at(model, tmp_path):
    """Keys without the prefix that was named belong to something else, even if they match by chance."""
    path = lowbit.save(model, tmp_path / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"lacks .*up\.weight.* \(prefix 'other\.'\)"):
        lowbit.load(Block(), path, prefix="other.")


def test_without_strict_what_the_module_lacks_is_left_out(model, tmp_path):
    """Quantized layers and plain tensors of another model in the file are reported, and the rest is loaded."""
    both = nn.ModuleDict({"unet": model, "encoder": nn.Sequential(nn.Linear(128, 64), nn.LayerNorm(64))})
    lowbit.quantize_(both, "fp8_e4m3(granularity=row)")
    path = lowbit.save(both, tmp_path / "both.safetensors")
    with pytest.raises(CheckpointError, match="that the module lacks"):
        lowbit.load(Block(), path)

    report = lowbit.load(fresh := Block(), path, strict=False)

    assert set(report.unexpected) == {"encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias"}
    assert torch.equal(fresh.up.weight, model.up.weight)


@pytest.mark.parametrize(
    ("stored", "held"), [(torch.tensor([1.5]), torch.tensor([1])), (torch.tensor([1]), torch.ones(1))]
)
def test_integers_and_floats_are_not_mixed(stored, held, tmp_path):
    """A float tensor for an integer buffer, or the other way round, is an error that names both dtypes."""
    save_file({"x": stored}, tmp_path / "x.safetensors")
    module = nn.Module()
    module.register_buffer("x", held)

    with pytest.raises(CheckpointError, match=r"'x' is (float32|int64), the module's 'x' is (float32|int64)"):
        lowbit.load(module, tmp_path / "x.safetensors")


def test_a_new_bias_follows_its_layer(tmp_path):
    """The bias that an unsigned activation shift needs takes dtype and device of the layer it is made for."""
    source = nn.Sequential(nn.Linear(64, 64, bias=False))
    lowbit.quantize_(source, "svdquant_w4a4(rank=4,act_unsigned=true)")
    path = lowbit.save(source, tmp_path / "model.safetensors")
    fresh = nn.Sequential(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16))

    lowbit.load(fresh, path)

    assert fresh[0].bias.dtype == torch.bfloat16


def test_a_new_bias_of_a_tied_head_comes_back(tmp_path):
    """A head gets the bias for a shift of its activations; its weight is in the file under the name of the table."""
    source = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64, bias=False))
    source[1].weight = source[0].weight
    fresh = copy.deepcopy(source)
    lowbit.quantize_(source, "svdquant_w4a4(rank=4,act_unsigned=true)")

    lowbit.load(fresh, lowbit.save(source, tmp_path / "model.safetensors"))

    assert fresh[1].weight is fresh[0].weight
    assert torch.equal(fresh[1].bias, source[1].bias)


def test_options_of_a_checkpoint_end_with_its_format(tmp_path):
    """A layer that was loaded in one format and quantized anew in another is saved as if it had not been loaded."""
    source, other = nn.Linear(64, 64), nn.Linear(64, 64)
    lowbit.quantize_(source, "nvfp4")
    lowbit.load(other, lowbit.save(source, tmp_path / "a.safetensors"))
    other.weight = nn.Parameter(other.weight.dequantize())
    lowbit.quantize_(other, "int8")

    lowbit.load(fresh := nn.Linear(64, 64), lowbit.save(other, tmp_path / "b.safetensors"))

    assert torch.equal(fresh.weight, other.weight)


def test_a_module_without_values_is_not_saved(tmp_path):
    """A parameter on the meta device is named, and no file appears."""
    with pytest.raises(CheckpointError, match="weight is on the meta device"):
        lowbit.save(nn.Linear(4, 4, device="meta"), tmp_path / "x.safetensors")

    assert not list(tmp_path.iterdir())


def test_a_buffer_that_the_module_makes_by_itself_is_left_out(model, tmp_path):
    """A file with an old persistent buffer loads into a module where it is not stored any more, and that is noted."""
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    save_file({**tensors, "steps": torch.arange(7)}, tmp_path / "old.safetensors")
    fresh = Block()
    fresh.register_buffer("steps", torch.arange(4), persistent=False)

    report = lowbit.load(fresh, tmp_path / "old.safetensors")

    assert report.notes == ["steps: left out, the module makes it by itself"]
    assert torch.equal(fresh.steps, torch.arange(4))


@pytest.mark.parametrize("spec", ["nvfp4", "mxfp8"])
def test_a_file_that_only_tells_the_padded_shape_takes_the_modules(spec, tmp_path):
    """Files of ComfyUI's own nvfp4 and mxfp8 pad rows and columns and do not say so: they load where they fit."""
    layer = nn.Linear(40, 33, bias=False)
    lowbit.quantize_(layer, spec)
    path = lowbit.save(layer, tmp_path / "model.safetensors")
    tensors = load_file(path)
    marker = json.loads(bytes(tensors["comfy_quant"].tolist()))
    del marker["orig_shape"]
    tensors["comfy_quant"] = torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)
    save_file(tensors, path)
    again = nn.Linear(40, 33, bias=False)
    lowbit.load(again, path)
    assert torch.equal(again.weight.dequantize(), layer.weight.dequantize())
    for shape in ((40, 14), (40, 70), (7, 33)):
        with pytest.raises(CheckpointError, match="the module expects"):
            lowbit.load(nn.Linear(*shape, bias=False), path)
