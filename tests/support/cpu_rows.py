"""What every native kernel is held to that decodes rows, or multiplies them, of plain parts alone."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lowbit.dispatch import use_backend
from lowbit.tensor import QuantizedTensor
from tests.support.cpu_linear import activations


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit by bit, signs of zeros and NaN included, but for the bits that a NaN may carry."""
    bits = {4: torch.int32, 2: torch.int16}[a.element_size()]
    there = ~a.isnan()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.view(bits)[there], b.view(bits)[there])


def decoded(weight: QuantizedTensor, dtype: torch.dtype, backend: str) -> torch.Tensor:
    """The weight by the kernels of one backend."""
    with use_backend(backend), torch.inference_mode():
        return weight.dequantize(dtype)


def check_embedding(weight: QuantizedTensor, wanted: torch.Tensor) -> None:
    """Assert that indices of both dtypes and any shape give the rows `wanted` [n, k], that none give none."""
    n, k = wanted.shape
    indices = torch.tensor([[0, n - 1, n // 2], [n // 2, n // 3, 0]])
    many = torch.randint(0, n, (200,), generator=torch.Generator().manual_seed(0))
    with use_backend("cpu"), torch.inference_mode():
        for index in (indices, indices.int(), indices.t(), torch.tensor(n // 3), many):
            assert same_bits(F.embedding(index, weight), wanted[index.long()])
        assert F.embedding(torch.zeros(0, 3, dtype=torch.int64), weight).shape == (0, 3, k)


def check_plain_linear(weight: QuantizedTensor) -> None:
    """Assert that gaps in x and in the weight, leading axes, no tokens, and the number of threads change nothing."""
    n, k = weight.shape
    spread = weight.map_parts(lambda part: torch.stack([part, part], -1)[..., 0] if part.dim() == 2 else part)
    before = torch.get_num_threads()
    with use_backend("cpu"), torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float32):
            for m in (1, 9, 40):
                x = activations(m, k, dtype)
                whole = F.linear(x, weight)
                gaps = activations(m, 2 * k, dtype)
                gaps[:, ::2] = x
                assert torch.equal(F.linear(gaps[:, ::2], weight), whole)
                assert torch.equal(F.linear(x, spread), whole)
                assert torch.equal(F.linear(x.view(1, m, 1, k), weight), whole.view(1, m, 1, n))
                assert torch.equal(F.linear(x, weight[n // 3 : n - 1]), whole[:, n // 3 : n - 1])
                try:
                    for threads in (1, 3):
                        torch.set_num_threads(threads)
                        assert torch.equal(F.linear(x, weight), whole)
                finally:
                    torch.set_num_threads(before)
            assert F.linear(activations(0, k, dtype), weight).shape == (0, n)
