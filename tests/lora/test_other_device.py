"""Adapters on modules on another device, beside the weights and baked into them.

Without a GPU a stand-in refuses what a GPU would (`tests.support.other_device`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import QuantizedTensor
from lowbit.dispatch import use_backend
from lowbit.formats.parts import raw_bytes
from lowbit.lora import Delta, DoraDelta, LohaDelta, LokrDelta, LoraDelta, attach_lora, bake_lora, combined
from lowbit.lora.adapter_delta import RowsDelta
from tests.lora.models import FORMATS, adapter, model
from tests.support import gaussian
from tests.support.other_device import back, elsewhere, moved, needs_stand_in, other_device

pytestmark = needs_stand_in
X = gaussian(3, 64, seed=5)


def _low(n: int, k: int, seed: int = 0) -> LoraDelta:
    return LoraDelta(gaussian(2, k, seed=seed) * 0.05, gaussian(n, 2, seed=seed + 1))


KINDS: dict[str, Delta] = {  # of the linear `out` [48, 64]
    "LoRA": _low(48, 64),
    "LoHa": LohaDelta(_low(48, 64), _low(48, 64, seed=2), 0.5),
    "LoKr": LokrDelta(gaussian(6, 8) * 0.02, _low(8, 8, seed=4)),
    "whole LoKr": LokrDelta(gaussian(6, 8) * 0.02, gaussian(8, 8, seed=4)),
    "DoRA": DoraDelta(_low(48, 64), gaussian(1, 48, seed=6)[0].abs() + 0.1, by_row=True),
    "DoRA by column": DoraDelta(_low(48, 64), gaussian(1, 64, seed=6)[0].abs() + 0.1, by_row=False),
    "parts": RowsDelta([(0, _low(16, 64)), (32, _low(16, 64, seed=2))], 48),
    "sum": combined([({"out": _low(48, 64)}, 0.5), ({"out": LokrDelta(gaussian(6, 8), gaussian(8, 8))}, 0.1)])["out"],
}


def sent(value: Any, at: Callable[[Tensor], Tensor]) -> Any:
    """A change with all of its tensors somewhere else."""
    if isinstance(value, Tensor):
        return at(value)
    if isinstance(value, list | tuple):
        return type(value)(sent(each, at) for each in value)
    if not dataclasses.is_dataclass(value):
        return value
    held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dataclasses.replace(value, **{name: sent(each, at) for name, each in held.items()})


def quantized(at: Callable[[nn.Module], nn.Module] = lambda module: module) -> nn.Module:
    """The small model in three formats."""
    made = at(model()).requires_grad_(False)
    with use_backend("eager"):
        lowbit.quantize_(made, FORMATS)
    return made


def state(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a module, those of quantized weights by part."""
    found: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        parts = value.parts.items() if isinstance(value, QuantizedTensor) else [("", value)]
        found |= {f"{name}.{part}": tensor for part, tensor in parts}
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that all of them are on the stand-in, with these bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(raw_bytes(back(found[name])), raw_bytes(tensor)), name


@pytest.mark.parametrize("at", [lambda x: x, elsewhere], ids=["adapter on the CPU", "adapter on the device"])
def test_a_branch_runs_where_its_layer_is(at):
    """Several adapters, another strength, and moving the module with them."""
    here, there = quantized(), quantized(moved)
    first, second = adapter(), adapter(seed=1, names=("up",))
    with use_backend("eager"):
        attach_lora(here, first, 0.5)
        attach_lora(here, second).strength = 0.25
        expected = here(X)
        with other_device():
            attach_lora(there, sent_all(first, at), 0.5)
            handle = attach_lora(there, sent_all(second, at))
            handle.strength = 0.25
            assert torch.equal(back(there(elsewhere(X))), expected)
            there.to("cpu")
            assert torch.equal(there(X), expected)
            handle.strength = 0.5
            handle.remove()


def sent_all(layers: dict[str, Any], at: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """An adapter with all of its tensors somewhere else."""
    return {name: sent(delta, at) for name, delta in layers.items()}


@pytest.mark.parametrize("at", [lambda x: x, elsewhere], ids=["adapter on the CPU", "adapter on the device"])
@pytest.mark.parametrize("rounding", [None, "nearest", "stochastic", "error_feedback"])
def test_an_adapter_is_baked_in_where_the_module_is(rounding, at):
    """Parts and biases stay there, and what was there before comes back, also after a move."""
    here, there = quantized(), quantized(moved)
    names = ("up", "out") if rounding == "stochastic" else ("up", "down", "out")
    before = state(here)
    with use_backend("eager"):
        done = bake_lora(here, adapter(names=names), rounding=rounding)
        with other_device():
            found = bake_lora(there, sent_all(adapter(names=names), at), rounding=rounding)
            same(state(there), state(here))
            assert found.layers == done.layers
            found.unbake()
            same(state(there), before)
            found = bake_lora(there, sent_all(adapter(names=names), at), rounding=rounding)
            there.to("cpu")
            found.unbake()
        pairs = zip(state(there).values(), before.values(), strict=True)
        assert all(torch.equal(raw_bytes(a), raw_bytes(b)) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [lambda x: x, elsewhere], ids=["adapter on the CPU", "adapter on the device"])
def test_every_kind_of_change(kind, at):
    """Into a quantized weight and into a plain one, and beside it where it is a thin product."""
    here, there = quantized(), quantized(moved)
    plain, plain_there = model().requires_grad_(False), moved(model().requires_grad_(False))
    change, given = {"out": KINDS[kind]}, {"out": sent(KINDS[kind], at)}
    with use_backend("eager"):
        for module in (here, plain):
            bake_lora(module, change)
        with other_device():
            for module in (there, plain_there):
                bake_lora(module, given)
        same(state(there), state(here))
        same(state(plain_there), state(plain))
        if change["out"].low_rank() is not None:
            attach_lora(here, change)
            expected = here(X)
            with other_device():
                attach_lora(there, given)
                assert torch.equal(back(there(elsewhere(X))), expected)


def test_adapters_of_two_devices_are_combined():
    """One that is trained on the device and one of a file: for layers that both change, and for rows of one layer."""
    here, there = quantized(), quantized(moved)
    one, two = adapter(), adapter(seed=1)
    rows = RowsDelta([(0, _low(16, 64)), (32, _low(16, 64, seed=2))], 48)
    mixed = RowsDelta([(0, sent(_low(16, 64), elsewhere)), (32, _low(16, 64, seed=2))], 48)
    with use_backend("eager"):
        bake_lora(here, combined([(one, 1.0), (two, 0.5)]))
        attach_lora(here, {"out": rows})
        expected = here(X)
        with other_device():
            bake_lora(there, combined([(sent_all(one, elsewhere), 1.0), (two, 0.5)]))
            same({k: v for k, v in state(there).items() if "lora" not in k}, state_of_bake(here))
            attach_lora(there, {"out": mixed})
            assert torch.equal(back(there(elsewhere(X))), expected)


def state_of_bake(module: nn.Module) -> dict[str, Tensor]:
    """Without branches."""
    return {name: value for name, value in state(module).items() if "lora" not in name}
