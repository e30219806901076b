"""Linears by the names that a checkpoint has for them."""

from __future__ import annotations

from torch import nn

from lowbit.calibration.names import checkpoint_names


def model():
    """Two blocks with one layer each, and a head."""
    blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(8, 8)}) for _ in range(2))
    return nn.ModuleDict({"encoder": nn.ModuleDict({"layers": blocks}), "head": nn.Linear(8, 3)})


def test_a_prefix_is_found():
    """Keys with something in front of the module's names are matched; equal names are left alone."""
    shapes = {"bert.encoder.layers.0.proj": (8, 8), "bert.encoder.layers.1.proj": (8, 8), "head": (3, 8)}

    assert checkpoint_names(model(), shapes) == {
        "encoder.layers.0.proj": "bert.encoder.layers.0.proj",
        "encoder.layers.1.proj": "bert.encoder.layers.1.proj",
    }


def test_a_prefix_of_the_module_is_found():
    """The module may be the one with more in front."""
    shapes = {"layers.0.proj": (8, 8), "layers.1.proj": (8, 8)}

    assert checkpoint_names(model(), shapes) == {
        "encoder.layers.0.proj": "layers.0.proj",
        "encoder.layers.1.proj": "layers.1.proj",
        "head": None,
    }


def test_what_is_not_certain_is_left():
    """Two keys that fit equally well, or one of another shape, are not taken."""
    shapes = {"a.encoder.layers.0.proj": (8, 8), "b.encoder.layers.0.proj": (8, 8), "x.head": (4, 8)}

    assert checkpoint_names(model(), shapes) == {
        "encoder.layers.0.proj": None,
        "encoder.layers.1.proj": None,
        "head": None,
    }


def test_one_weight_is_not_taken_twice():
    """A key that two linears would take goes to none of them."""
    assert set(checkpoint_names(model(), {"layers.proj": (8, 8), "head": (3, 8)}).values()) == {None}
