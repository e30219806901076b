"""ComfyUI for tests: the stand-in always, and the source tree that the environment variable COMFYUI_PATH names."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from lowbit.checkpoint.dialects import StoredLayer
from lowbit.checkpoint.dialects.comfy import COMFY
from lowbit.formats.parts import raw_bytes
from lowbit.formats.registry import as_format
from tests.support.comfy_stand_in import make_modules

TREE = os.environ.get("COMFYUI_PATH", "")
STAND_IN, REAL = "stand_in", "real"
_LOADED: dict[str, object] = {}
BOTH = (STAND_IN, REAL)


def real_modules() -> dict[str, object]:
    """The modules of the tree by name; imported once, for the CPU."""
    if not TREE:
        pytest.skip("COMFYUI_PATH does not name a ComfyUI source tree")
    if not _LOADED:
        assert (Path(TREE) / "comfy" / "ops.py").is_file(), f"COMFYUI_PATH={TREE} is no ComfyUI source tree"
        sys.path.insert(0, TREE)
        before = set(sys.modules)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("comfy.cli_args").args.cpu = True
            importlib.import_module("comfy.quant_ops")
            importlib.import_module("comfy.ops")
            with contextlib.suppress(ImportError):  # tests that need it skip, and say so
                importlib.import_module("comfy.sd")
        _LOADED.update({name: sys.modules[name] for name in set(sys.modules) - before if name.startswith("comfy.")})
        _LOADED["comfy"] = sys.modules["comfy"]
        sys.path.remove(TREE)
    return _LOADED


def install(kind, monkeypatch):
    """Put the stand-in or the real package `comfy` where lowbit looks for it. Skips without a tree."""
    modules = make_modules() if kind == STAND_IN else real_modules()
    for name in [name for name in sys.modules if name == "comfy" or name.startswith("comfy.")]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    if kind == REAL:
        monkeypatch.syspath_prepend(TREE)
        table = modules["comfy.quant_ops"].QUANT_ALGOS
        for name in [name for name in table if name.startswith("lowbit_")]:
            monkeypatch.delitem(table, name)
    return modules["comfy"]


def stored_linear(spec, n=128, k=256, *, layer="lin", dtype=torch.bfloat16, layout=""):
    """A linear as a ComfyUI file holds it: its tensors by key with a random bias, its format, parts and weight."""
    fmt = as_format(spec)
    weight = (0.05 * torch.randn(n, k)).to(dtype)
    parts = fmt.quantize(weight)
    stored = StoredLayer(layer, fmt, (n, k), dtype=dtype, layout=layout)
    tensors = {**COMFY.store_parts(stored, parts), f"{layer}.bias": torch.randn(n).to(dtype)}
    return tensors, fmt, parts, weight


def same_tensors(a, b):
    """Whether two state dicts have the same keys, dtypes and bytes."""
    return set(a) == set(b) and all(
        a[key].dtype == b[key].dtype and torch.equal(raw_bytes(a[key].detach()), raw_bytes(b[key].detach()))
        for key in a
    )


class OneLinear(nn.Module):
    """A model of one linear, "lin", made of the operations of a class."""

    def __init__(self, ops, n=128, k=256, *, bias=True):
        super().__init__()
        self.lin = ops.Linear(k, n, bias=bias)
        self.lin.weight_function, self.lin.bias_function = [], []

    def forward(self, x):
        """The product."""
        return self.lin(x)


def loaded(ops, tensors, n=128, k=256, *, bias=True):
    """A `OneLinear` with the tensors of a state dict."""
    model = OneLinear(ops, n, k, bias=bias)
    model.load_state_dict(dict(tensors))
    return model
