"""Every model family is recognized by its names alone, keeps what it has to, and keeps nothing by accident."""

from __future__ import annotations

import json
import re

import pytest

from lowbit.checkpoint.presets import GENERIC, Preset, detect_preset, get_preset, presets
from lowbit.checkpoint.presets.registry import read_family
from lowbit.errors import PlanError
from tests.support.model_families import FAMILIES, KEPT_BY_CTQ, tensors_of

STYLES = [(family, style) for family, styles in FAMILIES.items() for style in styles]
BY_NAME_ONLY = {"chroma_small", "generic", "generic_text", "nerf_large", "nerf_small", "zimage_refiner"}
# The same weights as another family's, of which more or fewer are kept.
SAME_KEYS = {
    "distillation_small": "chroma",
    "nerf_large": "radiance",
    "nerf_small": "radiance",
    "zimage_refiner": "zimage",
}
# Layers that a part of a name of ctq's hits by accident, or that ctq keeps in only some formats.
BY_ACCIDENT = re.compile(
    r"(^|\.)norm1(_context)?\.linear$"  # adaptive norms: large modulation weights, which other names of FLUX quantize
    r"|(^|\.)norm\.linear$"  # the same of the single blocks
    r"|^single_transformer_blocks\.\d+\.proj_out$"  # "proj_out" means the model's last layer
)


def bound(family: str, style: str, prefix: str = "", blocks: int = 5):
    """The family fitted to a checkpoint of this style, and its tensors."""
    tensors = {
        prefix + key: (prefix + layer, verdict) for key, (layer, verdict) in lines(family, style, blocks).items()
    }
    return presets()[family].bind(tensors), tensors


def lines(family: str, style: str, blocks: int = 5):
    """The tensors of one style of a family."""
    return tensors_of(FAMILIES[family][style], blocks)


def actions(preset, layers):
    """What the preset decides, layer by layer."""
    return {layer: preset.decide(layer).action for layer in layers}


@pytest.mark.parametrize(("family", "style"), STYLES)
def test_a_family_is_recognized_and_no_other_matches(family, style):
    """A family's names are recognized as that family, with and without each of its prefixes, and match no other."""
    for prefix in ("", *presets()[family].prefixes):
        keys = [prefix + key for key in lines(family, style)]

        assert detect_preset(keys) is presets()[family]
        assert [name for name, preset in presets().items() if preset.find_prefix(keys) is not None] == [family]
        assert presets()[family].bind(keys).prefix == prefix


@pytest.mark.parametrize(("family", "style"), STYLES)
def test_layers_are_decided_as_written_down(family, style):
    """Every layer of a family is kept or quantized as its list says, whatever stands before its name."""
    for prefix in ("", *presets()[family].prefixes[:1]):
        preset, tensors = bound(family, style, prefix)
        wanted = {layer: verdict for layer, verdict in tensors.values() if verdict != "-"}
        got = {layer: {"keep": "K", "quantize": "Q"}[action] for layer, action in actions(preset, wanted).items()}

        assert got == wanted


def test_every_family_is_tested_or_has_to_be_asked_for():
    """Each family that is recognized has a list of names here, and the others are never recognized."""
    silent = {name for name, preset in presets().items() if not preset.detect_all}

    assert silent == BY_NAME_ONLY
    assert set(FAMILIES) == presets().keys() - BY_NAME_ONLY


@pytest.mark.parametrize("family", sorted(KEPT_BY_CTQ.keys() - {"base"}))
def test_what_ctq_keeps_is_kept(family):
    """A linear that ctq keeps by a part of its name is kept here too, but for the names it hits by accident."""
    preset = get_preset(family)
    checked = 0
    for text in FAMILIES[SAME_KEYS.get(family, preset.name)].values():
        tensors = tensors_of(text, 48 if family == "ltxv2" else 5)
        fitted = preset.bind(tensors)
        parts = [part.removeprefix("net.") for part in KEPT_BY_CTQ[family]] + KEPT_BY_CTQ["base"]
        for layer, _ in tensors.values():
            if any(part in layer + "." for part in parts) and not BY_ACCIDENT.search(layer):
                checked += 1
                assert fitted.decide(layer).action == "keep", layer

    assert checked > 3


@pytest.mark.parametrize("depth", [28, 48, 3])
def test_the_edges_of_ltx_move_with_its_depth(depth):
    """The first two and the last two blocks of LTX-2 are kept at any depth, and no other block."""
    preset, _ = bound("ltxv2", "original", "model.diffusion_model.", depth)
    kept = {
        i
        for i in range(depth)
        if preset.decide(f"model.diffusion_model.transformer_blocks.{i}.attn1.to_q").action == "keep"
    }

    assert kept == {0, 1, depth - 2, depth - 1}
    last = preset.decide(f"model.diffusion_model.transformer_blocks.{depth - 1}.ff.net.2")
    assert last.why == f"Block {depth - 1} is one of the last 2 of {depth} blocks, which stay in high precision."


@pytest.mark.parametrize(("style", "root"), [("qwen 2.5 vl", "model."), ("qwen 3.5 text", "model.language_model.")])
@pytest.mark.parametrize("depth", [28, 64])
def test_the_edges_of_qwen_move_with_its_depth(style, root, depth):
    """The first and the last language layer of a Qwen model are kept at any depth, and no other."""
    preset, _ = bound("qwen_vlm", style, blocks=depth)
    kept = {i for i in range(depth) if preset.decide(f"{root}layers.{i}.mlp.up_proj").action == "keep"}

    assert kept == {0, depth - 1}


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("krea2", "blocks.0.attn.last_proj"),  # "las"
        ("krea2", "blocks.0.class_embedding"),
        ("krea2", "blocks.0.first_stage.up"),  # "firs"
        ("krea2", "blocks.2.htmlmix.up"),  # "tml"
        ("flux", "double_blocks.0.last_proj"),
        ("llama", "model.layers.0.shared_mlp.up_proj"),  # "shared"
        ("llama", "model.layers.0.mlp.shared_experts.up_proj"),
        ("llama", "model.layers.0.mlp.normalizer_proj"),  # "norm"
        ("llama", "model.layers.0.self_attn.unbiased"),  # "bias"
        ("t5xxl", "encoder.block.0.layer.1.shared_mlp"),
        ("flux", "single_transformer_blocks.3.proj_out"),  # "proj_out" means the model's last layer
        ("wan", "blocks.0.head.headroom"),
        ("qwen_image", "transformer_blocks.10.img_mod.1"),  # ".0.img_mod"
        ("anima", "blocks.10.mlp.layer1"),
        ("ltxv2", "transformer_blocks.10.attn1.to_q"),
        ("gemma4", "model.language_model.layers.0.self_attn.supervision_proj"),  # "vision"
        ("generic", "blocks.0.first_stage.last_proj"),
    ],
)
def test_a_part_of_a_name_is_not_the_name(family, layer):
    """A layer whose name only contains a kept name is quantized."""
    preset = presets()[family].bind([key for text in FAMILIES.get(family, {}).values() for key in tensors_of(text, 30)])

    assert preset.decide(layer).action == "quantize"


def test_unknown_names_are_no_family():
    """Names of no known model, other parts of pipelines and no names at all are not recognized."""
    vae = ["decoder.conv_in.weight", "decoder.up.0.block.0.conv1.weight", "encoder.mid.attn_1.q.weight"]
    lora = [
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
        "double_blocks.0.img_attn.qkv.lora_up.weight",
    ]

    for keys in ([], ["a.weight", "blocks.0.up.weight"], vae, [f"first_stage_model.{key}" for key in vae], lora):
        assert detect_preset(keys) is None


def test_the_order_of_the_names_does_not_matter():
    """A model is recognized from its keys in reverse, from a generator of them, and from its later blocks alone."""
    keys = list(lines("flux", "diffusers", 19))
    later = [key for key in keys if not re.search(r"blocks\.[0-5]\.", key)]

    assert (
        detect_preset(reversed(keys)) is detect_preset(key for key in keys) is detect_preset(later) is presets()["flux"]
    )


def test_a_file_with_several_models_is_the_largest_and_keeps_the_rest():
    """In a file of several models the one with most tensors is described, and the others' layers are kept."""
    keys = ["model.diffusion_model." + key for key in lines("sdxl", "original", 10)]
    keys += ["conditioner.embedders.0.transformer." + key for key in lines("clip", "transformers", 2)]
    keys += ["text_encoder." + key for key in lines("clip", "transformers", 2)]
    keys += ["first_stage_model.decoder.mid.attn_1.q.weight"]
    preset = detect_preset(keys)
    assert preset is presets()["sdxl"]

    decision = preset.bind(keys).decide("text_encoder.text_model.encoder.layers.0.mlp.fc1")
    assert (decision.action, decision.why) == ("keep", "It is no part of the model that the preset sdxl describes.")
    assert preset.bind(keys).decide("first_stage_model.decoder.mid.attn_1.q").action == "keep"
    assert (
        preset.bind(keys).decide("model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.2").action
        == "quantize"
    )


def test_the_decoder_of_t5_is_dropped_only_on_demand():
    """T5's decoder and head are quantized or kept with a remark, and dropped only where that is allowed."""
    keys = list(lines("t5xxl", "whole"))
    decoder, head = "decoder.block.0.layer.0.SelfAttention.q", "lm_head"
    careful, allowed = presets()["t5xxl"].bind(keys), presets()["t5xxl"].bind(keys, allow_drop=True)

    assert actions(careful, [decoder, head]) == {decoder: "quantize", head: "keep"}
    assert careful.decide(decoder).why.endswith("It could be dropped: A text encoder never runs T5's decoder.")
    assert actions(allowed, [decoder, head]) == {decoder: "drop", head: "drop"}
    assert allowed.decide("decoder.block.0.layer.0.SelfAttention.q.bias").action == "drop"
    assert allowed.decide("encoder.block.0.layer.0.SelfAttention.q").action == "quantize"


@pytest.mark.parametrize(
    ("family", "style", "tables"),
    [
        ("bert", "model", {"word_embeddings", "position_embeddings", "token_type_embeddings"}),
        ("llama", "transformers", {"embed_tokens"}),
        ("t5xxl", "encoder", {"shared", "embed_tokens", "relative_attention_bias"}),
        ("clip", "transformers", {"token_embedding", "position_embedding"}),
        ("gemma4", "transformers", {"embed_tokens", "embed_tokens_per_layer"}),
        ("ideogram4", "original", {"embed_image_indicator"}),
        ("flux", "original", set()),
    ],
)
def test_tables_are_told_from_linears(family, style, tables):
    """The tables whose rows are looked up are exactly those of the model."""
    preset, tensors = bound(family, style)

    assert {layer.rpartition(".")[2] for layer, _ in tensors.values() if preset.is_embedding(layer)} == tables


@pytest.mark.parametrize(
    ("family", "style", "layers"),
    [
        ("qwen_image", "original", {"transformer_blocks.#.img_mlp.net.2", "transformer_blocks.#.txt_mlp.net.2"}),
        ("flux", "original", {"double_blocks.#.img_mlp.2", "double_blocks.#.txt_mlp.2"}),
        ("flux", "diffusers", {"transformer_blocks.#.ff.net.2", "transformer_blocks.#.ff_context.net.2"}),
        ("flux2", "original", set()),  # gated
        ("zimage", "original", set()),  # gated
        ("wan", "original", {"blocks.#.ffn.2"}),
        ("wan", "diffusers", {"blocks.#.ffn.net.2"}),
        ("sd3", "original", {"joint_blocks.#.x_block.mlp.fc2", "joint_blocks.#.context_block.mlp.fc2"}),
    ],
)
def test_layers_that_read_what_a_gelu_gave_are_known(family, style, layers):
    """The last linears of plain MLPs with a GELU follow one, those of gated ones and all other layers do not."""
    preset, tensors = bound(family, style, "".join(presets()[family].prefixes[:1]))
    names = {layer.removeprefix(preset.prefix) for layer, _ in tensors.values() if preset.follows_gelu(layer)}

    assert {re.sub(r"(?<=\.)\d+(?=\.(?!weight))", "#", name, count=1) for name in names} == layers


def test_a_family_is_found_by_name_and_by_alias():
    """Names and aliases give the family; the error for any other name lists the names."""
    assert get_preset("qwen") is get_preset("qwen_image") is presets()["qwen_image"]
    assert all(get_preset(name).name in presets() for name in KEPT_BY_CTQ if name != "base")
    assert {name: get_preset(name).name for name in ("t5xxl", "mistral", "generic_text")} == {
        name: name for name in ("t5xxl", "mistral", "generic_text")
    }
    assert list(presets()) == sorted(presets())
    with pytest.raises(
        PlanError, match=r"unknown preset 'flux3'; use auto, none or one of: anima, bert, .*zimage_refiner"
    ):
        get_preset("flux3")


def test_a_head_beside_the_wrapped_model_is_kept():
    """BERT inside of a larger model is described there, and the head that stands beside it has its own reason."""
    keys = [f"bert.{key}" for key in lines("bert", "model")] + ["cls.predictions.decoder.weight"]
    preset = presets()["bert"].bind(keys)

    assert (detect_preset(keys), preset.prefix) == (presets()["bert"], "bert.")
    assert (
        preset.decide("cls.predictions.decoder").why
        == "It is the head of the model, where an error changes the answer."
    )
    assert preset.is_embedding("bert.embeddings.word_embeddings")


def test_generic_keeps_the_ways_in_and_out():
    """Where no family is known, norms, tables, embedders and heads are kept and the rest is quantized."""
    keys = ["img_in", "final_layer.linear", "blocks.0.norm", "blocks.0.attn.qkv", "t_embedder.mlp.0", "embed_tokens"]
    for prefix in ("", "model.diffusion_model."):
        preset = GENERIC.bind([f"{prefix}{key}.weight" for key in keys])

        assert [preset.decide(prefix + key).action for key in keys] == [
            "keep",
            "keep",
            "keep",
            "quantize",
            "keep",
            "keep",
        ]
    assert presets()["generic"] == GENERIC


@pytest.mark.parametrize("preset", presets().values(), ids=presets().keys())
def test_a_family_is_well_formed(preset: Preset):
    """Every pattern compiles and is tied to a name's start, end or dots; every reason is a sentence."""
    rules = (*preset.keep, *preset.drop)
    edges = [edge.pattern for edge in (preset.keep_first_blocks, preset.keep_last_blocks) if edge]

    for pattern in (
        *preset.detect_all,
        *preset.detect_none,
        *preset.embedding,
        *preset.bank_transposed,
        *preset.after_gelu,
        *(rule.pattern for rule in rules),
        *edges,
    ):
        re.compile(pattern)
        assert re.match(r"\^|\(\?:\^\||\(\?i:\(\?:\^\||\\\.", pattern), pattern
    assert all(re.fullmatch(r"[A-Z][^.]*(\w\.\d[^.]*)?\.", rule.why) and rule.why.count(" ") > 3 for rule in rules)
    assert all(re.compile(pattern).groups == 1 for pattern in edges)
    assert preset.title[0].isupper()
    assert all(prefix.endswith(".") for prefix in preset.prefixes)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kep": []}, "unknown field kep; the fields are after_gelu, aliases, bank_transposed"),
        ({"detect": {"all": []}}, "detect: misses none"),
        ({"keep": [{"pattern": "^a$"}]}, "keep: misses why"),
        ({"keep": ["^a$"]}, "keep: expected an object"),
        ({"prefixes": "model."}, "prefixes: expected a list"),
        ({"keep_last_blocks": {"pattern": "^(a)", "count": 0}}, "keep_last_blocks: count is 0"),
        ({"title": 3}, "title: expected a text, found 3"),
    ],
)
def test_a_wrong_file_is_refused_by_field(tmp_path, change, complaint):
    """A family's file with an unknown, missing or mistaken field is an error that names the file and the field."""
    path = tmp_path / "f.json"
    path.write_text(json.dumps({"name": "f", "title": "F", "detect": {"all": [], "none": []}, **change}))

    with pytest.raises(PlanError, match=rf"f\.json.*{complaint}"):
        read_family(path)
