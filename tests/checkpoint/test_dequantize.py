"""Dequantizing gives a plain checkpoint: the effective weights, the true biases, and nothing of the old format."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.dequantize import dequantize
from lowbit.checkpoint.inspection import inspect
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.quantized_source import look_for_layers
from lowbit.checkpoint.source import open_source
from lowbit.checkpoint.verify import verify
from lowbit.errors import CheckpointError
from tests.support.checkpoints import files_below, model_tensors, save_model, save_shards
from tests.support.specs import ALL_SPECS, fits


def converted(tmp_path, spec):
    """The path of a converted small model."""
    with open_source(save_model(tmp_path / "in.safetensors")) as source:
        convert(source, tmp_path / "out.safetensors", make_plan(source, spec, preset="none", solver="rtn"))
    return tmp_path / "out.safetensors"


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("spec", [spec for spec in ALL_SPECS if fits(spec, 128) or fits(spec, 192)])
def test_weights_are_the_effective_ones(tmp_path, spec, dtype):
    """Every layer is what its format decodes to, in the dtype asked for or its own; names are the source's."""
    plain = tmp_path / "plain.safetensors"
    with open_source(converted(tmp_path, spec)) as source:
        report = dequantize(source, plain, dtype=dtype)
        held = look_for_layers(source, source.components[0])
        expected = {n: held.dequantized(s, dtype or s.dtype)[0] for n, s in held.layers.items()}
    out, tensors = load_file(plain), model_tensors()

    made = {f"{layer}.bias" for layer in expected} if "act_unsigned=True" in spec else set()
    assert out.keys() == tensors.keys() | made
    for layer, w in expected.items():
        assert torch.equal(out[f"{layer}.weight"], w)
    for key in tensors.keys() - {f"{layer}.weight" for layer in expected}:
        if key not in made:
            assert torch.equal(out[key], tensors[key])
    assert report.layers == dict.fromkeys(expected, spec)
    json.dumps(report.to_json())
    with safe_open(plain, "pt") as file:
        assert file.metadata() == {"format": "pt", "author": "test"}


def test_biases_are_the_true_ones_again(tmp_path):
    """A bias that a format had put a constant into is back to what it was, within the rounding of its dtype."""
    spec = "svdquant_w4a4(rank=4,act_unsigned=true)"
    with open_source(converted(tmp_path, spec)) as source:
        dequantize(source, tmp_path / "plain.safetensors")
    out, folded = load_file(tmp_path / "plain.safetensors"), load_file(tmp_path / "out.safetensors")

    for i in range(3):
        true = model_tensors()[f"blocks.{i}.up.bias"].float()
        size = torch.maximum(folded[f"blocks.{i}.up.bias"].float().abs(), true.abs())
        assert bool(((out[f"blocks.{i}.up.bias"].float() - true).abs() <= 2**-8 * size).all())
        assert float((folded[f"blocks.{i}.up.bias"].float() - true).abs().max()) > 0.005  # there was something to undo
        made = folded[f"blocks.{i}.down.bias"].float()  # by the format, for a layer without one: zeros in truth
        assert bool((out[f"blocks.{i}.down.bias"].float().abs() <= 2**-8 * made.abs()).all())


def test_shards_stay_shards(tmp_path):
    """A sharded quantized model becomes a sharded plain one with an index of the plain tensors."""
    with open_source(save_shards(tmp_path / "in")) as source:
        convert(source, tmp_path / "out", make_plan(source, "int8", preset="none"))
    with open_source(tmp_path / "out") as source:
        dequantize(source, tmp_path / "plain")
    before, after = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("in", "plain")
    )

    assert after["weight_map"] == dict(sorted(before["weight_map"].items()))
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"]
    assert files_below(tmp_path / "plain").keys() == files_below(tmp_path / "in").keys()


def test_a_plain_file_is_refused(tmp_path):
    """A file without quantized layers is an error, and no copy of it appears."""
    with (
        open_source(save_model(tmp_path / "in.safetensors")) as source,
        pytest.raises(CheckpointError, match="holds no quantized layer"),
    ):
        dequantize(source, tmp_path / "plain.safetensors")
    assert not (tmp_path / "plain.safetensors").exists()


def test_a_dtype_for_codes_is_refused(tmp_path):
    """Decoding to something that is no dtype for weights is refused."""
    with (
        open_source(converted(tmp_path, "int8")) as source,
        pytest.raises(CheckpointError, match=r"cannot decode to int8; .* bfloat16, float16, float32"),
    ):
        dequantize(source, tmp_path / "plain.safetensors", dtype=torch.int8)


def test_a_plain_file_is_named(tmp_path):
    """There is nothing to decode in it, and the message names the file and not its folder."""
    unfit = pytest.raises(CheckpointError, match=r"in\.safetensors: holds no quantized layer")
    with open_source(save_model(tmp_path / "in.safetensors")) as source, unfit:
        dequantize(source, tmp_path / "out.safetensors")


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
@pytest.mark.parametrize("cast", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_cast_to_8_bit_floats_are_widened(tmp_path, cast, dtype):
    """Without a scale the values are what they are: of every rank, bfloat16 if nothing else is asked; verify agrees."""
    shapes = {"a.weight": (48, 32), "a.bias": (48,), "conv.weight": (8, 4, 3, 3), "one": ()}
    stored = {key: (4 * torch.randn(shape)).to(cast) for key, shape in shapes.items()}
    save_file({**stored, "norm.weight": torch.ones(8)}, tmp_path / "cast.safetensors")

    with open_source(tmp_path / "cast.safetensors") as source:
        report = dequantize(source, tmp_path / "plain.safetensors", dtype=dtype)
        with open_source(tmp_path / "plain.safetensors") as plain:
            result = verify(source, plain)

    assert (report.widened, report.copied, report.layers) == (4, 1, {})
    out = load_file(tmp_path / "plain.safetensors")
    for key, tensor in stored.items():
        assert out[key].dtype == (dtype or torch.bfloat16)
        assert torch.equal(out[key].float(), tensor.float())
    assert out["norm.weight"].dtype == torch.float32
    assert (result.problems, result.identical) == ((), 5)


def test_another_value_in_a_wider_dtype_is_a_problem(tmp_path):
    """Verify forgives the dtype of widened 8-bit floats, and no change of a value; large tensors are read in pieces."""
    wide = torch.randn(4096, 4096).to(torch.float8_e4m3fn)
    save_file({"a.weight": wide}, tmp_path / "cast.safetensors")
    changed = wide.bfloat16()
    changed[-1, -1] += 1
    for name, tensor in {"same": wide.bfloat16(), "changed": changed}.items():
        save_file({"a.weight": tensor}, tmp_path / f"{name}.safetensors")
        with open_source(tmp_path / "cast.safetensors") as source, open_source(tmp_path / f"{name}.safetensors") as out:
            assert len(verify(source, out).problems) == (name == "changed")


def test_8_bit_floats_with_a_scale_that_nobody_knows_are_refused(tmp_path):
    """DeepSeek's `.scale` beside a weight: its values cannot be had, so no file is written that pretends to."""
    tensors = {"a.weight": torch.ones(128, 128).to(torch.float8_e4m3fn), "a.scale": torch.ones(1, 1)}
    save_file(tensors, tmp_path / "in.safetensors")

    with open_source(tmp_path / "in.safetensors") as source, pytest.raises(CheckpointError, match=r"'a\.scale' scales"):
        dequantize(source, tmp_path / "out.safetensors")

    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("codes", "scale"),
    [
        ("experts.gate_up_proj", "experts.gate_up_proj_scale"),
        ("experts.gate_up_proj", "experts.gate_up_proj.scale_inv"),
        ("a.weight", "a_scale"),
    ],
)
def test_scales_beside_parameters_of_any_name_are_seen(tmp_path, codes, scale):
    """Banks of experts have no ".weight"; `inspect`, `plan` and `dequantize` take none for plain values."""
    save_file({codes: torch.ones(2, 64, 64).to(torch.float8_e4m3fn), scale: torch.ones(2)}, tmp_path / "in.safetensors")

    with open_source(tmp_path / "in.safetensors") as source:
        with pytest.raises(CheckpointError, match=f"{scale}' scales"):
            dequantize(source, tmp_path / "out.safetensors")
        plan = make_plan(source, "int8", preset="none", requantize=True)
        why = {tensor.key: tensor.why for tensor in plan.components[0].tensors}
        assert f"how '{scale}' scales it" in why[codes]
        assert f"how '{scale}' scales them is not known" in "".join(inspect(source).notes)


def test_scales_of_codes_that_nobody_knows_are_not_widened(tmp_path):
    """Block scales are 8-bit floats themselves; the codes that they belong to would stay behind."""
    tensors = {"a.codes": torch.ones(64, 32).to(torch.uint8), "a.blockscale": torch.ones(64, 4).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "in.safetensors")

    with (
        open_source(tmp_path / "in.safetensors") as source,
        pytest.raises(CheckpointError, match=r"scale of 'a\.codes'"),
    ):
        dequantize(source, tmp_path / "out.safetensors")


def test_cast_tensors_beside_quantized_layers_are_widened(tmp_path):
    """A checkpoint may hold both; the result is one that any program loads."""
    with open_source(converted(tmp_path, "int8")) as source:
        held = look_for_layers(source, source.components[0])
        tensors = {key: held.read(key) for key in held.specs}
        metadata = held.metadata
    tensors["extra.weight"] = torch.ones(16, 16).to(torch.float8_e5m2)
    save_file(tensors, tmp_path / "mixed.safetensors", metadata)

    with open_source(tmp_path / "mixed.safetensors") as source:
        report = dequantize(source, tmp_path / "plain.safetensors")

    assert report.widened == 1
    assert {tensor.dtype.itemsize for tensor in load_file(tmp_path / "plain.safetensors").values()} == {2, 4, 8}
