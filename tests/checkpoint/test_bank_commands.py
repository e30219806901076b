"""Banks of experts in quantized files, through every command that reads one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.checkpoint.banks import experts_of
from lowbit.checkpoint.compare import compare
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.dequantize import dequantize
from lowbit.checkpoint.dialects.comfy_marker import marker_tensor
from lowbit.checkpoint.inspection import inspect
from lowbit.checkpoint.migrate import migrate
from lowbit.checkpoint.mixed_precision import find_choices
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.quantized_source import look_for_layers
from lowbit.checkpoint.sensitivity import measure
from lowbit.checkpoint.source import open_source
from lowbit.checkpoint.verify import verify
from lowbit.errors import CheckpointError, LowbitError
from lowbit.experts import quantize_bank
from lowbit.formats.parts import raw_bytes
from tests.support.bank_files import DOWN, FORMATS, UP, module, planned, tensors
from tests.support.tensors import outlier_weight


@pytest.fixture
def source(tmp_path):
    """The plain file, open."""
    save_file(tensors(), tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as opened:
        yield opened


@pytest.mark.parametrize("spec", FORMATS)
def test_every_command_knows_banks(spec, source, tmp_path):
    """Verify, inspect and dequantize: real shapes, the accuracy of the report, and the banks' own decoded weights."""
    report = convert(source, tmp_path / "out.safetensors", planned(source, spec))
    root, held = module()
    lowbit.load(root, tmp_path / "out.safetensors", strict=False)

    with open_source(tmp_path / "out.safetensors") as output:
        result, seen = verify(source, output), inspect(output)
        dequantize(output, tmp_path / "plain.safetensors")

    assert [*result.problems, *result.failing(12), *seen.problems] == []
    assert {x.name: (x.shape, x.accuracy) for x in result.layers} == {
        x.layer: (x.shape, x.accuracy) for x in report.layers
    }
    groups = {group.name: group for group in seen.quantized}
    assert groups[DOWN].shape == (4, 128, 64)
    assert groups[DOWN].weights == 4 * 128 * 64
    plain = load_file(tmp_path / "plain.safetensors")
    assert plain.keys() == tensors().keys()
    for key, bank in ((UP, held.gate_up_proj), (DOWN, held.down_proj)):
        assert torch.equal(plain[key], bank.dequantize())


def test_a_bank_named_weight_keeps_its_name(tmp_path):
    """`experts.down_proj.weight` is written under that key, loads, and is decoded to it again."""
    name = "mlp.experts.down_proj.weight"
    save_file({name: tensors()[DOWN]}, tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as source:
        convert(source, tmp_path / "out.safetensors", make_plan(source, "nvfp4"))
        with open_source(tmp_path / "out.safetensors") as output:
            assert not verify(source, output).problems
            dequantize(output, tmp_path / "plain.safetensors")
            convert(output, tmp_path / "again.safetensors", make_plan(output, "int8", requantize=True))
    assert list(load_file(tmp_path / "plain.safetensors")) == [name]
    assert "bank_parameter" not in json.loads(
        load_file(tmp_path / "again.safetensors")["mlp.experts.down_proj.comfy_quant"].numpy().tobytes()
    )


def test_requantized_banks_are_those_of_the_decoded_ones(source, tmp_path):
    """Converting again keeps experts, orientation and names: the bytes that converting the decoded file gives."""
    convert(source, tmp_path / "first.safetensors", planned(source, "int8"))
    with open_source(tmp_path / "first.safetensors") as first:
        dequantize(first, tmp_path / "plain.safetensors")
        plan = make_plan(first, "nvfp4", requantize=True, solver="rtn")
        convert(first, tmp_path / "again.safetensors", plan)
        assert plan.bytes_before > plan.bytes_after
        with open_source(tmp_path / "again.safetensors") as again:
            assert not verify(first, again).problems
    with open_source(tmp_path / "plain.safetensors") as plain:
        convert(plain, tmp_path / "direct.safetensors", planned(plain, "nvfp4"))

    again, direct = load_file(tmp_path / "again.safetensors"), load_file(tmp_path / "direct.safetensors")
    assert again.keys() == direct.keys()
    assert all(torch.equal(raw_bytes(again[key]), raw_bytes(direct[key])) for key in direct)


def test_banks_migrate_only_where_there_is_a_place_for_them(source, tmp_path):
    """To comfy bit for bit; to other dialects and to scaled_fp8 files an error that names the layer."""
    convert(source, tmp_path / "out.safetensors", planned(source, "fp8_e4m3"))
    with open_source(tmp_path / "out.safetensors") as output:
        for to in ("current", "comfy"):
            migrate(output, tmp_path / f"{to}.safetensors", to)
            mine, theirs = load_file(tmp_path / f"{to}.safetensors"), load_file(tmp_path / "out.safetensors")
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(raw_bytes(mine[key]), raw_bytes(theirs[key])) for key in theirs)
        with pytest.raises(CheckpointError, match=r"experts\..*: its marker says bank_parameter.*num_experts"):
            migrate(output, tmp_path / "no.safetensors", "legacy")
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "out.safetensors").rename(folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    refused = pytest.raises(CheckpointError, match=r"layer '.*experts.*': the dialect modelopt has no place for a bank")
    with open_source(folder) as output, refused:
        migrate(output, tmp_path / "no", "modelopt")


def test_a_damaged_bank_is_told_by_every_command(source, tmp_path):
    """One expert fewer in a tensor: an error by name for those who need it, a problem for those who look."""
    convert(source, tmp_path / "out.safetensors", planned(source, "nvfp4"))
    held = load_file(tmp_path / "out.safetensors")
    held[f"{UP}.weight_scale"] = held[f"{UP}.weight_scale"][:3].clone()
    save_file(held, tmp_path / "bad.safetensors")

    with open_source(tmp_path / "bad.safetensors") as output:
        assert any(UP in problem and "4 experts" in problem for problem in inspect(output).problems)
        assert any(UP in problem and "4 experts" in problem for problem in verify(source, output).problems)
        for act in (dequantize, migrate):
            with pytest.raises(LowbitError, match=rf"bad\.safetensors: layer '{UP}'.*4 experts"):
                act(output, tmp_path / "no.safetensors")


def test_verify_tells_another_bank(source, tmp_path):
    """Experts in another order are layers with low SQNR; another orientation or number of experts is a problem."""
    convert(source, tmp_path / "out.safetensors", planned(source, "int8"))
    changed = tensors()
    changed[UP] = changed[UP].flip(0).contiguous()
    save_file(changed, tmp_path / "other.safetensors")
    save_file({**tensors(3), f"{UP}_bias": tensors()[f"{UP}_bias"]}, tmp_path / "three.safetensors")

    with open_source(tmp_path / "out.safetensors") as output:
        with open_source(tmp_path / "other.safetensors") as other:
            found = {layer.name: layer for layer in verify(other, output).layers}
            assert found[UP].accuracy.sqnr < 5 < found[DOWN].accuracy.sqnr
        with open_source(tmp_path / "three.safetensors") as other:
            found = {layer.name: layer for layer in verify(other, output).layers}
            assert "has shape [4, 64, 128] here and [3, 64, 128] in the source" in found[UP].problem


def test_an_impossible_marker_is_refused(source, tmp_path):
    """A number of experts that is none is an error that names the layer, not a matrix read as something else."""
    convert(source, tmp_path / "out.safetensors", planned(source, "int8"))
    held = load_file(tmp_path / "out.safetensors")
    marker = json.loads(held[f"{UP}.comfy_quant"].numpy().tobytes())
    for experts in (0, "four"):
        held[f"{UP}.comfy_quant"] = marker_tensor({**marker, "num_experts": experts})
        save_file(held, tmp_path / "bad.safetensors")
        refused = pytest.raises(LowbitError, match=rf"layer '{UP}'.*num_experts is")
        with open_source(tmp_path / "bad.safetensors") as output, refused:
            look_for_layers(output, output.components[0])


def test_mixed_precision_measures_an_expert_of_each_bank(source):
    """A bank is among the layers whose format is chosen; the error of its middle expert stands for it."""
    found = find_choices(source, ["int8", "nvfp4"], solver="rtn")
    errors = measure(source, found.candidates).layers

    assert {UP, DOWN} <= errors.keys()
    expert = tensors()[UP][2]
    bank = quantize_bank(expert[None], "nvfp4", solver="rtn")
    lost = (bank.dequantize(torch.float32)[0] - expert.float()).square().sum() / expert.float().square().sum()
    assert errors[UP]["nvfp4"].error == pytest.approx(float(lost), rel=1e-3)


def test_a_bank_may_be_stored_in_a_layout(tmp_path):
    """Each expert is arranged for itself; verifying, decoding and migrating undo that, and no code changes."""
    save_file({UP: outlier_weight(512, 256).reshape(2, 256, 256)}, tmp_path / "in.safetensors")
    layout = "svdquant_w4a4(rank=16)@kitchen_tile_packed_w4a4"
    decoded = []
    with open_source(tmp_path / "in.safetensors") as source:
        for spec in ("svdquant_w4a4(rank=16)", layout):
            convert(source, tmp_path / "out.safetensors", make_plan(source, spec, solver="rtn"))
            with open_source(tmp_path / "out.safetensors") as output:
                held = look_for_layers(output, output.components[0]).layers[UP]
                assert (held.layout, experts_of(held)) == (spec.partition("@")[2], 2)
                assert [*verify(source, output).problems, *verify(source, output).failing(15)] == []
                migrate(output, tmp_path / "again.safetensors")
                dequantize(output, tmp_path / "plain.safetensors")
            assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()
            decoded.append(load_file(tmp_path / "plain.safetensors")[UP])
    assert torch.equal(*decoded)


def test_compare_judges_each_expert(source, tmp_path):
    """Experts are rows of their own in a comparison, with what converting them measured; kept banks stay tensors."""
    convert(source, tmp_path / "out.safetensors", planned(source, "nvfp4"))
    convert(source, tmp_path / "kept.safetensors", planned(source, "nvfp4", keep=["experts"]))
    with open_source(tmp_path / "out.safetensors") as output, open_source(tmp_path / "kept.safetensors") as kept:
        both, alone = compare(source, [output, kept]), compare(source, [kept])
        result = {layer.name: layer for layer in verify(source, output).layers}

    rows = {layer.name: layer for layer in both.candidates[0].layers}
    others = {layer.name: layer.status for layer in both.candidates[1].layers}
    for name, shape in ((UP, (64, 128)), (DOWN, (64, 128))):
        experts = [rows[f"{name}[{index}]"] for index in range(4)]
        assert {(row.status, row.shape, row.format, row.was) for row in experts} == {
            ("quantized", shape, "nvfp4", "bfloat16")
        }
        worst = min(row.accuracy.sqnr for row in experts)
        assert worst <= result[name].accuracy.sqnr <= max(row.accuracy.sqnr for row in experts)
        assert {others[f"{name}[{index}]"] for index in range(4)} == {"kept"}
    for candidate in both.candidates:
        assert (candidate.absent.missing, candidate.absent.extra, candidate.changed) == ([], [], ())
    assert not any("[" in layer.name for layer in alone.candidates[0].layers)
    assert alone.candidates[0].identical == 3


def test_comparing_banks_of_other_shapes_is_refused(source, tmp_path):
    """Another number of experts or orientation is an error that names the layer and both shapes."""
    convert(source, tmp_path / "out.safetensors", planned(source, "nvfp4"))
    save_file({**tensors(3), f"{UP}_bias": tensors()[f"{UP}_bias"]}, tmp_path / "three.safetensors")
    refused = pytest.raises(CheckpointError, match=rf"{UP} \[4, 64, 128\] for \[3, 64, 128\]")
    three, output = open_source(tmp_path / "three.safetensors"), open_source(tmp_path / "out.safetensors")
    with three, output, refused:
        compare(three, [output])
