"""What an NVFP4 layer refuses after loading: missing shards, wrong kinds, damage, and the other convention's scale."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit.errors import PartsError
from lowbit.integrations.nvfp4_loaded import COMPRESSED_TENSORS, MODELOPT
from lowbit.integrations.nvfp4_serving import Nvfp4WeightOnly
from tests.integrations.nvfp4_layers import checkpoint, load

QKV = (64, 16, 16)


def _loaded(sizes=QKV, k=64, convention=COMPRESSED_TENSORS, shards=None):
    """A layer whose parameters are loaded, before it is checked."""
    scheme, layer = Nvfp4WeightOnly(convention), nn.Module()
    scheme.create_weights(layer, list(sizes), k, torch.bfloat16, prefix="blocks.3.attn.qkv")
    load(layer, scheme, shards or checkpoint(sizes, k, divides=convention.divides))
    return layer, scheme


@pytest.mark.parametrize("key", ["weight_packed", "weight_scale", "weight_global_scale"])
@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_shard_that_was_never_loaded_is_named(key, shard):
    """If one tensor of one shard is missing, the error names layer, parameter, shard and rows."""
    scheme, layer = Nvfp4WeightOnly(), nn.Module()
    scheme.create_weights(layer, list(QKV), 64, torch.bfloat16, prefix="blocks.3.attn.qkv")
    fresh = {name: parameter.data.clone() for name, parameter in layer.named_parameters()}
    load(layer, scheme, checkpoint(QKV, 64))
    start = sum(QKV[:shard])
    rows = slice(shard, shard + 1) if key == "weight_global_scale" else slice(start, start + QKV[shard])
    getattr(layer, key).data[rows] = fresh[key][rows]

    with pytest.raises(PartsError, match=rf"blocks\.3\.attn\.qkv: {key} of shard {shard} \(rows .* was never loaded"):
        scheme.process_weights_after_loading(layer)


@pytest.mark.parametrize("key", ["weight_packed", "weight_scale"])
def test_one_row_that_was_never_loaded_is_noticed(key):
    """A loader that leaves out a single row is caught."""
    scheme, layer = Nvfp4WeightOnly(), nn.Module()
    scheme.create_weights(layer, [16], 16, torch.bfloat16, prefix="a.b")
    row = getattr(layer, key).data[5].clone()
    load(layer, scheme, checkpoint((16,), 16))
    getattr(layer, key).data[5] = row

    with pytest.raises(PartsError, match=rf"a\.b: {key} was never loaded"):
        scheme.process_weights_after_loading(layer)


def test_a_missing_input_scale_is_none():
    """Weight-only checkpoints have no activation scale, and none is asked for."""
    layer, scheme = _loaded()

    assert layer.input_global_scale.isnan().all()
    scheme.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("key", "replace", "complaint"),
    [
        ("weight_scale", lambda t: t.float(), r"weight_scale is float32 \[96, 4\], expected float8_e4m3fn \[96, 4\]"),
        ("weight_packed", lambda t: t.view(torch.int8), r"weight_packed is int8 .*, expected uint8 \[96, 32\]"),
        ("weight_packed", lambda t: t[:, :16], r"weight_packed is uint8 \[96, 16\], expected uint8 \[96, 32\]"),
        ("weight_global_scale", lambda t: t[:1], r"weight_global_scale is float32 \[1\], expected float32 \[3\]"),
    ],
)
def test_wrong_dtypes_and_shapes(key, replace, complaint):
    """A parameter that an engine replaced by another kind of tensor is refused with both kinds."""
    layer, scheme = _loaded()
    setattr(layer, key, nn.Parameter(replace(getattr(layer, key).data), requires_grad=False))

    with pytest.raises(PartsError, match=rf"blocks\.3\.attn\.qkv: {complaint}"):
        scheme.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("byte", "complaint"), [(0x7F, "holds NaN; the checkpoint is damaged"), (0x81, "holds negative scales")]
)
def test_damaged_scales(byte, complaint):
    """One NaN or negative group scale is refused with the shard it lies in."""
    layer, scheme = _loaded()
    layer.weight_scale.data.view(torch.uint8)[70, 2] = byte

    with pytest.raises(PartsError, match=rf"weight_scale of shard 1 \(rows 64 to 80\) {complaint}"):
        scheme.process_weights_after_loading(layer)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf")])
def test_a_global_scale_that_is_none(value):
    """Zero, negative and infinite global scales are refused."""
    layer, scheme = _loaded()
    layer.weight_global_scale.data[2] = value

    with pytest.raises(PartsError, match=rf"weight_global_scale of shard 2 .* is {value}, expected a finite value"):
        scheme.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("convention", "kinds"), [(COMPRESSED_TENSORS, ("divisor", "factor")), (MODELOPT, ("factor", "divisor"))]
)
def test_the_reciprocal_of_the_global_scale_is_caught(convention, kinds):
    """A factor read as a divisor, or the reverse, is refused with the largest weight under both readings."""
    shards = checkpoint(QKV, 64, divides=not convention.divides)
    layer, scheme = _loaded(convention=convention, shards=shards)

    with pytest.raises(
        PartsError, match=rf"as a {kinds[0]}, which .* the largest weight would be .*; as a {kinds[1]} 0\.1"
    ):
        scheme.process_weights_after_loading(layer)


@pytest.mark.parametrize("magnitude", [1e-6, 1e-2, 1.0, 2000.0])
def test_weights_of_any_sensible_size_are_taken(magnitude):
    """The check of the convention lets weights through from tiny ones up to 2688."""
    shards = checkpoint((32,), 64)
    shards[0]["global_scale"] = shards[0]["global_scale"] * (0.1 / magnitude)
    layer, scheme = _loaded((32,), shards=shards)

    scheme.process_weights_after_loading(layer)


def test_zero_weights_are_taken():
    """A shard of zeros, whose codes and scales are zero, is no missing one."""
    shards = checkpoint(QKV, 64)
    shards[1]["qdata"], shards[1]["scale"] = (
        torch.zeros(16, 32, dtype=torch.uint8),
        torch.zeros(16, 4).to(torch.float8_e4m3fn),
    )
    shards[1]["global_scale"] = torch.tensor(1.0)
    layer, scheme = _loaded(shards=shards)

    scheme.process_weights_after_loading(layer)

    assert not scheme.apply_weights(layer, torch.randn(2, 64))[:, 64:80].any()


@pytest.mark.parametrize(("shard", "rows"), [("x", 16), (3, 16), (1, 17)])
def test_the_default_loader_refuses_what_does_not_fit(shard, rows):
    """A shard that there is not, or a tensor of another shape, is an error that names the layer."""
    layer, _ = _loaded()

    with pytest.raises(PartsError, match=r"blocks\.3\.attn\.qkv: "):
        layer.weight_packed.weight_loader(layer.weight_packed, torch.zeros(rows, 32, dtype=torch.uint8), shard)


def test_the_default_loader_knows_q_k_and_v():
    """Shards may be named as in attention."""
    layer, _ = _loaded()
    tensor = torch.full((16, 32), 7, dtype=torch.uint8)

    layer.weight_packed.weight_loader(layer.weight_packed, tensor, "v")

    assert bool((layer.weight_packed[80:] == 7).all())
    assert not bool((layer.weight_packed[64:80] == 7).all())
