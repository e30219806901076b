"""Which layers are compared where files differ in what they hold, and what makes them no files of one model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoint.compare_sources import layer_shapes
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.errors import CheckpointError
from lowbit.solvers import Statistics
from tests.checkpoint.test_compare import by_name, compared, converted
from tests.support.checkpoints import model_tensors, save_model


def converted_part(tmp_path, spec, without):
    """The conversion of the model without the tensors whose names begin with `without`, and with one layer more."""
    path = tmp_path / "part_in.safetensors"
    tensors = {key: tensor for key, tensor in model_tensors().items() if not key.startswith(without)}
    save_file({**tensors, "more.weight": torch.ones(64, 64).bfloat16()}, path)
    with open_source(path) as source:
        convert(source, tmp_path / "part.safetensors", make_plan(source, spec, preset="none"))
    return tmp_path / "part.safetensors"


def test_what_does_not_match_is_one_error(tmp_path):
    """Other shapes, and a file that has no layer of the reference, are errors with the names and the file."""
    path, _ = converted(tmp_path, "int8")
    other = save_model(tmp_path / "other.safetensors", blocks__0__up__weight=torch.ones(64, 128).bfloat16())

    with pytest.raises(CheckpointError, match=r"other.*has other shapes: blocks\.0\.up \[64, 12"):
        compared(path, other)
    save_file({"foreign.weight": torch.ones(64, 64)}, other)
    with pytest.raises(
        CheckpointError, match=r"other.*lacks ragged, blocks.*: has no layer of .*the one it was made from"
    ):
        compared(path, other)


def test_what_both_have_is_compared(tmp_path):
    """Layers that only one of two files has are named, and all others measured as without them."""
    path, out = converted(tmp_path, "int8")
    whole = by_name(compared(path, out))
    part = converted_part(tmp_path, "int8", "blocks.1.up.")
    (candidate,) = compared(path, part).candidates

    assert (candidate.absent.missing_layers, candidate.absent.extra_layers) == (["blocks.1.up"], ["more"])
    assert candidate.absent.missing == ["blocks.1.up.bias"]
    assert whole.keys() - {layer.name for layer in candidate.layers} == {"blocks.1.up"}
    for layer in candidate.layers:
        assert layer.accuracy == whole[layer.name].accuracy
    small = save_model(tmp_path / "small.safetensors", blocks=1)
    (candidate,) = compared(small, out).candidates
    assert [name for name in candidate.absent.extra_layers if name.startswith("blocks.1")]
    assert {layer.name for layer in candidate.layers} == {
        x for x in whole if not x.startswith(("blocks.1", "blocks.2"))
    }


def test_totals_are_over_layers_that_all_have(tmp_path):
    """Beside a candidate of few layers, the others' totals are of these few, too."""
    path, full = converted(tmp_path, "nvfp4")
    part = converted_part(tmp_path, "nvfp4", "blocks.0.")
    found = compared(path, full, part)

    first, second = (found.totals(candidate) for candidate in found.candidates)

    assert first.sqnr == second.sqnr != compared(path, full).totals(compared(path, full).candidates[0]).sqnr
    assert (found.partial, compared(path, full).partial) == (True, False)
    assert not [name for name in found.judged if name.startswith("blocks.0.")]


def test_statistics_of_another_model_are_refused(tmp_path):
    """Second moments of another width, with NaN, or of no layer of this model are errors that say so."""
    path, out = converted(tmp_path, "int8")

    def run(name, h):
        compared(path, out, statistics={name: Statistics(hessian=h, tokens=4)})

    with pytest.raises(CheckpointError, match=r"'blocks.0.up': the statistics are of shape"):
        run("blocks.0.up", torch.eye(64))
    with pytest.raises(CheckpointError, match=r"'blocks.0.up': the statistics hold NaN"):
        run("blocks.0.up", torch.full((128,), float("nan")))
    with pytest.raises(CheckpointError, match="know none of its quantized layers"):
        run("layer.0", torch.eye(128))


def test_shapes_are_those_of_the_weights(tmp_path):
    """The shapes that statistics are checked against are logical ones, quantized or not."""
    path, out = converted(tmp_path, "awq_w4a16")
    with open_source(path) as plain, open_source(out) as coded:
        assert layer_shapes(plain) == layer_shapes(coded)
        assert layer_shapes(plain)["blocks.0.up"] == (192, 128)
        assert "patch" not in layer_shapes(plain)


@pytest.mark.parametrize("change", [lambda w: w.to(torch.int8), lambda w: w.flatten()], ids=["codes", "flat"])
def test_a_weight_that_is_there_as_something_else_is_refused(tmp_path, change):
    """Codes that nothing describes, or one axis: the layer is not lacking, and not right either."""
    path, _ = converted(tmp_path, "int8")
    tensors = model_tensors()
    save_file({**tensors, "blocks.0.up.weight": change(tensors["blocks.0.up.weight"])}, tmp_path / "odd.safetensors")

    with pytest.raises(CheckpointError, match=r"odd.*has other shapes: blocks\.0\.up \["):
        compared(path, tmp_path / "odd.safetensors")


def test_totals_of_different_layers_say_so(tmp_path):
    """Two candidates that share no quantized layer."""
    path, _ = converted(tmp_path)
    tensors = model_tensors()
    halves = []
    for index in (0, 1):
        mine = {key: tensor for key, tensor in tensors.items() if key.startswith(f"blocks.{index}.")}
        save_file(mine, tmp_path / f"half{index}.safetensors")
        halves.append(tmp_path / f"half{index}_out.safetensors")
        with open_source(tmp_path / f"half{index}.safetensors") as source:
            convert(source, halves[-1], make_plan(source, "int8", preset="none"))

    assert compared(path, *halves).basis.endswith("each one's totals are over other layers")
    assert compared(path, halves[0]).basis == ""
