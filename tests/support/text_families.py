"""The layers of text and vision models by name, written down by hand, with what has to become of each.

A line is a verdict and a layer; `model_families.py` says how to read it.
"""

from __future__ import annotations

_LANGUAGE = """
{1} {0}layers.#.self_attn.{{q_proj,k_proj,v_proj,o_proj}}
{1} {0}layers.#.mlp.{{gate_proj,up_proj,down_proj}}
K {0}layers.#.{{input_layernorm,post_attention_layernorm}}
K {0}{{embed_tokens,norm}}
"""
_QWEN_VISION = """
K visual.patch_embed.proj
K visual.blocks.#.{attn.qkv,attn.proj,norm1,norm2}
K visual.blocks.#.mlp.{gate_proj,up_proj,down_proj}
K visual.merger.{ln_q,mlp.0,mlp.2}
"""
_BERT = """
Q embeddings.word_embeddings
K embeddings.{position_embeddings,token_type_embeddings,LayerNorm}
Q encoder.layer.#.attention.{self.query,self.key,self.value,output.dense}
Q encoder.layer.#.{intermediate.dense,output.dense}
K encoder.layer.#.{attention.output.LayerNorm,output.LayerNorm}
K pooler.dense
"""
# family -> style -> lines
TEXT_FAMILIES: dict[str, dict[str, str]] = {
    "t5xxl": {
        "encoder": """
            K {shared,encoder.embed_tokens,encoder.final_layer_norm}
            Q encoder.block.#.layer.0.SelfAttention.{q,k,v,o}
            K encoder.block.0.layer.0.SelfAttention.relative_attention_bias
            Q encoder.block.#.layer.1.DenseReluDense.{wi_0,wo}
            Q encoder.block.#.layer.1.DenseReluDense.wi_1
            K encoder.block.#.layer.{0,1}.layer_norm
            K encoder.block.23.layer.1.DenseReluDense.wi_1""",
        "whole": """
            K {shared,encoder.embed_tokens,decoder.embed_tokens,lm_head}
            Q {encoder,decoder}.block.#.layer.0.SelfAttention.{q,k,v,o}
            Q decoder.block.#.layer.1.EncDecAttention.{q,k,v,o}
            Q encoder.block.#.layer.1.DenseReluDense.{wi_0,wo}""",
        "umt5 of wan": """
            K {token_embedding,norm}
            Q blocks.#.{attn.q,attn.k,attn.v,attn.o,ffn.gate.0,ffn.fc1,ffn.fc2}
            K blocks.#.{norm1,norm2,pos_embedding.embedding}""",
    },
    "bert": {"model": _BERT},
    "clip": {
        "transformers": """
            K text_model.embeddings.{token_embedding,position_embedding}
            K {text_projection,text_model.final_layer_norm}
            Q text_model.encoder.layers.#.self_attn.{q_proj,k_proj,v_proj,out_proj}
            Q text_model.encoder.layers.#.mlp.{fc1,fc2}
            K text_model.encoder.layers.#.layer_norm{1,2}""",
        "open_clip": """
            K {token_embedding,ln_final}
            K ={positional_embedding,text_projection,logit_scale}
            - =transformer.resblocks.#.attn.in_proj_weight
            Q transformer.resblocks.#.{attn.out_proj,mlp.c_fc,mlp.c_proj}
            K transformer.resblocks.#.ln_{1,2}""",
    },
    "gpt_oss": {
        "transformers": """
            Q model.layers.#.self_attn.{q_proj,k_proj,v_proj,o_proj}
            - =model.layers.#.self_attn.sinks
            Q =model.layers.#.mlp.experts.{gate_up_proj,down_proj}
            K =model.layers.#.mlp.experts.gate_up_proj_bias
            K model.layers.#.mlp.router
            K model.layers.#.{input_layernorm,post_attention_layernorm}
            K {lm_head,model.embed_tokens,model.norm}""",
        "published": """
            Q model.layers.#.self_attn.{q_proj,k_proj,v_proj,o_proj}
            - =model.layers.#.{self_attn.sinks,mlp.experts.gate_up_proj_blocks,mlp.experts.gate_up_proj_scales}
            K model.layers.#.mlp.router
            K {lm_head,model.embed_tokens,model.norm}""",
    },
    "llama": {
        "transformers": _LANGUAGE.format("model.", "Q") + "K lm_head\nK model.layers.#.self_attn.{q_norm,k_norm}",
        "experts": _LANGUAGE.format("model.", "Q")
        + """
            K model.layers.#.mlp.gate
            Q model.layers.#.mlp.experts.0.gate_proj""",
        "original": """
            K {tok_embeddings,output,norm}
            Q layers.#.{attention.wq,attention.wk,attention.wv,attention.wo,feed_forward.w1,feed_forward.w2}
            K layers.#.{attention_norm,ffn_norm}""",
        "gemma 3 that sees": _LANGUAGE.format("model.language_model.", "Q")
        + """
            K =model.multi_modal_projector.mm_input_projection_weight
            K model.vision_tower.{embeddings.patch_embedding,encoder.layers.#.self_attn.q_proj}""",
    },
    "mistral": {
        "comfy": _LANGUAGE.format("model.", "Q") + "K =tekken_model",
        "transformers": _LANGUAGE.format("language_model.model.", "Q")
        + """
            K language_model.lm_head
            K multi_modal_projector.{linear_1,linear_2,patch_merger.merging_layer,norm}
            K vision_tower.{patch_conv,ln_pre,transformer.layers.#.attention_norm}
            Q vision_tower.transformer.layers.#.attention.q_proj""",
    },
    "gemma4": {
        "transformers": _LANGUAGE.format("model.language_model.", "Q")
        + """
            K model.language_model.{embed_tokens_per_layer,per_layer_projection_norm}
            K model.language_model.layers.#.{per_layer_input_gate,per_layer_projection,post_per_layer_input_norm}
            K =model.language_model.layers.#.layer_scalar
            K model.audio_tower.{output_proj,layers.#.self_attn.q_proj.linear,layers.#.feed_forward1.ffw_layer_1.linear}
            K model.vision_tower.{patch_embedder.input_proj,encoder.layers.#.mlp.up_proj.linear}
            K model.{embed_vision,embed_audio}.embedding_projection
            K lm_head"""
    },
    "qwen_vlm": {
        "qwen 2.5 vl": _LANGUAGE.format("model.", "-") + _QWEN_VISION + "K lm_head",
        "qwen 3 vl": _LANGUAGE.format("model.language_model.", "-")
        + """
            K model.visual.{pos_embed,blocks.#.mlp.linear_fc1,deepstack_merger_list.#.linear_fc1}
            K lm_head""",
        "qwen 3.5 text": _LANGUAGE.format("model.language_model.", "-")
        + """
            - model.language_model.layers.#.linear_attn.{out_proj,in_proj_qkv,in_proj_z}
            K model.language_model.layers.#.linear_attn.{in_proj_a,in_proj_b}
            K mtp.{fc,layers.0.mlp.up_proj}""",
    },
    "visual": {
        "qwen 2.5 vl": "Q visual.blocks.#.{attn.qkv,attn.proj}\n" + _QWEN_VISION,
        "pixtral": """
            K {patch_conv,ln_pre}
            Q transformer.layers.#.attention.{q_proj,k_proj,v_proj,o_proj}
            K transformer.layers.#.feed_forward.{gate_proj,up_proj,down_proj}""",
        "siglip": """
            K vision_model.embeddings.{patch_embedding,position_embedding}
            Q vision_model.encoder.layers.#.{self_attn.q_proj,self_attn.k_proj,self_attn.out_proj,mlp.fc1,mlp.fc2}""",
    },
}
