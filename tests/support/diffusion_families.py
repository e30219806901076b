"""The layers of diffusion models by name, written down by hand, with what has to become of each.

A line is a verdict and a layer; `model_families.py` says how to read it.
"""

from __future__ import annotations

_FLUX_DIFFUSERS_ATTENTION = """
Q transformer_blocks.#.attn.{to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out}
K transformer_blocks.#.attn.{norm_q,norm_k,norm_added_q,norm_added_k}
"""
_FLUX_DIFFUSERS = f"""{_FLUX_DIFFUSERS_ATTENTION}
Q transformer_blocks.#.{{ff,ff_context}}.net.{{0.proj,2}}
Q single_transformer_blocks.#.{{proj_mlp,proj_out,attn.to_q,attn.to_k,attn.to_v}}
K single_transformer_blocks.#.attn.{{norm_q,norm_k}}
"""
_FLUX_BLOCKS = """
Q double_blocks.#.{img,txt}_attn.{qkv,proj}
K =double_blocks.#.{img,txt}_attn.norm.{key,query}_norm.scale
Q double_blocks.#.{img,txt}_mlp.{0,2}
Q single_blocks.#.{linear1,linear2}
K =single_blocks.#.norm.{key,query}_norm.scale
"""
_RADIANCE = f"""{_FLUX_BLOCKS}
K {{img_in_patch,txt_in}}
K distilled_guidance_layer.{{in_proj,out_proj,layers.#.in_layer,layers.#.out_layer}}
K nerf_blocks.#.param_generator
K nerf_image_embedder.embedder.0
K nerf_final_layer_conv.conv
K =__x0__
"""
_UNET_HEAD = """
Q {0}.transformer_blocks.#.{{attn1,attn2}}.{{to_q,to_v,to_out.0}}
Q {0}.transformer_blocks.#.attn1.to_k
- {0}.transformer_blocks.#.attn2.to_k
Q {0}.transformer_blocks.#.ff.net.{{0.proj,2}}
K {0}.transformer_blocks.#.{{norm1,norm2,norm3}}
K {0}.{{norm,proj_in,proj_out}}
"""
_UNET = """
K input_blocks.0.0
K time_embed.{0,2}
K input_blocks.4.0.emb_layers.1
K middle_block.0.emb_layers.1
- middle_block.0.in_layers.2
K out.2
""" + "".join(_UNET_HEAD.format(where) for where in ("input_blocks.4.1", "middle_block.1", "output_blocks.2.1"))
_UNET_DIFFUSERS = """
K {conv_in,conv_out}
K time_embedding.linear_{1,2}
K down_blocks.1.resnets.0.time_emb_proj
K mid_block.resnets.0.time_emb_proj
- mid_block.resnets.0.conv1
""" + "".join(
    _UNET_HEAD.format(where)
    for where in ("down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.1")
)
_WAN_FACE = """
K face_adapter.fuser_blocks.#.{linear1_kv,linear1_q,linear2,q_norm}
K face_encoder.{conv1_local.conv,conv2.conv,out_proj}
K motion_encoder.enc.{net_app.convs.0.0,fc.0}
K =motion_encoder.dec.direction.weight
K pose_patch_embedding
"""
_WAN = """
K {0}patch_embedding
K {0}{{text_embedding.0,text_embedding.2,time_embedding.0,time_embedding.2,time_projection.1}}
Q {0}blocks.#.{{self_attn,cross_attn}}.{{q,k,v,o}}
K {0}blocks.#.{{self_attn,cross_attn}}.{{norm_q,norm_k}}
K {0}blocks.#.norm3
Q {0}blocks.#.ffn.{{0,2}}
K ={0}blocks.#.modulation
K ={0}head.modulation
K {0}head.head
"""
_LTX_BLOCK = """
- transformer_blocks.#.{attn1,attn2}.{to_q,to_k,to_v,to_out.0}
- transformer_blocks.#.ff.net.{0.proj,2}
K =transformer_blocks.#.scale_shift_table
K =scale_shift_table
K proj_out
"""
_LTX2_BLOCK = """
- transformer_blocks.#.{audio_attn1,audio_attn2,audio_to_video_attn,video_to_audio_attn}.{to_q,to_k,to_v,to_out.0}
K transformer_blocks.#.{attn1,audio_attn1,audio_to_video_attn}.to_gate_logits
- transformer_blocks.#.audio_ff.net.{0.proj,2}
K =transformer_blocks.#.{audio_scale_shift_table,scale_shift_table_a2v_ca_audio}
K audio_proj_out
"""
_Z_IMAGE = """
K {cap_embedder.0,cap_embedder.1,t_embedder.mlp.0,t_embedder.mlp.2}
K ={cap_pad_token,x_pad_token}
Q {layers,noise_refiner,context_refiner}.#.feed_forward.{w1,w2,w3}
K {layers,noise_refiner,context_refiner}.#.{attention_norm1,attention_norm2,ffn_norm1,ffn_norm2}
"""

# family -> style -> lines
DIFFUSION_FAMILIES: dict[str, dict[str, str]] = {
    "flux": {
        "original": f"""{_FLUX_BLOCKS}
            K {{img_in,txt_in}}
            K {{time_in,vector_in,guidance_in}}.{{in_layer,out_layer}}
            Q double_blocks.#.{{img,txt}}_mod.lin
            Q single_blocks.#.modulation.lin
            K final_layer.{{linear,adaLN_modulation.1}}""",
        "diffusers": f"""{_FLUX_DIFFUSERS}
            K {{x_embedder,context_embedder,proj_out,norm_out.linear}}
            K time_text_embed.{{timestep_embedder,text_embedder,guidance_embedder}}.linear_{{1,2}}
            Q transformer_blocks.#.{{norm1,norm1_context}}.linear
            Q single_transformer_blocks.#.norm.linear""",
    },
    "flux2": {
        "original": f"""{_FLUX_BLOCKS}
            K {{img_in,txt_in}}
            K {{time_in,guidance_in}}.{{in_layer,out_layer}}
            K {{double_stream_modulation_img,double_stream_modulation_txt,single_stream_modulation}}.lin
            K final_layer.{{linear,adaLN_modulation.1}}""",
        "diffusers": f"""{_FLUX_DIFFUSERS_ATTENTION}
            Q transformer_blocks.#.{{ff,ff_context}}.{{linear_in,linear_out}}
            Q single_transformer_blocks.#.attn.{{to_qkv_mlp_proj,to_out}}
            K {{x_embedder,context_embedder,proj_out,norm_out.linear}}
            K time_guidance_embed.{{timestep_embedder,guidance_embedder}}.linear_{{1,2}}
            K {{double_stream_modulation_img,double_stream_modulation_txt,single_stream_modulation}}.linear""",
    },
    "chroma": {
        "original": f"""{_FLUX_BLOCKS}
            K {{img_in,txt_in,final_layer.linear}}
            K distilled_guidance_layer.{{in_proj,out_proj,layers.#.in_layer,layers.#.out_layer}}
            K =distilled_guidance_layer.norms.#.scale""",
        "diffusers": f"""{_FLUX_DIFFUSERS}
            K {{x_embedder,context_embedder,proj_out}}
            K distilled_guidance_layer.{{in_proj,out_proj,layers.#.linear_1,layers.#.linear_2,norms.#}}""",
    },
    "radiance": {
        "original": _RADIANCE,
        "linear head": _RADIANCE.replace("nerf_final_layer_conv.conv", "nerf_final_layer.linear"),
    },
    "qwen_image": {
        "original": f"""{_FLUX_DIFFUSERS_ATTENTION}
            K {{img_in,txt_in,txt_norm,proj_out,norm_out.linear}}
            K time_text_embed.{{timestep_embedder.linear_1,timestep_embedder.linear_2,addition_t_embedding}}
            K transformer_blocks.0.img_mod.1
            - transformer_blocks.#.img_mod.1
            Q transformer_blocks.#.txt_mod.1
            Q transformer_blocks.#.{{img,txt}}_mlp.net.{{0.proj,2}}"""
    },
    "lens": {
        "original": """
            K {img_in,txt_in,txt_norm.0,txt_norm.1,proj_out,norm_out.linear}
            K time_text_embed.timestep_embedder.linear_{1,2}
            K transformer_blocks.#.{img,txt}_mod.1
            K transformer_blocks.#.{img,txt}_norm{1,2}
            Q transformer_blocks.#.attn.{img_qkv,txt_qkv,to_out.0,to_add_out}
            K transformer_blocks.#.attn.{norm_q,norm_k,norm_added_q,norm_added_k}
            Q transformer_blocks.#.{img,txt}_mlp.{w1,w2,w3}"""
    },
    "zimage": {
        "original": f"""{_Z_IMAGE}
            K {{x_embedder,final_layer.linear,final_layer.adaLN_modulation.1,clip_text_pooled_proj.1,time_text_embed.1}}
            Q {{layers,noise_refiner,context_refiner}}.#.attention.{{qkv,out}}
            K {{layers,noise_refiner,context_refiner}}.#.attention.{{q_norm,k_norm}}
            K {{layers,noise_refiner}}.#.adaLN_modulation.0""",
        "diffusers": f"""{_Z_IMAGE}
            K {{all_x_embedder.2-1,all_final_layer.2-1.linear,all_final_layer.2-1.adaLN_modulation.1}}
            Q {{layers,noise_refiner,context_refiner}}.#.attention.{{to_q,to_k,to_v,to_out.0}}
            K {{layers,noise_refiner,context_refiner}}.#.attention.{{norm_q,norm_k}}
            K {{layers,noise_refiner}}.#.adaLN_modulation.0""",
    },
    "boogu": {
        "original": """
            K {x_embedder,ref_image_patch_embedder,norm_out.linear_1,norm_out.linear_2}
            K =image_index_embedding
            K time_caption_embed.{timestep_embedder.linear_1,timestep_embedder.linear_2,caption_embedder.1}
            Q {noise_refiner,context_refiner,ref_image_refiner,single_stream_layers}.#.attn.{to_q,to_k,to_v,to_out.0}
            Q {noise_refiner,context_refiner,ref_image_refiner,single_stream_layers}.#.feed_forward.linear_{1,2,3}
            K single_stream_layers.#.{norm2,ffn_norm1,ffn_norm2}
            Q double_stream_layers.#.img_instruct_attn.processor.{img_to_q,instruct_to_k,img_out,instruct_out}
            Q double_stream_layers.#.img_instruct_attn.to_out.0
            Q double_stream_layers.#.img_self_attn.{to_q,to_k,to_v,to_out.0}
            Q double_stream_layers.#.{img,instruct}_feed_forward.linear_{1,2,3}
            K double_stream_layers.#.{img_attn_norm,img_self_attn_norm,img_ffn_norm1,instruct_ffn_norm2}"""
    },
    "krea2": {
        "original": """
            K {first,last.linear,tmlp.0,tmlp.2,tproj.1,txtmlp.1,txtmlp.3}
            K =last.{norm.scale,modulation.lin}
            K txtfusion.{projector,layerwise_blocks.#.attn.wq,refiner_blocks.#.mlp.down}
            Q blocks.#.attn.{wq,wk,wv,wo,gate}
            K =blocks.#.attn.qknorm.{qnorm,knorm}.scale
            Q blocks.#.mlp.{gate,up,down}
            K =blocks.#.{prenorm,postnorm}.scale""",
        "diffusers": """
            K {img_in,final_layer.linear,time_embed.linear_1,time_embed.linear_2}
            K {time_mod_proj,txt_in.linear_1,txt_in.linear_2}
            K text_fusion.{projector,layerwise_blocks.#.attn.to_q,refiner_blocks.#.ff.down}
            Q transformer_blocks.#.attn.{to_q,to_k,to_v,to_out.0,to_gate}
            Q transformer_blocks.#.ff.{gate,up,down}
            K transformer_blocks.#.{norm1,norm2,attn.norm_q}""",
    },
    "ideogram4": {
        "original": """
            K {input_proj,llm_cond_norm,llm_cond_proj,adaln_proj,embed_image_indicator}
            K {t_embedding.mlp_in,t_embedding.mlp_out,final_layer.linear,final_layer.adaln_modulation}
            Q layers.#.{attention.qkv,attention.o,adaln_modulation}
            Q layers.#.feed_forward.{w1,w2,w3}
            K layers.#.{attention.norm_q,attention_norm1,ffn_norm2}""",
        "diffusers": """
            K {input_proj,llm_cond_norm,llm_cond_proj,adaln_proj,embed_image_indicator}
            K {t_embedding.mlp_in,t_embedding.mlp_out,final_layer.linear,final_layer.adaln_modulation}
            Q layers.#.attention.{to_q,to_k,to_v,to_out.0}
            Q layers.#.feed_forward.{w1,w2,w3}""",
    },
    "anima": {
        "original": """
            K {x_embedder.proj.1,t_embedder.1.linear_1,t_embedder.1.linear_2,t_embedding_norm}
            K final_layer.{linear,adaln_modulation.1,adaln_modulation.2}
            K llm_adapter.{embed,out_proj,norm,blocks.#.self_attn.q_proj,blocks.#.mlp.0}
            K blocks.0.{self_attn.q_proj,mlp.layer1}
            K blocks.1.{adaln_modulation_self_attn,adaln_modulation_cross_attn,adaln_modulation_mlp}.{1,2}
            Q blocks.{1,2,9}.{self_attn,cross_attn}.{q_proj,k_proj,v_proj,output_proj}
            Q blocks.{1,2,9}.mlp.{layer1,layer2}
            Q blocks.{2,9}.adaln_modulation_self_attn.{1,2}"""
    },
    "sd3": {
        "original": """
            K {x_embedder.proj,context_embedder,t_embedder.mlp.0,y_embedder.mlp.0,final_layer.linear}
            K =pos_embed
            Q joint_blocks.#.{x_block,context_block}.attn.{qkv,proj}
            Q joint_blocks.#.{x_block,context_block}.{mlp.fc1,mlp.fc2,adaLN_modulation.1}
            K joint_blocks.#.x_block.attn.{ln_q,ln_k}""",
        "diffusers": f"""{_FLUX_DIFFUSERS_ATTENTION}
            K {{pos_embed.proj,context_embedder,proj_out,norm_out.linear}}
            K =pos_embed.pos_embed
            K time_text_embed.{{timestep_embedder,text_embedder}}.linear_{{1,2}}
            Q transformer_blocks.#.{{ff,ff_context}}.net.{{0.proj,2}}""",
    },
    "sdxl": {
        "original": _UNET + "K label_emb.0.{0,2}",
        "diffusers": _UNET_DIFFUSERS + "K add_embedding.linear_{1,2}",
    },
    "sd15": {"original": _UNET, "diffusers": _UNET_DIFFUSERS},
    "wan": {
        "original": _WAN.format("") + "K {img_emb.proj.1,img_emb.proj.3,ref_conv,control_adapter.conv}",
        "animate": _WAN.format("") + _WAN_FACE,
        "speech": _WAN.format("")
        + """
            K {casual_audio_encoder.encoder.final_linear,audio_injector.injector.#.q,cond_encoder,trainable_cond_mask}
            K frame_packer.{proj,proj_2x}""",
        "ovi": _WAN.format("video_model.") + _WAN.format("audio_model."),
        "diffusers": """
            K {patch_embedding,proj_out}
            K =scale_shift_table
            K condition_embedder.{time_embedder.linear_1,text_embedder.linear_1,text_embedder.linear_2,time_proj}
            Q blocks.#.{attn1,attn2}.{to_q,to_k,to_v,to_out.0}
            K blocks.#.{norm2,attn1.norm_q}
            K =blocks.#.scale_shift_table
            Q blocks.#.ffn.net.{0.proj,2}""",
    },
    "hunyuan": {
        "original": """
            K {img_in.proj,txt_in.input_embedder,txt_in.t_embedder.mlp.0,txt_in.c_embedder.linear_1}
            Q txt_in.individual_token_refiner.blocks.#.{self_attn_qkv,self_attn_proj,mlp.fc1}
            K txt_in.individual_token_refiner.blocks.#.{norm1,norm2}
            K {time_in.mlp.0,vector_in.in_layer,guidance_in.mlp.0,final_layer.linear}
            Q double_blocks.#.{img,txt}_{attn_qkv,attn_proj,mlp.fc1,mod.linear}
            K double_blocks.#.{img,txt}_attn_{q_norm,k_norm}
            Q single_blocks.#.{linear1,linear2}""",
        "comfy 1.5": f"""{_FLUX_BLOCKS}
            K {{img_in.proj,txt_in.input_embedder,txt_in.t_embedder.in_layer,time_in.in_layer,cond_type_embedding}}
            K {{vision_in.proj.0,vision_in.proj.4,byt5_in.layernorm,final_layer.linear}}
            Q {{vision_in.proj.1,vision_in.proj.3,byt5_in.fc1}}
            Q txt_in.individual_token_refiner.blocks.#.self_attn.qkv""",
        "diffusers": f"""{_FLUX_DIFFUSERS}
            K {{x_embedder.proj,context_embedder.proj_in,proj_out,norm_out.linear}}
            K time_text_embed.text_embedder.linear_1
            K context_embedder.time_text_embed.timestep_embedder.linear_1
            Q context_embedder.token_refiner.refiner_blocks.#.attn.{{to_q,to_k,to_v,to_out.0}}
            Q transformer_blocks.#.{{norm1,norm1_context}}.linear""",
    },
    "ltxv2": {
        "original": _LTX_BLOCK
        + _LTX2_BLOCK
        + """
            K {patchify_proj,audio_patchify_proj}
            K {adaln_single,audio_adaln_single,prompt_adaln_single,audio_prompt_adaln_single}.linear
            K {adaln_single,av_ca_a2v_gate_adaln_single}.emb.timestep_embedder.linear_{1,2}
            K av_ca_{v2a_gate,audio_scale_shift,video_scale_shift}_adaln_single.linear
            K {video,audio}_embeddings_connector.transformer_1d_blocks.#.attn1.to_q
            Q {caption_projection,audio_caption_projection}.linear_{1,2}""",
        "diffusers": _LTX_BLOCK
        + _LTX2_BLOCK
        + """
            K {proj_in,audio_proj_in,time_embed.linear,audio_time_embed.linear}
            K time_embed.emb.timestep_embedder.linear_{1,2}
            K av_cross_attn_{video_scale_shift,audio_scale_shift,video_a2v_gate,audio_v2a_gate}.linear""",
        "first version": _LTX_BLOCK + "K patchify_proj\nK adaln_single.{linear,emb.timestep_embedder.linear_1}",
    },
    "minimaxh3": {
        "original": """
            K {video_patch_proj,audio_patch_proj,condition_proj,time_embedder.proj_in,time_embedder.proj_out}
            K token_refiner.{final_norm,blocks.#.attn.qkv_proj,blocks.#.mlp.fc1}
            K final_layer.{norm,video_out,audio_out,adaln_proj.linear}
            Q blocks.#.{attn.qkv_proj,attn.out_proj,mlp.fc1,mlp.fc2,adaln_proj.linear}
            K blocks.#.{norm1,norm2,attn.q_norm}""",
        "diffusers": """
            K {proj_in,audio_proj_in,context_embedder,time_embedder.linear_1,time_embedder.linear_2}
            K token_refiner.{final_norm,refiner_blocks.#.attn.to_q,refiner_blocks.#.ff.net.0.proj}
            K {norm_out.linear,proj_out,audio_proj_out}
            Q transformer_blocks.#.{attn.to_q,attn.to_out.0,ff.net.0.proj,ff.net.2,adaln_proj.linear}""",
    },
}
