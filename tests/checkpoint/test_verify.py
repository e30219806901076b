"""Verifying finds what a conversion lost, what was changed since, and what is missing."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.dequantize import dequantize
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.checkpoint.verify import VerifyResult, verify
from lowbit.errors import CheckpointError
from lowbit.formats import parse_spec
from tests.support.checkpoints import model_tensors, save_model, save_shards
from tests.support.specs import ALL_SPECS, fits


def converted(tmp_path, spec="fp8_e4m3", **options):
    """A model and its conversion; returns both paths and the report."""
    path, out = save_model(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    with open_source(path) as source:
        report = convert(source, out, make_plan(source, spec, preset="none", **options))
    return path, out, report


def verified(before, after, **options) -> VerifyResult:
    """Compare two files."""
    with open_source(before) as source, open_source(after) as output:
        return verify(source, output, **options)


def changed(path, change) -> None:
    """Write a file again with its tensors changed by `change(tensors)`."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("spec", [spec for spec in ALL_SPECS if fits(spec, 128) or fits(spec, 192)])
def test_agrees_with_the_conversion(tmp_path, spec):
    """For every format, verify measures exactly what the conversion had measured, and finds nothing wrong."""
    path, out, report = converted(tmp_path, parse_spec(spec))
    result = verified(path, out)

    assert result.problems == ()
    assert {x.name: x.accuracy for x in result.layers} == {x.name: x.accuracy for x in report.layers}
    assert {x.format for x in result.layers} == {spec}
    assert all(x.shape == tuple(model_tensors()[f"{x.name}.weight"].shape) for x in result.layers)


def test_threshold_names_the_layers_below_it(tmp_path):
    """Layers below a threshold in dB fail, and the worst comes first."""
    path, out, _ = converted(tmp_path, "int8", layer_rules=[("blocks.1.up", "awq_w4a16")])
    result = verified(path, out)

    assert [x.name for x in result.failing(30)] == ["blocks.1.up"]
    assert result.worst(1)[0].name == "blocks.1.up"
    assert result.failing(15) == []
    assert len(result.failing(1000)) == len(result.layers)


def test_damaged_codes_show(tmp_path):
    """A layer whose codes were changed after the conversion has a low SQNR, one ruined row a high row error."""
    path, out, _ = converted(tmp_path)

    def ruin(tensors):
        tensors["blocks.0.up.weight"] = tensors["blocks.0.up.weight"].flip(0)
        w = tensors["blocks.1.up.weight"].float()
        w[5] = -w[5]
        tensors["blocks.1.up.weight"] = w.to(torch.float8_e4m3fn)

    changed(out, ruin)
    layers = {x.name: x.accuracy for x in verified(path, out).layers}

    assert layers["blocks.0.up"].sqnr < 0
    assert layers["blocks.1.up"].max_row_error == pytest.approx(2, abs=0.05)
    assert layers["blocks.2.up"].max_row_error < 0.1


def test_nan_in_the_output_fails_every_threshold(tmp_path):
    """A scale that became NaN fails even a threshold of minus infinity, and sorts as the worst."""
    path, out, _ = converted(tmp_path)
    changed(out, lambda tensors: tensors["blocks.1.up.weight_scale"].fill_(math.nan))
    result = verified(path, out)

    assert [x.name for x in result.failing(-math.inf)] == ["blocks.1.up"]
    assert result.worst(1)[0].name == "blocks.1.up"
    json.dumps(result.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("patch.weight"), "'patch.weight' of the source is missing"),
        (lambda t: t.update(extra=torch.ones(2)), "'extra' is not in the source"),
        (lambda t: t["blocks.0.norm.weight"].add_(1), "blocks.0.norm.weight: differs from the source"),
        (lambda t: t.update(steps=t["steps"].int()), r"steps: is int32 [10] here and int64 [10] in the source"),
        (lambda t: t.pop("blocks.0.up.weight_scale"), "blocks.0.up"),
        (lambda t: t.update({"blocks.0.up.comfy_quant": torch.zeros(3, dtype=torch.uint8)}), "blocks.0.up"),
    ],
)
def test_other_differences_are_problems(tmp_path, change, complaint):
    """Missing, added and changed plain tensors and layers that cannot be read are each one problem, by name."""
    path, out, _ = converted(tmp_path)
    changed(out, change)
    problems = verified(path, out).problems

    assert len(problems) == 1
    assert complaint in problems[0]


def test_a_wrong_bias_behind_a_constant_is_found(tmp_path):
    """Where a format puts a constant into the bias, the true bias is compared: right as converted, wrong when plain."""
    path, out, _ = converted(tmp_path, "svdquant_w4a4(rank=4,act_unsigned=true)")
    assert verified(path, out).failing(10) == []
    changed(out, lambda tensors: tensors.update({"blocks.0.up.bias": model_tensors()["blocks.0.up.bias"]}))
    wrong = verified(path, out).failing(10)

    assert [x.name for x in wrong] == ["blocks.0.up"]
    assert "the bias without the constant" in wrong[0].problem


def test_a_layer_of_another_shape_is_a_problem(tmp_path):
    """A layer that is larger than the source's is reported, not compared in part."""
    path, out, _ = converted(tmp_path)
    save_model(path, blocks__1__up__weight=torch.randn(64, 128).bfloat16())
    failing = verified(path, out).failing(0)

    assert [x.name for x in failing] == ["blocks.1.up"]
    assert "has shape [192, 128] here and [64, 128] in the source" in failing[0].problem


def test_a_quantized_source_is_decoded(tmp_path):
    """A conversion from a quantized file is compared with the decoded weights of that file."""
    _, out, _ = converted(tmp_path, "int8")
    with open_source(out) as source:
        report = convert(source, tmp_path / "b.safetensors", make_plan(source, "nvfp4", preset="none", requantize=True))
    result = verified(out, tmp_path / "b.safetensors")

    assert result.problems == ()
    measured = {layer.name: layer.accuracy.sqnr for layer in report.layers}
    assert {x.name: x.accuracy.sqnr for x in result.layers} == pytest.approx(measured, abs=0.01)  # it saw bfloat16


def test_shards_against_one_file(tmp_path):
    """A sharded source and an output in one file are compared as one model."""
    index = save_shards(tmp_path / "in")
    with open_source(index) as source:
        convert(source, tmp_path / "out.safetensors", make_plan(source, "mxfp8", preset="none"))
    result = verified(index, tmp_path / "out.safetensors", jobs=1)

    assert (result.problems, len(result.layers), result.identical) == ((), 7, 11)


def test_other_models_are_refused(tmp_path):
    """A pipeline and a single model are not compared as if they were parts of each other."""
    path = save_model(tmp_path / "in.safetensors")
    for name in ("text_encoder", "transformer"):
        save_shards(tmp_path / "pipe" / name)
    (tmp_path / "pipe" / "model_index.json").write_text(
        json.dumps({n: ["x", "y"] for n in ("text_encoder", "transformer")})
    )
    with pytest.raises(CheckpointError, match="holds the models"):
        verified(path, tmp_path / "pipe")


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_decoded_weight_differs_by_what_was_lost(tmp_path, dtype):
    """Of plain weights that differ the problem says how far; for a dequantized file that is the conversion's SQNR."""
    path, out, report = converted(tmp_path, "int8", only=["blocks.0.up"])
    with open_source(out) as source:
        dequantize(source, tmp_path / "plain.safetensors", dtype=dtype)
    (problem,) = verified(path, tmp_path / "plain.safetensors").problems
    (number,) = re.findall(r"\(SQNR ([\d.]+) dB\)$", problem)

    assert problem.startswith("blocks.0.up.weight: ")
    assert float(number) == pytest.approx(report.layers[0].accuracy.sqnr, abs=0.6)
