"""`--input-scales` and `--input-percentile`: where the static scales of inputs come from."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.calibration import calibrate
from lowbit.checkpoint import convert_layer
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.input_scales import InputScales
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.errors import PlanError
from lowbit.solvers import percentile, solve

FP8 = "fp8_e4m3(input_scale=true)"
SCALES = {f"blocks.{block}.{name}": 0.01 * (block + 1) for block in (0, 1) for name in ("attn.q", "mlp.up", "mlp.down")}


def stored(path):
    """The scales in a file, by layer."""
    found = load_file(path)
    return {key.removesuffix(".input_scale"): float(found[key]) for key in found if key.endswith(".input_scale")}


def interrupted(*_, **__):
    """What ends a conversion in the middle."""
    raise KeyboardInterrupt


def as_float32(scales):
    """Numbers as float32 holds them."""
    return {layer: float(torch.tensor(scale, dtype=torch.float32)) for layer, scale in scales.items()}


@pytest.fixture
def given(tmp_path):
    """A function that writes a JSON file of scales."""

    def write(scales, name="scales.json"):
        (tmp_path / name).write_text(scales if isinstance(scales, str) else json.dumps(scales))
        return tmp_path / name

    return write


@pytest.fixture
def calibrated(tmp_path):
    """Two linears in a file, and what was seen of their inputs, open and as a file."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 64))
    save_file({name: value.detach().clone() for name, value in module.named_parameters()}, tmp_path / "m.safetensors")
    seen = calibrate(module, [torch.randn(256, 64) for _ in range(4)])
    seen.save(tmp_path / "stats.safetensors")
    return tmp_path / "m.safetensors", tmp_path / "stats.safetensors", seen


def test_scales_from_a_file_are_stored_as_they_are(lowbit, model, given, tmp_path):
    """Without statistics, from JSON; and again from the tensors of the checkpoint that this made."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"

    done = lowbit("convert", model, "-o", first, "--format", FP8, "--input-scales", given(SCALES))
    assert done.code == 0, done.err
    assert "input scales of 6 layers are given" in done.out
    again = lowbit("convert", model, "-o", second, "--format", "nvfp4(input_scale=true)", "--input-scales", first)
    assert again.code == 0, again.err

    assert stored(first) == stored(second) == as_float32(SCALES)
    assert lowbit("verify", model, second).code == 0


def test_weights_are_what_they_are_without(lowbit, model, given, tmp_path):
    """Nothing but the scales is added."""
    plain, scaled = tmp_path / "plain.safetensors", tmp_path / "scaled.safetensors"
    assert lowbit("convert", model, "-o", plain, "--format", "fp8_e4m3").code == 0
    assert lowbit("convert", model, "-o", scaled, "--format", FP8, "--input-scales", given(SCALES)).code == 0

    before, after = load_file(plain), load_file(scaled)
    assert after.keys() - before.keys() == {f"{layer}.input_scale" for layer in SCALES}
    for key in before:
        if not key.endswith("comfy_quant"):
            assert torch.equal(before[key].float(), after[key].float()), key


def test_a_plan_holds_them(lowbit, model, given, tmp_path):
    """The plan file says each scale, converting by it needs no other file, and a wrong one in it is refused."""
    plan, out = tmp_path / "plan.json", tmp_path / "out.safetensors"
    assert lowbit("plan", model, "--format", FP8, "--input-scales", given(SCALES), "-o", plan).code == 0
    assert lowbit("convert", model, "-o", out, "--plan", plan).code == 0
    assert stored(out) == as_float32(SCALES)

    both = lowbit("convert", model, "-o", out, "--plan", plan, "--input-scales", given(SCALES))
    assert (both.code, "--input-scales: the plan file says this already" in both.err) == (2, True)
    text = plan.read_text()
    for wrong, said in {
        '"input_scale": -0.02': "input_scale is -0.02, expected a number above zero",
        '"input_scale": "big"': "input_scale is 'big', expected a number",
        '"input_percentile": 0.9, "input_scale": 0.02': "remove one of them",
        '"input_percentile": 1.5': "input_percentile is 1.5, expected a number above 0 and up to 1",
    }.items():
        plan.write_text(text.replace('"input_scale": 0.02', wrong))
        found = lowbit("convert", model, "-o", out, "--plan", plan)
        assert (found.code, said in found.err, "blocks.1" in found.err) == (2, True, True), found.err
    plan.write_text(text.replace("(input_scale=True)", ""))
    found = lowbit("convert", model, "-o", out, "--plan", plan)
    assert (found.code, "stores no input_scale; give it input_scale=true" in found.err) == (2, True), found.err


def test_scales_of_layers_that_store_none_are_counted(lowbit, model, given):
    """A file may know more layers than are converted; the plan says how many of its scales go unused."""
    done = lowbit("plan", model, "--format", FP8, "--keep", "attn", "--input-scales", given(SCALES))
    assert (done.code, "of 4 layers are given; 2 more are of layers that store none" in done.out) == (0, True), done.out


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        ({**SCALES, "blocks.7.attn.q": 0.1}, "the model has no layer 'blocks.7.attn.q'"),
        ({**SCALES, "blocks.0.attn.q": -0.1}, "layer 'blocks.0.attn.q' is -0.1, expected a number above zero"),
        ({**SCALES, "blocks.0.attn.q": 0}, "layer 'blocks.0.attn.q' is 0, expected a number above zero"),
        ({**SCALES, "blocks.0.attn.q": float("nan")}, "layer 'blocks.0.attn.q' is nan"),
        ({**SCALES, "blocks.0.attn.q": float("inf")}, "layer 'blocks.0.attn.q' is inf"),
        ({**SCALES, "blocks.0.attn.q": 1e-60}, "layer 'blocks.0.attn.q' is 1e-60"),
        ({**SCALES, "blocks.0.attn.q": 10**400}, "layer 'blocks.0.attn.q' is 1000"),
        ({**SCALES, "blocks.0.attn.q": "0.1"}, "layer 'blocks.0.attn.q' is '0.1', expected a number"),
        ({**SCALES, "blocks.0.attn.q": True}, "layer 'blocks.0.attn.q' is True, expected a number"),
        ({"blocks.0.attn.q": 0.1}, "'blocks.0.mlp.down': fp8_e4m3(input_scale=True) needs to know the layer's input"),
        ({"small": 0.1, **{name: 1.0 for name in SCALES if "attn" in name}}, "nor a scale in"),
        ({}, "holds no scales"),
        ("[1]", "not an object"),
        ("{", "is not JSON"),
        ('{"a": 1, "a": 2}', "stands twice"),
    ],
)
def test_a_wrong_file_is_one_error_before_any_work(lowbit, model, given, tmp_path, scales, said):
    """It names the file and, where it is about one, the layer; nothing is written."""
    path, out = given(scales), tmp_path / "out.safetensors"
    found = lowbit("convert", model, "-o", out, "--format", FP8, "--input-scales", path)

    assert (found.code, said in found.err, "scales.json" in found.err) == (2, True, True), found.err
    assert not list(tmp_path.glob("out*"))


def test_a_checkpoint_without_usable_scales_is_refused(lowbit, model, tmp_path):
    """One without such tensors, one with more than one number for a layer, and none at all."""
    wide = tmp_path / "wide.safetensors"
    save_file({"blocks.0.attn.q.input_scale": torch.ones(64)}, wide)
    asked = ("convert", model, "-o", tmp_path / "out.safetensors", "--format", FP8, "--input-scales")

    for path, said in (
        (model, "holds no scales"),
        (wide, "layer 'blocks.0.attn.q' is 'a tensor [64]', expected a number"),
        (tmp_path / "none.json", "cannot be read"),
        (tmp_path / "none.safetensors", "none.safetensors"),
    ):
        found = lowbit(*asked, path)
        assert (found.code in (2, 3), said in found.err, path.name in found.err) == (True, True, True), found.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--format", "fp8_e4m3", "--input-scales"), "none of its 6 scales would be stored"),
        (("--format", FP8, "--fold-scales", "--input-scales"), "does not go with --fold-scales"),
        (("--format", "fp8_e4m3(pre_quant_scale=true,input_scale=true)", "--input-scales"), "needs calibration"),
        (("--target-size", "0.5x", "--input-scales"), "do not go with a target"),
    ],
)
def test_scales_that_nothing_could_store_are_refused(lowbit, model, given, options, said):
    """A format without such a scale, an input that changes first, and formats that are yet to be chosen."""
    found = lowbit("plan", model, *options, given(SCALES))
    assert (found.code, said in found.err) == (2, True), found.err


@pytest.mark.parametrize(
    ("fraction", "options", "said"),
    [
        ("99.9", ("--format", FP8), "--input-percentile is 99.9, expected a number above 0 and up to 1"),
        ("0", ("--format", FP8), "--input-percentile is 0.0"),
        ("nan", ("--format", FP8), "--input-percentile is nan"),
        ("0.999", ("--format", "fp8_e4m3"), "no layer stores an input scale that calibration finds"),
        ("0.999", ("--target-size", "0.5x"), "do not go with a target"),
    ],
)
def test_a_wrong_percentile_is_refused(lowbit, model, fraction, options, said):
    """A percentage, nothing, no number; and a fraction that would be of no use."""
    found = lowbit("plan", model, *options, "--input-percentile", fraction)
    assert (found.code, said in found.err) == (2, True), found.err


def test_scales_cover_the_fraction_that_is_asked_for(lowbit, calibrated, given, tmp_path):
    """Of the counted magnitudes; one layer's given scale stays, and the usual fraction is 0.9999."""
    model, stats, seen = calibrated
    asked = ("--format", FP8, "--stats", stats, "--solver", "rtn")
    runs = {"usual": (), "half": ("--input-percentile", 0.5)}
    runs["mixed"] = (*runs["half"], "--input-scales", given({"1": 0.25}))
    for name, more in runs.items():
        done = lowbit("convert", model, "-o", tmp_path / f"{name}.safetensors", *asked, *more)
        assert done.code == 0, done.err

    def expected(fraction):
        return {name: pytest.approx(percentile(seen[name], fraction) / 448, rel=1e-6) for name in ("0", "1")}

    assert stored(tmp_path / "usual.safetensors") == expected(0.9999)
    assert stored(tmp_path / "half.safetensors") == expected(0.5)
    assert stored(tmp_path / "mixed.safetensors") == {**expected(0.5), "1": 0.25}


@pytest.mark.parametrize("option", ["input_scales", "input_percentile"])
def test_other_scales_begin_anew(calibrated, tmp_path, monkeypatch, option):
    """An interrupted run goes on with the same scales and percentile only."""
    model, _, seen = calibrated
    values = {
        "input_scales": [InputScales({"0": scale, "1": 0.5}) for scale in (0.5, 0.25)],
        "input_percentile": [0.99, 0.9],
    }[option]
    out = tmp_path / "out.safetensors"

    with open_source(model) as source:
        first, other = (make_plan(source, FP8, preset="none", statistics=seen, **{option: value}) for value in values)
        for plan, resumed in ((first, 1), (other, 0)):
            outcomes = iter([solve, interrupted])
            with monkeypatch.context() as patch:
                patch.setattr(convert_layer, "solve", lambda *given, run=outcomes, **more: next(run)(*given, **more))
                with pytest.raises(KeyboardInterrupt):
                    convert(source, out, first, statistics=seen, jobs=1)
            assert convert(source, out, plan, statistics=seen, jobs=1).resumed == resumed
            out.unlink()


def test_a_given_scale_refuses_an_input_that_changes_first(calibrated):
    """A pre_quant_scale is yet to be chosen when the scale is given: no file can know the input behind it."""
    model, _, seen = calibrated
    spec = "fp8_e4m3(pre_quant_scale=true,input_scale=true)"
    with open_source(model) as source, pytest.raises(PlanError, match=r"'0.weight'.*is yet to be chosen"):
        make_plan(source, spec, preset="none", statistics=seen, input_scales=InputScales({"0": 0.5}))
