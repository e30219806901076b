"""The kinds of layers whose weights can be quantized, and how formats see the weight of each.

A layer here is an `nn.Linear`, an `nn.Embedding`, an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, or the `Conv1D` of
transformers. Transposed convolutions are known too, to say why they are kept.

Formats store matrices [N, K] (`weight_matrix`): a kernel [O, I / groups, ...] is one with a row for each output
channel, the weight [K, N] of a `Conv1D` is the transpose of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeGuard

import torch
from torch import Tensor, nn

from lowbit.formats.base import Format
from lowbit.tensor import QuantizedTensor

_CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d
_TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer = nn.Linear | nn.Embedding | _CONVOLUTIONS | _TRANSPOSED  # what `is_layer` accepts; Conv1D counts as linear


def is_layer(module: nn.Module) -> TypeGuard[Layer]:
    """Whether `quantize_` knows this kind of module."""
    return isinstance(module, Layer) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the `Conv1D` of transformers (GPT-2): a linear whose weight is [K, N]."""
    kinds = ((kind.__module__, kind.__name__) for kind in type(module).__mro__)
    return ("transformers.pytorch_utils", "Conv1D") in kinds


def weight_matrix(layer: Layer) -> Tensor:
    """A layer's plain weight as formats store it, [N, K]."""
    weight = layer.weight.detach()
    return weight.t() if is_conv1d(layer) else weight.flatten(1) if weight.dim() > 2 else weight


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """(N, K) of a layer's weight, plain or quantized."""
    first, *rest = layer.weight.shape
    return (rest[0], first) if is_conv1d(layer) else (first, torch.Size(rest).numel())


def shaped_weight(layer: Layer, parts: Mapping[str, Tensor], fmt: Format, dtype: torch.dtype) -> QuantizedTensor:
    """The parts of a matrix [N, K] as a weight of the layer's shape."""
    return QuantizedTensor(
        parts, fmt, tuple(layer.weight.shape), dtype, matrix=matrix_shape(layer), transposed=is_conv1d(layer)
    )


def kind_refusal(layer: Layer, fmt: Format) -> str | None:
    """Why no weight of this format can serve this kind of layer, or None."""
    if isinstance(layer, _TRANSPOSED):
        return "a transposed convolution: the rows of its kernel are input channels"
    if isinstance(layer, _CONVOLUTIONS) and fmt.folds_bias:
        return f"a convolution, and {fmt} shifts the activations, which a convolution pads and slides over"
    if isinstance(layer, nn.Embedding) and not fmt.supports_embedding:
        return f"an embedding table, and {fmt.name} has no lookup"
    return None


def repacked_op(owners: Iterable[nn.Module]) -> str | None:
    """The op that a weight of these layers is packed for, or None where it is to keep its plain parts.

    A table that is the head of a model as well is multiplied with as a whole at each token, and only looked up in once.
    """
    owners = list(owners)
    if any(isinstance(owner, _CONVOLUTIONS | _TRANSPOSED) for owner in owners):
        return None
    return "embedding" if all(isinstance(owner, nn.Embedding) for owner in owners) else "linear"


def quantizable_layers(module: nn.Module) -> Iterator[tuple[str, Layer]]:
    """The layers of a module by name ("weight" for a bare layer), those not quantized yet."""
    for name, layer in module.named_modules():
        if is_layer(layer) and not isinstance(layer.weight, QuantizedTensor):
            yield name or "weight", layer


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, Layer]]:
    """The layers of a module whose weight is quantized, by name ("" for a bare layer).

    Of layers that share a weight, only the first.
    """
    seen: set[int] = set()
    for name, layer in module.named_modules():
        if is_layer(layer) and isinstance(layer.weight, QuantizedTensor):
            if id(layer.weight) not in seen:
                yield name, layer
            seen.add(id(layer.weight))
