"""Banks of experts: each expert is quantized for itself, and every way to multiply with one gives the same."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowbit
from lowbit import QuantizedTensor
from lowbit.errors import PartsError, UnsupportedError, WeightError
from lowbit.experts import QuantizedBank, grouped_linear, quantize_bank
from lowbit.formats import parse_spec
from tests.support import gaussian, sqnr
from tests.support.specs import ALL_SPECS, weight_shape

ENCODED = [spec for spec in ALL_SPECS if parse_spec(spec).encodable and not parse_spec(spec).folds_bias]
SPECS = [
    "nvfp4",
    "int8(granularity=tensor,activations=none)",
    "fp8_e4m3(granularity=block)",
    "awq_w4a16(group_size=32)",
]
E, N, K = 5, 48, 64


def _weights(scales=(1.0, 30.0, 0.01, 1.0, 5.0), n=N, k=K):
    """Experts of very different sizes: one scale for all of them would lose the small one."""
    return torch.stack([gaussian(n, k, seed=seed) * scale for seed, scale in enumerate(scales)])


@pytest.fixture(autouse=True)
def _no_fallback():
    before = lowbit.fallbacks()
    yield
    assert lowbit.fallbacks() == before


@pytest.mark.parametrize("spec", ENCODED)
def test_every_expert_is_what_it_would_be_alone(spec):
    """In every format the parts of bank[e] are bit for bit those of that expert quantized by itself."""
    weights = _weights(n=weight_shape(parse_spec(spec))[0], k=weight_shape(parse_spec(spec))[1])

    bank = quantize_bank(weights, spec, solver="rtn" if "svdquant" not in spec else "auto")

    assert bank.shape == weights.shape
    for index, weight in enumerate(weights):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight)
        lowbit.quantize_(layer, {"": spec}, solver="rtn" if "svdquant" not in spec else "auto")
        assert torch.equal(bank[index], layer.weight.data)
    assert torch.equal(bank.dequantize(), torch.stack([bank[e].dequantize() for e in range(len(weights))]))


@pytest.mark.parametrize("spec", SPECS)
def test_global_scales_stay_with_their_experts(spec):
    """The smallest expert beside one 3000 times larger is as exact as it is alone."""
    weights = _weights()

    bank = quantize_bank(weights, spec)

    for weight, decoded in zip(weights, bank.dequantize(), strict=True):
        assert sqnr(weight, decoded) > 17


@pytest.mark.parametrize("spec", SPECS)
def test_grouped_linear_sends_each_token_to_its_expert(spec):
    """By offsets and by numbers the result is F.linear with bank[e], rows of no expert are zero, nothing is mixed."""
    bank, bias = quantize_bank(_weights(), spec), torch.randn(E, N)
    numbers = torch.tensor([[3, 0, -1, 3], [4, 5, 0, 3]])
    x = torch.randn(2, 4, K)

    out = grouped_linear(x, bank, expert_of_token=numbers, bias=bias)

    for place, number in zip(torch.cartesian_prod(torch.arange(2), torch.arange(4)), numbers.flatten(), strict=True):
        row = out[tuple(place)]
        if 0 <= number < E:
            torch.testing.assert_close(row, F.linear(x[tuple(place)], bank[number], bias[number]))
        else:
            assert not row.any()
    rows = torch.randn(7, K)
    sorted_out = grouped_linear(rows, bank, offsets=torch.tensor([2, 2, 5, 5, 6], dtype=torch.int32))
    wanted = [F.linear(rows[:2], bank[0]), F.linear(rows[2:5], bank[2]), F.linear(rows[5:6], bank[4])]
    torch.testing.assert_close(sorted_out, torch.cat([*wanted, torch.zeros(1, N)]))


def test_gradients_reach_the_input_and_the_bias():
    """They equal those of plain linears with the decoded weights; the bank gets none."""
    bank = quantize_bank(_weights(), "int8(activations=none)")
    numbers = torch.tensor([3, 0, 9, 3, 4])
    x, bias = torch.randn(5, K, requires_grad=True), torch.randn(E, N, requires_grad=True)
    weights = torch.randn(5, N)
    plain = torch.cat([bank.dequantize(), torch.zeros(1, N, K)])

    (grouped_linear(x, bank, expert_of_token=numbers, bias=bias) * weights).sum().backward()
    found, x.grad = x.grad, None
    found_bias, bias.grad = bias.grad, None
    index = numbers.clamp(max=E)
    padded = torch.cat([bias, torch.zeros(1, N)])
    ((torch.einsum("tk,tnk->tn", x, plain[index]) + padded[index]) * weights).sum().backward()

    torch.testing.assert_close(found, x.grad)
    torch.testing.assert_close(found_bias, bias.grad)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_whole_banks(spec, transposed):
    """bmm, matmul, baddbmm and PyTorch's grouped product equal those with the decoded bank, gradients included."""
    weights = _weights()
    bank = quantize_bank(weights.transpose(1, 2) if transposed else weights, spec, transposed=transposed)
    bank = bank if transposed else bank.transpose(-2, -1)  # [E, K, N] either way
    plain = bank.dequantize()
    x = torch.randn(E, 3, K, requires_grad=True)

    assert bank.shape == (E, K, N)
    assert torch.equal(plain.transpose(1, 2), quantize_bank(weights, spec).dequantize())
    for product in (
        torch.bmm,
        torch.matmul,
        lambda a, b: torch.baddbmm(torch.ones(E, 3, N), a, b, beta=0.5, alpha=2),
        lambda a, b: torch.bmm(b.transpose(1, 2), a.transpose(1, 2)),
        lambda a, b: torch.stack([row @ w for row, w in zip(a, b, strict=True)]),
    ):
        torch.testing.assert_close(product(x, bank), product(x, plain), rtol=1e-4, atol=1e-3)
        grads = [torch.autograd.grad(product(x, w).square().sum(), x)[0] for w in (bank, plain)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-2)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="newer than this PyTorch")
def test_the_grouped_product_of_pytorch():
    """F.grouped_mm takes a bank in either orientation, forward and backward, as transformers calls it."""
    bank = quantize_bank(_weights().bfloat16(), "nvfp4")
    offsets = torch.tensor([2, 2, 5, 5, 6], dtype=torch.int32)
    x = torch.randn(6, K, dtype=torch.bfloat16, requires_grad=True)

    out = F.grouped_mm(x, bank.transpose(-2, -1), offs=offsets)
    out.float().sum().backward()
    found, x.grad = x.grad, None
    plain = F.grouped_mm(x, bank.dequantize().transpose(-2, -1), offs=offsets)
    plain.float().sum().backward()

    assert sqnr(plain.double(), out.double()) > 45
    assert sqnr(x.grad.double(), found.double()) > 45


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_compiling_a_layer_with_experts():
    """torch.compile(fullgraph=True) gives the eager result, as a parameter of a module, forward and backward."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(quantize_bank(_weights(), "nvfp4"), requires_grad=False)

        def forward(self, x, numbers):
            return grouped_linear(x, self.up, expert_of_token=numbers) + F.linear(x, self.up[1])

    layer, x, numbers = Experts(), torch.randn(6, K, requires_grad=True), torch.tensor([0, 4, 4, 1, 2, 0])
    expected = layer(x, numbers)
    (wanted,) = torch.autograd.grad(expected.sum(), x)

    out = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, numbers)
    (grad,) = torch.autograd.grad(out.sum(), x)

    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, wanted)


def test_opcheck():
    """Schema, fake and autograd registration of the two ops agree with what they do (float8 parts it cannot check)."""
    bank, x = quantize_bank(_weights(), "int8(granularity=tensor)"), torch.randn(6, K, requires_grad=True)
    offsets = torch.tensor([2, 2, 5, 5, 6], dtype=torch.int32)
    bias = torch.randn(E, N, requires_grad=True)

    torch.library.opcheck(torch.ops.lowbit.grouped_linear.default, (x, bank.part_list, offsets, bias, bank.spec))
    torch.library.opcheck(
        torch.ops.lowbit.grouped_linear_input_gradient.default,
        (torch.randn(6, N), bank.part_list, offsets, K, bank.spec),
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_a_bank_is_a_parameter_like_any_other(transposed):
    """Copies, casts, pickles, state dicts and pieces keep shape and values; experts are views."""
    weights = _weights()
    bank = quantize_bank(weights.transpose(1, 2) if transposed else weights, "nvfp4", transposed=transposed)
    module, other = nn.Module(), nn.Module()
    module.w = nn.Parameter(bank, requires_grad=False)
    other.w = nn.Parameter(torch.empty_like(bank), requires_grad=False)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    plain = bank.dequantize()

    for made in (
        copy.deepcopy(module).w,
        other.w,
        bank.clone(),
        bank.to(torch.bfloat16).float(),
        torch.cat([bank[:2], bank[2:]]),
        torch.cat(bank.split(2)),
        bank.permute(0, 2, 1).transpose(1, 2),
        bank[torch.arange(E)],
    ):
        assert isinstance(made, QuantizedBank)
        assert torch.equal(made, bank)
    assert isinstance(copy.deepcopy(module).w, nn.Parameter)
    assert bank.bfloat16().dtype == torch.bfloat16
    assert torch.equal(bank[[3, 1, 3]].dequantize(), plain[[3, 1, 3]])
    assert torch.equal(bank.index_select(0, torch.tensor([4])).dequantize(), plain[4:])
    assert [torch.equal(expert.dequantize(), plain[e]) for e, expert in enumerate(bank.unbind())] == [True] * E
    assert bank.nbytes_stored() == sum(bank[e].nbytes_stored() for e in range(E))
    bank[1].copy_(bank[0])
    assert torch.equal(bank.dequantize()[1], plain[0])
    bank.copy_(plain.flip(0))
    assert sqnr(plain.flip(0), bank.dequantize()) > 17


def test_what_cannot_be_a_bank_is_refused_in_words():
    """Wrong shapes, values, formats and mixtures are errors that say which expert and what to do."""
    weights = _weights()
    broken = weights.clone()
    broken[3, 0, 0] = float("nan")

    with pytest.raises(WeightError, match=r"experts\.up\[3\]: holds NaN"):
        quantize_bank(broken, "nvfp4", where="experts.up")
    with pytest.raises(WeightError, match=r"bank: has shape \[48, 64\], expected experts"):
        quantize_bank(weights[0], "nvfp4")
    with pytest.raises(WeightError, match="meta device"):
        quantize_bank(weights.to("meta"), "nvfp4")
    with pytest.raises(WeightError, match="corrects the bias"):
        quantize_bank(weights, "svdquant_w4a4(rank=8,act_unsigned=true)")
    with pytest.raises(WeightError, match="2 statistics for 5 experts"):
        quantize_bank(weights, "nvfp4", statistics=[None, None])
    with pytest.raises(PartsError, match="expert 1 is QuantizedTensor"):
        QuantizedBank.stack([QuantizedTensor.quantize(w, s) for w, s in zip(weights, ("nvfp4", "int8"), strict=False)])
    with pytest.raises(PartsError, match="at least one"):
        QuantizedBank.stack([])


def test_bad_calls_are_refused_in_words():
    """Offsets and shapes that do not fit are errors, not reads beyond the end."""
    bank, x = quantize_bank(_weights(), "nvfp4"), torch.randn(6, K)

    for ends in ([1, 2, 3], [3, 2, 4, 5, 6], [1, 2, 3, 4, 7], [-1, 2, 3, 4, 6]):
        with pytest.raises(UnsupportedError, match="do not cut 6 rows into 5 groups"):
            grouped_linear(x, bank, offsets=torch.tensor(ends))
    with pytest.raises(UnsupportedError, match=r"offsets int32 \[E\], not .* float32"):
        grouped_linear(x, bank, offsets=torch.ones(E))
    with pytest.raises(UnsupportedError, match="its last axis must be 64 long"):
        grouped_linear(torch.randn(6, K - 1), bank, expert_of_token=torch.zeros(6).long())
    with pytest.raises(UnsupportedError, match="one whole number a token"):
        grouped_linear(x, bank, expert_of_token=torch.zeros(5).long())
    with pytest.raises(UnsupportedError, match="either offsets or expert_of_token"):
        grouped_linear(x, bank)
    with pytest.raises(UnsupportedError, match=r"must be \[E, N\] = \[5, 48\], not \[48\]"):
        grouped_linear(x, bank, expert_of_token=torch.zeros(6).long(), bias=torch.zeros(N))
    with pytest.raises(UnsupportedError, match="inner axes differ"):
        torch.bmm(torch.randn(E, 2, K - 1), bank.transpose(1, 2))


def test_a_bank_in_a_kernels_layout_comes_back_bit_for_bit():
    """Every expert is repacked by itself, and the plain parts are restored exactly."""
    bank = quantize_bank(torch.randn(2, 128, 128), "svdquant_w4a4(rank=16)")

    packed = bank.in_layout("kitchen_tile_packed_w4a4")

    assert packed.spec.endswith("@kitchen_tile_packed_w4a4")
    assert packed[1].kernel_layout == "kitchen_tile_packed_w4a4"
    assert packed.in_layout("kitchen_tile_packed_w4a4") is packed
    assert torch.equal(packed.in_layout(""), bank)


def test_the_backend_that_is_asked_for_runs_the_experts():
    """Each expert is one `linear`, so use_backend is obeyed: eager gives what eager's linear gives."""
    bank, x = quantize_bank(_weights(), "int8"), torch.randn(6, K)
    numbers = torch.tensor([0, 0, 4, 3, 4, 1])

    with lowbit.use_backend("eager"):
        out = grouped_linear(x, bank, expert_of_token=numbers)
        expected = torch.stack([F.linear(row, bank[number]) for row, number in zip(x, numbers, strict=True)])

    torch.testing.assert_close(out, expected)


def test_no_tokens_and_no_rows():
    """No tokens give no rows; an expert without tokens is not run."""
    bank = quantize_bank(_weights(), "nvfp4")

    assert grouped_linear(torch.randn(0, K), bank, expert_of_token=torch.zeros(0).long()).shape == (0, N)
    assert grouped_linear(torch.randn(2, 0, K), bank, expert_of_token=torch.zeros(2, 0).long()).shape == (2, 0, N)


def test_what_a_bank_does_not_know_dequantizes_visibly():
    """Writing with another op is refused; an op without a handler warns with its name."""
    bank = quantize_bank(_weights(), "int8")

    with pytest.raises(UnsupportedError, match="would write into QuantizedBank"):
        bank.add_(1)
