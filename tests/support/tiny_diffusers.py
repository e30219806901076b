"""Transformers of diffusers so small that a test can make, save and load them in a moment, and what they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def flux(*, singles: int = 1) -> Any:
    """FLUX with one double block and some single ones, 64 channels: 11 linears a block that presets quantize."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def sd3() -> Any:
    """Stable Diffusion 3 with two blocks of 64 channels, the last of which ends the text's way."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        out_channels=16,
        pos_embed_max_size=16,
    ).eval()


def qwen() -> Any:
    """Qwen-Image with two blocks of 128 channels."""
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        axes_dims_rope=(8, 12, 12),
    ).eval()


MAKERS = {"flux": flux, "sd3": sd3, "qwen": qwen}


def saved(model: Any, folder: Path) -> Path:
    """The folder, with a model saved in it."""
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def answer(model: Any) -> Tensor:
    """What a model makes of fixed latents and a fixed text, in its own dtype."""
    dtype, made = model.dtype, torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made).to(dtype)

    kind = type(model).__name__
    time = torch.tensor([0.5]).to(dtype)
    if kind.startswith("Flux"):
        return model(
            hidden_states=noise(1, 16, 64),
            encoder_hidden_states=noise(1, 5, 64),
            pooled_projections=noise(1, 64),
            timestep=time,
            guidance=time,
            img_ids=_grid(4, 4),
            txt_ids=torch.zeros(5, 3),
        ).sample
    if kind.startswith("SD3"):
        return model(
            hidden_states=noise(1, 16, 8, 8),
            encoder_hidden_states=noise(1, 5, 64),
            pooled_projections=noise(1, 64),
            timestep=time,
        ).sample
    return model(
        hidden_states=noise(1, 16, 64),
        encoder_hidden_states=noise(1, 5, 64),
        encoder_hidden_states_mask=torch.ones(1, 5, dtype=torch.bool),
        timestep=time,
        img_shapes=[[(1, 4, 4)]],
    ).sample


def _grid(height: int, width: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
