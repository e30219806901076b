from __future__ import annotations

import pytest
import torch

from tests.support import cuda_simulator
from tests.support.cpu_linear import activations, packed_weight

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import compiler, kernels, words_decoded
from lowbit.backends.cuda.words_operands import operands_of
from lowbit.formats import parse_spec
from lowbit.layouts import words128

BF16, FP16 = torch.bfloat16, torch.float16
SPECS = (
    "awq_w4a16", "awq_w4a16(group_size=32)", "awq_w4a16(group_size=256)", "wna16", "wna16(group_size=16)", "nvfp4",
    "nvfp4(row_global_scale=true)", "mxfp4",
)  # fmt: skip


def parts_of(spec: str, n: int, k: int, dtype: torch.dtype):
    """A format and its parts in words128, scales of 16 bits in a dtype."""
    fmt = parse_spec(spec)
    packed, _ = packed_weight(spec, n, k, words128.NAME)
    parts = dict(zip(fmt.part_names, packed.part_list, strict=True))
    return fmt, {name: part.to(dtype) if part.dtype in (BF16, FP16) else part for name, part in parts.items()}


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_decoded(spec, dtype, monkeypatch):
    """Each piece of rows is the dequantized weight, rounded once."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    n, k = 7, 256
    fmt, parts = parts_of(spec, n, k, dtype)
    wanted = fmt.dequantize(words128.unpack(fmt, parts), (n, k), torch.float32)
    operands = operands_of(fmt, parts, k)
    for start, stop in ((0, 7), (2, 5)):
        found = words_decoded.decoded(operands, start, stop, k, dtype, plain=False)
        torch.testing.assert_close(found.float(), wanted[start:stop], rtol=1.01 * torch.finfo(dtype).eps / 2, atol=1e-7)


def test_plain_bytes(monkeypatch):
    """Bytes as files hold them give the same numbers."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    fmt, parts = parts_of("awq_w4a16(group_size=32)", 5, 384, BF16)
    plain = {name: part.contiguous() for name, part in words128.unpack(fmt, parts).items()}
    found = words_decoded.decoded(operands_of(fmt, plain, 384), 0, 5, 384, BF16, plain=True)
    assert torch.equal(found, words_decoded.decoded(operands_of(fmt, parts, 384), 0, 5, 384, BF16, plain=False))


@pytest.mark.parametrize("biased", [False, True])
def test_product(biased, monkeypatch):
    """Pieces of rows are put side by side, with their part of the bias."""
    monkeypatch.setattr(kernels, "launch", cuda_simulator.launch)
    monkeypatch.setattr(words_decoded, "PIECE", 4 * 128)
    fmt, parts = parts_of("awq_w4a16", 10, 128, BF16)
    weight = fmt.dequantize(words128.unpack(fmt, parts), (10, 128), torch.float32)
    x, bias = activations(12, 128, BF16), torch.randn(10).bfloat16() if biased else None
    out = x.new_empty(3, 4, 10)
    words_decoded.product(x, operands_of(fmt, parts, 128), bias, out, plain=False)
    wanted = x.double() @ weight.double().t() + (bias.double() if biased else 0)
    torch.testing.assert_close(out.view(12, 10).double(), wanted, rtol=1e-2, atol=2e-2 * wanted.abs().max().item())


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_120a"])
def test_compiles(architecture):
    """Every kind of code and scale compiles without a warning or a spill."""
    for kind in ("kIntegers, lowbit::kBFloat16, lowbit::kHalfScale, true, lowbit::kWords",
                 "kIntegers, lowbit::kFloat16, lowbit::kFloatScale, true, lowbit::kBytes",
                 "kE2M1, lowbit::kBFloat16, lowbit::kE4M3, false, lowbit::kWords",
                 "kE2M1, lowbit::kFloat16, lowbit::kE8M0, false, lowbit::kWords"):  # fmt: skip
        made = compiler.compile_now("words_decoded.cu", f"lowbit::decoded_weights<lowbit::{kind}>", architecture)
        assert not made.warnings
        assert not made.spills
