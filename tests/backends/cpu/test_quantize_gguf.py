"""quantize and scale_search for K-quants and NVFP4 blocks on the CPU backend: no more is lost than by the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.dispatch import explain, select, use_backend
from lowbit.errors import WeightError
from lowbit.formats import Format, Parts, parse_spec
from lowbit.formats.scale_search import best_params
from lowbit.numerics.gguf_encode import SEARCHED, WRITABLE
from lowbit.ops.encode import encode, encode_searched
from tests.support import gaussian, outlier_weight

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)

EVERY_TYPE = pytest.mark.parametrize("name", SEARCHED)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIKE = 2e-3  # of the error: what the order of sums decides otherwise


def of(name: str) -> Format:
    """The format of a type."""
    return parse_spec(f"gguf(type={name})")


def made(fmt: Format, w: Tensor, weights: Tensor | None = None) -> Parts:
    """By the kernel and no other."""
    with use_backend("cpu"):
        return encode(w, fmt) if weights is None else encode_searched(w, fmt, weights)


def lost(fmt: Format, w: Tensor, parts: Parts, weights: Tensor | None = None) -> float:
    """The squared error, columns by their weights."""
    error = fmt.dequantize(parts, (w.shape[0], w.shape[1]), torch.float32).double() - w.double()
    return float((error.square() * (1.0 if weights is None else weights)).sum())


def awkward(shape: tuple[int, int]) -> Tensor:
    """Rows of many sizes, of zeros, of one value, of one sign, of a single value and far from zero."""
    w = outlier_weight(*shape)
    w *= torch.logspace(-3, 3, shape[0]).unsqueeze(1)
    w[0] = 0
    w[1] = 3.7
    w[2] = -w[2].abs()
    w[3, 1:] = 0
    w[4] = 5 + 0.1 * torch.rand(shape[1], generator=torch.Generator().manual_seed(1))
    return w


@EVERY_TYPE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_more_is_lost_than_by_the_reference(name, dtype):
    """Plain and with weights, for every dtype and for numbers of blocks that no vector divides."""
    fmt = of(name)
    for shape in ((1, 256), (7, 768), (37, 512)):
        for w in (gaussian(*shape).to(dtype), outlier_weight(*shape).to(dtype)):
            weights = torch.logspace(-1.5, 1.5, shape[1]).flip(0)
            reference = fmt.quantize(w)
            searched = fmt.quantize(w, params=best_params(w, fmt, weights, "w"))

            assert lost(fmt, w, made(fmt, w)) <= lost(fmt, w, reference) * (1 + ALIKE)
            assert lost(fmt, w, made(fmt, w, weights), weights) <= lost(fmt, w, searched, weights) * (1 + ALIKE)


@EVERY_TYPE
def test_awkward_rows_are_those_of_the_reference(name):
    """Row for row, whatever they hold, the error is about the reference's."""
    fmt, w = of(name), awkward((24, 512))
    found, reference = made(fmt, w), fmt.quantize(w)

    for row in range(24):
        one = slice(row, row + 1)
        mine, other = (lost(fmt, w[one], {"qdata": parts["qdata"][one]}) for parts in (found, reference))
        assert mine <= other * 1.05 + 1e-12 * float(w[one].double().square().sum()), row


@EVERY_TYPE
@pytest.mark.parametrize("scale", [1e-38, 1e-9, 1e-7, 3e-6, 1e9, 3e38])
def test_tiny_and_huge_weights(name, scale):
    """Values stay finite, and no more is lost than by zeros or by the reference."""
    fmt, w = of(name), gaussian(20, 512).clamp(-1, 1) * scale
    parts = made(fmt, w)
    found = fmt.dequantize(parts, (20, 512), torch.float32)

    assert found.isfinite().all()
    assert lost(fmt, w, parts) <= float(w.double().square().sum())
    assert lost(fmt, w, parts) <= 1.02 * lost(fmt, w, fmt.quantize(w))


@EVERY_TYPE
def test_codes_are_the_nearest_under_what_is_stored(name):
    """Encoding the weight again under the headers gives the same values, bit for bit."""
    fmt, w = of(name), awkward((24, 512))
    for weights in (None, torch.logspace(-1, 1, 512)):
        parts = made(fmt, w, weights)
        values, again = (fmt.dequantize(x, (24, 512), torch.float32) for x in (parts, fmt.quantize(w, params=parts)))

        assert torch.equal(again, values)


@EVERY_TYPE
def test_blocks_do_not_depend_on_their_neighbours(name):
    """A row alone, among many, and on several threads becomes the same bytes."""
    fmt, w, weights = of(name), outlier_weight(75, 768), torch.logspace(-1, 1, 768)
    plain, searched = made(fmt, w), made(fmt, w, weights)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        assert torch.equal(made(fmt, w)["qdata"], plain["qdata"])
    finally:
        torch.set_num_threads(before)
    for row in (0, 15, 16, 74):
        assert torch.equal(made(fmt, w[row : row + 1])["qdata"][0], plain["qdata"][row])
        assert torch.equal(made(fmt, w[row : row + 1], weights)["qdata"][0], searched["qdata"][row])


@EVERY_TYPE
def test_many_rows_are_worked_on_in_pieces(monkeypatch, name):
    """Pieces of rows make up the same weight."""
    fmt, w = of(name), gaussian(33, 512)
    whole = made(fmt, w)
    monkeypatch.setattr("lowbit.backends.cpu.quantize_gguf._ELEMENTS", 4096)

    assert torch.equal(made(fmt, w)["qdata"], whole["qdata"])


@EVERY_TYPE
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(name, bad):
    """In the first block as in the last, of 16 bits as of 32."""
    for place in ((0, 0), (18, 511)):
        for dtype in DTYPES:
            w = gaussian(19, 512).to(dtype)
            w[place] = bad
            with pytest.raises(WeightError, match=r"blocks\.3: holds NaN or infinity"), use_backend("cpu"):
                encode(w, of(name), where="blocks.3")


def test_what_the_kernel_does_not_take():
    """A scale of the whole weight goes to the reference; every type without one is made here."""
    for name in WRITABLE:
        assert select("quantize", "gguf", "", "cpu", (of(name), gaussian(2, 256), None)).backend == "cpu"
    scaled = parse_spec("gguf(type=NVFP4,global_scale=true)")
    reasons = str(explain("scale_search", "gguf", "", "cpu", (scaled, gaussian(2, 256), None)))
    assert "a scale of the whole weight; the kernel makes blocks without one" in reasons
