"""nn.Embedding with a quantized table: every format, every option."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowbit
from lowbit.errors import UnsupportedError
from tests.support.specs import ALL_SPECS, weight_shape


@pytest.mark.parametrize("spec", ALL_SPECS)
def test_every_format_looks_up_or_says_why_not(spec):
    """The rows are those of the dequantized table, in the table's dtype; a format without lookup keeps the table."""
    k = weight_shape(lowbit.parse_spec(spec))[1]
    table = nn.Embedding(48, k, dtype=torch.bfloat16)
    indices = torch.tensor([[47, 0, 3], [3, 31, 0]])

    (change,) = lowbit.quantize_(table, spec)

    if change.format is None:
        assert "only read" in change.why or "no lookup" in change.why
        return
    out = table(indices)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, table.weight.dequantize()[indices], rtol=0.02, atol=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"padding_idx": 3},
        {"padding_idx": -1},
        {"sparse": True},
        {"scale_grad_by_freq": True},
        {"padding_idx": 0, "sparse": True},
    ],
    ids=str,
)
def test_options_about_gradients_change_nothing(options):
    """padding_idx, sparse and scale_grad_by_freq concern gradients of a table, and this one is frozen."""
    table = nn.Embedding(20, 64, **options)
    plain = copy.deepcopy(table)
    indices = torch.tensor([[0, 3, 19], [3, 3, 1]])

    lowbit.quantize_(table, "int8(activations=none)")

    plain.weight = nn.Parameter(table.weight.dequantize())
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(table(indices), plain(indices))
    if table.padding_idx is not None:
        assert not table(torch.tensor([table.padding_idx])).any()
    assert not table(indices).requires_grad


def test_renormalizing_a_quantized_table_is_refused():
    """max_norm writes into the table: quantize_ keeps such a layer, and setting it later is an error."""
    table = nn.Embedding(20, 64)
    lowbit.quantize_(table, "int8(activations=none)")
    table.max_norm = 1.0

    with pytest.raises(UnsupportedError, match=r"would write into"):
        table(torch.tensor([1, 2]))


def test_indices_that_are_none_are_refused():
    """Numbers outside the table and floats are errors."""
    table = nn.Embedding(20, 64)
    lowbit.quantize_(table, "nvfp4")

    with pytest.raises((IndexError, RuntimeError)):
        table(torch.tensor([20]))
    with pytest.raises((IndexError, RuntimeError)):
        table(torch.tensor([-1]))
    with pytest.raises(UnsupportedError, match=r"torch\.float32, expected torch\.int64"):
        F.embedding(torch.ones(2), table.weight)
