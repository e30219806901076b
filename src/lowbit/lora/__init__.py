"""LoRA on quantized weights, and LoHa, LoKr and DoRA: read adapters, apply them at run time, or bake them in.

attach_lora      beside the weight: exact, any number at once, strengths can change, removed without a trace
bake_lora        into the codes of a module's weights, with `unbake`
bake_checkpoint  into a file, without loading a model
"""

from lowbit.lora.adapter import Adapter, combined
from lowbit.lora.adapter_delta import Delta, DoraDelta, LohaDelta, LokrDelta, LoraDelta
from lowbit.lora.adapter_file import read_adapter
from lowbit.lora.bake import BakedHandle, bake_lora
from lowbit.lora.bake_checkpoint import BakeReport, bake_checkpoint
from lowbit.lora.bake_layer import LayerBake
from lowbit.lora.side_branch import LoraHandle, attach_lora

__all__ = [
    "Adapter",
    "BakeReport",
    "BakedHandle",
    "Delta",
    "DoraDelta",
    "LayerBake",
    "LohaDelta",
    "LokrDelta",
    "LoraDelta",
    "LoraHandle",
    "attach_lora",
    "bake_checkpoint",
    "bake_lora",
    "combined",
    "read_adapter",
]
