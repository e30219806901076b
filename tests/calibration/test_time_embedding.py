"""Statistics of modulation layers from the timestep alone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import lowbit
from lowbit.calibration.time_embedding import modulation_statistics, timestep_waves
from lowbit.checkpoint.source import open_source
from lowbit.errors import StatisticsError
from lowbit.integrations.digits_dit import Config, DigitsDiT
from tests.calibration.models import assert_moments

WIDTH = 32
QWEN = {
    "time_text_embed.timestep_embedder.linear_1": (WIDTH, 256),
    "time_text_embed.timestep_embedder.linear_2": (WIDTH, WIDTH),
    "transformer_blocks.0.img_mod.1": (6 * WIDTH, WIDTH),
    "transformer_blocks.0.txt_mod.1": (6 * WIDTH, WIDTH),
    "transformer_blocks.0.attn.to_q": (WIDTH, WIDTH),
    "norm_out.linear": (2 * WIDTH, WIDTH),
}
FLUX = {"time_in.in_layer": (WIDTH, 256), "time_in.out_layer": (WIDTH, WIDTH)}
WAN = {
    "time_embedding.0": (WIDTH, 256),
    "time_embedding.2": (WIDTH, WIDTH),
    "time_projection.1": (6 * WIDTH, WIDTH),
}
Z_IMAGE = {
    "t_embedder.mlp.0": (48, 256),
    "t_embedder.mlp.2": (WIDTH, 48),
    "layers.0.adaLN_modulation.0": (128, WIDTH),
    "all_final_layer.2-1.adaLN_modulation.1": (64, WIDTH),
}


def checkpoint(path, shapes, prefix=""):
    """A checkpoint of random weights and biases with these layers."""
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"{prefix}{name}.weight"] = torch.randn(shape, generator=random) / shape[1] ** 0.5
        tensors[f"{prefix}{name}.bias"] = torch.randn(shape[0], generator=random)
    save_file(tensors, path)
    return path, tensors


def taken(path, **options):
    """The statistics of a checkpoint's modulation."""
    with open_source(path) as source:
        return modulation_statistics(source, **options)


def by_hand(tensors, first, second, *, steps=1000):
    """The embedding of every timestep, with the formulas of diffusers' `get_timestep_embedding` in float64."""
    t = torch.arange(0, steps + 1, dtype=torch.float64) * (1000 / steps)
    exponent = -torch.log(torch.tensor(10000.0).double()) * torch.arange(128).double() / 128
    angle = t[:, None] * exponent.exp()
    waves = torch.cat((torch.cos(angle), torch.sin(angle)), 1)

    def linear(name, x):
        return x @ tensors[f"{name}.weight"].double().mT + tensors[f"{name}.bias"].double()

    return linear(second, F.silu(linear(first, waves)))


def test_qwen_image_is_exact(tmp_path):
    """H of every modulation layer is E[x xᵀ] of SiLU(temb), computed by hand in float64; they share one input."""
    path, tensors = checkpoint(tmp_path / "q.safetensors", QWEN)

    found = taken(path)

    x = F.silu(by_hand(tensors, *list(QWEN)[:2]))
    for half, moment in ((x[0::2], found["norm_out.linear"].hessian), (x[1::2], found["norm_out.linear"].held_out)):
        assert_moments(moment, half)
    assert set(found) == set(QWEN) - {"transformer_blocks.0.attn.to_q"}
    keys = {found.contents.layers[name].input for name in (*list(QWEN)[2:4], "norm_out.linear")}
    assert len(keys) == 1
    found.check(QWEN)


def test_a_real_model_sees_the_same(tmp_path):
    """On a model that runs, hooks over every timestep and class find the same second moment, by 1e-3 of its size."""
    model = DigitsDiT(Config(width=48, blocks=1))
    path = tmp_path / "digits.safetensors"
    lowbit.save(model, path)
    t = torch.linspace(0, 1, 101)
    inputs = [{"x": torch.zeros(101, 8, 8), "timestep": t, "label": torch.full((101,), label)} for label in range(10)]

    computed = taken(path, steps=100)
    seen = lowbit.calibrate(model, inputs)

    for name in ("transformer_blocks.0.img_mod.1", "norm_out.linear"):
        truth, guess = seen[name].combined, computed[name].combined
        assert (truth - guess).norm() < 1e-3 * truth.norm()
        assert computed[name].total_tokens == seen[name].total_tokens == 1010


def test_few_timesteps_are_no_small_sample(tmp_path):
    """However wide the input is, 8 tokens a channel are stated, for H is of all timesteps there are."""
    path, _ = checkpoint(tmp_path / "q.safetensors", QWEN)

    found = taken(path, steps=10)

    assert found["norm_out.linear"].tokens >= 8 * WIDTH
    assert found["norm_out.linear"].held_out_tokens >= 8 * WIDTH
    assert found.warnings() == []


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_wan(tmp_path, prefix):
    """Wan's projection reads SiLU(e); the names keep the checkpoint's prefix."""
    path, tensors = checkpoint(tmp_path / "w.safetensors", WAN, prefix)

    found = taken(path)

    x = F.silu(by_hand(tensors, f"{prefix}time_embedding.0", f"{prefix}time_embedding.2"))
    moment = found[f"{prefix}time_projection.1"].combined
    torch.testing.assert_close(moment.double(), x.mT @ x / len(x), rtol=1e-4, atol=1e-5)


def test_z_image_has_no_silu_in_its_blocks(tmp_path):
    """Its blocks read the embedding itself, its last layer SiLU of it."""
    path, tensors = checkpoint(tmp_path / "z.safetensors", Z_IMAGE)

    found = taken(path)

    x = by_hand(tensors, "t_embedder.mlp.0", "t_embedder.mlp.2")
    for name, rows in (("layers.0.adaLN_modulation.0", x), ("all_final_layer.2-1.adaLN_modulation.1", F.silu(x))):
        torch.testing.assert_close(found[name].combined.double(), rows.mT @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_flux_2_adds_its_guidance(tmp_path):
    """FLUX.2 embeds the guidance by a second MLP; another guidance gives other statistics."""
    shapes = {
        **FLUX,
        "guidance_in.in_layer": (WIDTH, 256),
        "guidance_in.out_layer": (WIDTH, WIDTH),
        "double_stream_modulation_img.lin": (6 * WIDTH, WIDTH),
    }
    path, tensors = checkpoint(tmp_path / "f.safetensors", shapes)

    found = taken(path, guidance=1.0)["double_stream_modulation_img.lin"]

    guidance = by_hand(tensors, "guidance_in.in_layer", "guidance_in.out_layer")[-1]  # t = 1000 is 1000 * guidance 1
    x = F.silu(by_hand(tensors, "time_in.in_layer", "time_in.out_layer") + guidance)
    torch.testing.assert_close(found.combined.double(), x.mT @ x / len(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(taken(path, guidance=4.0)["double_stream_modulation_img.lin"].mean, found.mean)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({**FLUX, "vector_in.in_layer": (8, 8), "final_layer.adaLN_modulation.1": (8, WIDTH)}, "pooled text"),
        ({**QWEN, "time_text_embed.text_embedder.linear_1": (8, 8)}, "pooled text"),
        ({**Z_IMAGE, "y_embedder.mlp.0": (8, 8)}, "pooled text"),
        ({"blocks.0.q": (8, 8)}, "no time MLP"),
        ({**QWEN, "norm_out.linear": (8, 2 * WIDTH)}, "is not built as Qwen-Image"),
        (FLUX, "no modulation layer known there"),
    ],
)
def test_what_depends_on_more_is_refused(tmp_path, shapes, said):
    """FLUX.1 and SD3 mix in pooled text, others have no such MLP: an error says so and names the way out."""
    path, _ = checkpoint(tmp_path / "m.safetensors", shapes)

    with pytest.raises(StatisticsError, match=said):
        taken(path)


def test_waves_begin_with_cosines():
    """At t = 0 the first half is 1 and the second 0; the first frequency is 1, the last nearly 1/10000."""
    waves = timestep_waves(torch.tensor([0.0, 1.0]), 256)

    assert torch.equal(waves[0], torch.cat((torch.ones(128), torch.zeros(128))))
    assert float(waves[1, 128]) == pytest.approx(0.841471, abs=1e-6)
    assert float(waves[1, 255]) == pytest.approx(10_000 ** (-127 / 128), rel=1e-5)
