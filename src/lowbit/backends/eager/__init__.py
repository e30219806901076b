"""Pure PyTorch: serves every format on every device, never refuses, and is the oracle of all other backends.

Where a kernel here needs decoded rows (`row_errors`, `linear_input_gradient`), those of the device decode them, unless
`use_backend("eager")` says that nothing else may run.
"""

from lowbit.backends.eager import (
    add_column_ranges,
    add_second_moment,
    awq,
    dequantize,
    descent_columns,
    descent_sweep,
    embedding,
    fp8,
    gptq_columns,
    gptq_sweep,
    int4_plain,
    int8,
    linear,
    linear_input_gradient,
    mxfp8,
    nvfp4,
    packing,
    quantize,
    refit_unit,
    row_errors,
    scale_search,
    svdquant,
    w4a4_search,
)

__all__ = [
    "add_column_ranges",
    "add_second_moment",
    "awq",
    "dequantize",
    "descent_columns",
    "descent_sweep",
    "embedding",
    "fp8",
    "gptq_columns",
    "gptq_sweep",
    "int4_plain",
    "int8",
    "linear",
    "linear_input_gradient",
    "mxfp8",
    "nvfp4",
    "packing",
    "quantize",
    "refit_unit",
    "row_errors",
    "scale_search",
    "svdquant",
    "w4a4_search",
]
