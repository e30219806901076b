"""Two models have the same quantized weights, bit for bit."""

from __future__ import annotations

import torch
from torch import nn

from lowbit.formats.parts import raw_bytes
from lowbit.layer_kinds import quantized_layers


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    """Every quantized weight of one model is in the other, part for part; and there are some."""
    first, second = dict(quantized_layers(one)), dict(quantized_layers(other))
    assert first.keys() == second.keys()
    assert first
    for name, layer in first.items():
        assert layer.weight.format == second[name].weight.format
        for part, tensor in layer.weight.parts.items():
            there = second[name].weight.parts[part]
            assert tensor.dtype == there.dtype, (name, part)
            assert torch.equal(raw_bytes(tensor), raw_bytes(there)), (name, part)
