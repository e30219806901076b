"""Kernels of convolutions in files: converted where somebody asks for it, and through every other command."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowbit
from lowbit.checkpoint.compare import compare
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.dequantize import dequantize
from lowbit.checkpoint.dialects import dialects
from lowbit.checkpoint.error_lora import write_error_lora
from lowbit.checkpoint.export_gguf import export_gguf
from lowbit.checkpoint.inspection import inspect
from lowbit.checkpoint.migrate import migrate
from lowbit.checkpoint.plan import Plan, make_plan
from lowbit.checkpoint.source import open_source
from lowbit.checkpoint.verify import verify
from lowbit.errors import CheckpointError, PlanError
from lowbit.formats.parts import raw_bytes

FORMATS = ["int8(activations=none)", "nvfp4", "mxfp8", "awq_w4a16(group_size=32)", "svdquant_w4a4(rank=8)", "wna16"]


class Convolutions(nn.Module):
    """One of each kind that is quantized, one that is not, and a linear."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(64, 128, 4)
        self.two = nn.Conv2d(128, 128, 2, groups=2, bias=False)
        self.three = nn.Conv3d(32, 128, (1, 2, 2))
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.linear = nn.Linear(128, 64)


@pytest.fixture
def model():
    """The modules of the plain file."""
    torch.manual_seed(3)
    return Convolutions()


@pytest.fixture
def source(model, tmp_path):
    """The plain file, open."""
    save_file(model.state_dict(), tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as opened:
        yield opened


def converted(source, target, spec="int8(activations=none)", **options):
    """Convert with all kernels but the transposed one."""
    plan = make_plan(source, spec, **{"convolutions": True, "keep": ["^up$"], "solver": "rtn", **options})
    return convert(source, target, plan), plan


def by_layer(plan):
    """The plan of every tensor by its layer."""
    return {tensor.layer: tensor for tensor in plan.tensors()}


@pytest.mark.parametrize("spec", FORMATS)
def test_a_converted_file_loads_as_the_modules_would_be_quantized(spec, source, model, tmp_path):
    """The weights that load gives are bit for bit those of `quantize_`, with the modules' shapes, and compute alike."""
    converted(source, tmp_path / "out.safetensors", spec)
    lowbit.quantize_(model, {"up": None, "": spec}, solver="rtn")
    fresh = Convolutions()
    lowbit.load(fresh, tmp_path / "out.safetensors")

    for name in ("one", "two", "three", "linear"):
        mine, theirs = fresh.get_submodule(name).weight, model.get_submodule(name).weight
        assert (mine.spec, mine.shape, mine.matrix) == (theirs.spec, theirs.shape, theirs.matrix)
        assert all(
            torch.equal(raw_bytes(a), raw_bytes(b)) for a, b in zip(mine.part_list, theirs.part_list, strict=True)
        )
    x = torch.randn(2, 64, 9)
    assert torch.equal(fresh.one(x), model.one(x))
    assert torch.equal(fresh.up.weight, model.up.weight)


def test_kernels_stay_unless_asked_for(source):
    """By default the reason is that it is a convolution; a rule or `convolutions` quantizes it with its real shape."""
    plain = by_layer(make_plan(source, "int8"))
    ruled = by_layer(make_plan(source, "int8", layer_rules=[("^(one|two)$", "nvfp4")]))
    asked = by_layer(make_plan(source, "int8(activations=none)", convolutions=True, only=["^(one|three|up)$"]))

    assert plain["one"].why == "3-D weight (convolution or bank of experts)"
    assert (plain["three"].action, plain["three"].why) == ("keep", "5-D weight (convolution)")
    assert [ruled[name].action for name in ("one", "two", "three")] == ["quantize", "quantize", "keep"]
    assert (ruled["two"].shape, ruled["two"].axes, ruled["two"].format) == ((128, 64, 2, 2), "O I ...", "nvfp4")
    assert [asked[name].action for name in ("one", "two", "three")] == ["quantize", "keep", "quantize"]
    assert asked["up"].why == "fewer than 4096 weights"


def test_a_format_that_shifts_activations_is_not_for_convolutions(source):
    """The constant in a bias is wrong where a convolution pads: such a format leaves kernels, and says why."""
    spec = "svdquant_w4a4(rank=8,act_unsigned=true)"
    plan = by_layer(make_plan(source, spec, layer_rules=[("one", spec)]))

    assert plan["linear"].action == "quantize"
    assert "shifts the activations, which a convolution pads" in plan["one"].why


def test_other_dialects_refuse_kernels_by_name(source):
    """A dialect without a place for the kernel's shape refuses it, and never writes it as a matrix."""
    others = [name for name, dialect in dialects().items() if dialect.writes and name != "comfy"]
    assert len(others) > 3
    for dialect in others:
        with pytest.raises(PlanError, match=rf"layer 'one' as .*: the dialect {dialect} has no place for a kernel"):
            make_plan(source, "int8(activations=none)", convolutions=True, only=["one"], dialect=dialect)


def test_a_plan_file_says_that_it_is_a_kernel(source, tmp_path):
    """Written and read the plan is the same; setting the action of a kept kernel is enough; wrong axes are refused."""
    plan = make_plan(source, "int8(activations=none)", convolutions=True)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan

    data = make_plan(source, "int8").to_json()
    entry = data["components"][""]["tensors"]["two.weight"]
    entry |= {"action": "quantize", "format": "int8(activations=none)", "solver": "rtn"}
    convert(source, tmp_path / "out.safetensors", Plan.from_json(data))
    assert load_file(tmp_path / "out.safetensors")["two.weight"].dtype == torch.int8
    for axes, message in (
        ("", "has 4 axes, which are not 'N K'"),
        ("E N K", "not 'E N K'"),
        ("N C", "expected one of"),
    ):
        entry["axes"] = axes
        with pytest.raises(PlanError, match=rf"'two\.weight' cannot become int8.*{message}"):
            Plan.from_json(data)


def test_every_command_knows_kernels(source, tmp_path):
    """Verify, inspect and dequantize: real shapes, no problems, and the weights that the modules would have."""
    report, plan = converted(source, tmp_path / "out.safetensors", "awq_w4a16(group_size=32)")
    model = Convolutions()
    lowbit.load(model, tmp_path / "out.safetensors")

    with open_source(tmp_path / "out.safetensors") as output:
        result, seen = verify(source, output), inspect(output)
        dequantize(output, tmp_path / "plain.safetensors")

    shapes = {"one": (128, 64, 4), "two": (128, 64, 2, 2), "three": (128, 32, 1, 2, 2), "linear": (64, 128)}
    assert {layer.layer: layer.shape for layer in report.layers} == shapes
    assert {layer.name: layer.shape for layer in result.layers} == shapes
    assert {group.name: group.shape for group in seen.quantized} == shapes
    assert [*result.problems, *result.failing(15), *seen.problems] == []
    assert {x.name: x.accuracy for x in result.layers} == {x.layer: x.accuracy for x in report.layers}
    plain = load_file(tmp_path / "plain.safetensors")
    for name, shape in shapes.items():
        assert plain[f"{name}.weight"].shape == shape
        assert torch.equal(plain[f"{name}.weight"], model.get_submodule(name).weight.dequantize())
    assert plan.bytes_after == sum(t.nbytes for t in load_file(tmp_path / "out.safetensors").values())


def test_verify_tells_a_changed_kernel(source, model, tmp_path):
    """Another kernel than the one that was converted is a layer with low SQNR; one of another shape is a problem."""
    converted(source, tmp_path / "out.safetensors")
    changed = model.state_dict()
    changed["two.weight"] = -changed["two.weight"]
    changed["three.weight"] = changed["three.weight"].reshape(128, 32, 2, 1, 2)
    save_file(changed, tmp_path / "other.safetensors")

    with open_source(tmp_path / "other.safetensors") as other, open_source(tmp_path / "out.safetensors") as output:
        found = {layer.name: layer for layer in verify(other, output).layers}

    assert found["two"].accuracy.sqnr < 0
    assert "three: has shape [128, 32, 1, 2, 2] here and [128, 32, 2, 1, 2] in the source" in found["three"].problem


def test_requantized_kernels_keep_their_shape(source, model, tmp_path):
    """Converting again gives what quantizing the decoded kernel gives, with its shape."""
    converted(source, tmp_path / "first.safetensors", "int8(activations=none)")
    with open_source(tmp_path / "first.safetensors") as first:
        dequantize(first, tmp_path / "plain.safetensors")
        convert(first, tmp_path / "again.safetensors", make_plan(first, "nvfp4", requantize=True, solver="rtn"))
    with open_source(tmp_path / "plain.safetensors") as plain:
        converted(plain, tmp_path / "direct.safetensors", "nvfp4")

    again, direct = load_file(tmp_path / "again.safetensors"), load_file(tmp_path / "direct.safetensors")
    assert again.keys() == direct.keys()
    assert all(torch.equal(raw_bytes(again[key]), raw_bytes(direct[key])) for key in direct)


def test_a_turned_over_weight_stays_one(tmp_path):
    """The Conv1D of transformers, saved quantized: verified, converted again and decoded as [K, N]."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = nn.Sequential(conv1d(96, 64))
    save_file(layer.state_dict(), tmp_path / "in.safetensors")
    lowbit.quantize_(layer, "int8(activations=none)")
    lowbit.save(layer, tmp_path / "out.safetensors")

    with open_source(tmp_path / "in.safetensors") as source, open_source(tmp_path / "out.safetensors") as output:
        result = verify(source, output)
        plan = make_plan(output, "awq_w4a16(group_size=32)", requantize=True)
        convert(output, tmp_path / "again.safetensors", plan)
        assert [group.shape for group in inspect(output).quantized] == [(64, 96)]
    assert [*result.problems, *result.failing(30)] == []
    assert by_layer(plan)["0"].axes == "K N"
    fresh = nn.Sequential(conv1d(96, 64))
    lowbit.load(fresh, tmp_path / "again.safetensors")
    assert fresh[0].weight.spec.startswith("awq_w4a16")


def test_kernels_migrate_only_where_there_is_a_place_for_them(source, tmp_path):
    """To comfy bit for bit; to other dialects and to scaled_fp8 files an error that names the layer."""
    spec = "fp8_e4m3"
    converted(source, tmp_path / "out.safetensors", spec, keep=["^up$", "linear"])
    with open_source(tmp_path / "out.safetensors") as output:
        for to in ("current", "comfy"):
            migrate(output, tmp_path / f"{to}.safetensors", to)
            assert (tmp_path / f"{to}.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()
        with pytest.raises(CheckpointError, match=r"layer '\w+': its marker says kernel_shape"):
            migrate(output, tmp_path / "no.safetensors", "legacy")
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "out.safetensors").rename(folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    refused = pytest.raises(
        CheckpointError, match=r"folder.*layer '\w+': the dialect modelopt has no place for a kernel"
    )
    with open_source(folder) as output, refused:
        migrate(output, tmp_path / "no", "modelopt")
    assert not {"no", "no.safetensors"} & {path.name for path in tmp_path.iterdir()}


def test_compare_knows_kernels(source, tmp_path):
    """A quantized kernel is compared with the plain one as the matrix that it is stored as; a kept one is a tensor."""
    report, _ = converted(source, tmp_path / "out.safetensors", "nvfp4", keep=["^up$", "three"])
    with open_source(tmp_path / "out.safetensors") as output:
        (found,) = compare(source, [output]).candidates
        (back,) = compare(output, [source]).candidates

    rows = {layer.name: layer for layer in found.layers}
    assert {name: row.shape for name, row in rows.items()} == {
        "one": (128, 256),
        "two": (128, 256),
        "linear": (64, 128),
    }
    assert {x.layer: x.accuracy.sqnr for x in report.layers} == pytest.approx(
        {name: row.accuracy.sqnr for name, row in rows.items()}, rel=1e-4
    )
    for one in (found, back):
        assert (one.absent.missing, one.absent.extra, one.changed) == ([], [], ())


def test_what_cannot_hold_a_kernel_leaves_it_or_says_so(source, tmp_path):
    """A correcting LoRA is made for the linears alone; a GGUF file is not made of kernels as if they were matrices."""
    converted(source, tmp_path / "out.safetensors", "nvfp4")
    with open_source(tmp_path / "out.safetensors") as output:
        layers = write_error_lora(source, output, tmp_path / "lora.safetensors", 4)
        pytest.importorskip("gguf")
        with pytest.raises(
            CheckpointError, match=r"layer '\w+': is the kernel of a convolution, .* \(lowbit dequantize\)"
        ):
            export_gguf(output, tmp_path / "out.gguf", "F16")
    assert [layer.layer for layer in layers] == ["linear"]
    assert not (tmp_path / "out.gguf").exists()
