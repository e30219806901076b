"""What runs between F.linear and a native kernel: few functions of ours, and the checks of what they point to."""

import sys

import pytest
import torch
from torch.nn import functional as F

import lowbit
from lowbit import dispatch
from lowbit.errors import UnsupportedError
from lowbit.nn import repack_
from lowbit.tensor import QuantizedTensor
from tests.support import gaussian

FOLDER = lowbit.__path__[0]
SPECS = (
    "awq_w4a16",
    "convrot_w4a4",
    "fp8_e4m3",
    "gguf(type=Q4_0)",
    "int8",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "svdquant_w4a4",
    "w4a8_codebook",
    "wna16",
)
# Each takes 1 to 2 microseconds when weights have just gone through the caches; it was 30 to 45 once.
MOST = 16


@pytest.mark.parametrize("spec", SPECS)
def test_few_functions_run_on_the_way_to_a_kernel(spec):
    """A product of one token calls no more than MOST functions of ours, whatever the format."""
    layer = torch.nn.Linear(512, 32)
    layer.weight = torch.nn.Parameter(QuantizedTensor.quantize(layer.weight, spec), requires_grad=False)
    repack_(layer)
    weight, bias, x = layer.weight, layer.bias.detach(), torch.randn(1, 512, dtype=torch.bfloat16)
    called = []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(FOLDER):
            called.append(frame.f_code.co_name)

    with dispatch.use_backend("cpu"), torch.inference_mode():
        F.linear(x, weight, bias.to(x.dtype))  # looks the kernel up
        sys.setprofile(note)
        try:
            F.linear(x, weight, bias.to(x.dtype))
        finally:
            sys.setprofile(None)
    assert 0 < len(called) <= MOST, called


@pytest.mark.parametrize("layout", ["", "rows16"])
def test_what_lies_elsewhere_is_refused(layout):
    """Kernels are told addresses: a weight, a bias and an input of another device, or without memory, are errors."""
    packed = QuantizedTensor.quantize(gaussian(48, 256), "int8").in_layout(layout)
    x, bias = gaussian(2, 256), torch.ones(48)
    absent, freed, no_input = packed.to("meta"), torch.ones(48), gaussian(2, 256)
    freed.untyped_storage().resize_(0)
    no_input.untyped_storage().resize_(0)

    with pytest.raises(UnsupportedError, match="linear on cpu of a weight on meta; move one"):
        F.linear(x, absent)
    with pytest.raises(UnsupportedError, match="the bias is on meta and x on cpu; move one"):
        F.linear(x, packed, bias.to("meta"))
    with dispatch.use_backend("cpu"):
        with pytest.raises(UnsupportedError, match="the bias has no memory, which was freed"):
            F.linear(x, packed, freed)
        with pytest.raises(UnsupportedError, match="x has no memory, which was freed"):
            F.linear(no_input, packed)
    assert F.linear(x.to("meta"), absent, bias.to("meta")).shape == (2, 48)

    packed.qdata.untyped_storage().resize_(0)
    with pytest.raises(UnsupportedError, match="qdata has no memory, which was freed"):
        F.linear(x, packed)
