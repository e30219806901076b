"""Pipelines of diffusers whose models have lowbit's weights, those of transformers included."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", "0.42", reason="needs diffusers 0.42")
pytest.importorskip("accelerate", reason="diffusers loads quantized models with accelerate")
pytest.importorskip("transformers", "5.0", reason="pipelines of diffusers hold models of transformers 5")

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, PipelineQuantizationConfig
from transformers import CLIPTextConfig, CLIPTextModel

from lowbit.integrations import transformers as in_transformers
from lowbit.integrations.diffusers import LowbitConfig
from lowbit.layer_kinds import quantized_layers
from tests.support.same_weights import assert_same_weights
from tests.support.tiny_diffusers import answer, flux

ABSENT = dict.fromkeys(["vae", "tokenizer", "tokenizer_2", "text_encoder_2"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a pipeline with a tiny FLUX and a tiny text encoder."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, CLIPTextModel(config), None, None, None, flux())
    target = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(target)
    return target


def load(folder, **options):
    """The pipeline of a folder, in bfloat16."""
    return FluxPipeline.from_pretrained(folder, dtype=torch.bfloat16, **ABSENT, **options)


def counts(pipeline):
    """How many layers of the transformer and of the text encoder are quantized, by format."""
    models = (pipeline.transformer, pipeline.text_encoder)
    return [{layer.weight.format.name for _, layer in quantized_layers(model)} for model in models]


@pytest.mark.parametrize("encoder", [LowbitConfig("int8"), in_transformers.LowbitConfig("int8"), None])
def test_a_mapping_of_configs(folder, encoder, tmp_path):
    """Each model gets the format it is given; our config serves both libraries; saved and loaded, all is the same."""
    mapping = {"transformer": LowbitConfig("awq_w4a16"), **({"text_encoder": encoder} if encoder else {})}
    pipeline = load(folder, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping))
    pipeline.save_pretrained(tmp_path)
    again = load(tmp_path)

    assert counts(pipeline) == [{"awq_w4a16"}, {"int8"} if encoder else set()]
    assert_same_weights(pipeline.transformer, again.transformer)
    if encoder:
        assert_same_weights(pipeline.text_encoder, again.text_encoder)


@pytest.mark.parametrize("components", [None, ["transformer"]])
def test_one_backend_for_all(folder, components):
    """The short form, a backend and its arguments, quantizes all models or those that it names."""
    arguments = {"format": "awq_w4a16", "modules_to_not_convert": ["proj_mlp"]}
    config = PipelineQuantizationConfig(
        quant_backend="lowbit", quant_kwargs=arguments, components_to_quantize=components
    )
    pipeline = load(folder, quantization_config=config)

    assert counts(pipeline) == [{"awq_w4a16"}, set() if components else {"awq_w4a16"}]
    assert "single_transformer_blocks.0.proj_mlp" not in dict(quantized_layers(pipeline.transformer))
    assert "awq_w4a16" in repr(config)


def test_a_pipeline_makes_images_and_takes_lora(folder):
    """A few steps give finite latents, and a LoRA loaded into the pipeline changes them in proportion to its scale."""
    mapping = {"transformer": LowbitConfig("nvfp4")}
    pipeline = load(folder, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping))
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        prompt_embeds=torch.randn(1, 5, 64).bfloat16(),
        pooled_prompt_embeds=torch.randn(1, 64).bfloat16(),
        num_inference_steps=2,
        height=64,
        width=64,
        output_type="latent",
    ).images
    assert latents.shape == (1, 16, 64)
    assert latents.isfinite().all()

    weight = pipeline.transformer.transformer_blocks[0].attn.to_q.weight
    name = "transformer.transformer_blocks.0.attn.to_q"
    down, up = torch.randn(4, weight.shape[1]) * 0.2, torch.randn(weight.shape[0], 4) * 0.2
    before = answer(pipeline.transformer)
    pipeline.load_lora_weights({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, adapter_name="style")
    beside = answer(pipeline.transformer)
    pipeline.set_adapters("style", 0.0)

    assert not torch.equal(beside, before)
    assert torch.equal(answer(pipeline.transformer), before)
