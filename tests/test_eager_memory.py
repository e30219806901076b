"""The eager backend never builds a temporary that grows with the weight."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import lowbit
from lowbit import QuantizedTensor
from lowbit.ops import generic

N, K = 12288, 3072  # Qwen-Image's widest linear: 72 MiB in bfloat16, 18 MiB in 4 bits
LARGEST = 1 << 24
SPECS = [
    "fp8_e4m3(granularity=row)",
    "fp8_e4m3(granularity=block)",
    "int8",
    "int8(granularity=block)",
    "int8(rotation=256)",
    "mxfp8",
    "nvfp4",
    "awq_w4a16",
    "svdquant_w4a4",
]


class _Largest(TorchDispatchMode):
    """Records the largest memory that an operation allocated."""

    def __init__(self):
        super().__init__()
        self.bytes, self.where = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {id_of(t) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for made in tree_iter(result):
            if isinstance(made, torch.Tensor) and id_of(made) not in given:
                size = made.untyped_storage().nbytes()
                if size > self.bytes:
                    self.bytes, self.where = size, f"{func} {tuple(made.shape)} {made.dtype}"
        return result


def id_of(tensor):
    """What tells one storage from another."""
    return tensor.untyped_storage()._cdata


@pytest.mark.slow
@pytest.mark.real_empty
@pytest.mark.parametrize("spec", SPECS)
def test_no_temporary_grows_with_the_weight(spec):
    """linear, its input gradient and embedding of a 12288 x 3072 weight allocate at most 16 MiB at once.

    That is below the weight's own 4-bit codes, so no copy of the whole weight in any form would pass.
    """
    fmt = lowbit.parse_spec(spec)
    dtypes = fmt.part_dtypes(torch.bfloat16)
    parts = {
        name: torch.full(shape, 0x38, dtype=torch.uint8).view(dtypes[name])
        if dtypes[name].itemsize == 1
        else torch.full(shape, 0.01, dtype=dtypes[name])
        for name, shape in fmt.part_shapes(N, K).items()
    }
    w = QuantizedTensor(parts, fmt, (N, K), torch.bfloat16)

    # The implementations, not the ops: a dispatch mode does not see what happens inside an op.
    with torch.no_grad(), _Largest() as trace:
        generic.run_linear(torch.ones(1, K).bfloat16(), w.part_list, torch.zeros(N).bfloat16(), w.spec)
        generic._input_gradient(torch.ones(1, N), w.part_list, K, w.spec)
        if fmt.supports_embedding:
            generic._embedding(torch.arange(0, N, 100), w.part_list, K, w.spec, torch.bfloat16)

    assert 0 < trace.bytes <= LARGEST, trace.where


def test_the_trace_sees_a_whole_weight():
    """A dequantized weight shows up in the trace: the test above can fail."""
    w = QuantizedTensor.quantize(torch.ones(64, 64), "fp8_e4m3")

    with _Largest() as trace:
        generic._dequantize(w.part_list, w.spec, [64, 64], torch.float32)

    assert trace.bytes == 64 * 64 * 4
