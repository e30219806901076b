"""A pytest plugin that puts lowbit.integrations.kitchen in the place of comfy_kitchen, for its own test suite.

Its tests take expectations from private helpers (`comfy_kitchen.backends.eager...`) and from the constraints of its
registry; those stay its own. All that is public is ours.
"""

from __future__ import annotations

import sys
import types

import comfy_kitchen as theirs
from comfy_kitchen.tensor import int8_utils

import lowbit.integrations.kitchen as ours

LAYOUT_MODULES = ("awq_w4a16", "base", "convrot_w4a4", "fp8", "int8", "mxfp8", "nvfp4", "svdquant_w4a4", "w4a8_int8")


class StandIn(types.ModuleType):
    """The module `comfy_kitchen`, whose public names are ours."""

    __path__ = theirs.__path__
    registry = types.SimpleNamespace(get_constraints=theirs.registry.get_constraints, use_backend=ours.use_backend)

    def __getattr__(self, name):
        return getattr(ours, name)

    @staticmethod
    def list_backends():
        """Ours, under its names of functions."""
        listed = ours.list_backends()
        functions = [name for name in ours.__all__ if callable(getattr(ours, name))]
        return {"eager": {**listed["eager"], "capabilities": functions}}


for loaded in [name for name in sys.modules if name.startswith("comfy_kitchen.tensor")]:
    del sys.modules[loaded]
sys.modules["comfy_kitchen"] = StandIn("comfy_kitchen")
sys.modules["comfy_kitchen.tensor"] = ours.tensor
sys.modules["comfy_kitchen.float_utils"] = ours.float_utils
sys.modules["comfy_kitchen.tensor.int8_utils"] = int8_utils
for part in LAYOUT_MODULES:
    sys.modules[f"comfy_kitchen.tensor.{part}"] = sys.modules[f"lowbit.integrations.kitchen.tensor.{part}"]
