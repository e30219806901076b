from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support import ptx
from tests.support.triton_linear import DEVICE, INTERPRETED, ON_GPU

words = pytest.importorskip("lowbit.backends.triton.words", reason="Triton is not installed", exc_type=ImportError)
triton = pytest.importorskip("triton")
tl = triton.language

VALUES = {
    words.INTEGERS.value: np.arange(-8.0, 8.0),
    words.E2M1.value: np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]),
}


def _words() -> np.ndarray:
    """Every nibble in every place, beside two others in the rest, and random words: uint32 [8 * 256 + 256]."""
    place, nibble, rest = np.meshgrid(np.arange(8), np.arange(16), np.arange(16), indexing="ij")
    here = np.uint32(15) << (4 * place).astype(np.uint32)
    filled = (rest * 0x11111111).astype(np.uint32)
    made = (filled & ~here) | (nibble.astype(np.uint32) << (4 * place).astype(np.uint32))
    random = np.random.default_rng(0).integers(0, 1 << 32, 256, dtype=np.uint32)
    return np.concatenate([made.reshape(-1).astype(np.uint32), random])


def _halves(bits: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    low, high = bits & 0xFFFF, bits >> 16
    if dtype == "f16":
        return tuple(one.astype(np.uint16).view(np.float16).astype(np.float64) for one in (low, high))
    return tuple((one << np.uint32(16)).view(np.float32).astype(np.float64) for one in (low, high))


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("code", ["INTEGERS", "E2M1", "TINY_E2M1"])
def test_assembly(code, dtype):
    """The PTX gives the exact value of every nibble in every place, of both words, with the sign of zero."""
    kind = getattr(words, code).value
    program = (words.BF16 if dtype == "bf16" else words.FP16)[kind]
    table = VALUES[kind] if kind in VALUES else VALUES[1] * (2.0**-126 if dtype == "bf16" else 2.0**-14)
    first = _words()
    second = np.roll(first[::-1], 1234)
    found = ptx.run(program, {8: first, 9: second})
    assert sorted(found) == list(range(8))
    for j in range(8):
        for got, source in zip(_halves(found[j], dtype), (first, second), strict=True):
            wanted = table[(source >> np.uint32(4 * j)) & np.uint32(15)]
            assert np.array_equal(got, wanted)
            assert np.array_equal(np.signbit(got), np.signbit(wanted))


@triton.jit
def _decode(source, out, CODE: tl.constexpr, ASSEMBLE: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    values = words.decode(tl.load(source + at), CODE, out.dtype.element_ty, ASSEMBLE)
    for j in tl.static_range(8):
        tl.store(out + j * SIZE + at, values[j])


@pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="no GPU; TRITON_INTERPRET=1 runs the kernels on a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("code", ["INTEGERS", "E2M1"])
@pytest.mark.parametrize("assemble", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_decode(assemble, code, dtype):
    """Triton's own words, and the assembly on a GPU, give the exact value of every nibble in every place."""
    if assemble and dtype == torch.float32:
        pytest.skip("the assembly makes 16-bit floats")
    source = _words()[:2048]
    out = torch.empty(8, 2048, dtype=dtype, device=DEVICE)
    kind = getattr(words, code)
    _decode[(1,)](torch.from_numpy(source.view(np.int32)).to(DEVICE), out, kind, assemble, 2048)
    for j in range(8):
        wanted = VALUES[kind.value][(source >> np.uint32(4 * j)) & np.uint32(15)]
        assert torch.equal(out[j].double().cpu(), torch.from_numpy(wanted))
