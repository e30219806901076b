"""Tiny checkpoints with the names that FLUX and Stable Diffusion 3 were published under, plain and for ComfyUI."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowbit.checkpoint.dialects import StoredLayer
from lowbit.checkpoint.dialects.comfy import COMFY
from lowbit.formats import parse_spec

WIDTH = 64
_BLOCKS = re.compile(r"(double_blocks|single_blocks|joint_blocks|transformer_blocks)\.")


def flux_original() -> dict[str, Tensor]:
    """The tensors of `tiny_diffusers.flux()` as Black Forest Labs name them."""
    w = WIDTH
    state: dict[str, Tensor] = {}
    linear = _adder(state)
    for name, inputs in (("time_in", 256), ("vector_in", w), ("guidance_in", 256)):
        linear(f"{name}.in_layer", w, inputs)
        linear(f"{name}.out_layer", w, w)
    linear("txt_in", w, w)
    linear("img_in", w, w)
    for side in ("img", "txt"):
        block = f"double_blocks.0.{side}"
        linear(f"{block}_mod.lin", 6 * w, w)
        linear(f"{block}_attn.qkv", 3 * w, w)
        linear(f"{block}_attn.proj", w, w)
        linear(f"{block}_mlp.0", 4 * w, w)
        linear(f"{block}_mlp.2", w, 4 * w)
        for norm in ("query_norm", "key_norm"):
            state[f"{block}_attn.norm.{norm}.scale"] = torch.rand(16) + 0.5
    linear("single_blocks.0.modulation.lin", 3 * w, w)
    linear("single_blocks.0.linear1", 7 * w, w)
    linear("single_blocks.0.linear2", w, 5 * w)
    for norm in ("query_norm", "key_norm"):
        state[f"single_blocks.0.norm.{norm}.scale"] = torch.rand(16) + 0.5
    linear("final_layer.adaLN_modulation.1", 2 * w, w)
    linear("final_layer.linear", w, w)
    return state


def sd3_original() -> dict[str, Tensor]:
    """The tensors of `tiny_diffusers.sd3()` as Stability AI name them."""
    w = WIDTH
    state: dict[str, Tensor] = {"pos_embed": torch.randn(1, 256, w), "x_embedder.proj.weight": torch.randn(w, 16, 2, 2)}
    state["x_embedder.proj.bias"] = torch.randn(w)
    linear = _adder(state)
    for name, inputs in (("t_embedder", 256), ("y_embedder", w)):
        linear(f"{name}.mlp.0", w, inputs)
        linear(f"{name}.mlp.2", w, w)
    linear("context_embedder", w, w)
    for block in range(2):
        last = block == 1
        for side in ("x_block", "context_block"):
            name, ends = f"joint_blocks.{block}.{side}", last and side == "context_block"
            linear(f"{name}.adaLN_modulation.1", (2 if ends else 6) * w, w)
            linear(f"{name}.attn.qkv", 3 * w, w)
            if not ends:
                linear(f"{name}.attn.proj", w, w)
                linear(f"{name}.mlp.fc1", 4 * w, w)
                linear(f"{name}.mlp.fc2", w, 4 * w)
    linear("final_layer.adaLN_modulation.1", 2 * w, w)
    linear("final_layer.linear", 64, w)
    return state


def _adder(state: dict[str, Tensor]) -> Callable[[str, int, int], None]:
    def add(name: str, outputs: int, inputs: int) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
        state[f"{name}.bias"] = torch.randn(outputs) * 0.1

    return add


def quantized_original(
    state: dict[str, Tensor], spec: str, *, also: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[StoredLayer]]:
    """The tensors of a ComfyUI file and those of the plain file that means the same numbers, and the layers.

    The linears of all blocks are quantized, and `also`.
    """
    fmt, stored, plain, layers = parse_spec(spec), dict(state), dict(state), []
    for key, weight in state.items():
        layer = key.removesuffix(".weight")
        if not key.endswith(".weight") or weight.dim() != 2 or not (_BLOCKS.search(key) or layer in also):
            continue
        parts, shape = fmt.quantize(weight), (weight.shape[0], weight.shape[1])
        layers.append(StoredLayer(layer, fmt, shape, weight.dtype))
        del stored[key]
        stored |= COMFY.store_parts(layers[-1], parts)
        plain[key] = fmt.dequantize(parts, shape, weight.dtype)
        share = fmt.bias_share(parts)
        if share is not None:
            stored[f"{layer}.bias"] = state[f"{layer}.bias"] - share
    return stored, plain, layers


def scaled_fp8(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a file as ComfyUI wrote fp8 before it had markers, and those that mean the same numbers."""
    stored, plain = dict(state), dict(state)
    for key, weight in state.items():
        if key.endswith(".weight") and weight.dim() == 2 and _BLOCKS.search(key):
            scale = weight.abs().max() / 448
            stored[key] = (weight / scale).to(torch.float8_e4m3fn)
            stored[f"{key.removesuffix('weight')}scale_weight"] = scale
            plain[key] = stored[key].float() * scale
    stored["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    return stored, plain


def file_of(state: dict[str, Tensor], path: Path, *, prefix: str = "", metadata: dict[str, str] | None = None) -> str:
    """The path of a safetensors file with these tensors."""
    save_file({prefix + key: value.contiguous() for key, value in state.items()}, path, metadata=metadata)
    return str(path)


def narrow_flux_converter() -> Any:
    """diffusers' own conversion of FLUX with the width of the tiny model where it has 3072 written into it."""
    from diffusers.loaders import single_file_utils

    name = "convert_flux_transformer_checkpoint_to_diffusers"
    source = inspect.getsource(getattr(single_file_utils, name))
    assert source.count("3072") == 1
    scope: dict[str, Any] = {**vars(single_file_utils)}
    exec(source.replace("3072", str(WIDTH)), scope)
    return scope[name]
