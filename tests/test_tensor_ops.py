"""Operations of QuantizedTensor that once went wrong, in the modes and views in which they did."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import lowbit
from lowbit import QuantizedTensor
from lowbit.errors import UnsupportedError
from lowbit.formats.parts import raw_bytes
from tests.support import gaussian
from tests.support.specs import ALL_SPECS, weight_shape

SPEC = "fp8_e4m3(granularity=row)"
BLOCKS = "int8(granularity=block,block_size=16x32)"
SHARED = "fp8_e4m3"  # one scale for all rows


def _weight(spec=SPEC, n=48, k=64, dtype=torch.float32):
    return QuantizedTensor.quantize(gaussian(n, k, seed=1).to(dtype), spec)


VIEWS = {
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(0, 1),
    "permute": lambda w: w.permute(1, 0),
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "view": lambda w: w.view(4, 12, 64),
    "unflatten": lambda w: w.unflatten(0, (4, 12)),
    "flatten": lambda w: w.view(4, 12, 64).flatten(0, 1),
    "unsqueeze": lambda w: w.unsqueeze(0),
    "squeeze": lambda w: w.view(1, 48, 64).squeeze(0),
    "slice": lambda w: w[3:17],
    "narrow": lambda w: w.narrow(0, 2, 5),
    "select": lambda w: w[5],
    "chunk": lambda w: w.chunk(3)[1],
    "split": lambda w: w.split([8, 40])[1],
    "unbind": lambda w: w.unbind(0)[7],
    "tensor_split": lambda w: w.tensor_split(5)[2],
    "index_select": lambda w: w.index_select(0, torch.tensor([3, 3, 40])),
    "expand": lambda w: w.expand(48, 64),
    "contiguous": lambda w: w.contiguous(),
    "clone": lambda w: w.clone(),
    "cat": lambda w: torch.cat([w[:16], w[16:]]),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
@pytest.mark.parametrize("view", VIEWS)
def test_views_stay_quantized_in_every_grad_mode(view, mode):
    """Each view is quantized and equals that of the dequantized weight; the weight is made outside inference mode."""
    before = lowbit.fallbacks()
    for spec in (SPEC, BLOCKS, SHARED, "nvfp4", "awq_w4a16"):
        w = _weight(spec)
        with mode():
            made = VIEWS[view](w)
            assert isinstance(made, QuantizedTensor)
            assert torch.equal(made.dequantize(), VIEWS[view](w.dequantize()))
    assert lowbit.fallbacks() == before


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_products_of_all_kinds_in_every_grad_mode(mode):
    """mm, mv, addmv, matmul and (b)addbmm on views run low-bit in inference mode as in the others."""
    w, before = _weight(), lowbit.fallbacks()
    d, x, bank = w.dequantize(), torch.randn(5, 64), torch.randn(4, 5, 64)
    with mode():
        for mine, theirs in [
            (x @ w.t(), x @ d.t()),
            (
                torch.addmm(torch.ones(48), x, w.t(), beta=0.5, alpha=2),
                torch.addmm(torch.ones(48), x, d.t(), beta=0.5, alpha=2),
            ),
            (w @ x[0], d @ x[0]),
            (torch.addmv(torch.ones(48), w, x[0], alpha=3), torch.addmv(torch.ones(48), d, x[0], alpha=3)),
            (bank @ w.t(), bank @ d.t()),
            (bank.transpose(0, 1) @ w.mT, bank.transpose(0, 1) @ d.mT),
            (torch.bmm(bank, w.view(4, 12, 64).mT), torch.bmm(bank, d.view(4, 12, 64).mT)),
            (
                torch.baddbmm(torch.ones(4, 5, 12), bank, w.view(4, 12, 64).mT, beta=2),
                torch.baddbmm(torch.ones(4, 5, 12), bank, d.view(4, 12, 64).mT, beta=2),
            ),
        ]:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert lowbit.fallbacks() == before


def test_a_view_without_handler_falls_back_in_inference_mode_too():
    """Picking a column dequantizes visibly, also for an ordinary weight inside inference mode."""
    w = _weight()
    with torch.inference_mode(), pytest.warns(UserWarning, match="aten.select.int"):
        column = w.select(1, 3)

    assert torch.equal(column, w.dequantize()[:, 3])


@pytest.mark.parametrize("spec", ALL_SPECS)
def test_the_wrong_number_of_columns_is_refused(spec):
    """A product over the wrong length raises in every way of asking; padded parts would let it pass unnoticed."""
    n, k = weight_shape(lowbit.parse_spec(spec))
    w = QuantizedTensor.quantize(gaussian(n, k, seed=1), spec)
    for wrong in (k - 3, k + 5):
        x = torch.randn(2, wrong)
        for call in (lambda: F.linear(x, w), lambda: x @ w.t(), lambda: F.linear(x.requires_grad_(), w)):  # noqa: B023
            with pytest.raises(UnsupportedError, match=f"its last axis must be {k} long"):
                call()
    with pytest.raises(UnsupportedError, match=f"its last axis must be {n} long"):
        torch.randn(2, n - 1) @ w


def test_indices_of_an_embedding_are_whole_numbers():
    """A float index is refused as F.embedding refuses it, not rounded."""
    with pytest.raises(UnsupportedError, match=r"expected torch\.int64 or torch\.int32"):
        F.embedding(torch.tensor([1.5]), _weight())


@pytest.mark.parametrize("spec", ALL_SPECS)
def test_the_meta_device_and_fake_tensors(spec):
    """Shapes, dtypes and devices come out right where there is no data, gradients included."""
    n, k = weight_shape(lowbit.parse_spec(spec))
    layer = nn.Linear(k, n)
    lowbit.quantize_(layer, spec)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.randn(3, k)).shape == (3, n)

    layer = layer.to("meta")
    x = torch.randn(3, k, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    with torch.no_grad():
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert isinstance(layer.to_empty(device="cpu").weight, QuantizedTensor)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_casts_what_it_casts_for_plain_weights(dtype, mode):
    """float32 inputs are computed in the region's dtype, by every way to ask; float64 ones stay."""
    w, x, bias = _weight(dtype=torch.bfloat16), torch.randn(2, 3, 64), torch.randn(48)
    with mode(), torch.autocast("cpu", dtype):
        assert F.linear(x, w, bias).dtype == dtype
        assert (x @ w.t()).dtype == dtype
        assert torch.addmm(bias, x[0], w.t()).dtype == dtype
        assert F.linear(x.double(), w, bias).dtype == torch.float64
    x.requires_grad_()
    with torch.autocast("cpu", dtype):
        y = F.linear(x, w, bias)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("spec", ALL_SPECS)
def test_activation_checkpointing_gives_the_same_gradient(spec):
    """Recomputing a quantized layer in the backward pass changes nothing."""
    n, k = weight_shape(lowbit.parse_spec(spec))
    layer = nn.Linear(k, n)
    lowbit.quantize_(layer, spec)
    x = torch.randn(3, k, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)

    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

    assert torch.equal(torch.autograd.grad(again.square().sum(), x)[0], plain)


def test_quantizing_a_trainable_parameter_tracks_nothing():
    """The weight is frozen: no part of it remembers the parameter that it was made from."""
    w = QuantizedTensor.quantize(nn.Parameter(torch.randn(48, 64)), SPEC)

    assert not w.requires_grad
    assert all(part.grad_fn is None and not part.requires_grad for part in w.part_list)


def test_functional_call_takes_the_parameters_as_arguments():
    """torch.func.functional_call runs a layer on quantized weights given by name."""
    layer = nn.Linear(64, 48)
    other = copy.deepcopy(layer)
    lowbit.quantize_(layer, SPEC)
    x = torch.randn(3, 64)

    assert torch.equal(torch.func.functional_call(other, dict(layer.named_parameters()), (x,)), layer(x))


def test_memory_is_shared_with_other_processes_by_its_parts():
    """share_memory moves the parts; PyTorch's own would follow a null pointer."""
    layer = nn.Linear(64, 48)
    lowbit.quantize_(layer, SPEC)
    assert not layer.weight.is_shared()

    layer.share_memory()

    assert layer.weight.is_shared()
    assert all(part.is_shared() for part in layer.weight.part_list)


def test_copying_between_dtypes_and_transpositions():
    """copy_ takes any logical dtype, plain or quantized, and a transposed target stores the transposed source."""
    w, other = _weight(), QuantizedTensor.quantize(torch.randn(48, 64).bfloat16(), SPEC)

    other.copy_(w)
    assert torch.equal(other, w)
    assert other.dtype == torch.bfloat16
    for source in (w.dequantize().t(), w.t()):
        target = torch.empty_like(w)
        target.t().copy_(source)
        assert torch.equal(target.dequantize(), w.dequantize())
    plain = torch.empty(64, 48, dtype=torch.float16)
    assert torch.equal(plain.copy_(w.t()), w.dequantize(torch.float16).t())


def test_writing_rows_never_changes_other_rows():
    """Rows with scales of their own are written; where a scale belongs to other rows too, it is refused."""
    w, new = _weight(SPEC), torch.randn(5, 64)
    before = w.dequantize()
    w[3:8] = new
    assert torch.equal(w.dequantize()[3:8], QuantizedTensor.quantize(new, SPEC).dequantize())
    assert torch.equal(w.dequantize()[8:], before[8:])

    blocks = _weight(BLOCKS)
    blocks[16:32] = torch.zeros(16, 64)
    assert not blocks.dequantize()[16:32].any()
    for rows in (slice(16, 20), slice(5, 21), slice(0, 48, 2)):
        with pytest.raises(UnsupportedError, match="copy whole blocks"):
            blocks[rows] = torch.zeros(len(range(*rows.indices(48))), 64)

    shared = _weight(SHARED)
    before = shared.dequantize()
    with pytest.raises(UnsupportedError, match="its rows share scale; copy a whole weight"):
        shared[0:4] = 100 * torch.randn(4, 64)
    assert torch.equal(shared.dequantize(), before)


def test_blocks_can_be_copied_into_single_rows_and_not_back():
    """Gathered rows take whole blocks exactly; the way back would need scales that blocks do not have."""
    blocks = _weight(BLOCKS)
    single = blocks.index_select(0, torch.arange(48))
    target = torch.empty_like(single)

    target.copy_(blocks)

    assert torch.equal(target.dequantize(), blocks.dequantize())
    with pytest.raises(UnsupportedError, match="of another format or view"):
        blocks.copy_(single)


def test_pieces_of_a_split_are_of_one_format():
    """Where one piece of blocks cannot be a view, none is: FSDP gathers them as equals."""
    for sizes, views in (([16, 16, 16], True), ([16, 16, 10, 6], False), ([24, 24], False)):
        pieces = _weight(BLOCKS).split(sizes)
        assert len({piece.spec for piece in pieces}) == 1
        assert (pieces[0].format == lowbit.parse_spec(BLOCKS)) == views


@pytest.mark.parametrize("spec", ALL_SPECS)
def test_half_a_module_saved_and_loaded_by_assignment_or_copy(spec):
    """A state dict with weights_only goes into a quantized or a plain layer; views pickle too."""
    n, k = weight_shape(lowbit.parse_spec(spec))
    layer = nn.Linear(k, n).half()
    lowbit.quantize_(layer, spec)
    buffer = io.BytesIO()
    torch.save({**layer.state_dict(), "rows": layer.weight[3:9], "turned": layer.weight.t()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)

    assert torch.equal(state.pop("rows").dequantize(), layer.weight[3:9].dequantize())
    assert torch.equal(state.pop("turned").dequantize(), layer.weight.t().dequantize())
    assigned, plain = nn.Linear(k, n).half(), nn.Linear(k, n).half()
    assigned.load_state_dict(state, assign=True)
    plain.load_state_dict(state)
    assert torch.equal(assigned.weight, layer.weight)
    assert torch.equal(plain.weight, layer.weight.dequantize())


def test_gathered_rows_keep_their_bytes():
    """index_select copies codes and scales, so that writing to the copy leaves the source alone."""
    w = _weight()
    picked = w.index_select(0, torch.tensor([1, 2]))
    raw_bytes(picked.qdata).zero_()

    assert w[1:3].dequantize().any()


@pytest.mark.parametrize("spec", ALL_SPECS)
def test_a_plain_pickle_survives(spec):
    """pickle and copy.copy work as torch.save does, also for float8 parts, which PyTorch alone cannot unpickle."""
    n, k = weight_shape(lowbit.parse_spec(spec))
    w = QuantizedTensor.quantize(gaussian(n, k, seed=1), spec)

    for made in (pickle.loads(pickle.dumps(w)), copy.copy(w)):
        assert torch.equal(made, w)
        assert made.qdata.dtype == w.qdata.dtype
