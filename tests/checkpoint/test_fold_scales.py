"""Scales folded while a checkpoint is converted: less is lost, nothing else changes, and the output tells it."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.calibration import calibrate
from lowbit.checkpoint.compare import compare
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.fold_plan import plan_folds
from lowbit.checkpoint.folding import folded
from lowbit.checkpoint.load import load
from lowbit.checkpoint.migrate import migrate
from lowbit.checkpoint.plan import Plan, make_plan
from lowbit.checkpoint.rescaling import Rescaling
from lowbit.checkpoint.source import open_source
from lowbit.checkpoint.verify import verify
from lowbit.errors import PlanError, WeightError
from lowbit.integrations.text_objectives import text_objective
from lowbit.lora import LoraDelta, bake_checkpoint
from tests.support import gaussian
from tests.support.tiny_decoders import decoder, distance, logits, seen, tokens, written

pytest.importorskip("transformers")
SPEC = "awq_w4a16(group_size=32)"
BLOCK = "model.layers.0."


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a model of one block, in bfloat16; the model; and what is known of its layers."""
    model = decoder("llama", layers=1).bfloat16().float()
    folder = written(model.bfloat16(), tmp_path_factory.mktemp("llama") / "model")
    model = model.float()
    return folder, model, seen(model)


def planned(source, known, spec=SPEC, **options):
    """A plan for the linears, with scales to fold."""
    chosen = {"preset": "none", "only": ["_proj$"], **options}
    return plan_folds(source, make_plan(source, spec, statistics=known, **chosen), known)


def with_folds(plan, change):
    """The plan with other folds."""
    parts = [dataclasses.replace(part, folds=tuple(map(change, part.folds))) for part in plan.components]
    return dataclasses.replace(plan, components=tuple(parts))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma", "phi3"])
def test_the_logits_of_the_converted_model_are_closer(tmp_path, model_type):
    """In 4 bits with searched scales the loaded model is nearer to the original with scales folded in than without."""
    model = decoder(model_type, layers=1).bfloat16().float()
    wanted, known = logits(model), seen(model)
    folder, far = written(model.bfloat16(), tmp_path / "model"), {}
    for name in ("plain", "folded"):
        with open_source(folder) as source:
            plan = planned(source, known, solver="scale_search")
            plan = plan if name == "folded" else with_folds(plan, lambda fold: dataclasses.replace(fold, exponent=0.0))
            report = convert(source, tmp_path / name, plan, statistics=known)
        loaded = decoder(model_type, layers=1)
        load(loaded, tmp_path / name, strict=False)
        far[name] = distance(logits(loaded), wanted)

    assert len(report.folds) == 4
    assert sum(fold.active for _, fold in report.folds) >= 3
    assert far["folded"] < 0.95 * far["plain"]


def test_the_output_is_verified_with_its_scales(llama, tmp_path):
    """`verify` and `compare` find the scales again, of norms and of rows: every layer as near as the report says."""
    folder, _, known = llama
    with open_source(folder) as source:
        report = convert(source, tmp_path / "out", planned(source, known, keep=["k_proj"]), statistics=known)
        with open_source(tmp_path / "out") as output:
            result = verify(source, output)
            beside = compare(source, [output, output], statistics=known, rtn=False).candidates

    assert not result.problems
    found = {layer.name: layer.accuracy.sqnr for layer in result.layers}
    assert {name: pytest.approx(sqnr) for name, sqnr in found.items()} == {
        layer.name: layer.accuracy.sqnr for layer in report.layers
    }
    assert len(found) == 6
    kept, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert not torch.equal(kept[f"{BLOCK}self_attn.k_proj.weight"], before[f"{BLOCK}self_attn.k_proj.weight"])
    for one in beside:
        assert not one.changed
        assert {layer.name for layer in one.layers if layer.status == "changed"} == set()
        quantized = [layer for layer in one.layers if layer.status == "quantized"]
        assert min(layer.output_sqnr for layer in quantized) > 15


def test_a_lora_of_the_model_before_is_told_apart_and_a_comparison_is_whole(llama, tmp_path):
    """Baking into layers with folded scales gives a note, into others none; `compare` tells what any candidate has."""
    folder, _, known = llama
    with open_source(folder) as source:
        convert(source, tmp_path / "out", planned(source, known), statistics=known)
        with open_source(tmp_path / "out") as output:
            beside = compare(source, [source, output], statistics=known, rtn=False)
    notes = {}
    for name in (f"{BLOCK}self_attn.q_proj", "lm_head"):
        rows = known.contents.layers[name].shape[0]
        delta = LoraDelta(gaussian(4, 64), gaussian(rows, 4))
        notes[name] = bake_checkpoint(tmp_path / "out", tmp_path / f"{rows}", {name: delta}).notes

    assert beside.with_statistics
    assert "scales are folded into 1 of the layers" in notes[f"{BLOCK}self_attn.q_proj"][-1]
    assert not any("folded" in note for note in notes["lm_head"])


def test_static_scales_of_inputs_are_those_of_the_folded_ones(llama, tmp_path):
    """A format with input_scale=true is converted, each scale that of the input times what was folded in."""
    folder, _, known = llama
    with open_source(folder) as source:
        plan = planned(source, known, "fp8_e4m3(input_scale=true)", solver="rtn")
        convert(source, tmp_path / "out", plan, statistics=known)
        _, rescaled = folded(source, plan, known)
    name = f"{BLOCK}self_attn.q_proj"
    largest = float(rescaled.get(name).samples.abs().max())
    found = float(load_file(tmp_path / "out" / "model.safetensors")[f"{name}.input_scale"]) * 448

    assert not torch.equal(rescaled.get(name).samples, known[name].samples)
    assert 0.3 * largest < found <= largest


def test_a_given_scale_of_an_input_that_a_fold_changes_is_refused(llama):
    """It was found without the fold, so one of the two has to go."""
    folder, _, known = llama
    name = f"{BLOCK}self_attn.q_proj"
    with open_source(folder) as source:
        plan = planned(source, known, "fp8_e4m3(input_scale=true)", solver="rtn")
        part = plan.components[0]
        tensors = [dataclasses.replace(one, input_scale=0.5) if one.layer == name else one for one in part.tensors]
        given = dataclasses.replace(plan, components=(dataclasses.replace(part, tensors=tuple(tensors)),))
        with pytest.raises(PlanError, match=rf"'{name}.weight' is of its input without the fold"):
            given.validate()


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_gradients_are_those_of_the_folded_model(tmp_path, model_type):
    """Of linears whose rows (of a joined gate and up the last ones) take a scale, gradients are divided by it."""
    model, inputs = decoder(model_type, layers=1), [{"input_ids": batch} for batch in tokens(8).split(4)]
    known = calibrate(model, inputs, gradients=text_objective)
    with open_source(written(model, tmp_path / "model")) as source:
        plan = planned(source, known)
        rescaled, statistics = folded(source, plan, known)
        component = rescaled.components[0]
        model.load_state_dict({key: rescaled.read(component, key) for key in component.tensors}, strict=False)
        rows = [fold.before for part in plan.components for fold in part.folds if fold.kind == "rows" and fold.active]

    assert rows
    for name, seen_folded in calibrate(model, inputs, gradients=text_objective).items():
        found = statistics.get(name).output_hessian
        assert distance(found, seen_folded.output_hessian) < 1e-3
        assert (name in rows) == (not torch.equal(found, known[name].output_hessian))


def test_what_is_made_of_a_folded_output_is_verified_too(llama, tmp_path):
    """Migrated: beside the folded output, whose scales it has, and beside the original, which has none."""
    folder, _, known = llama
    with open_source(folder) as source:
        convert(source, tmp_path / "out", planned(source, known), statistics=known)
        with open_source(tmp_path / "out") as output:
            migrate(output, tmp_path / "moved", to="torchao")
            with open_source(tmp_path / "moved") as moved:
                again = verify(output, moved)
                beside = compare(output, [moved], rtn=False).candidates[0]
                original = verify(source, moved)

    assert not again.problems
    assert not original.problems
    assert min(layer.accuracy.sqnr for layer in again.layers) > 100
    assert not [layer for layer in beside.layers if layer.status == "changed"]
    assert min(layer.accuracy.sqnr for layer in original.layers) > 12


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"linears": []}, "do not share an input"),
        ({"linears": [f"{BLOCK}mlp.down_proj"]}, "does not give the 128 channels"),
        ({"linears": ["model.norm"]}, "do not share an input"),
        ({"kind": "rows"}, "does not give the 64 channels"),
    ],
)
def test_a_header_with_other_groups_is_one_error(llama, tmp_path, change, complaint):
    """As is an output that was made from a model of another size."""
    folder, _, known = llama
    other = written(decoder("llama", 128, layers=1), tmp_path / "other")
    with open_source(folder) as source:
        convert(source, tmp_path / "out", planned(source, known, solver="rtn"), statistics=known)
        with open_source(tmp_path / "out") as output, open_source(other) as larger:
            with pytest.raises(PlanError, match="in the other"):
                verify(larger, output)
            for file in output.files.values():
                entries = json.loads(file.metadata["lowbit_folded_scales"])
                file.metadata["lowbit_folded_scales"] = json.dumps([entries[0] | change])
            with pytest.raises(PlanError, match=complaint):
                verify(source, output)


def test_other_scales_do_not_verify(llama, tmp_path):
    """Without the header that names the groups, the same output is not what it was made from."""
    folder, _, known = llama
    with open_source(folder) as source:
        report = convert(source, tmp_path / "out", planned(source, known), statistics=known)
        with open_source(tmp_path / "out") as output:
            for file in output.files.values():
                file.metadata.pop("lowbit_folded_scales")
            result = verify(source, output)

    assert len(result.problems) == 2
    assert min(layer.accuracy.sqnr for layer in result.layers) < min(layer.accuracy.sqnr for layer in report.layers) - 3


def test_layers_without_a_gain_are_left_alone(llama, tmp_path):
    """Where the samples held out lose more with the scale than without, nothing is folded, and the reason is told."""
    folder, _, known = llama
    names = [f"{BLOCK}self_attn.{x}_proj" for x in "qkv"]
    even = {name: dataclasses.replace(known[name], held_out=torch.eye(64) / known[name].diagonal) for name in names}
    with open_source(folder) as source:
        from_file = make_plan(source, SPEC, preset="none", only=["_proj$"], statistics=known)
        broken = _Known(known, even)
        fold, *others = plan_folds(source, from_file, broken).components[0].folds

    assert fold.before == f"{BLOCK}input_layernorm"
    assert not fold.active
    assert fold.error_after > fold.error_before
    assert fold.why == "no scale lowers the error of its outputs on samples held out"
    assert others[1].active


class _Known:
    """Statistics, some of them replaced."""

    def __init__(self, known, other):
        self.known, self.other = known, other
        self.kind, self.smallest, self.fingerprint = known.kind, known.smallest, known.fingerprint

    def get(self, layer):
        """Those of a layer."""
        return self.other.get(layer) or self.known.get(layer)

    get_input = get


ITS_OWN = "awq_w4a16(group_size=32,pre_quant_scale=true)"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"layer_rules": [("[qkv]_proj|gate|up", ITS_OWN)]}, "stores scales of its own"),
        ({"layer_rules": [("[qkv]_proj|gate|up", "svdquant_w4a4(rank=4)")]}, "stores scales of its own"),
        ({"only": ["down_proj"]}, "none of its linears is quantized"),
    ],
)
def test_groups_that_cannot_gain_say_why(llama, options, why):
    """Formats with their own scales and groups that stay as they are take no scale; plan and notes say why."""
    folder, _, known = llama
    with open_source(folder) as source:
        plan = planned(source, known, **options)
    folds = [fold for fold in plan.components[0].folds if "norm" in fold.before]

    assert len(folds) == 2
    for fold in folds:
        assert not fold.active
        assert why in fold.why
    assert any("left alone" in note and why in note for note in plan.notes)


@pytest.mark.parametrize("spec", [ITS_OWN, "svdquant_w4a4(rank=4)"])
def test_nothing_that_could_take_a_scale_is_an_error(llama, spec):
    """Where no group can take a scale, whatever it would gain, the option is refused, with a group and the reason."""
    folder, _, known = llama
    with open_source(folder) as source, pytest.raises(PlanError, match=r"--fold-scales: nothing to fold: none of 4 .*"):
        planned(source, known, spec=spec)
    with open_source(folder) as source, pytest.raises(PlanError, match=r"input_layernorm: .* stores scales of its own"):
        planned(source, known, spec=spec)


def test_a_weight_with_nan_is_named(llama, tmp_path):
    """Choosing a scale reads the weights first: the error names the file and the group."""
    folder, _, known = llama
    shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{BLOCK}mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    words = r"model\.safetensors: a layer behind '.*post_attention_layernorm': holds NaN"
    with open_source(tmp_path / "model") as source, pytest.raises(WeightError, match=words):
        planned(source, known)


def test_that_none_gains_is_said_and_not_an_error(llama):
    """Groups that were tried and gain nothing are a finding: the plan is made, and its notes say so."""
    folder, _, known = llama
    even = {name: dataclasses.replace(known[name], held_out=torch.eye(64) / known[name].diagonal) for name in known
            if name.endswith(("q_proj", "k_proj", "v_proj"))}  # fmt: skip
    with open_source(folder) as source:
        plan = planned(source, _Known(known, even), only=["[qkv]_proj"])

    assert not any(fold.active for fold in plan.components[0].folds)
    assert any("folded into 0 of 4" in note and "--fold-scales changes nothing here" in note for note in plan.notes)


def test_fewer_key_value_heads_leave_the_output_projection_alone(tmp_path):
    """With grouped queries the values are no channels of their own for o_proj, so that pair takes no scale."""
    model = decoder("llama", layers=1, num_key_value_heads=2)
    known = seen(model)
    with open_source(written(model, tmp_path / "model")) as source:
        folds = {fold.before.removeprefix(BLOCK): fold for fold in planned(source, known).components[0].folds}

    assert folds["input_layernorm"].active
    assert not folds["self_attn.v_proj"].active
    assert "[32, 64] does not give the 64 channels of self_attn.o_proj" in folds["self_attn.v_proj"].why


def test_a_plan_holds_its_folds(llama, tmp_path):
    """Written, read and run again a plan gives the same bytes; a fold that would change the model is refused."""
    folder, _, known = llama
    with open_source(folder) as source:
        plan = planned(source, known)
        plan.save(tmp_path / "plan.json")
        again = Plan.load(tmp_path / "plan.json")
        assert again == plan
        for name, each in {"one": plan, "two": again}.items():
            convert(source, tmp_path / name, each, statistics=known)
        files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
        assert files[0] == files[1]
        with pytest.raises(PlanError, match="nothing is known"):
            folded(source, with_folds(plan, lambda fold: fold), None)

    data = json.loads((tmp_path / "plan.json").read_text())
    for change, complaint in [
        ({"before": f"{BLOCK}mlp.gate_projection"}, "not there"),
        ({"linears": [f"{BLOCK}mlp.down_proj"]}, "does not give the 128 channels"),
        ({"kind": "bias"}, "'kind' of weight"),
        ({"exponent": 2}, "from 0 to 1"),
        ({"error_before": "small"}, "error_before is 'small'"),
        ({"error_after": -1.0}, "error_after is -1.0"),
        ({"before": f"{BLOCK}post_attention_layernorm"}, "takes a scale twice"),
    ]:
        entries = json.loads(json.dumps(data))
        entries["components"][""]["folds"][0].update(change)
        with pytest.raises(PlanError, match=complaint):
            Plan.from_json(entries)


def test_an_edited_fold_that_would_change_the_model_is_refused(llama, tmp_path):
    """A linear left out of its group, another kind of norm, rows that serve several heads: nothing is written."""
    folder, _, known = llama
    grouped = decoder("phi3", layers=1, num_key_value_heads=2)
    shared, seen_there = written(grouped, tmp_path / "phi3"), seen(grouped)
    for place, statistics, index, change, complaint in [
        (folder, known, 0, {"linears": (f"{BLOCK}self_attn.q_proj",), "exponent": 0.5}, "goes before .*k_proj"),
        (folder, known, 0, {"linears": ("lm_head",), "exponent": 0.5}, "goes before .*k_proj"),
        (folder, known, 0, {"before": "model.norm", "exponent": 0.5}, "is none that takes a scale"),
        (folder, known, 0, {"kind": "1 + weight", "exponent": 0.5}, "multiplies by its weight"),
        (shared, seen_there, 1, {"exponent": 0.5}, "does not give the 64 channels"),
    ]:
        with open_source(place) as source:
            plan = planned(source, statistics)
            changed = dataclasses.replace(plan.components[0].folds[index], **change)
            part = dataclasses.replace(plan.components[0], folds=(changed,))
            with pytest.raises(PlanError, match=complaint):
                convert(source, tmp_path / "out", dataclasses.replace(plan, components=(part,)), statistics=statistics)
    assert not (tmp_path / "out").exists()


def test_the_source_is_left_as_it_is(llama):
    """Views with different scales of one open source give different weights, and the source its own."""
    folder, _, known = llama
    with open_source(folder) as source:
        plan = planned(source, known)
        other = with_folds(plan, lambda fold: dataclasses.replace(fold, exponent=0.5 * fold.exponent))
        views = [folded(source, each, known)[0] for each in (plan, other)]
        key = f"{BLOCK}self_attn.q_proj.weight"
        assert not torch.equal(*(view.read("", key) for view in views))
        assert torch.equal(source.read("", key), load_file(folder / "model.safetensors")[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_read_apart_are_those_of_the_whole(dtype):
    """A tensor read in pieces is scaled as one read at once: columns, the last rows, and norms of 1 + weight."""
    w, columns, rows = gaussian(10, 6).to(dtype), gaussian(1, 6)[0].abs() + 0.5, gaussian(1, 4)[0].abs() + 0.5
    change = Rescaling(columns=columns, rows=rows, first_row=6)
    whole = change.apply(w.clone(), 0, "w")
    apart = torch.cat([change.apply(w[a:b].clone(), a, "w") for a, b in ((0, 3), (3, 8), (8, 10))])
    expected = w.float() / columns
    expected[6:] *= rows.unsqueeze(1)
    norm = Rescaling(rows=rows, offset=1.0).apply(w[0, :4].clone(), 0, "norm")

    assert torch.equal(whole, apart)
    assert torch.equal(whole, expected.to(dtype))
    assert torch.equal(norm, ((w[0, :4].float() + 1) * rows - 1).to(dtype))


def test_what_a_dtype_cannot_hold_is_refused():
    """A product beyond float16 is an error that names the tensor, and no infinity gets into a file."""
    with pytest.raises(WeightError, match=r"tensor 'a': is too large for torch.float16"):
        Rescaling(columns=torch.full((4,), 1e-3)).apply(torch.full((2, 4), 100.0).half(), 0, "tensor 'a'")
