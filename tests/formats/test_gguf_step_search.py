"""Steps searched for the GGUF types whose plain blocks are ggml's: by block less error than by rounding to nearest."""

from __future__ import annotations

import pytest
import torch

from lowbit.formats import parse_spec
from lowbit.numerics.gguf_encode import AS_GGML
from lowbit.ops.encode import encode_searched
from tests.formats.test_gguf_k_blocks import SHAPE, column_weights, decibels
from tests.support import gaussian, outlier_weight

# Decibels of ggml 0.21.0 with an importance matrix: ggml_quantize_chunk, called by ctypes on these very tensors, its
# blocks decoded as ours (gaussian, then outlier_weight). MXFP4 and Q8_0 have no use for one there.
GGML = {
    "Q4_0": (22.67, 18.56),
    "Q4_1": (24.69, 21.88),
    "Q5_0": (28.74, 24.28),
    "Q5_1": (31.02, 28.08),
    "Q8_0": (45.43, 41.41),
    "MXFP4": (18.82, 17.06),
}
LEAST_GAIN = 0.2  # dB
EVERY_TYPE = pytest.mark.parametrize("name", AS_GGML)


def _of(name):
    return parse_spec(f"gguf(type={name})")


def _values(fmt, parts, w):
    return fmt.dequantize(parts, (w.shape[0], w.shape[1]), torch.float32)


@EVERY_TYPE
def test_less_is_lost_than_with_ggml(name):
    """Of Gaussian weights and of ones with outliers, their columns counting differently."""
    fmt, weights = _of(name), column_weights()
    for w, fact in zip((gaussian(*SHAPE, seed=1), outlier_weight(*SHAPE, seed=1)), GGML[name], strict=True):
        found = encode_searched(w, fmt, weights)
        assert decibels(w, _values(fmt, found, w), weights) > fact + LEAST_GAIN


@EVERY_TYPE
@pytest.mark.parametrize("weighted", [False, True])
def test_no_block_is_worse_than_by_rounding_to_nearest(name, weighted):
    """Which keeps the blocks that cannot be better, zeros among them, as ggml writes them."""
    fmt, weights = _of(name), column_weights() if weighted else None
    w = outlier_weight(*SHAPE, seed=2)
    w[3], w[4, :64], w[5] = 0.0, 0.25, w[5].abs() + 3
    w[6], w[7], w[8] = w[6] * 2**-24, w[7] * 60000, 0.0
    w[8, 40] = -7.0
    plain, found = fmt.quantize(w), encode_searched(w, fmt, weights)

    heavy = torch.ones(w.shape[1]) if weights is None else weights
    lost, before = (
        ((_values(fmt, parts, w) - w).double().square() * heavy).view(SHAPE[0], -1, 32).sum(2)
        for parts in (found, plain)
    )

    assert bool((lost <= before * (1 + 1e-5)).all())
    assert float(lost.sum()) < 0.95 * float(before.sum())
    assert torch.equal(found["qdata"][3], plain["qdata"][3])
    assert bool(_values(fmt, found, w).isfinite().all())


@EVERY_TYPE
def test_weights_that_say_nothing_change_nothing(name):
    """All the same, however large; and none at all leaves every block as good as it can be."""
    fmt, w = _of(name), gaussian(64, 256)
    same = encode_searched(w, fmt, None)["qdata"]
    for size in (1.0, 2.0**100, 2.0**-100):
        assert torch.equal(encode_searched(w, fmt, torch.full((256,), size))["qdata"], same)
    assert bool(_values(fmt, encode_searched(w, fmt, torch.zeros(256)), w).isfinite().all())
