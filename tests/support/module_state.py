"""The tensors of a module on the stand-in for another device, and those of the same module on the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowbit import QuantizedTensor
from lowbit.experts import QuantizedBank
from lowbit.formats.parts import raw_bytes
from tests.support.other_device import back


def state(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a module, those of quantized weights by part."""
    found: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        if isinstance(value, QuantizedTensor | QuantizedBank):
            found |= {f"{name}.{part}": tensor for part, tensor in value.parts.items()}
        else:
            found[name] = value
    return found


def assert_same_there(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """All of them are on the stand-in, with these bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(raw_bytes(back(found[name])), raw_bytes(tensor)), name
