from __future__ import annotations

import itertools

import pytest
import torch

from lowbit.dispatch import use_backend
from lowbit.numerics.int4_matmul import GELU_SHIFT, quantize_groups, unpack_codes
from lowbit.ops import quantize_svdquant_w4a4 as the_op
from tests.support import cuda_simulator
from tests.support.cpu_linear import activations, relative_error

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import compiler, kernels
from lowbit.backends.cuda import quantize_svdquant_w4a4 as cuda
from lowbit.backends.gpu import Target, assume

HALVES = (torch.bfloat16, torch.float16)
GPU = Target("cuda", (9, 0))
FEW = Target("cuda", (9, 0), 1)


@pytest.fixture
def simulated(monkeypatch):
    """Launches run on a simulated GPU."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)


def operands(m: int, k: int, rank: int, dtype: torch.dtype, smooth: torch.dtype):
    """x with rows of zeros, tiny rows and quotients halfway between codes, smoothing factors with a 0, and proj_down."""
    generator = torch.Generator().manual_seed(m + k + rank)
    x, factor = activations(m, k, dtype), (torch.rand(k, generator=generator) + 0.5).to(smooth)
    down = torch.randn(k, rank, generator=generator).to(dtype)
    x[m // 2], x[m // 3], factor[k // 2 + 3] = 0, x[m // 3] * 1e-20, 0
    x[-1] = (x[-1] * 2).round()
    return x, factor, down


def eager(x, smooth, unsigned, shift):
    """Codes [M, K] and scales [M, K/64] of eager."""
    return quantize_groups(x.float() + shift, smooth, unsigned)


def test_plain(simulated):
    """The named op gives eager's bits of codes and scales, and its sums, over odd shapes and every kind of operand."""
    cases = [
        (1, 64, 3, torch.bfloat16, torch.bfloat16, 1, False, False),
        (23, 320, 11, torch.float16, torch.bfloat16, 1, True, True),
        (17, 192, 16, torch.bfloat16, torch.float32, 16, False, True),
        (5, 1280, 40, torch.float16, torch.float16, 256, True, False),
    ]
    for m, k, rank, dtype, smooth, pad_size, unsigned, apart in cases:
        x, factor, down = operands(m, k, rank, dtype, smooth)
        raw = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype) if apart else None
        arguments = (x, factor, down, pad_size, unsigned, raw)
        with use_backend("eager"):
            wanted = the_op(*arguments)
        with assume(GPU):
            assert cuda.refuses_quantize(*arguments) is None
            found = cuda.quantize_svdquant_w4a4(*arguments)
        assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in wanted]
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
        assert relative_error(found[2], wanted[2].double()) < 1e-5
        assert not found[2][m:].any()


def stored(codes: torch.Tensor, storage: str) -> torch.Tensor:
    """Codes [Mp, K] -> the bytes that the definition of a storage asks for, each written once, as a flat tensor."""
    tokens, k = codes.shape
    out = torch.full((tokens * k // (2 if storage == "fragments4" else 1),), -1, dtype=torch.int32)
    token, column = torch.meshgrid(torch.arange(tokens), torch.arange(k), indexing="ij")
    group, c, code = column // 64, column % 64, codes.int()
    s = c // 2
    if storage == "fragments4":
        lane = token % 8 * 4 + c // 8 % 4
        byte = token % 16 // 8 * 8 + c // 32 * 4 + c % 8 // 2
        at = (group * (tokens // 16) + token // 16) * 512 + lane * 16 + byte
        even = c % 2 == 0
        low, high = at[even], at[~even]
        assert torch.equal(low, high)
        at, code = low, code[even] & 15 | (code[~even] & 15) << 4
    elif storage == "fragments8":
        lane, byte = token % 8 * 4 + s % 16 // 4, (c % 2 * 2 + s // 16) * 4 + s % 4
        at = (group * (tokens // 8) + token // 8) * 512 + lane * 16 + byte
    else:
        b = c % 2 * 32 + s
        at = (group * tokens + token) * 64 + (b // 16 ^ token // 2 % 4) * 16 + b % 16
    assert torch.equal(at.flatten().sort().values, torch.arange(out.numel()))
    out[at.flatten()] = code.flatten() & 255
    return out.to(torch.uint8)


@pytest.mark.parametrize("storage", ["fragments4", "fragments8", "swizzled8"])
def test_storages(storage, simulated):
    """Every byte of a storage is where its definition says, with eager's codes and scales, and zeros in padded rows."""
    for (m, multiple, target), unsigned in itertools.product([(19, 32, GPU), (70, 16, FEW)], [False, True]):
        x, factor, down = operands(m, 192, 16, torch.bfloat16, torch.bfloat16)
        shift = GELU_SHIFT if unsigned else 0.0
        if target is FEW:
            cuda_block = cuda._Block(16, 2, 2, 2)
        with assume(target), pytest.MonkeyPatch.context() as patch:
            if target is FEW:  # the block of many tokens
                patch.setattr(cuda, "_block", lambda rows, rank: cuda_block)
            codes, scale, low = cuda.quantized(
                x, factor, down, storage=storage, tokens_multiple=multiple, unsigned=unsigned, shift=shift
            )
        rows = scale.shape[1]
        assert rows == -(-m // multiple) * multiple
        wanted, steps = eager(x, factor, unsigned, shift)
        padded = torch.cat([wanted, wanted.new_zeros(rows - m, 192)])
        assert torch.equal(codes.flatten().view(torch.uint8), stored(padded, storage))
        assert torch.equal(scale[:, :m], steps.t())
        assert not scale[:, m:].any()
        assert low.shape == (1 if target is FEW else low.shape[0], rows, 16)
        assert relative_error(low.sum(0)[:m], x.double() @ down.double()) < 1e-5
        assert not low[:, m:].any()
