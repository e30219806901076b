"""Adapter files: the names of each trainer, how they are matched with a model's, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from lowbit.errors import CheckpointError, UnsupportedError, WeightError
from lowbit.lora import LoraDelta, combined, read_adapter

SHAPES = {
    "blocks.0.attn.to_q": (24, 16),
    "blocks.0.attn.to_out.0": (24, 16),
    "blocks.0.ff_net.up": (24, 16),
}
RANK = 4
PAIR = {"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(4, 2)}
EMPTY_CORES = {f"x.hada_t{i}": torch.ones(0, 0, 3, 3) for i in (1, 2)} | {
    f"x.hada_w{i}_{side}": torch.ones(0, 4) for i in (1, 2) for side in "ab"
}


def factors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """down [4, 16] and up [24, 4]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((RANK, 16), generator=generator), torch.randn((24, RANK), generator=generator)


def write(path, pattern_down: str, pattern_up: str, names=SHAPES, alpha: str | None = None, metadata=None):
    """An adapter file whose keys are patterns of the layer's name."""
    tensors = {}
    for seed, name in enumerate(names):
        down, up = factors(seed)
        tensors |= {pattern_down.format(name): down, pattern_up.format(name): up}
        if alpha is not None:
            tensors[alpha.format(name)] = torch.tensor(2.0)
    save_file(tensors, path, metadata=metadata)
    return path


CONVENTIONS = {
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"),
    "onetrainer": ("lora_transformer_{}.lora_down.weight", "lora_transformer_{}.lora_up.weight", None),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", None),
    "diffusers old": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight", None),
    "diffusers older": ("unet.{}.lora_linear_layer.down.weight", "unet.{}.lora_linear_layer.up.weight", None),
    "comfy": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", "diffusion_model.{}.alpha"),
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", None),
    "peft named": ("base_model.model.{}.lora_A.default.weight", "base_model.model.{}.lora_B.default.weight", None),
    "bare": ("{}.lora_down.weight", "{}.lora_up.weight", "{}.alpha"),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_every_convention_means_the_same_layers(convention, prefix, tmp_path):
    """Each trainer's names lead to the same layers and changes, whatever prefix the model's own names have."""
    down, up, alpha = CONVENTIONS[convention]
    flat = "_{}" in down
    names = [name.replace(".", "_") for name in SHAPES] if flat else list(SHAPES)
    path = write(tmp_path / "lora.safetensors", down, up, names, alpha)

    matched = read_adapter(path).match({prefix + name: shape for name, shape in SHAPES.items()})

    assert set(matched.layers) == {prefix + name for name in SHAPES}
    assert matched.unmatched == ()
    for seed, name in enumerate(SHAPES):
        a, b = factors(seed)
        scale = 2.0 / RANK if alpha else 1.0
        torch.testing.assert_close(matched.layers[prefix + name].dense(0.5), 0.5 * scale * b @ a)


def test_attention_processors_of_old_diffusers(tmp_path):
    """`attn.processor.to_q_lora.down` means attn.to_q, `to_out_lora` the first module of to_out."""
    names = ["blocks.0.attn.processor.to_q_lora", "blocks.0.attn.processor.to_out_lora"]
    path = write(tmp_path / "lora.safetensors", "unet.{}.down.weight", "unet.{}.up.weight", names)

    assert set(read_adapter(path).match(SHAPES).layers) == {"blocks.0.attn.to_q", "blocks.0.attn.to_out.0"}


def test_alpha_from_peft_configuration(tmp_path):
    """PEFT's folder: alpha over rank, or over its root, and patterns for the ends of names."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    write(
        folder / "adapter_model.safetensors", "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"
    )
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "alpha_pattern": {"ff_net.up": 2}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    scales = {name: delta.scale for name, delta in read_adapter(folder).match(SHAPES).layers.items()}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    rooted = {name: delta.scale for name, delta in read_adapter(folder).match(SHAPES).layers.items()}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "OFT"}))

    assert list(scales.values()) == [2.0, 2.0, 0.5]
    assert list(rooted.values()) == [4.0, 4.0, 1.0]
    with pytest.raises(UnsupportedError, match="is OFT"):
        read_adapter(folder)


def test_alpha_from_the_header_of_diffusers(tmp_path):
    """The configuration in a header of diffusers decides the scale; without any, a note says what counts."""
    about = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 12, "transformer.r": RANK})}
    keys = ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight")
    with_header = read_adapter(write(tmp_path / "a.safetensors", *keys, metadata=about))
    without = read_adapter(write(tmp_path / "b.safetensors", *keys))

    assert {delta.scale for delta in with_header.layers.values()} == {3.0}
    assert {delta.scale for delta in without.layers.values()} == {1.0}
    assert with_header.notes == ()
    assert "alpha" in without.notes[0]


def test_underscores_that_could_mean_two_layers_are_an_error(tmp_path):
    """kohya's underscores hide dots: where two layers read the same, both are named and nothing is guessed."""
    path = write(
        tmp_path / "lora.safetensors", "lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", ["a_b_c"]
    )

    with pytest.raises(CheckpointError, match=r"'lora_unet_a_b_c' could mean 'a\.b_c' or 'a_b\.c'"):
        read_adapter(path).match({"a.b_c": (24, 16), "a_b.c": (24, 16)})


def test_layers_of_a_text_encoder_are_left_over(tmp_path):
    """A file for a whole pipeline fits its denoiser, and its text encoder, each with the other's layers left over."""
    names = ["unet.blocks.0.attn.to_q", "text_encoder.layers.0.mlp"]
    adapter = read_adapter(write(tmp_path / "lora.safetensors", "{}.lora_A.weight", "{}.lora_B.weight", names))

    denoiser = adapter.match(SHAPES)
    text = adapter.match({"layers.0.mlp": (24, 16)})

    assert (list(denoiser.layers), denoiser.unmatched) == (["blocks.0.attn.to_q"], ("text_encoder.layers.0.mlp",))
    assert (list(text.layers), text.unmatched) == (["layers.0.mlp"], ("unet.blocks.0.attn.to_q",))


def test_what_does_not_fit_is_refused_with_names(tmp_path):
    """No layer in common, a layer too many, another shape: errors that name layers; strict=False takes what fits."""
    keys = ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight")
    adapter = read_adapter(write(tmp_path / "lora.safetensors", *keys))

    with pytest.raises(CheckpointError, match="none of its 3 layers"):
        adapter.match({"other": (24, 16)})
    with pytest.raises(CheckpointError, match=r"2 of its 3 layers .*strict=False \(--no-strict\) to use the 1"):
        adapter.match({"blocks.0.attn.to_q": (24, 16)})
    assert list(adapter.match({"blocks.0.attn.to_q": (24, 16)}, strict=False).layers) == ["blocks.0.attn.to_q"]
    with pytest.raises(WeightError, match=r"changes a weight \[24, 16\], but 'blocks.0.attn.to_q' is \[24, 8\]"):
        adapter.match({**SHAPES, "blocks.0.attn.to_q": (24, 8)})


@pytest.mark.parametrize(
    ("key", "method"),
    [
        ("lora_unet_x.oft_blocks", "is OFT"),
        ("base_model.model.x.boft_R", "is BOFT"),
        ("diffusion_model.x.diff", "weights"),
        ("lora_unet_x.on_input.ia3_l", "IA3"),
        ("base_model.model.x.lora_embedding_A.default", "embedding"),
        ("diffusion_model.x.diff_b", "biases"),
    ],
)
def test_other_methods_are_refused_by_their_keys(key, method, tmp_path):
    """An adapter of another method is an error that names the method and the key, before anything is changed."""
    path = tmp_path / "lora.safetensors"
    save_file({key: torch.ones(2, 2)}, path)

    with pytest.raises(UnsupportedError, match=method) as caught:
        read_adapter(path)
    assert key in str(caught.value)


@pytest.mark.parametrize("layer", ["model.diffusion_model.x", "base_model.model.diffusion_model.x", "x.soft_gate"])
def test_names_that_resemble_other_methods_are_read(layer, tmp_path):
    """A ".diffusion_model" is no ".diff", and "soft_gate" no "oft_"."""
    path = tmp_path / "lora.safetensors"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, 3), f"{layer}.lora_B.weight": torch.ones(4, 2)}, path)

    assert list(read_adapter(path).layers) == [layer]


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"x.lora_A.weight": torch.ones(2, 3)}, "without its counterpart"),
        ({"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(4, 5)}, "do not fit"),
        ({"x.weight": torch.ones(2, 3)}, "no LoRA that is known"),
        ({"x.lora_A.weight": torch.ones(2, 3, dtype=torch.int8), "x.lora_B.weight": torch.ones(4, 2)}, "is int8"),
        ({"x.lora_A.a.weight": torch.ones(2, 3), "x.lora_A.b.weight": torch.ones(2, 3)}, "several adapters"),
        ({**PAIR, "x.alpha": torch.tensor(math.nan)}, "no finite number"),
        ({**PAIR, "x.lora_B.weight": torch.ones(0, 2, 1, 1), "x.dora_scale": torch.ones(1)}, "neither of the 0 rows"),
        ({**PAIR, "x.lora_B.weight": torch.ones(1, 2), "x.dora_scale": torch.tensor(1.0)}, "neither of the 1 rows"),
        ({**PAIR, "x.dora_scale": torch.ones(4), "x.lora_magnitude_vector": torch.ones(4)}, "magnitudes twice"),
        ({"x.lokr_w1": torch.ones(2, 2), "x.lokr_w1_a": torch.ones(2, 1), "x.lokr_w2": torch.ones(2, 2)}, "twice"),
        ({**EMPTY_CORES, "x.alpha": torch.tensor(1.0)}, "do not fit"),
    ],
)
def test_broken_files_are_refused(tensors, complaint, tmp_path):
    """Half a pair, factors that do not fit, no LoRA at all, integers, two adapters in one file: each is said."""
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)

    with pytest.raises(CheckpointError, match=complaint):
        read_adapter(path)


def test_combined_adapters_add_up():
    """Several adapters with their strengths become one whose change is the sum."""
    first, second = LoraDelta(*factors(0), scale=0.5), LoraDelta(*factors(1))
    both = combined([({"a": first}, 2.0), ({"a": second, "b": second}, -0.5)])

    torch.testing.assert_close(both["a"].dense(), first.dense(2.0) + second.dense(-0.5))
    torch.testing.assert_close(both["b"].dense(), second.dense(-0.5))


def test_parts_of_fused_projections_are_put_together(tmp_path):
    """q, k and v of an adapter change their own rows of a fused weight; a part that is absent leaves its rows alone."""
    names = ["attn.to_q", "attn.to_v"]
    for pattern in ("transformer.{}", "lora_unet_{}"):
        spelled = [name.replace(".", "_") if "_{" in pattern else name for name in names]
        path = write(tmp_path / "lora.safetensors", pattern + ".lora_down.weight", pattern + ".lora_up.weight", spelled)
        matched = read_adapter(path).match({"attn.to_qkv": (64, 16)})
        (first, up_first), (second, up_second) = factors(0), factors(1)

        expected = torch.cat([up_first @ first, torch.zeros(16, 16), up_second @ second])
        torch.testing.assert_close(matched.layers["attn.to_qkv"].dense(), expected)
        assert matched.unmatched == ()
    with pytest.raises(WeightError, match=r"do not fit the fused weight \[40, 16\]"):
        read_adapter(path).match({"attn.to_qkv": (40, 16)})
