"""Decoders of transformers of many model types, tiny and random, with norms as uneven as those of trained models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowbit.calibration import StatisticsCollection, calibrate

VOCABULARY = 96


def decoder(model_type: str, hidden: int = 64, *, layers: int = 2, seed: int = 0, **more: Any) -> Any:
    """A causal language model in float32 with 4 heads; `more` goes into its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "head_dim": hidden // 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, **{**sizes, **more})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:  # some channels stand out
                parameter.add_(noise * 0.2)
                parameter[torch.randperm(len(parameter), generator=generator)[: len(parameter) // 12]] += 8
            else:
                parameter.copy_(noise * (0.02 if name.endswith("bias") else parameter.shape[-1] ** -0.5))
    model.config.use_cache = False
    return model


def tokens(count: int = 8, *, seed: int = 1, length: int = 32) -> Tensor:
    """Random ones, [count, length]."""
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def seen(model: Any, count: int = 64) -> StatisticsCollection:
    """What the inputs of its linears are on random tokens, half of them held out."""
    return calibrate(model, [{"input_ids": batch} for batch in tokens(count).split(8)])


def written(model: Any, folder: Path) -> Path:
    """The folder, with the model's weights and config in it."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    state = {key: value for key, value in model.state_dict().items() if not (tied and key == "lm_head.weight")}
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    return folder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """What a model says to tokens that it was not calibrated on, float32."""
    return model(input_ids=tokens(8, seed=2)).logits.float()


def distance(a: Tensor, b: Tensor) -> float:
    """Of a to b, relative to the length of b."""
    return float((a - b).norm() / b.norm())
