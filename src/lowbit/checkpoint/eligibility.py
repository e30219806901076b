"""Why a tensor stays as it is: the reasons that hold for any model, in words.

Two kinds: a tensor that the format cannot hold, which nobody can order otherwise, and one that is better left alone,
which a rule for that layer overrides.
"""

from __future__ import annotations

import math
import re

import torch

from lowbit.checkpoint.dialects.base import TensorSpec, layer_of
from lowbit.checkpoint.stored_format import StoredFormat
from lowbit.checkpoint.weight_shape import BANK_AXES, CAST_DTYPES, KERNEL_AXES, WeightShape
from lowbit.formats.parts import FLOATS

# 3-D weights of many experts: those that transformers 5 names so, and others that are known to be none of a Conv1d.
_NAMED_BANK = re.compile(r"(?:^|\.)experts\.(?:gate_up_proj|gate_proj|up_proj|down_proj)(?:\.weight)?$")
_ANY_BANK = re.compile(r"(?:^|\.)(?:experts(?!\.\d)(?:\.|$)|(?:block_sparse_moe|moe)\.(?:input|output)_linear\.)")
MIN_WEIGHTS = 4096  # below this a layer's markers and scales eat what its codes save
_SOURCE_DTYPES = (*FLOATS, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """Its short name, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def cannot_hold(key: str, spec: TensorSpec, *, requantize: bool = False) -> str | None:
    """Why no format can store this tensor, or None. `requantize`: 8-bit floats without a scale are taken as values."""
    shape, name = spec.shape, dtype_name(spec.dtype)
    cast = spec.dtype in CAST_DTYPES
    if name.startswith("float8") and not (cast and requantize):
        more = ", cast without a scale; --requantize converts its values, with the loss of both" if cast else ""
        return f"already quantized ({name}{more})"
    if spec.dtype not in (*_SOURCE_DTYPES, *CAST_DTYPES):
        return f"{name} values"
    if len(shape) < 2:
        return "1-D" if shape else "a single value"
    if not math.prod(shape):
        return "no elements"
    if layer_of(key) is not None or (len(shape) == 3 and _ANY_BANK.search(key)):
        return None
    return "its name does not end in .weight"


def axes_of(key: str, shape: tuple[int, ...]) -> str:
    """What the axes of a weight are, by its name and their number: those of a matrix, a kernel or a bank [E, N, K]."""
    if len(shape) == 3 and _ANY_BANK.search(key):
        return BANK_AXES
    return KERNEL_AXES if len(shape) > 2 else ""


def cannot_store(stored: StoredFormat, weight: WeightShape, *, embedding: bool = False) -> str | None:
    """Why this format cannot store a weight, or None."""
    fmt = stored.format
    if embedding and not fmt.supports_embedding:
        return f"embedding table, and {fmt.name} has no lookup"
    if weight.is_bank and fmt.folds_bias:
        return f"bank of experts, and {fmt} corrects the bias of its layer, which a bank has not"
    if weight.axes == KERNEL_AXES and fmt.folds_bias:
        return f"convolution, and {fmt} shifts the activations, which a convolution pads and slides over"
    return stored.refuses(*weight.matrix)


def better_left(shape: tuple[int, ...]) -> str | None:
    """Why a weight that could be stored is left alone unless a rule names it, or None."""
    return f"fewer than {MIN_WEIGHTS} weights" if math.prod(shape) < MIN_WEIGHTS else None


def not_by_default(key: str, weight: WeightShape, *, convolutions: bool) -> str | None:
    """The same with what is no matrix: `convolutions` says whether kernels are wanted."""
    rank = len(weight.shape)
    unknown = weight.is_bank and not _NAMED_BANK.search(key)
    if unknown or (weight.axes == KERNEL_AXES and not convolutions):
        return f"{rank}-D weight (convolution)" if rank > 3 else "3-D weight (convolution or bank of experts)"
    return better_left(weight.shape)
