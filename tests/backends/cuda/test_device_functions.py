from __future__ import annotations

import faulthandler
import os
import signal
from pathlib import Path

import pytest
import torch

from tests.support import cuda_simulator

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import compiler

SOURCE = str(Path(__file__).parents[2] / "native" / "products.cu")
SEEDS = ("1", "2", "3")
DTYPES = {0: torch.int8, 1: torch.float16, 2: torch.bfloat16}


def run(name: str, grid: int, block: int, arguments: list, shared: int = 0) -> None:
    """One of the kernels of products.cu, simulated."""
    cuda_simulator.launch(SOURCE, f"lowbit::{name}", torch.device("cpu"), grid, block, arguments, shared)


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["int8", "int4", "uint4"])
def test_integer_products(kind):
    """The fragments of m16n8k32 and m16n8k64 give the product and keep to the constants they start from."""
    size = 32 if kind == 0 else 64
    left = torch.randint(-128, 128, (16, size)) if kind == 0 else torch.randint(-8, 8, (16, size))
    right = torch.randint(-128, 128, (8, size)) if kind == 0 else torch.randint(0, 8 if kind == 1 else 16, (8, size))
    if kind == 1:
        right -= 4
    wanted = left @ right.t() + torch.tensor([[1, 2], [3, 4]]).repeat_interleave(8, 0).repeat(1, 4)
    if kind:
        left, right = ((part[:, ::2] & 15) | (part[:, 1::2] & 15) << 4 for part in (left, right))
    out = torch.zeros(16, 8, dtype=torch.int32)
    run(f"product<{kind}>", 1, 32, [left.to(torch.uint8), right.to(torch.uint8), out])
    assert torch.equal(out.long(), wanted)


@pytest.mark.parametrize("seed", SEEDS)
def test_matrices(seed, monkeypatch):
    """Asynchronous copies fill with zeros what is not valid, and ldmatrix hands rows out to lanes."""
    monkeypatch.setenv("LOWBIT_SIMULATOR_SEED", seed)
    rows = torch.randint(0, 1 << 15, (32, 8), dtype=torch.int16)
    out = torch.zeros(4, 32, dtype=torch.int32)
    run("matrices", 1, 32, [rows, out], 512)
    rows[5] = 0
    assert torch.equal(out.view(torch.int16).view(4, 8, 8), rows.view(4, 8, 8))


@pytest.mark.parametrize("seed", SEEDS)
def test_ring(seed, monkeypatch):
    """Bulk copies and mailboxes hand every slot over once it is full, and back once it was read."""
    monkeypatch.setenv("LOWBIT_SIMULATOR_SEED", seed)
    numbers = torch.randint(-1000, 1000, (11, 128), dtype=torch.int32)
    out = torch.zeros(128, dtype=torch.int32)
    run("ring<3>", 1, 160, [numbers, out, 11], 3 * 512 + 64)
    assert torch.equal(out.long(), numbers.long().sum(0))


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["int8", "float16", "bfloat16"])
def test_warpgroup_products(kind, width, monkeypatch):
    """Products of four warps read B through the swizzle of its width, and add up over K."""
    dtype = DTYPES[kind]
    for tokens, seed in ((8, "1"), (32, "2"), (32, "3")):
        monkeypatch.setenv("LOWBIT_SIMULATOR_SEED", seed)
        left, right = (torch.randint(-100, 100, (rows, width // dtype.itemsize)).to(dtype) for rows in (64, tokens))
        out = torch.zeros(64, tokens, dtype=torch.int32)
        run(f"warpgroup<{kind}, {tokens}, {width}>", 1, 128, [left, right, out], tokens * width)
        found = out.long() if kind == 0 else out.view(torch.float32).long()
        assert torch.equal(found, left.long() @ right.long().t())


@pytest.mark.skipif(torch.cuda.is_available() or not hasattr(os, "fork"), reason="of the simulator alone")
@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize(
    ("name", "said"), [("unordered<8>", "without begin_products"), ("overrun", "behind the shared")]
)
def test_mistakes_are_seen(name, said, capfd):
    """The simulator stops at products that nothing orders, and at writes behind the shared memory of a launch."""
    cuda_simulator._library(SOURCE, f"lowbit::{name}")  # compiled, so that the child only runs it
    child = os.fork()
    if not child:
        faulthandler.disable()
        run(name, 1, 128, [torch.zeros(128, dtype=torch.int32)], 512)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGABRT
    assert said in capfd.readouterr().err


def test_compile():
    """The device functions compile for every architecture that has them, without a warning."""
    names = [(f"product<{kind}>", arch) for kind in range(3) for arch in ("sm_80", "sm_90a", "sm_120a")]
    names += [("matrices", "sm_80"), ("ring<3>", "sm_90a"), ("ring<3>", "sm_100a"), ("ring<3>", "sm_120a")]
    names += [(f"warpgroup<{kind}, {tokens}, 64>", "sm_90a") for kind in range(3) for tokens in (8, 64, 256)]
    for name, arch in names:
        made = compiler.compile_now(SOURCE, f"lowbit::{name}", arch)
        assert not made.warnings, made.warnings
        assert not made.spills


def test_on_a_gpu(monkeypatch):
    """Where there is a GPU, a launch gets copies of the tensors there, and the tests see what it made of them."""
    seen = []

    def launched(source, name, device, grid, block, arguments, *sizes):
        seen.append((source, name, grid, block, *sizes))
        arguments[0].add_(arguments[2])

    monkeypatch.setattr(cuda_simulator, "_LAUNCH", launched)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, _: self.clone())
    out = torch.zeros(3)
    cuda_simulator.launch("a.cu", "f", torch.device("cpu"), 2, 32, [out, None, 5], 64)
    assert out.tolist() == [5, 5, 5]
    assert seen == [("a.cu", "f", 2, 32, 64, 0)]
