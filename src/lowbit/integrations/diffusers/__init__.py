"""Run and save models of Hugging Face diffusers (0.42 and later) with lowbit's weights.

Importing this package registers the quantization method "lowbit" with diffusers, and with transformers, whose text
encoders are in the same pipelines:

    from lowbit.integrations.diffusers import LowbitConfig
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(folder, quantization_config=LowbitConfig("awq_w4a16"))
    model.save_pretrained(out)
    model = FluxTransformer2DModel.from_pretrained(out)  # the same weights, bit for bit
    model = FluxTransformer2DModel.from_single_file("comfyui.safetensors", quantization_config=LowbitConfig())

diffusers refuses a folder whose method it does not know: import this package first.
"""

from __future__ import annotations

from lowbit.integrations.diffusers.version import VERSION  # first: it says what is missing

# isort: split
from lowbit.integrations.diffusers.config import LowbitConfig
from lowbit.integrations.diffusers.quantizer import LowbitQuantizer
from lowbit.integrations.diffusers.registration import register
from lowbit.integrations.diffusers.single_file import read_single_file

__all__ = ["VERSION", "LowbitConfig", "LowbitQuantizer", "read_single_file", "register"]

register()
