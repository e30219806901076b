from __future__ import annotations

import math

import pytest
import torch

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.load import load
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.presets import get_preset
from lowbit.checkpoint.source import open_source
from lowbit.errors import CheckpointError
from lowbit.integrations import digits_dit
from lowbit.integrations.digits_dit import (
    Config,
    DigitsDiT,
    calibration,
    compare_sample,
    evaluation,
    load_model,
    psnr,
    sample,
    save_model,
)
from lowbit.layer_kinds import quantized_layers

SMALL = Config(width=64, heads=2, blocks=2)
LABEL = torch.arange(6)


@pytest.fixture
def model() -> DigitsDiT:
    """A model whose modulation is not zero: a fresh one predicts zero whatever comes in."""
    made = DigitsDiT(SMALL)
    for value in made.parameters():
        value.detach().normal_(0, 0.1)
    return made.requires_grad_(False)


def test_velocity_has_the_shape_of_the_images(model):
    """Images of 8x8 pixels give velocities of 8x8 pixels, and a class changes them."""
    x, t = torch.randn(6, 8, 8), torch.full((6,), 0.5)
    out = model(x, t, LABEL)
    assert out.shape == x.shape
    assert not torch.equal(out, model(x, t, LABEL.flip(0)))
    assert not torch.equal(out, model(x, t / 2, LABEL))


def test_patches_go_back_where_they_came_from():
    """Output pixels depend on their own patch through the residual stream: with blocks off, on no other patch."""
    made = DigitsDiT(Config(width=64, heads=2, blocks=1)).requires_grad_(False)
    made.proj_out.weight.normal_()
    x = torch.randn(1, 8, 8)
    changed = x.clone()
    changed[0, 2, 5] += 1.0  # in the patch of rows 2, 3 and columns 4, 5
    t, label = torch.full((1,), 0.5), torch.zeros(1, dtype=torch.long)
    rows, columns = (made(changed, t, label) - made(x, t, label))[0].nonzero(as_tuple=True)
    assert set(rows.tolist()) == {2, 3}
    assert set(columns.tolist()) == {4, 5}


def test_new_model_predicts_zero():
    """Modulation and output start at zero, as adaLN-zero has it."""
    made = DigitsDiT(SMALL)
    assert not made(torch.randn(6, 8, 8), torch.rand(6), LABEL).any()


def test_preset_of_qwen_image_knows_the_names(model):
    """Names are Qwen-Image's: its preset keeps input, output, embeddings and the first modulation, and no other."""
    bound = get_preset(digits_dit.PRESET).bind(list(model.state_dict()))
    linears = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    kept = {name for name in linears if bound.decide(name).action == "keep"}
    assert kept == {
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "img_in",
        "transformer_blocks.0.img_mod.1",
        "norm_out.linear",
        "proj_out",
    }
    assert bound.is_embedding("time_text_embed.addition_t_embedding")
    block = {name.removeprefix("transformer_blocks.1.") for name in linears if name not in kept and ".1." in name}
    attention = {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"}
    assert {"img_mod.1", "img_mlp.net.0.proj", "img_mlp.net.2", *attention} <= block


def test_samples_repeat(model):
    """The same seed gives the same images bit for bit, another seed others; images come without gradients."""
    images = sample(model, LABEL, seed=3, steps=4)
    assert images.shape == (6, 8, 8)
    assert torch.equal(images, sample(model, LABEL, seed=3, steps=4))
    assert not torch.equal(images, sample(model, LABEL, seed=4, steps=4))


def test_psnr_of_a_known_error():
    """Identical images have infinite PSNR; an error of 0.02 everywhere is 100 times below the range: 40 dB."""
    images = torch.rand(3, 8, 8)
    assert psnr(images, images) == math.inf
    assert psnr(images.double(), images.double() + 0.02) == pytest.approx(40.0)


def test_training_lowers_the_loss():
    """A few steps on one batch of images bring the velocity's error well below that of predicting zero."""
    made = DigitsDiT(Config(width=64, heads=2, blocks=1))
    images, noise, t = torch.randn(10, 8, 8), torch.randn(10, 8, 8), torch.rand(10)
    mixed, velocity = torch.lerp(images, noise, t.view(-1, 1, 1)), noise - images
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = (made(mixed, t, torch.arange(10)) - velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_factory_gives_the_model_and_what_it_meets(model, tmp_path, monkeypatch):
    """The factory loads the folder that the environment names; its inputs run and cover every timestep and class."""
    monkeypatch.setenv(digits_dit.FOLDER_VARIABLE, str(save_model(model, tmp_path / "dit")))
    loaded, inputs = calibration()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert torch.isfinite(loaded(**inputs[0])).all()
    labels, times = (torch.cat([batch[key] for batch in inputs]) for key in ("label", "timestep"))
    assert set(labels.tolist()) == set(range(10))
    assert times.unique().tolist() == pytest.approx([step / 20 for step in range(1, 21)])
    assert len(inputs[0]["timestep"].unique()) > 10


def test_evaluation_meets_other_noise(model, tmp_path):
    """What conversions are compared on is not what they were calibrated on, and images are compared by seed."""
    loaded, inputs = evaluation(save_model(model, tmp_path / "dit"))
    seen = {row.numpy().tobytes() for batch in calibration(tmp_path / "dit")[1] for row in batch["x"]}
    assert not any(row.numpy().tobytes() in seen for batch in inputs for row in batch["x"])
    images = compare_sample(loaded, 5)
    assert images.shape == (20, 8, 8)
    assert torch.equal(images, compare_sample(loaded, 5))


def test_missing_or_foreign_folder_is_named(tmp_path):
    """A folder without a model, with a broken description or with another model's gives one error that says so."""
    with pytest.raises(CheckpointError, match="train a model"):
        calibration(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "Other"}')
    with pytest.raises(CheckpointError, match="does not describe a DigitsDiT"):
        load_model(tmp_path)


def test_converted_folder_loads_and_samples(model, tmp_path):
    """A folder converted with awq for the modulation and svdquant for the rest is loaded by `load_model` and runs."""
    folder = save_model(model.bfloat16(), tmp_path / "dit")
    with open_source(folder) as source:
        rules = [(r"img_mod\.1$", "awq_w4a16")]
        plan = make_plan(source, "svdquant_w4a4(rank=16)", preset=digits_dit.PRESET, layer_rules=rules)
        convert(source, tmp_path / "out", plan)
    small, plain = load_model(tmp_path / "out"), load_model(folder)
    formats = {name: layer.weight.format.name for name, layer in quantized_layers(small)}
    assert {name for name, fmt in formats.items() if fmt == "awq_w4a16"} == {
        f"transformer_blocks.{index}.img_mod.1" for index in range(SMALL.blocks)
    }
    assert sum(fmt == "svdquant_w4a4" for fmt in formats.values()) == 6 * SMALL.blocks
    load(DigitsDiT(SMALL), tmp_path / "out")
    assert 5 < psnr(sample(plain, LABEL, 0, 3), sample(small, LABEL, 0, 3)) < math.inf
