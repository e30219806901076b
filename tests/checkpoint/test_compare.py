"""Comparing checkpoints: every measure against its definition, and whatever a conversion changed is told."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from lowbit.checkpoint.compare import compare
from lowbit.checkpoint.compare_layer import error_histogram, scale_health
from lowbit.checkpoint.comparison import Comparison
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.dequantize import dequantize
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.formats import parse_spec
from lowbit.formats.gguf_block import GgufBlock
from lowbit.numerics.gguf_encode import SEARCHED
from lowbit.solvers import Statistics, solver
from tests.support.checkpoints import model_tensors, rewrite, save_model
from tests.support.specs import ALL_SPECS, weight_shape


def converted(tmp_path, spec="fp8_e4m3", name="out", **options):
    """A model and its conversion; returns both paths."""
    path, out = tmp_path / "in.safetensors", tmp_path / f"{name}.safetensors"
    if not path.exists():
        save_model(path)
    with open_source(path) as source:
        convert(source, out, make_plan(source, spec, preset="none", **options))
    return path, out


def compared(before, *after, **options) -> Comparison:
    """Compare files."""
    with open_source(before) as reference:
        sources = [open_source(path) for path in after]
        try:
            return compare(reference, sources, jobs=2, **options)
        finally:
            for source in sources:
                source.close()


def second_moments(k, seed=0, rows=512):
    """E[x x^T] of inputs whose channels differ in size and are correlated, and the inputs [rows, K]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * torch.logspace(0, -2, k)
    x = torch.randn(rows, k, generator=generator) @ mix
    return x.T @ x / rows, x


def by_name(found, index=0):
    """The layers of a candidate by name."""
    return {layer.name: layer for layer in found.candidates[index].layers}


def test_output_sqnr_is_that_of_real_outputs(tmp_path):
    """The measure from H equals signal over noise of the layer's outputs on the inputs that H was taken from."""
    path, out = converted(tmp_path, "nvfp4")
    h, x = second_moments(128)
    statistics = {"blocks.0.up": Statistics(hessian=h, tokens=len(x))}

    layer = by_name(compared(path, out, statistics=statistics))["blocks.0.up"]

    w = model_tensors()["blocks.0.up.weight"].float()
    with open_source(out) as source:
        plain = tmp_path / "plain.safetensors"
        dequantize(source, plain, dtype=torch.float32)
    e = load_file(plain)["blocks.0.up.weight"].float() - w
    expected = 20 * math.log10((x @ w.T).double().norm() / (x @ e.T).double().norm())
    assert layer.output_sqnr == pytest.approx(expected, abs=1e-3)
    assert layer.accuracy.sqnr == pytest.approx(20 * math.log10(w.double().norm() / e.double().norm()), abs=1e-3)


def test_held_out_moments_and_diagonals_are_used(tmp_path):
    """The held-out half is what a layer is judged on; a diagonal counts as a matrix with nothing beside it."""
    path, out = converted(tmp_path, "nvfp4")
    h, _ = second_moments(128)
    diagonal = h.diagonal().clone()
    entries = {
        "blocks.0.up": Statistics(hessian=torch.eye(128), tokens=8, held_out=diagonal.diag(), held_out_tokens=8),
        "blocks.1.up": Statistics(hessian=diagonal, tokens=8),
    }
    swapped = {"blocks.0.up": Statistics(hessian=diagonal, tokens=8), "blocks.1.up": entries["blocks.0.up"]}

    first, second = (by_name(compared(path, out, statistics=each)) for each in (entries, swapped))

    for name in ("blocks.0.up", "blocks.1.up"):
        assert first[name].output_sqnr == pytest.approx(second[name].output_sqnr, abs=1e-3)
        assert abs(first[name].output_sqnr - first[name].accuracy.sqnr) > 0.05


@pytest.mark.parametrize("spec", ALL_SPECS)
def test_rounding_flips_nothing_and_stays_within_half_a_step(spec):
    """For every format, its own rounding has no gain, no flips, and errors of at most half a step where codes reach."""
    fmt = parse_spec(spec)
    w = torch.randn(weight_shape(fmt), generator=torch.Generator().manual_seed(1))
    parts = solver("rtn")(w, fmt)

    found = error_histogram(w, fmt, parts)

    assert sum(found.counts) + found.beyond > 0.9 * w.numel()
    # ggml gives up half of the upper end, and more of its types are clipped where that costs less; w4a8_codebook clips,
    # and its integers lie unevenly.
    clips = isinstance(fmt, GgufBlock) and fmt.type in SEARCHED
    beyond = 1.2 if clips else {"gguf": 1.01, "w4a8_codebook": 2.01}.get(fmt.name, 0.56)
    assert found.largest <= beyond  # half a step, and what rounding the grid itself adds
    assert 0.1 < found.rms < 0.32  # 0.29 where errors are even; low where the low rank fits the rounding
    health = scale_health({**parts, "scale": fmt.scales(parts)})
    assert health.not_finite == 0
    assert health.count == fmt.scales(parts).numel()


@pytest.mark.parametrize("spec", ["fp8_e4m3", "int8", "mxfp8", "nvfp4", "awq_w4a16", "svdquant_w4a4"])
def test_plain_rounding_is_the_yardstick(tmp_path, spec):
    """A conversion by plain rounding has a gain of 0 dB and no flips; the shares lie between 0 and 1."""
    path, out = converted(tmp_path, spec, solver="rtn")
    found = compared(path, out, histograms=7)

    for layer in found.candidates[0].quantized:
        assert layer.gain == 0
        assert layer.measure.flips == 0
        assert 0 < layer.measure.at_ends < 0.2
        assert layer.histogram is not None
    assert found.totals(found.candidates[0]).gain == pytest.approx(0, abs=1e-9)


def test_codes_at_the_ends_are_counted(tmp_path):
    """At ends are exactly the codes of the largest magnitude: of int8 the 127s, of nvfp4 the sixes, of awq 0 and 15."""
    for spec, count in {
        "int8": lambda t: (t["blocks.0.up.weight"].abs() == 127).sum(),
        "nvfp4": lambda t: sum(((t["blocks.0.up.weight"] >> s) & 7 == 7).sum() for s in (0, 4)),
        "awq_w4a16": lambda t: sum(
            torch.isin((t["blocks.0.up.weight"].view(torch.uint8) >> s) & 15, torch.tensor([0, 15])).sum()
            for s in (0, 4)
        ),
    }.items():
        path, out = converted(tmp_path, spec, name=spec)
        share = by_name(compared(path, out))["blocks.0.up"].measure.at_ends

        assert share == pytest.approx(float(count(load_file(out))) / (192 * 128))


def test_flips_are_weights_that_decode_otherwise(tmp_path):
    """Changing one code of a rounded weight is one flip and one error beyond half a step, and lowers the SQNR."""
    path, out = converted(tmp_path, "int8(rotation=0)")

    def change(tensors):
        tensors["blocks.1.up.weight"][7, 9] += 1 if tensors["blocks.1.up.weight"][7, 9] < 100 else -1

    rewrite(out, change)
    layer = by_name(compared(path, out, histograms=7))["blocks.1.up"]

    assert layer.measure.flips == 1 / (192 * 128)
    assert layer.gain < 0
    assert 0.5 < layer.histogram.largest <= 1.5


def test_scales_that_are_saturated_or_broken_are_counted():
    """Scales of 448, zero and NaN are counted each as what they are, in every dtype that scales have."""
    e4m3 = torch.tensor([[448.0, 0.0, 1.0, float("nan")]]).to(torch.float8_e4m3fn)
    found = scale_health({"qdata": torch.zeros(1, 4), "scale": e4m3, "global_scale": torch.tensor(float("inf"))})
    assert (found.count, found.at_top, found.zero, found.not_finite) == (4, 1, 1, 2)
    assert found.saturated == 0.5

    e8m0 = scale_health({"scale": torch.tensor([[254, 0, 127, 255]], dtype=torch.uint8)})
    assert (e8m0.at_top, e8m0.zero, e8m0.not_finite) == (1, 1, 1)

    half = scale_health({"scale": torch.tensor([65504.0, 0.0, float("inf")], dtype=torch.float16)})
    assert (half.zero, half.not_finite) == (1, 1)


def test_kept_layers_are_exact_or_flagged(tmp_path):
    """A kept layer is told as kept; once it differs, however little, it is flagged with how far it is off."""
    path, out = converted(tmp_path, "int8", keep=["blocks.0"])
    found = compared(path, out)
    assert {layer.name for layer in found.candidates[0].layers if layer.status == "kept"} >= {
        "blocks.0.up", "blocks.0.down", "tiny"
    }  # fmt: skip
    assert found.candidates[0].changed == ()

    def change(tensors):
        tensors["blocks.0.up.weight"][3, 5] += 0.5
        tensors["patch.weight"] *= 2
        tensors["steps"][0] = 7

    rewrite(out, change)
    candidate = compared(path, out).candidates[0]

    assert [layer.name for layer in candidate.altered] == ["blocks.0.up"]
    assert 0 < candidate.altered[0].accuracy.sqnr < 80
    assert [text.partition(":")[0] for text in candidate.changed] == ["patch.weight", "steps"]


def test_a_kept_layer_in_another_dtype_is_changed(tmp_path):
    """Casting a kept float32 weight to bfloat16 is a change that is told, and so is a dropped or an added tensor."""
    path, out = converted(tmp_path, "int8", keep=["ragged"])

    def change(tensors):
        tensors["ragged.weight"] = tensors["ragged.weight"].bfloat16()
        tensors["more"] = torch.ones(2)
        del tensors["blocks.2.norm.weight"]

    rewrite(out, change)
    candidate = compared(path, out).candidates[0]

    assert [(layer.name, layer.was, layer.format) for layer in candidate.altered] == [("ragged", "float32", "bfloat16")]
    assert candidate.absent.extra == ["more"]
    assert candidate.absent.missing == ["blocks.2.norm.weight"]


@pytest.mark.parametrize("spec", ["int8", "svdquant_w4a4(rank=16,act_unsigned=True)"])
def test_biases_are_compared_without_the_formats_share(tmp_path, spec):
    """A bias into which the format put a constant counts as unchanged; one that a solver corrected is told apart."""
    path, out = converted(tmp_path, spec)
    assert compared(path, out).candidates[0].biases == ()

    def change(tensors):
        tensors["blocks.0.up.bias"] += 1

    rewrite(out, change)
    candidate = compared(path, out).candidates[0]

    assert [text.partition(":")[0] for text in candidate.biases] == ["blocks.0.up.bias"]
    assert candidate.changed == ()


def test_a_quantized_reference_is_decoded(tmp_path):
    """A file compared with itself is exact in every layer; nvfp4 made from fp8 is measured against that fp8."""
    path, eight = converted(tmp_path, "fp8_e4m3", name="fp8")
    same = compared(eight, eight)
    assert all(layer.accuracy.sqnr == math.inf for layer in same.candidates[0].layers)
    assert same.candidates[0].changed == ()

    with open_source(eight) as source:
        convert(source, tmp_path / "four.safetensors", make_plan(source, "nvfp4", preset="none", requantize=True))
    from_eight = by_name(compared(eight, tmp_path / "four.safetensors"))["blocks.0.up"]
    from_plain = by_name(compared(path, tmp_path / "four.safetensors"))["blocks.0.up"]
    assert from_eight.was == "fp8_e4m3"
    assert from_eight.accuracy.sqnr != from_plain.accuracy.sqnr


def test_a_plain_candidate_of_a_quantized_reference_is_measured(tmp_path):
    """Decoding a file to bfloat16 changes its weights by less than a step, and that is told."""
    _, out = converted(tmp_path, "int8(rotation=0)")
    with open_source(out) as source:
        dequantize(source, tmp_path / "plain.safetensors")

    layer = by_name(compared(out, tmp_path / "plain.safetensors"))["blocks.0.up"]

    assert (layer.status, layer.was, layer.format) == ("changed", "int8", "bfloat16")
    assert 40 < layer.accuracy.sqnr < 70


def test_totals_count_layers_by_their_weights(tmp_path):
    """The total is the mean noise-to-signal ratio over the layers that any candidate quantizes, kept ones at zero."""
    path, full = converted(tmp_path, "nvfp4", name="full")
    _, part = converted(tmp_path, "nvfp4", name="part", keep=["blocks.0"])
    found = compared(path, full, part)

    for index, candidate in enumerate(found.candidates):
        layers = [layer for layer in by_name(found, index).values() if layer.name in found.judged]
        ratio = sum(x.weights * 10 ** (-x.accuracy.sqnr / 10) for x in layers) / sum(x.weights for x in layers)
        assert found.totals(candidate).sqnr == pytest.approx(-10 * math.log10(ratio))
    assert found.totals(found.candidates[1]).sqnr > found.totals(found.candidates[0]).sqnr
    assert found.totals(found.candidates[0]).output_sqnr is None

    h, _ = second_moments(192)
    found = compared(path, full, statistics={"blocks.1.down": Statistics(hessian=h, tokens=4)})
    layer, total = by_name(found)["blocks.1.down"], found.totals(found.candidates[0])
    assert total.output_sqnr == pytest.approx(layer.output_sqnr)
    assert total.gain == pytest.approx(layer.gain)
    assert "blocks.0.up" in found.unmeasured


def test_the_result_is_json(tmp_path):
    """The JSON form holds every layer with its numbers and survives a strict encoder."""
    path, out = converted(tmp_path, "int8", keep=["blocks.0"])
    h, _ = second_moments(192)
    data = compared(path, out, statistics={"blocks.1.down": Statistics(hessian=h, tokens=4)}).to_json()

    again = json.loads(json.dumps(data, default=str))
    layers = {layer["name"]: layer for layer in again["candidates"][0]["layers"]}
    assert layers["blocks.0.up"]["status"] == "kept"
    assert layers["blocks.0.up"]["accuracy"]["sqnr"] == "inf"
    assert layers["blocks.1.down"]["output_sqnr"] > 20
    assert layers["blocks.1.up"]["scales"]["count"] == 192
    assert "blocks.2.up" in again["unmeasured"]
