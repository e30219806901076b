from __future__ import annotations

import pytest
import torch

from tests.support import cuda_simulator

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import compiler, kernels, svdquant_storage
from lowbit.backends.gpu import Target, assume
from lowbit.numerics.int4_matmul import GROUP, unpack_codes

STORAGES = ("fragments4", "fragments8", "swizzled8")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _places(storage: str, padded: int) -> torch.Tensor:
    """The byte of a group at which the code of a token and a column lies: [padded, 64]."""
    m, c = torch.meshgrid(torch.arange(padded), torch.arange(GROUP), indexing="ij")
    s = c // 2
    if storage == "fragments4":
        lane = m % 8 * 4 + c // 8 % 4
        return m // 16 * 512 + lane * 16 + m % 16 // 8 * 8 + c // 32 * 4 + c % 8 // 2
    if storage == "fragments8":
        return m // 8 * 512 + (m % 8 * 4 + s % 16 // 4) * 16 + (c % 2 * 2 + s // 16) * 4 + s % 4
    b = c % 2 * 32 + s
    return m * 64 + (b // 16 ^ m // 2 % 4) * 16 + b % 16


@pytest.mark.parametrize(("storage", "dtype"), list(zip(STORAGES, DTYPES, strict=True)), ids=str)
@pytest.mark.parametrize("unsigned", [False, True])
def test_where_codes_go(storage, dtype, unsigned, monkeypatch):
    """Every code is at its place, of padded tokens 0; scales are the same numbers in float32, and 0."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    for m, k in ((21, 128), (1, 64), (16, 192)):
        act = torch.randint(-128, 128, (m, k // 2), dtype=torch.int8)
        scales = torch.rand(k // GROUP, m).to(dtype)
        found, scale = svdquant_storage.stored(act, scales, storage=storage, tokens_multiple=16, unsigned=unsigned)
        padded = -(-m // 16) * 16
        codes = torch.zeros(padded, k, dtype=torch.int32)
        codes[:m] = unpack_codes(act, unsigned)
        wanted = codes.view(padded, -1, GROUP).transpose(0, 1)
        there = found.view(k // GROUP, -1).int()[:, _places(storage, padded)]
        if storage == "fragments4":
            there, wanted = there >> torch.tensor([0, 4]).repeat(32) & 15, wanted & 15
        assert found.numel() == padded * k // (2 if storage == "fragments4" else 1)
        assert torch.equal(there, wanted)
        assert torch.equal(scale[:, :m], scales.float())
        assert not scale[:, m:].any()


def test_where_codes_begin(monkeypatch):
    """Codes are loaded 16 bytes at a time: those that begin elsewhere are copied first."""
    seen = []
    monkeypatch.setattr(kernels, "launch", lambda *args: seen.append(args[-1][0]))
    room = torch.zeros(80, dtype=torch.int8)
    for offset in (0, 8):
        act = room[offset : offset + 64].view(2, 32)
        svdquant_storage.stored(act, torch.ones(1, 2), storage="fragments8", tokens_multiple=16, unsigned=False)
        assert seen[-1].data_ptr() % 16 == 0


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_120a"])
def test_compiled(architecture):
    """Compiles without warnings and keeps all in registers."""
    act = torch.empty((64, 64), dtype=torch.int8, device="meta")
    scales = torch.empty((2, 64), dtype=torch.bfloat16, device="meta")
    for storage in STORAGES:
        with assume(Target("cuda", (8, 0))), kernels.record() as launches:
            svdquant_storage.stored(act, scales, storage=storage, tokens_multiple=16, unsigned=False)
        (launch,) = launches
        made = compiler.compile_now(launch.source, launch.name, architecture)
        assert not made.warnings
        assert made.spills == 0
