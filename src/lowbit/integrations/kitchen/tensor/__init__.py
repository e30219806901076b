"""comfy_kitchen.tensor: quantized tensors, their layouts, and the functions on weights that go with them."""

from lowbit.integrations.kitchen.tensor.awq_w4a16 import TensorCoreAWQW4A16Layout
from lowbit.integrations.kitchen.tensor.base import (
    BaseLayoutParams,
    QuantizedLayout,
    get_cuda_capability,
    get_layout_class,
    register_layout_class,
    register_layout_op,
)
from lowbit.integrations.kitchen.tensor.convrot_w4a4 import (
    TensorCoreConvRotW4A4Layout,
    convrot_w4a4_linear,
    dequantize_convrot_w4a4_weight,
    quantize_convrot_w4a4_weight,
)
from lowbit.integrations.kitchen.tensor.fp8 import TensorCoreFP8Layout
from lowbit.integrations.kitchen.tensor.generic import dequantize_args
from lowbit.integrations.kitchen.tensor.int8 import TensorWiseINT8Layout
from lowbit.integrations.kitchen.tensor.mxfp8 import TensorCoreMXFP8Layout
from lowbit.integrations.kitchen.tensor.nvfp4 import TensorCoreNVFP4Layout
from lowbit.integrations.kitchen.tensor.quantized import QuantizedTensor
from lowbit.integrations.kitchen.tensor.svdquant_groups import (
    svdquant_w4a4_can_share_quant,
    svdquant_w4a4_fuse_linear_weights,
    svdquant_w4a4_fused_grouped_linear,
    svdquant_w4a4_grouped_linear,
)
from lowbit.integrations.kitchen.tensor.svdquant_w4a4 import TensorCoreSVDQuantW4A4Layout
from lowbit.integrations.kitchen.tensor.w4a8_int8 import (
    AsymW4A8Int8Layout,
    dequantize_w4a8_int8_weight,
    quantize_w4a8_int8_weight,
    w4a8_int8_linear,
)

__all__ = [
    "AsymW4A8Int8Layout",
    "BaseLayoutParams",
    "QuantizedLayout",
    "QuantizedTensor",
    "TensorCoreAWQW4A16Layout",
    "TensorCoreConvRotW4A4Layout",
    "TensorCoreFP8Layout",
    "TensorCoreMXFP8Layout",
    "TensorCoreNVFP4Layout",
    "TensorCoreSVDQuantW4A4Layout",
    "TensorWiseINT8Layout",
    "convrot_w4a4_linear",
    "dequantize_args",
    "dequantize_convrot_w4a4_weight",
    "dequantize_w4a8_int8_weight",
    "get_cuda_capability",
    "get_layout_class",
    "quantize_convrot_w4a4_weight",
    "quantize_w4a8_int8_weight",
    "register_layout_class",
    "register_layout_op",
    "svdquant_w4a4_can_share_quant",
    "svdquant_w4a4_fuse_linear_weights",
    "svdquant_w4a4_fused_grouped_linear",
    "svdquant_w4a4_grouped_linear",
    "w4a8_int8_linear",
]
