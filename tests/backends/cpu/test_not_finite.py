"""Activations with infinities and NaN: linears that take a weight apart, or round activations, give what eager does."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowbit.dispatch import select, use_backend
from lowbit.formats import parse_spec
from lowbit.numerics.gguf_blocks import READABLE
from lowbit.tensor import QuantizedTensor
from tests.support.cpu_linear import DTYPES, activations
from tests.support.specs import any_parts

pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels", exc_type=ImportError)

SPECS = (
    ("awq_w4a16", "rows16"),
    ("awq_w4a16", "rows16_w4a8"),
    ("wna16(group_size=32)", "rows16"),
    ("wna16(bits=8,group_size=32)", "rows16"),
    ("nvfp4", "rows16"),
    ("mxfp4", "rows16"),
    ("mxfp8", "rows16"),
    ("fp8_e4m3", "rows16"),
    ("int8(activations=none)", "rows16"),
    *((f"gguf(type={name})", "") for name in READABLE),
)
INF, NAN = float("inf"), float("nan")
KINDS = {"inf": (INF,), "minus inf": (-INF,), "nan": (NAN,), "both": (INF, -INF), "all": (INF, NAN, -INF)}
N, K = 35, 512


def weight(spec: str, layout: str) -> QuantizedTensor:
    """A weight [N, K] whose columns all have values of both signs, and some zeros."""
    fmt = parse_spec(spec)
    if not fmt.encodable:
        return QuantizedTensor.from_parts(any_parts(fmt, (N, K), seed=N), spec, (N, K), torch.float32)
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(N))
    w[::7] = 0
    return QuantizedTensor.quantize(w, spec, dtype=torch.float32).in_layout(layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "layout"), SPECS)
def test_infinities_and_nan_are_what_eager_makes_of_them(spec, layout, dtype):
    """A token with some gives infinities and NaN where eager does, in any dtype; the tokens beside it change no bit."""
    packed = weight(spec, layout)
    plain = packed.in_layout("")
    bias = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(dtype)
    for m in (1, 3, 17, 40):
        x = activations(m, K, dtype)
        assert (
            select("linear", packed.format.name, layout, "cpu", (packed.format, x, packed.parts, bias)).backend == "cpu"
        )
        with use_backend("cpu"), torch.inference_mode():
            clean = F.linear(x, packed, bias)
        for values in KINDS.values():
            bad = x.clone()
            tokens = sorted({0, m // 2, m - 1})
            for token in tokens:
                for i, value in enumerate(values):
                    bad[token, (5 + 100 * i + token) % K] = value
            with use_backend("cpu"), torch.inference_mode():
                found = F.linear(bad, packed, bias)
            with use_backend("eager"), torch.inference_mode():
                wanted = F.linear(bad, plain, bias)
            assert torch.equal(found[tokens].isnan(), wanted[tokens].isnan()), (m, values)
            assert torch.equal(found[tokens].nan_to_num(0, 1, -1), wanted[tokens].nan_to_num(0, 1, -1)), (m, values)
            others = [token for token in range(m) if token not in tokens]
            assert torch.equal(found[others], clean[others])
