"""Scales of a weight that are far from 1: every kernel gives the same bits, times the power of two."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowbit.dispatch import select, use_backend
from lowbit.formats import parse_spec
from lowbit.tensor import QuantizedTensor
from tests.support.cpu_linear import activations
from tests.support.specs import any_parts

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)

# A format, its layout, and what has to be scaled so that the whole weight is. Not svdquant_w4a4: by definition the
# scales of its activations have a smallest value.
CASES = (
    ("awq_w4a16", "rows16", ("scale", "zero")),
    ("awq_w4a16", "rows16_w4a8", ("scale", "zero")),
    ("wna16(group_size=32)", "rows16", ("scale",)),
    ("wna16(group_size=32,zero_point=True)", "rows16", ("scale",)),
    ("wna16(bits=8,group_size=32)", "rows16", ("scale",)),
    ("nvfp4", "rows16", ("global_scale",)),
    ("nvfp4(row_global_scale=True)", "rows16", ("global_scale",)),
    ("mxfp4", "rows16", ("scale",)),
    ("mxfp8", "rows16", ("scale",)),
    ("fp8_e4m3", "rows16", ("scale",)),
    ("int8", "rows16", ("scale",)),
    ("int8(activations=none)", "rows16", ("scale",)),
    ("convrot_w4a4", "rows16", ("scale",)),
    ("w4a8_codebook", "", ("s_channel",)),
    ("gguf(type=MXFP4)", "", ("qdata",)),
)
N, K = 35, 512


def weight(spec: str, parts: tuple[str, ...], exponent: int) -> QuantizedTensor:
    """A weight [N, K] times 2**exponent."""
    fmt = parse_spec(spec)
    if fmt.encodable:
        w = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
        found = QuantizedTensor.quantize(w, spec, dtype=torch.float32)
    else:
        found = QuantizedTensor.from_parts(any_parts(fmt, (N, K), seed=1), spec, (N, K), torch.float32)
        found.parts["qdata"][:, :: fmt.block.size] = 120  # of every block the exponent, which comes first
    for name in parts:
        part = found.parts[name]
        if spec == "gguf(type=MXFP4)":
            part[:, :: fmt.block.size] += exponent
        elif part.dtype == torch.uint8:
            part += exponent
        else:
            part *= 2.0**exponent
    return found


@pytest.mark.parametrize("exponent", [112, -70])
@pytest.mark.parametrize(("spec", "layout", "parts"), CASES)
def test_the_same_bits_times_the_power_of_two(spec, layout, parts, exponent):
    """No sum on the way to a product that a float32 holds is infinite, or so small that it loses bits."""
    plain, scaled = (weight(spec, parts, e).in_layout(layout) for e in (0, exponent))
    for m in (1, 2, 4, 20, 40):
        x = activations(m, K, torch.bfloat16)
        assert select("linear", plain.format.name, layout, "cpu", (plain.format, x, plain.parts, None)).backend == "cpu"
        with use_backend("cpu"), torch.inference_mode():
            wanted = F.linear(x, plain) * 2.0**20
            found = F.linear(x * 2.0 ** (20 - exponent), scaled)
        assert bool(wanted.isfinite().all())
        assert torch.equal(found, wanted), m
