from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.ptx import run
from tests.support.triton_linear import require

require()

from lowbit.backends.triton import bytes_values  # noqa: E402  (Triton may not be installed)
from lowbit.backends.triton.device import Target  # noqa: E402

CODES = {
    "e4m3": (bytes_values.E4M3, torch.float8_e4m3fn),
    "e5m2": (bytes_values.E5M2, torch.float8_e5m2),
    "int8": (bytes_values.INT8, torch.int8),
}


def decoded(name, dtype, capability, factor):
    """What the PTX makes of all 256 codes in every byte of a word, and what it must be: [4, 256] in a dtype."""
    code, stored = CODES[name]
    program = bytes_values.program(code, dtype, Target("cuda", capability), scaled=factor is not None)
    byte = np.arange(256, dtype=np.uint32)
    order = np.stack([byte, byte[::-1], np.roll(byte, 7), np.roll(byte, 99)])
    word = order[0] | order[1] << 8 | order[2] << 16 | order[3] << 24
    scale = np.full(256, 1.0 if factor is None else factor, np.float32)
    out = run(program, {4: word, 5: scale.view(np.uint32)})
    assert sorted(out) == [0, 1, 2, 3]
    found = torch.from_numpy(np.stack([out[j] for j in range(4)]).astype(np.uint16).view(np.int16)).view(dtype)
    value = torch.arange(256, dtype=torch.uint8).view(stored).float() * float(scale[0])
    return found, value[torch.from_numpy(order.astype(np.int64))].to(dtype)


@pytest.mark.parametrize("factor", [None, 0.7310585, 2.0**-21, 2.0**9])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CODES)
def test_ptx_decodes_every_code(name, dtype, capability, factor):
    """The PTX gives the value of all 256 codes in each byte of a word, NaN as NaN, times a factor rounded once."""
    found, wanted = decoded(name, dtype, capability, factor)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    zeros = wanted == 0
    assert torch.equal(found[zeros].signbit(), wanted[zeros].signbit())


def test_no_ptx():
    """Elsewhere, and for float32, there is no PTX: plain Triton decodes."""
    for target, dtype in ((Target("hip"), torch.float16), (Target("cuda", (9, 0)), torch.float32)):
        assert bytes_values.program(bytes_values.E4M3, dtype, target, scaled=False) == ""
