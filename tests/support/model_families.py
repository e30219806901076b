"""The tensors of real model families by name, and what `ctq` keeps of them.

A line is a verdict and a layer: K kept, Q quantized, - not judged (it depends on the block's number). "#" stands for
the number of a block; "{a,b}" for each of a and b. A layer whose name begins with "=" is a whole key; the others are
weights. Names are those of the published checkpoints: "original" as the authors and ComfyUI have them, "diffusers".
"""

from __future__ import annotations

import re
from itertools import product

from .diffusion_families import DIFFUSION_FAMILIES
from .text_families import TEXT_FAMILIES

# family -> style -> lines
FAMILIES = DIFFUSION_FAMILIES | TEXT_FAMILIES


def tensors_of(text: str, blocks: int = 5) -> dict[str, tuple[str, str]]:
    """Every key that the lines describe at this depth, with its layer and its verdict; an earlier line wins."""
    tensors: dict[str, tuple[str, str]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        verdict, name = line.split(" ", 1)
        parts = [part.split(",") for part in re.split(r"[{}]", name)]
        for choice in map("".join, product(*parts)):
            for number in range(blocks if "#" in choice else 1):
                layer = choice.replace("#", str(number)).removeprefix("=")
                tensors.setdefault(layer if choice.startswith("=") else f"{layer}.weight", (layer, verdict))
    return tensors


# What `ctq` 1.3.4 keeps, by parts of names (its own list for all models, then its list for each family).
_KEPT_BY_CTQ = {
    "base": "norm bias embed_tokens lm_head shared patch_embedding ref_conv control_adapter motion_encoder.enc.net_app "
    "face_encoder.conv pose_patch_embedding motion_encoder.enc.fc img_emb.proj k_norm q_norm motion_encoder.dec "
    "head.modulation casual_audio_encoder cond_encoder frame_packer norm_k norm_q tekken_model multi_modal_projector "
    "patch_conv ln_pre input_layernorm attention_norm post_attention_layernorm mm_input_projection_weight",
    "gemma4": "audio per_layer_input_gate per_layer_projection vision multi_modal_projector",
    "qwen35": ".layers.0. lm_head embed_tokens in_proj_a in_proj_b visual. mtp.",
    "visual": "mlp.down_proj mlp.up_proj mlp.gate_proj",
    "anima": "net.blocks.0. net.blocks.1.adaln_modulation final_layer llm_adapter t_embedder x_embedder",
    "lens": "time_text_embed img_in norm_out proj_out img_mod.1 txt_mod.1 txt_in",
    "flux2": "stream_modulation guidance_in time_in final_layer img_in txt_in",
    "distillation_large": "distilled_guidance_layer final_layer img_in txt_in",
    "distillation_small": "distilled_guidance_layer",
    "nerf_large": "distilled_guidance_layer nerf_blocks nerf_image_embedder txt_in _attn.proj",
    "nerf_small": "distilled_guidance_layer nerf_blocks nerf_image_embedder",
    "radiance": "img_in_patch nerf_final_layer_conv __x0__",
    "krea2": "firs las tml txtfusion last.modulatio tpro",
    "ideogram4": "embed_image_indicator t_embedding llm_cond_proj adaln_proj final_layer input_proj",
    "wan": "text_embedding time_embedding casual_audio_encoder frame_packer trainable_cond_mask cond_encoder "
    "time_projection head.head face_encoder.out_proj face_adapter audio_injector",
    "hunyuan": "layernorm img_attn_k_norm img_attn_q_norm txt_attn_k_norm txt_attn_q_norm norm1 norm2 vision_in.proj.0 "
    "vision_in.proj.4 img_in.proj cond_type_embedding",
    "qwen": "norm_added_k norm_added_q norm_k norm_q txt_norm time_text_embed img_in norm_out proj_out "
    "transformer_blocks.0.img_mod.1 txt_in",
    "zimage": "cap_embedder.0 cap_pad_token attention_norm1 attention_norm2 ffn_norm1 ffn_norm2 k_norm q_norm "
    "x_pad_token x_embedder clip_text_pooled_proj final_layer cap_embedder.1 adaLN_modulation t_embedder "
    "time_text_embed",
    "zimage_refiner": "cap_embedder.0 attention_norm1 ffn_norm1 k_norm q_norm context_refiner noise_refiner",
    "boogu": "image_index_embedding ref_image_patch_embedder time_caption_embed x_embedder norm_out.linear_1 "
    "norm_out.linear_2",
    "ltxv2": "scale_shift_table text_embedding_projection audio_vae audio_embeddings_connector adaln_single "
    "audio_patchify_proj audio_proj_out patchify_proj proj_out transformer_blocks.0. transformer_blocks.1. "
    "transformer_blocks.46. transformer_blocks.47. video_embeddings_connector vae.decoder vae.encoder vocoder "
    "to_gate_logits",
    "minimaxh3": "audio_patch_proj condition_proj final_layer time_embedder token_refiner video_patch_proj",
}
KEPT_BY_CTQ = {family: names.split() for family, names in _KEPT_BY_CTQ.items()}
