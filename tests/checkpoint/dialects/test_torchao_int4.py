"""torchao's Int4Tensor, and ExecuTorch's reading of it: what zero points mean, by formulas written out here."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from lowbit.checkpoint.dialects import get_dialect
from lowbit.errors import PartsError
from lowbit.formats import parse_spec
from tests.checkpoint.dialects.comfy_files import assert_same_bits
from tests.checkpoint.dialects.test_torchao import DIALECT, LAYER, K, N, find, layer_and_parts, rewritten, written


def int4_file(zeros, qdata_dtype=torch.int8):
    """A file with an Int4Tensor [16, 64] in groups of 32."""
    generator = torch.Generator().manual_seed(1)
    qdata = torch.randint(0, 256, (16, 32), dtype=torch.uint8, generator=generator).view(qdata_dtype)
    scale = (torch.rand(2, 16, generator=generator) + 0.1).to(torch.bfloat16)
    tensors = {"a._weight_qdata": qdata, "a._weight_scale": scale, "a._weight_zero_point": zeros}
    dtype = {"_type": "torch.dtype", "_data": "bfloat16"}
    data = {"activation_dtype": dtype, "block_size": [1, 32], "shape": [16, 64]}
    entry = {"_type": "Int4Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale", "zero_point"]}
    return tensors, {"a.weight": json.dumps(entry), "tensor_names": '["a.weight"]'}


def nibbles(qdata):
    """The two nibbles of each byte, the low one first, in plain arithmetic."""
    raw = qdata.view(torch.uint8).int()
    return torch.stack([raw % 16, raw // 16], dim=-1).flatten(1)


def test_float_zero_points_of_int4_are_offsets():
    """Signed nibbles times the scale plus the offset is what awq_w4a16 decodes to, bit for bit."""
    tensors, metadata = int4_file(torch.randn(2, 16).to(torch.bfloat16))
    layer = find(tensors, metadata)
    assert layer.format == parse_spec("awq_w4a16(group_size=32)")
    signed = nibbles(tensors["a._weight_qdata"])
    signed = (signed - 16 * (signed > 7)).float()
    scale, zero = (
        tensors[f"a._weight_{name}"].float().t().repeat_interleave(32, 1) for name in ("scale", "zero_point")
    )
    parts = DIALECT.load_parts(layer, tensors.__getitem__)
    assert torch.equal(layer.format.dequantize(parts, (16, 64), torch.float32), signed * scale + zero)
    for key, tensor in rewritten(layer, parts)[0].items():
        assert_same_bits(tensor, tensors[key])


@pytest.mark.parametrize(("dtype", "dialect"), [(torch.int8, "torchao"), (torch.bfloat16, "executorch")])
@pytest.mark.parametrize("qdata_dtype", [torch.int8, torch.uint8])
def test_integer_zero_points_of_int4_are_codes(dtype, dialect, qdata_dtype):
    """ExecuTorch's: unsigned nibbles less the zero point, times the scale; shown by the dtype, or by the dialect."""
    zeros = torch.randint(0, 16, (2, 16), generator=torch.Generator().manual_seed(2)).to(dtype)
    tensors, metadata = int4_file(zeros, qdata_dtype)
    layer = find(tensors, metadata, dialect)
    assert layer.format == parse_spec("wna16(group_size=32,zero_point=true)")
    scale, zero = (
        tensors[f"a._weight_{name}"].float().t().repeat_interleave(32, 1) for name in ("scale", "zero_point")
    )
    parts = get_dialect(dialect).load_parts(layer, tensors.__getitem__)
    expected = (nibbles(tensors["a._weight_qdata"]) - zero) * scale
    assert torch.equal(layer.format.dequantize(parts, (16, 64), torch.float32), expected)
    for key, tensor in rewritten(layer, parts)[0].items():
        assert_same_bits(tensor, tensors[key])


def test_zero_points_that_could_be_either_are_refused():
    """Integers in a floating dtype are not guessed; all zeros are torchao's symmetric weights."""
    tensors, metadata = int4_file(torch.full((2, 16), 8.0, dtype=torch.bfloat16))
    with pytest.raises(
        PartsError, match=r"w = q \* scale \+ zero_point.*\(q - zero_point\).*source-dialect executorch"
    ):
        DIALECT.load_parts(find(tensors, metadata), tensors.__getitem__)
    tensors, metadata = int4_file(torch.zeros(2, 16, dtype=torch.bfloat16))
    assert DIALECT.load_parts(find(tensors, metadata), tensors.__getitem__)["zero"].count_nonzero() == 0
    tensors, metadata = int4_file(torch.full((2, 16), 0.5, dtype=torch.bfloat16))
    with pytest.raises(PartsError, match="fractional zero points"):
        get_dialect("executorch").load_parts(find(tensors, metadata, "executorch"), tensors.__getitem__)


@pytest.mark.parametrize("spec", ["awq_w4a16(group_size=32)", "awq_w4a16(pre_quant_scale=true)"])
def test_int4_tensors_are_made_of_what_is_written(spec):
    """torchao makes its Int4Tensor, which has no dequantize, of our files: signed codes * scale + zero point."""
    stored, parts = layer_and_parts(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    theirs = support.unflatten_tensor_state_dict(*written(spec))[0][f"{LAYER}.weight"]
    assert (type(theirs).__name__, theirs.shape, theirs.dtype) == ("Int4Tensor", (N, K), torch.bfloat16)
    size = stored.format.config()["group_size"]
    assert theirs.block_size == [1, size]
    assert theirs.qdata.dtype == torch.int8
    signed = nibbles(theirs.qdata)
    signed = (signed - 16 * (signed > 7)).float()
    scale, zero = (part.float().t().repeat_interleave(size, 1) for part in (theirs.scale, theirs.zero_point))
    plain = {name: part for name, part in parts.items() if name != "pre_quant_scale"}
    assert torch.equal(signed * scale + zero, stored.format.plain.dequantize(plain, (N, K), torch.float32))
    assert (theirs.act_pre_scale is not None) == stored.format.pre_quant_scale
