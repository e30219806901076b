"""comfy_kitchen's layouts, one case for each way a weight can be stored."""

from __future__ import annotations

import torch

# name in a test's id -> (layout, options of quantize)
LAYOUTS = {
    "fp8_e4m3": ("TensorCoreFP8Layout", {}),
    "fp8_e5m2": ("TensorCoreFP8Layout", {"dtype": torch.float8_e5m2}),
    "nvfp4": ("TensorCoreNVFP4Layout", {}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}),
    "int8": ("TensorWiseINT8Layout", {}),
    "int8_rows": ("TensorWiseINT8Layout", {"per_channel": True}),
    "int8_convrot": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True, "convrot_groupsize": 64}),
    "svdquant": ("TensorCoreSVDQuantW4A4Layout", {"rank": 8}),
    "awq": ("TensorCoreAWQW4A16Layout", {"group_size": 32}),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", {"convrot_groupsize": 64}),
    "convrot_w4a4_int8": ("TensorCoreConvRotW4A4Layout", {"convrot_groupsize": 64, "linear_dtype": "int8"}),
    "w4a8": ("AsymW4A8Int8Layout", {"convrot_groupsize": 64}),
    "w4a8_uniform": ("AsymW4A8Int8Layout", {"convrot_groupsize": 64, "codebook": False}),
    "w4a8_corrected": ("AsymW4A8Int8Layout", {"convrot_groupsize": 64, "symmetric": False}),
    "w6a8": ("AsymW4A8Int8Layout", {"convrot_groupsize": 64, "bits": 6}),
}
PADDED = ("nvfp4", "mxfp8")
ENCODED_ALIKE = tuple(name for name in LAYOUTS if not name.startswith(("svdquant", "awq", "w4a8", "w6a8")))
"""What comfy_kitchen encodes too, by the same rule."""
