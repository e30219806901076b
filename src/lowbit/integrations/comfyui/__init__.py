"""Run, convert and look into quantized models inside ComfyUI.

Nothing of ComfyUI is imported before a function here needs it. The nodes are in the folder `comfyui/lowbit_nodes` of
the repository; programs use

    from lowbit.integrations.comfyui import load_diffusion_model, lowbit_ops

    model = load_diffusion_model("qwen-image-svdquant.safetensors")        # a ModelPatcher
    ops = lowbit_ops(torch.bfloat16)                                       # for model_options["custom_operations"]
"""

from __future__ import annotations

from lowbit.integrations.comfyui.files import ComfyFile, describe_layers, read_file
from lowbit.integrations.comfyui.layout import LowbitLayout, is_lowbit, layout_for
from lowbit.integrations.comfyui.loader import load_clip, load_diffusion_model
from lowbit.integrations.comfyui.ops import KERNELS, lowbit_ops
from lowbit.integrations.comfyui.tasks import convert_file, inspect_text

__all__ = [
    "KERNELS",
    "ComfyFile",
    "LowbitLayout",
    "convert_file",
    "describe_layers",
    "inspect_text",
    "is_lowbit",
    "layout_for",
    "load_clip",
    "load_diffusion_model",
    "lowbit_ops",
    "read_file",
]
