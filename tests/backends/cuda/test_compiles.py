from __future__ import annotations

import re

import pytest

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import compiler
from lowbit.backends.cuda.compiler import Binary
from lowbit.backends.cuda.kernels import Launch
from lowbit.dispatch import Kernel
from tests.support import cuda_launches
from tests.support.cuda_launches import (
    SHARED,
    Noted,
    all_noted,
    capability,
    distinct,
    entries,
    functions,
    judge,
    nowhere,
    title,
)

TITLES = sorted({title(entry) for entry in entries()})
ARCHITECTURES = ("sm_80", "sm_90a", "sm_120a")
LOG = "0 bytes stack frame, {0} bytes spill stores, {0} bytes spill loads\nptxas info : Used 80 registers, {1}\n"
NAME = "lowbit::f<lowbit::kHalf, 8>"


@pytest.mark.parametrize("name", TITLES)
def test_every_entry_is_launched(name):
    """The table of examples has arguments that each registered kernel takes, so that nothing escapes the compiler."""
    reasons = [all_noted(architecture)[1].get(name) for architecture in SHARED]
    assert None in reasons, reasons


def test_every_function_is_launched():
    """Every `__global__` function of every file is launched by some entry on some architecture."""
    assert not nowhere(list(SHARED))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("function", functions())
def test_compiles(function, architecture):
    """A kernel compiles without a warning, fits the memory of the GPU and keeps its registers (two variants of it)."""
    mine = [one for one in distinct(all_noted(architecture)[0]) if one.function == function]
    for one in dict.fromkeys([*mine[:1], *mine[-1:]]):  # none: a kernel for other GPUs
        verdict = judge(one, architecture)
        assert not verdict.fault, f"{one.by}, {one.launch.name}: {verdict.fault}"
        assert 0 < verdict.made.registers <= 255


@pytest.mark.parametrize(
    ("log", "dynamic", "hot", "fault"),
    [
        (LOG.format(0, "used 1 barriers, 4096 bytes smem, 432 bytes cmem[0]"), 90 << 10, True, ""),
        (LOG.format(0, "used 1 barriers, 10240 bytes smem"), 90 << 10, True, "needs 102400 bytes of shared memory"),
        (LOG.format(0, "432 bytes cmem[0]"), 99 << 10, True, ""),
        (LOG.format(0, "432 bytes cmem[0]"), 100 << 10, True, "needs 102400 bytes"),
        (LOG.format(8, "432 bytes cmem[0]"), 0, True, "spills 16 bytes"),
        (LOG.format(8, "432 bytes cmem[0]"), 0, False, ""),
        (LOG.format(0, "432 bytes cmem[0]") + "a.cu(3): warning #177-D", 0, False, "the compiler warns: a.cu(3)"),
    ],
)  # fmt: skip
def test_verdicts(log, dynamic, hot, fault):
    """A warning and too much shared memory, the kernel's and the launch's together, are faults; so are hot spills."""
    one = Noted(Launch("a.cu", NAME, dynamic), "linear", "nvfp4", hot)
    found = judge(one, "sm_86", lambda *_: Binary(b"", "f", log))
    assert found.fault.startswith(fault)
    assert bool(found.fault) == bool(fault)
    assert found.made.registers == 80


def test_what_the_compiler_raises_is_a_fault():
    """An error of the compiler is reported with its text; the others are still compiled."""
    one = Noted(Launch("words_gemv.cu", NAME), "linear", "nvfp4", hot=True)
    assert "no template" in judge(one, "sm_90a", _refuse).fault
    assert "does not compile" in judge(one, "sm_90a").fault


def _refuse(*_):
    raise RuntimeError("there is no template of that name")


def test_what_escapes_is_named(monkeypatch, tmp_path):
    """An op without examples and a function that nothing launches are errors by name."""
    known = entries()[0]
    (tmp_path / "new.cu").write_text(
        "// __global__ void in_a_comment(int)\ntemplate <int n>\n__global__ void __launch_bounds__(f(32) * n, 1)\n"
        "    forgotten(int a) {}\n__global__ void other() {}\n"
    )
    unknown = Kernel("no_such_op", "*", "cuda", "", 0.0, None, known.run)
    monkeypatch.setattr(cuda_launches, "entries", lambda: [unknown])
    monkeypatch.setattr(compiler, "FOLDER", tmp_path)
    all_noted.cache_clear()
    try:
        said = nowhere(["sm_90a"])
    finally:
        all_noted.cache_clear()
    assert functions() == ["new.cu: forgotten", "new.cu: other"]
    assert "no example arguments for this op" in said[0]
    assert [line.partition(":")[2] for line in said[1:]] == [
        f" {name}: no entry launches it in the examples" for name in ("forgotten", "other")
    ]


def test_capabilities():
    """The names of architectures and their numbers agree."""
    numbers = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
    assert [capability(name) for name in SHARED] == numbers


def test_nothing_that_an_older_compiler_dies_of():
    """A lambda with `auto` takes no array by its size: NVRTC before 13.4 (PyTorch 2.11 has 13.0) ends the process."""
    for path in compiler.FOLDER.rglob("*.cu*"):
        lambdas = re.findall(r"\[[&=]?\]\(([^{]*)\)[^{)]*\{", path.read_text())
        assert not [one for one in lambdas if "auto " in one and re.search(r"\(&\w*\)\s*\[", one)], path.name


def test_instructions_of_a_warp_stay_where_they_are():
    """An instruction that all lanes of a warp reach together is volatile: others the compiler may move behind an if.

    ("Inline PTX Assembly", Incorrect Optimization: asm without volatile may be deleted or moved.)
    """
    sources = [*compiler.FOLDER.glob("*.cu"), *(compiler.FOLDER / "device").glob("*.cuh")]
    found = [
        (path.name, *one)
        for path in sources
        for one in re.findall(r"\basm(\s+volatile)?\(\s*\"([^\"]*)", path.read_text())
    ]
    assert {"mma.cuh", "mma_tf32.cuh", "transpose.cuh"} <= {name for name, _, text in found if ".aligned" in text}
    assert not [(name, text) for name, volatile, text in found if ".sync" in text and not volatile]
