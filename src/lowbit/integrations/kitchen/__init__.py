"""comfy_kitchen's quantization under comfy_kitchen's names: `import lowbit.integrations.kitchen as comfy_kitchen`.

The functions have its signatures, stored bytes its order, and layouts its parameters, so that files and tensors go
both ways. Arithmetic is lowbit's: float32 inside and one rounding at the end, on every device. comfy_kitchen itself is
not needed and not imported. `tensor` holds the quantized tensors and layouts, `float_utils` the small helpers.

What differs on purpose is said beside each function; in short, where comfy_kitchen divides in the dtype of the input,
returns NaN for zeros, ignores an argument or raises on a CPU, this computes the result. Names that have nothing to do
with quantization are absent; `absent.py` gives each one's reason.
"""

from __future__ import annotations

from typing import NoReturn

from lowbit.integrations.kitchen import backends as registry, float_utils, tensor
from lowbit.integrations.kitchen.absent import ABSENT
from lowbit.integrations.kitchen.backends import list_backends, use_backend
from lowbit.integrations.kitchen.block_floats import (
    dequantize_mxfp8,
    dequantize_nvfp4,
    dequantize_per_tensor_fp8,
    quantize_mxfp8,
    quantize_nvfp4,
    quantize_per_tensor_fp8,
    scaled_mm_mxfp8,
    scaled_mm_nvfp4,
    stochastic_rounding_fp8,
)
from lowbit.integrations.kitchen.float_utils import from_blocked, swap_nibbles, to_blocked
from lowbit.integrations.kitchen.int4 import (
    convrot_w4a4_linear,
    dequantize_convrot_w4a4_weight,
    gemv_awq_w4a16,
    quantize_convrot_w4a4_weight,
    quantize_svdquant_w4a4,
    scaled_mm_svdquant_w4a4,
)
from lowbit.integrations.kitchen.int8 import (
    dequantize_int8_simple,
    int8_linear,
    int8_linear_modulated,
    int8_linear_rms_modulated,
    mm_int8,
    quantize_int8_rowwise,
    quantize_int8_tensorwise,
)
from lowbit.integrations.kitchen.w4a8 import (
    dequantize_w4a8_int8_weight,
    quantize_w4a8_int8_weight,
    w4a8_int8_linear,
)

__all__ = [
    "convrot_w4a4_linear",
    "dequantize_convrot_w4a4_weight",
    "dequantize_int8_simple",
    "dequantize_mxfp8",
    "dequantize_nvfp4",
    "dequantize_per_tensor_fp8",
    "dequantize_w4a8_int8_weight",
    "float_utils",
    "from_blocked",
    "gemv_awq_w4a16",
    "int8_linear",
    "int8_linear_modulated",
    "int8_linear_rms_modulated",
    "list_backends",
    "mm_int8",
    "quantize_convrot_w4a4_weight",
    "quantize_int8_rowwise",
    "quantize_int8_tensorwise",
    "quantize_mxfp8",
    "quantize_nvfp4",
    "quantize_per_tensor_fp8",
    "quantize_svdquant_w4a4",
    "quantize_w4a8_int8_weight",
    "registry",
    "scaled_mm_mxfp8",
    "scaled_mm_nvfp4",
    "scaled_mm_svdquant_w4a4",
    "stochastic_rounding_fp8",
    "swap_nibbles",
    "tensor",
    "to_blocked",
    "use_backend",
    "w4a8_int8_linear",
]


def __getattr__(name: str) -> NoReturn:
    """Say why a name of comfy_kitchen is not here. Raises AttributeError, as Python wants it."""
    if name in ABSENT:
        raise AttributeError(f"lowbit has no {name!r}: {ABSENT[name]}. Take it from comfy_kitchen itself.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
