"""The LoRA file of a conversion: its names and shapes, what applying it gives, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.error_lora import embedding_tables, write_error_lora
from lowbit.checkpoint.layer_statistics import InMemory
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.quantized_source import look_for_layers
from lowbit.checkpoint.source import open_source
from lowbit.cli import app
from lowbit.errors import PlanError, WriteError
from lowbit.solvers import Statistics
from tests.support import gaussian
from tests.support.checkpoints import model_tensors, save_model


@pytest.fixture
def pair(tmp_path):
    """A checkpoint and its conversion to 4 bits, both open."""
    path = save_model(tmp_path / "in.safetensors")
    with open_source(path) as source:
        plan = make_plan(source, "awq_w4a16", preset="none", only=["blocks"], solver="rtn")
        convert(source, tmp_path / "out.safetensors", plan)
        with open_source(tmp_path / "out.safetensors") as converted:
            yield source, converted


def decoded(converted) -> dict[str, torch.Tensor]:
    """The weights as a loader gets them."""
    held = look_for_layers(converted, converted.components[0])
    return {name: held.dequantized(stored, torch.float32)[0] for name, stored in held.layers.items()}


def test_the_file_holds_a_correction_for_each_layer(pair, tmp_path):
    """Names, shapes and alpha are those of PEFT; adding B A to the decoded weight brings it closer to the source."""
    source, converted = pair
    report = write_error_lora(source, converted, tmp_path / "lora.safetensors", 16, prefix="diffusion_model.")
    lora, tensors, weights = load_file(tmp_path / "lora.safetensors"), model_tensors(), decoded(converted)

    assert len(lora) == 3 * len(weights) == 3 * len(report)
    assert not list(tmp_path.glob("*.partial*"))
    for layer in report:
        a, b = (lora[f"diffusion_model.{layer.layer}.lora_{x}.weight"] for x in "AB")
        w, lossy = tensors[f"{layer.layer}.weight"].float(), weights[layer.layer]
        assert float(lora[f"diffusion_model.{layer.layer}.alpha"]) == a.shape[0] == b.shape[1] == 16
        assert a.dtype == b.dtype == torch.bfloat16
        before, after = (w - lossy).square().sum(), (w - lossy - b.float() @ a.float()).square().sum()
        assert float(after / before) == pytest.approx(layer.error_after / layer.error_before, rel=1e-3)
        assert after < 0.85 * before


def test_statistics_decide_what_is_corrected(pair, tmp_path):
    """With second moments of the input, the error that is left of the output is smaller."""
    source, converted = pair
    x = gaussian(2048, 128, seed=4) * torch.linspace(-2, 2, 128).exp()
    known = InMemory({"blocks.0.up": Statistics(hessian=x.t() @ x / 2048, tokens=2048, mean=x.mean(0))})
    made = write_error_lora(source, converted, tmp_path / "a.safetensors", 8, statistics=known)
    plain = write_error_lora(source, converted, tmp_path / "b.safetensors", 8)
    lora, name = load_file(tmp_path / "b.safetensors"), "blocks.0.up"
    error = model_tensors()[f"{name}.weight"].float() - decoded(converted)[name]
    rest = error - lora[f"{name}.lora_B.weight"].float() @ lora[f"{name}.lora_A.weight"].float()
    found = next(layer for layer in made if layer.layer == name)

    assert found.error_after / found.error_before < 0.8 * float((x @ rest.t()).norm() / (x @ error.t()).norm()) ** 2
    assert [layer.layer for layer in made] == [layer.layer for layer in plain]


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_beside_a_corrected_bias_errors_are_those_of_the_outputs(pair, tmp_path, offset):
    """Where the bias took the mean error, the reported errors are those of outputs, and the correction lowers them."""
    source, converted = pair
    name, x = "blocks.0.up", gaussian(512, 128, seed=4) * torch.linspace(-2, 2, 128).exp() + offset
    statistics = Statistics(hessian=x.t() @ x / 512, tokens=512, mean=x.mean(0))
    known = InMemory({name: statistics})
    made = write_error_lora(source, converted, tmp_path / "a.safetensors", 8, statistics=known, bias_corrected={name})
    lora, w = load_file(tmp_path / "a.safetensors"), model_tensors()[f"{name}.weight"].float()
    error = w - decoded(converted)[name]
    before = (x - statistics.sure_mean) @ error.t()
    after = before - x @ (lora[f"{name}.lora_B.weight"].float() @ lora[f"{name}.lora_A.weight"].float()).t()
    found = next(layer for layer in made if layer.layer == name)

    assert found.error_after < 0.9 * found.error_before
    ratio = float(after.square().sum() / before.square().sum())
    assert found.error_after / found.error_before == pytest.approx(ratio, rel=0.03)


def test_what_cannot_work_is_refused(pair, tmp_path):
    """The input as target, a wrong name, a rank of 0 and a pair without a difference: refused, nothing is written."""
    source, converted = pair
    before = {path.name for path in tmp_path.iterdir()}
    for target, rank, kind, complaint in [
        ("in.safetensors", 4, WriteError, "is the input"),
        ("lora.bin", 4, WriteError, "ends in .safetensors"),
        ("none/lora.safetensors", 4, WriteError, "no folder"),
        ("lora.safetensors", 0, PlanError, "rank of a correction is 0"),
    ]:
        with pytest.raises(kind, match=complaint):
            write_error_lora(source, converted, tmp_path / target, rank)
    with pytest.raises(PlanError, match="nothing to correct"):
        write_error_lora(source, source, tmp_path / "lora.safetensors", 4)
    other = save_model(tmp_path / "other.safetensors", blocks__0__up__weight=torch.zeros(64, 128))
    with open_source(other) as another, pytest.raises(PlanError, match="these are two models"):
        write_error_lora(another, converted, tmp_path / "lora.safetensors", 4)

    assert {path.name for path in tmp_path.iterdir()} == before | {"other.safetensors"}


def test_the_command_writes_it_and_says_what_it_is_worth(tmp_path):
    """`convert --error-lora` writes both files; its JSON lists the errors before and after."""
    save_model(tmp_path / "in.safetensors")
    arguments = ["convert", str(tmp_path / "in.safetensors"), "-o", str(tmp_path / "out.safetensors")]
    arguments += ["--format", "int8", "--preset", "none", "--error-lora", str(tmp_path / "lora.safetensors")]
    done = CliRunner().invoke(app, [*arguments, "--lora-rank", "4", "--json"])

    assert done.exit_code == 0, done.output
    layers = json.loads(done.stdout)["error_lora"]
    assert layers
    assert all(layer["rank"] == 4 and layer["error_after"] < layer["error_before"] for layer in layers)
    assert (tmp_path / "lora.safetensors").exists()


def test_only_layers_that_match_are_corrected(tmp_path):
    """`--lora-layers` gives the names; all others are converted alike and have no correction."""
    save_model(tmp_path / "in.safetensors")
    given = ["convert", tmp_path / "in.safetensors", "-o", tmp_path / "out.safetensors", "--format", "int8"]
    lora = ["--preset", "none", "--error-lora", tmp_path / "lora.safetensors", "--lora-rank", "4"]
    only = ["--lora-layers", r"blocks\.0\.up$", "--lora-layers", r"blocks\.0\.down$", "--json"]

    done = CliRunner().invoke(app, [str(one) for one in (*given, *lora, *only)])

    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert len(told["layers"]) > 2
    assert {layer["layer"] for layer in told["error_lora"]} == {"blocks.0.up", "blocks.0.down"}
    held = {key.split(".lora_")[0].removesuffix(".alpha") for key in load_file(tmp_path / "lora.safetensors")}
    assert held == {"blocks.0.up", "blocks.0.down"}


def test_tables_of_embeddings_are_left_out_and_named(tmp_path):
    """PEFT and diffusers take no lora_A and lora_B for them: the file has none, the command says which."""
    tensors = {"model.embed_tokens.weight": gaussian(64, 128), "model.layers.0.mlp.up_proj.weight": gaussian(128, 128)}
    save_file(tensors, tmp_path / "in.safetensors")
    given = ["convert", tmp_path / "in.safetensors", "-o", tmp_path / "out.safetensors", "--format", "awq_w4a16"]
    lora = ["--preset", "none", "--error-lora", tmp_path / "lora.safetensors", "--lora-rank", "8"]

    done = CliRunner().invoke(app, [str(one) for one in (*given, *lora)])

    assert done.exit_code == 0, done.output
    assert "none of model.embed_tokens: tables of embeddings" in done.output
    assert {key.split(".lora_")[0] for key in load_file(tmp_path / "lora.safetensors") if "lora_" in key} == {
        "model.layers.0.mlp.up_proj"
    }
    with open_source(tmp_path / "in.safetensors") as source, open_source(tmp_path / "out.safetensors") as converted:
        assert embedding_tables(source, converted) == ["model.embed_tokens"]


def test_nothing_but_a_table_is_nothing_to_correct(tmp_path):
    """One error says so, and no file appears."""
    save_file({"model.embed_tokens.weight": gaussian(64, 128)}, tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as source:
        convert(source, tmp_path / "out.safetensors", make_plan(source, "awq_w4a16", preset="none", solver="rtn"))
        said = pytest.raises(PlanError, match="but tables of embeddings, which LoRAs do not correct")
        with open_source(tmp_path / "out.safetensors") as converted, said:
            write_error_lora(source, converted, tmp_path / "lora.safetensors", 8)
    assert not (tmp_path / "lora.safetensors").exists()
