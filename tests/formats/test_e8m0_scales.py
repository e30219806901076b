"""mxfp4 and mxfp8: the scale of a group is a power of two, from 2**-127, by where its largest magnitude lies."""

import pytest
import torch

from lowbit.formats import parse_spec

EDGES = {"mxfp4": 7.0, "mxfp8": 448.0}  # the largest magnitude of a group whose scale is 1
SIX = 6.0  # mxfp4's largest value; what is above it up to 7 is rounded to it


def scale_of(name, amax):
    """The scale code of a group whose largest magnitude is `amax`."""
    return int(parse_spec(name).quantize(torch.full((1, 32), amax))["scale"])


def ulp(value, towards):
    """The next float32."""
    return float(torch.nextafter(torch.tensor(value), torch.tensor(towards)))


@pytest.mark.parametrize(
    ("name", "exponent"),
    [(name, exponent) for name, top in (("mxfp4", 125), ("mxfp8", 119)) for exponent in (-126, -60, -1, 0, 1, 60, top)],
)
def test_the_scale_changes_right_above_an_edge(name, exponent):
    """7 (or 448) * 2**k gets the scale 2**k; one float32 ulp above it gets the next one, one ulp below stays."""
    edge = float(torch.tensor(EDGES[name]) * torch.tensor(2.0**exponent))

    assert scale_of(name, edge) == exponent + 127
    assert scale_of(name, ulp(edge, 0.0)) == exponent + 127
    assert scale_of(name, ulp(edge, float("inf"))) == exponent + 128


@pytest.mark.parametrize(("name", "tiny", "top"), [("mxfp4", SIX * 2.0**-127, 253), ("mxfp8", 448.0 * 2.0**-127, 247)])
def test_the_smallest_and_the_largest_scale(name, tiny, top):
    """Code 0 is 2**-127, also for zeros; the largest float32 gets 2**126 (mxfp8: 2**120); all keep their values."""
    fmt = parse_spec(name)

    assert [scale_of(name, value) for value in (0.0, 1e-45, tiny)] == [0, 0, 0]
    assert scale_of(name, torch.finfo(torch.float32).max) == top
    assert name == "mxfp4" or scale_of(name, ulp(tiny, 1.0)) == 1
    for value in (tiny, 2.0**-127, -tiny, 2.0**127, *([2.0**-130] if name == "mxfp8" else [])):
        w = torch.full((1, 32), value)
        assert torch.equal(fmt.dequantize(fmt.quantize(w), (1, 32), torch.float32), w)
