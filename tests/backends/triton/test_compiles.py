from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from lowbit.backends.triton import compile_ahead
from lowbit.backends.triton.compile_ahead import Compiled
from lowbit.backends.triton.device import assume
from lowbit.backends.triton.tuning import KERNELS, record
from lowbit.formats import parse_spec
from lowbit.layouts.base import get_layout
from tests.support import triton_launches
from tests.support.triton_launches import all_noted, distinct, entries, judge, qualified, title

TITLES = sorted({title(entry) for entry in entries()})
TARGETS = ("sm_90", "sm_80")
TARGET = triton_launches.TARGETS["sm_90"]


@pytest.mark.parametrize("name", TITLES)
def test_every_entry_is_launched(name):
    """The table of examples has arguments that each registered kernel takes, so that nothing escapes the compiler."""
    found, missing = all_noted()
    assert name not in missing, missing[name]
    assert found[name]


@pytest.mark.parametrize("index", range(len(KERNELS)), ids=[qualified(kernel) for kernel in KERNELS])
def test_compiles(index):
    """Every kernel compiles in its first config for Hopper and Ampere, fits their memory and keeps its registers."""
    kernel = KERNELS[index]
    for target in TARGETS:
        mine = [one for one in distinct(all_noted(target)[0]) if one.kernel is kernel]
        assert mine, f"no entry of the dispatch table launches {qualified(kernel)} in the examples"
        verdict = judge(mine[0], mine[0].first[0], target)
        assert not verdict.fault, f"{mine[0].by}, {mine[0].first[0]}, {target}: {verdict.fault}"


@pytest.mark.parametrize(
    ("made", "position", "fault", "note"),
    [
        (Compiled(90, 0, 1000, "st.global.v4"), 0, "", ""),
        (Compiled(4, 0, 1000, "trap;"), 1, "nothing is left", ""),
        (Compiled(255, 64, 1000, "st.global.v4"), 0, "spills 64 bytes", ""),
        (Compiled(255, 64, 1000, "st.global.v4"), 1, "", "spills 64 bytes"),
        (Compiled(90, 0, 1 << 20, "st.global.v4"), 0, "needs 1048576 bytes", ""),
        (Compiled(90, 0, 1 << 20, "st.global.v4"), 1, "", "passed over"),
    ],
)
def test_verdicts(monkeypatch, made, position, fault, note):
    """An empty kernel is a fault in any config; spills and too much memory are one in the first, else noted."""
    one = next(one for one in distinct(all_noted()[0]) if one.others)
    monkeypatch.setattr(triton_launches, "compile_launch", lambda *_: made)
    verdict = judge(one, (one.others if position else one.first)[0], "sm_90")
    assert verdict.fault.startswith(fault)
    assert verdict.note.startswith(note)
    assert bool(verdict.fault) == bool(fault)
    assert bool(verdict.note) == bool(note)


@pytest.mark.parametrize("layout", ["", "words128"])
@pytest.mark.parametrize("spec", ["awq_w4a16(group_size=256)", "wna16(group_size=0,zero_point=True)"])
def test_groups_wider_than_a_block(spec, layout):
    """A scale for more columns than are decoded at a time, or for the whole row, compiles like any other."""
    fmt, x = parse_spec(spec), torch.empty((1, 512), dtype=torch.bfloat16, device="meta")
    parts = fmt.empty_parts((64, 512), x.device, x.dtype)
    parts = get_layout(layout, fmt).pack(fmt, parts) if layout else parts
    (linear,) = [one for one in entries() if (one.op, one.format, one.layout) == ("linear", fmt.name, layout)]
    with assume(TARGET), record() as launches:
        linear.run(fmt, x, parts, None)
    assert compile_ahead.compile_launch(launches[0], launches[0].configs[0], TARGET).spills == 0


def test_resources_are_those_of_the_kernel():
    """Functions that are not inlined are listed beside the kernel, before it or behind."""
    said = """Resource usage:
 Common:
  GLOBAL:0
 Function __internal_division:
  REG:40 STACK:16 SHARED:0
 Function _linear:
  REG:4 STACK:0 SHARED:0
 Function _linear_part:
  REG:80 STACK:8 SHARED:0
"""
    assert compile_ahead._read_resources(said, "_linear") == (4, 0)
    with pytest.raises(RuntimeError, match="nothing of the registers of _other"):
        compile_ahead._read_resources(said, "_other")


def test_what_the_compiler_raises_is_a_fault(monkeypatch):
    """An error of the compiler is reported with its text; the others are still compiled."""

    def refuse(*_):
        raise RuntimeError("ptxas says no")

    monkeypatch.setattr(triton_launches, "compile_launch", refuse)
    one = distinct(all_noted()[0])[0]
    assert "ptxas says no" in judge(one, one.first[0], "sm_90").fault


def test_an_op_without_examples_is_named(monkeypatch):
    """A kernel of an op that the table of examples does not know fails by name."""
    known = entries()[0]
    unknown = type(known)("no_such_op", "*", "triton", "", 0.0, None, known.run)
    monkeypatch.setattr(triton_launches, "entries", lambda: [unknown])
    all_noted.cache_clear()
    try:
        found, missing = all_noted()
    finally:
        all_noted.cache_clear()
    assert not found
    assert "no example arguments for this op" in missing[title(unknown)]
