"""NVFP4 weight-only serving against float64: fused shards, padding, shapes, and what is refused."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lowbit.errors import PartsError, UnsupportedError
from lowbit.integrations.nvfp4_loaded import COMPRESSED_TENSORS, MODELOPT
from lowbit.integrations.nvfp4_serving import (
    ANY_SIZE,
    CUTLASS,
    MARLIN,
    TRTLLM,
    Alignment,
    Nvfp4WeightOnly,
    is_nvfp4_weight_only,
)
from lowbit.ops import generic
from tests.integrations.nvfp4_layers import checkpoint, exact, load

QKV = (64, 16, 16)


def _layer(sizes, k, *, scheme=None, shards=None, dtype=torch.float32, input_scale=None):
    """A layer that is ready, its scheme and the parts of its shards."""
    scheme, layer = scheme or Nvfp4WeightOnly(), nn.Module()
    shards = shards or checkpoint(sizes, k, divides=scheme.convention.divides)
    scheme.create_weights(layer, list(sizes), k, dtype, prefix="model.layers.0.qkv_proj")
    load(layer, scheme, shards, input_scale)
    scheme.process_weights_after_loading(layer)
    return layer, scheme, shards


def _close(found, expected):
    """Within what float32 sums of these sizes lose."""
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("alignment", [ANY_SIZE, MARLIN, CUTLASS, TRTLLM], ids=str)
@pytest.mark.parametrize(("n", "k"), [(16, 48), (1856, 48), (128, 64), (1, 16), (33, 80)])
def test_any_size_on_any_alignment(n, k, alignment):
    """Weights are padded to what a backend needs, results are those of the weight without padding, bias included."""
    layer, scheme, shards = _layer((n,), k, scheme=Nvfp4WeightOnly(alignment=alignment))
    x, bias = torch.randn(5, k), torch.randn(n)

    rows, columns = layer.weight_packed.shape[0], 2 * layer.weight_packed.shape[1]
    assert (rows, columns) == alignment.padded(n, k)
    assert rows % alignment.rows == 0
    assert columns % alignment.columns == 0
    assert layer.weight_scale.shape == (rows, columns // 16)
    _close(scheme.apply_weights(layer, x, bias), exact(x, shards, k, bias))
    _close(scheme.apply_weights(layer, x), exact(x, shards, k))


@pytest.mark.parametrize("convention", [COMPRESSED_TENSORS, MODELOPT], ids=lambda c: c.name)
@pytest.mark.parametrize("alignment", [ANY_SIZE, TRTLLM], ids=str)
def test_fused_shards_keep_their_own_global_scales(alignment, convention):
    """q, k and v with global scales up to 2.14 apart equal float64; with their maximum for all they would not."""
    scheme = Nvfp4WeightOnly(convention, alignment)
    layer, _, shards = _layer(QKV, 64, scheme=scheme)
    x, divides = torch.randn(7, 64), convention.divides
    value = getattr(layer, convention.global_scale)

    assert value.shape == (alignment.padded(96, 64)[0],)
    assert float(value[:96].max() / value[:96].min()) == pytest.approx(2.14, rel=1e-3)
    _close(scheme.apply_weights(layer, x), exact(x, shards, 64, divides=divides))
    largest = max(parts["global_scale"] for parts in shards)
    wrong = exact(x, [{**parts, "global_scale": largest} for parts in shards], 64, divides=divides)
    assert float((wrong - exact(x, shards, 64, divides=divides)).abs().max()) > 0.1


def test_equal_global_scales_stay_one_value():
    """Shards that agree keep a single global scale, which every kernel for the format takes."""
    one = checkpoint((32,), 64)[0]
    layer, scheme, shards = _layer((32, 32), 64, shards=[one, one])
    x = torch.randn(2, 64)

    assert layer.weight_global_scale.shape == ()
    _close(scheme.apply_weights(layer, x), exact(x, shards, 64))


@pytest.mark.parametrize("alignment", [ANY_SIZE, TRTLLM], ids=str)
def test_any_number_of_axes(alignment):
    """x of 1 to 4 axes, empty ones included, keeps its leading axes; each row is what it is alone."""
    layer, scheme, shards = _layer((48,), 48, scheme=Nvfp4WeightOnly(alignment=alignment))
    bias = torch.randn(48)
    for shape in [(48,), (1, 48), (0, 48), (2, 3, 48), (2, 1, 3, 48), (2, 0, 48)]:
        x = torch.randn(shape)
        out = scheme.apply_weights(layer, x, bias)

        assert out.shape == (*shape[:-1], 48)
        assert out.is_contiguous()
        if out.numel():
            _close(out, exact(x, shards, 48, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_dequantize_and_matmul(dtype):
    """In 16 bits the result has the dtype of x, equals the product with the decoded weight, and bias comes last."""
    layer, scheme, shards = _layer((40,), 64, scheme=Nvfp4WeightOnly(alignment=TRTLLM), dtype=dtype)
    x, bias = torch.randn(3, 64).to(dtype), torch.randn(40).to(dtype)

    out = scheme.apply_weights(layer, x, bias)

    assert out.dtype == dtype
    assert torch.equal(out, scheme.apply_weights(layer, x) + bias)
    error = (out.double() - exact(x, shards, 64, bias)).abs().max() / exact(x, shards, 64, bias).abs().max()
    assert error < 2e-2


def test_activations_are_never_rounded():
    """A stored scale of the activations is loaded and dropped; the result is the same without it, for any x."""
    with_scale, scheme, shards = _layer(QKV, 64, input_scale=123.0)
    without, _, _ = _layer(QKV, 64, shards=shards)
    x = torch.randn(3, 64) * torch.tensor([1e-4, 1.0, 1e4]).unsqueeze(1)

    assert not hasattr(with_scale, "input_global_scale")
    assert not any("input" in name for name, _ in [*with_scale.named_parameters(), *without.named_buffers()])
    assert torch.equal(scheme.apply_weights(with_scale, x), scheme.apply_weights(without, x))
    for row in range(3):
        _close(scheme.apply_weights(without, x)[row : row + 1], exact(x[row : row + 1], shards, 64))


def test_a_weight_fused_on_disk():
    """One tensor for all shards, with one global scale, fills the whole layer."""
    whole = checkpoint((96,), 64)[0]
    scheme, layer = Nvfp4WeightOnly(), nn.Module()
    scheme.create_weights(layer, list(QKV), 64, torch.float32)
    load(layer, scheme, [whole])
    scheme.process_weights_after_loading(layer)
    x = torch.randn(2, 64)

    assert layer.weight_global_scale.shape == ()
    _close(scheme.apply_weights(layer, x), exact(x, [whole], 64))


def test_a_loader_of_the_engine_is_called_with_the_attributes_it_needs():
    """An engine's loader gets its own arguments, parameters say their axes, and extra attributes are set."""
    seen = []

    def loader(parameter, tensor, shard):
        seen.append((parameter.output_dim, parameter.input_dim, shard))

    scheme, layer = Nvfp4WeightOnly(), nn.Module()
    scheme.create_weights(layer, [16], 32, torch.bfloat16, loader, mark="x")
    layer.weight_packed.weight_loader(layer.weight_packed, torch.zeros(16, 16), "q")

    assert seen == [(0, 1, "q")]
    assert layer.weight_global_scale.needs_scalar_to_array
    assert {parameter.mark for parameter in layer.parameters()} == {"x"}
    assert set(dict(layer.named_parameters())) == {
        "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"
    }  # fmt: skip


def test_processing_twice_changes_nothing():
    """A second call leaves the parameters alone."""
    layer, scheme, _ = _layer((16,), 32, scheme=Nvfp4WeightOnly(alignment=TRTLLM))
    before = layer.weight_packed

    scheme.process_weights_after_loading(layer)

    assert layer.weight_packed is before


def test_it_compiles():
    """torch.compile takes padding, product and slice as one graph."""
    layer, scheme, shards = _layer(QKV, 48, scheme=Nvfp4WeightOnly(alignment=TRTLLM))
    x, bias = torch.randn(3, 48), torch.randn(96)

    run = torch.compile(lambda x, b: scheme.apply_weights(layer, x, b), backend="eager", fullgraph=True)

    _close(run(x, bias), exact(x, shards, 48, bias))


def test_any_backend_can_serve_it(monkeypatch):
    """The product is asked of the dispatch table, for the format with the shards' own scales and the padded sizes."""
    layer, scheme, shards = _layer(QKV, 48, scheme=Nvfp4WeightOnly(alignment=TRTLLM))
    x, asked, choose = torch.randn(2, 48), [], generic.select

    def select(op, name, layout, device, args):
        asked.append((op, args[0].spec, tuple(args[1].shape)))
        return choose(op, name, layout, device, args)

    monkeypatch.setattr(generic, "select", select)
    _close(scheme.apply_weights(layer, x), exact(x, shards, 48))

    assert asked == [("linear", "nvfp4(global_scale_divides=True,row_global_scale=True)", (2, 64))]


class _Kind(str, Enum):
    FLOAT = "float"


GROUP = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}


@pytest.mark.parametrize(
    ("weights", "activations", "expected"),
    [
        (GROUP, None, True),
        (SimpleNamespace(**{**GROUP, "type": _Kind.FLOAT}), None, True),
        (GROUP, {"num_bits": 4, "type": "float", "dynamic": "local"}, False),
        (None, None, False),
        (None, GROUP, False),
        ({**GROUP, "type": "int"}, None, False),
        ({**GROUP, "num_bits": 8}, None, False),
        ({**GROUP, "strategy": "group", "group_size": 32}, None, False),
        ({**GROUP, "symmetric": False}, None, False),
        ({}, None, False),
    ],
)
def test_what_is_weight_only(weights, activations, expected):
    """Only 4-bit floats in groups of 16 under a global scale, activations null; nothing given is no error."""
    assert is_nvfp4_weight_only(weights, activations) is expected


@pytest.mark.parametrize("rows", [0, -1])
@pytest.mark.parametrize("columns", [8, 24])
def test_an_alignment_must_make_sense(rows, columns):
    """Rows below 1 and columns that cut a group are refused."""
    with pytest.raises(UnsupportedError, match="multiple of 16"):
        Alignment(rows, 64)
    with pytest.raises(UnsupportedError, match="multiple of 16"):
        Alignment(1, columns)


@pytest.mark.parametrize("k", [8, 24, 0])
def test_a_k_that_cuts_a_group_is_refused(k):
    """K on a rank must be a multiple of 16; the error names the layer and what to do."""
    with pytest.raises(UnsupportedError, match=rf"in_proj: K = {k} on this rank is not a multiple of 16"):
        Nvfp4WeightOnly().create_weights(nn.Module(), [16], k, torch.bfloat16, prefix="in_proj")


def test_calls_out_of_order_are_refused():
    """Multiplying before processing, processing before creating, another K and integer activations are refused."""
    scheme, layer = Nvfp4WeightOnly(), nn.Module()
    with pytest.raises(PartsError, match="create_weights must run before"):
        scheme.process_weights_after_loading(layer)
    with pytest.raises(UnsupportedError, match=r"activations in torch\.int8"):
        scheme.create_weights(layer, [16], 32, torch.int8)
    scheme.create_weights(layer, [16], 32, torch.float32)
    with pytest.raises(PartsError, match="process_weights_after_loading must run before"):
        scheme.apply_weights(layer, torch.zeros(1, 32))
    ready, _, _ = _layer((16,), 32)
    for x in (torch.zeros(1, 16), torch.tensor(1.0)):
        with pytest.raises(UnsupportedError, match=r"qkv_proj: x is .* expected \[\.\.\., 32\]"):
            scheme.apply_weights(ready, x)
