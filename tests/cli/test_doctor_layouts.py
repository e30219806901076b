"""`lowbit doctor` about weights in the layouts of kernels."""

from __future__ import annotations

import importlib

from tests.support.toy_layout import toy_backend

ASKED = ("doctor", "--format", "fp8_e4m3(granularity=row)", "--shape", "64x64", "--dtype")


def test_doctor_asks_about_the_weight_as_it_is_loaded(lowbit, monkeypatch):
    """The layout that loading packs it in is named, and what unpacks it at every call says so."""
    compiled = {"instruction_set": None, "usable": [], "pool": None}  # the toy backend is not
    monkeypatch.setattr(importlib.import_module("lowbit.cli.doctor"), "_cpu_kernels", lambda: compiled)
    with toy_backend("linear"):
        data, text = lowbit(*ASKED, "float32", "--json"), lowbit(*ASKED, "bfloat16")
    assert (data.code, data.json["choice"]["layout"], data.json["choice"]["runs"]) == (0, "toy", "cpu:linear_toy")
    assert text.code == 0
    assert "packed as toy" in text.out
    assert "cpu:linear_toy: x is torch.bfloat16, not float32" in text.out
    assert "eager:linear: runs, but unpacks the layout at every call" in text.out
    assert "runs: eager:linear" in text.out
