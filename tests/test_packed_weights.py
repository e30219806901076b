"""A weight in a kernel's layout does all that a plain one does, and gives the same."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import lowbit
from lowbit import QuantizedTensor, dispatch
from lowbit.errors import PartsError, UnsupportedError
from lowbit.formats.parts import raw_bytes
from lowbit.layouts import base
from lowbit.ops import generic
from lowbit.tensor import rebuild_quantized_tensor
from tests.support import gaussian, toy_layout

N, K = 48, 64
KINDS = {
    "fp8 rows": ("fp8_e4m3(granularity=row)", "toy"),
    "int8 blocks": ("int8(granularity=block,block_size=16x32)", "toy"),
    "nvfp4": ("nvfp4", "toy"),
    "wna16": ("wna16(group_size=32,zero_point=true)", "rows16"),
}


@pytest.fixture(autouse=True)
def _toy():
    with toy_layout.toy_backend("linear"):
        yield


@pytest.fixture(params=KINDS)
def pair(request):
    """A plain weight [48, 64] and the same one packed."""
    spec, layout = KINDS[request.param]
    plain = QuantizedTensor.quantize(gaussian(N, K, seed=1), spec)
    return plain, plain.in_layout(layout)


X, G = torch.randn(5, K), torch.randn(5, N)
OPS = {
    "linear": lambda w: F.linear(X, w, torch.ones(N)),
    "linear of 3-D": lambda w: F.linear(X.view(1, 5, K), w),
    "linear of float64": lambda w: F.linear(X.double(), w),
    "mm": lambda w: X @ w.t(),
    "mm with the weight first": lambda w: w @ X.t(),
    "transposed product": lambda w: G @ w,
    "addmm": lambda w: torch.addmm(torch.ones(N), X, w.t(), beta=0.5, alpha=2.0),
    "mv": lambda w: torch.mv(w, X[0]),
    "embedding": lambda w: F.embedding(torch.tensor([[1, 47], [0, 3]]), w),
    "dequantize": lambda w: w.dequantize(torch.float32),
    "detach": lambda w: w.detach(),
    "t": lambda w: w.t(),
    "permute": lambda w: w.permute(1, 0),
    "view": lambda w: w.view(4, 12, K),
    "unsqueeze": lambda w: w.unsqueeze(0),
    "squeeze": lambda w: w.view(1, N, K).squeeze(0),
    "expand": lambda w: w.expand(N, K),
    "bank": lambda w: torch.bmm(X.expand(4, 5, K), w.view(4, 12, K).transpose(1, 2)),
    "slice": lambda w: w[16:32],
    "slice inside a block": lambda w: w[3:9],
    "slice with a step": lambda w: w[::2],
    "slice of all": lambda w: w[:],
    "slice of columns of the transpose": lambda w: w.view(2, 24, K)[1].t(),
    "product of a slice": lambda w: F.linear(X, w[16:32]),
    "narrow": lambda w: w.narrow(0, 16, 16),
    "select": lambda w: w.view(3, 16, K)[1],
    "unbind": lambda w: w.view(3, 16, K).unbind(),
    "index_select": lambda w: w.index_select(0, torch.tensor([4, 0, 40])),
    "split": lambda w: w.split([16, 32]),
    "split inside a block": lambda w: w.split([3, 45]),
    "chunk": lambda w: w.chunk(3),
    "cat": lambda w: torch.cat([w, w]),
    "cat with its rows": lambda w: torch.cat([w, w[:16]]),
    "as_strided": lambda w: w.as_strided((32, K), (K, 1)),
    "pad": lambda w: F.pad(w, (0, 0, 0, 16)),
    "clone": lambda w: w.clone(),
    "contiguous": lambda w: w.contiguous(),
    "to bfloat16": lambda w: w.to(torch.bfloat16),
    "float": lambda w: w.bfloat16().float(),
    "deepcopy": copy.deepcopy,
    "merge": lambda w: w.merge(torch.full((N, K), 0.5), seed=None),
    "conv1d": lambda w: F.conv1d(torch.ones(1, 16, 9), w.view(N, 16, 4)),
    "conv2d in groups": lambda w: F.conv2d(torch.ones(1, 32, 5, 5), w.view(N, 16, 2, 2), groups=2),
    "isfinite": torch.isfinite,
}


def _values(result):
    """The results of an op as plain tensors."""
    found = list(result) if isinstance(result, tuple | list) else [result]
    return [one.dequantize() if isinstance(one, QuantizedTensor) else one for one in found]


def _kinds(result):
    found = list(result) if isinstance(result, tuple | list) else [result]
    return [(getattr(one, "format", None), tuple(one.shape), one.dtype, one.stride()) for one in found]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", OPS)
def test_every_operation_gives_what_plain_parts_give(name, mode, pair):
    """The same values, shapes and formats, whether the op keeps the layout or works on the plain parts."""
    plain, packed = pair
    with mode():
        expected, found = OPS[name](plain), OPS[name](packed)
    assert _kinds(found) == _kinds(expected)
    for one, other in zip(_values(found), _values(expected), strict=True):
        assert torch.equal(one, other)


def test_no_operation_dequantizes_because_of_a_layout(pair):
    """What is counted as a fallback of a packed weight is an unpacked linear or lookup, never another op."""
    before = lowbit.fallbacks()
    for run in OPS.values():
        run(pair[1])
    new = {name for name, count in lowbit.fallbacks().items() if count != before.get(name, 0)}
    assert new <= {f"lowbit::{op} (unpacks {pair[1].kernel_layout})" for op in ("linear", "embedding")}


def test_views_keep_the_layout_and_pieces_do_not(pair):
    """A whole weight stays packed for its kernel; rows of it have plain parts."""
    packed = pair[1]
    for kept in (packed.t(), packed.detach(), packed.clone(), packed[:], packed.view(N, K), packed.to(torch.float16)):
        assert kept.kernel_layout == packed.kernel_layout
    for piece in (packed[16:32], *packed.split(16), torch.cat([packed, packed])):
        assert piece.kernel_layout == ""


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_gradients_reach_the_input(mode, pair):
    """The gradient of x is that over plain parts."""
    grads = []
    for w in pair:
        x = X.clone().requires_grad_()
        F.linear(x, w).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_the_kernel_of_the_layout_runs_and_eager_takes_what_it_refuses():
    """float32 goes to the kernel that reads the layout; float64 is unpacked by eager, counted and explained."""
    plain = QuantizedTensor.quantize(gaussian(N, K), "int8(activations=none)")
    packed, name = plain.in_layout("toy"), "lowbit::linear (unpacks toy)"
    before = lowbit.fallbacks().get(name, 0)
    F.linear(X, packed)
    assert (toy_layout.CALLS, lowbit.fallbacks().get(name, 0)) == (["linear"], before)
    F.linear(X.double(), packed)
    assert (toy_layout.CALLS, lowbit.fallbacks()[name]) == (["linear"], before + 1)
    args = (packed.format, X.double(), packed.parts, None)
    reasons = dispatch.explain("linear", "int8", "toy", "cpu", args)
    assert reasons["cpu:linear_toy"] == "x is torch.float64, not float32"
    assert reasons["eager:linear"] == "runs, but unpacks the layout at every call"
    with lowbit.use_backend("cpu"), pytest.raises(UnsupportedError, match=r"x is torch\.float64"):
        F.linear(X.double(), packed)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_graph_breaks(kind):
    """A linear with a packed weight is one graph, and gives the eager result."""
    spec, layout = KINDS[kind]
    layer = nn.Linear(K, N)
    lowbit.quantize_(layer, spec)
    lowbit.repack_(layer, layout)
    assert layer.weight.kernel_layout == layout
    with torch.no_grad():
        expected = layer(X)
        found = torch.compile(layer, fullgraph=True, backend="aot_eager")(X)
    torch.testing.assert_close(found, expected)
    torch.compiler.reset()


def test_writing_in_place_packs_again(pair):
    """copy_ from weights of all kinds, and adding, change a packed weight as they change a plain one."""
    plain, packed = pair[0].clone(), pair[1].clone()  # they share what packing passes on
    other = QuantizedTensor.quantize(gaussian(N, K, seed=5), plain.format)
    layout = packed.kernel_layout
    for source in (other, other.in_layout(layout), gaussian(N, K, seed=6)):
        for target in (plain, packed):
            target.copy_(source)
        assert packed.kernel_layout == layout
        assert torch.equal(packed.dequantize(), plain.dequantize())
    plain.copy_(other.in_layout(layout))
    assert torch.equal(plain.dequantize(), other.dequantize())
    packed.copy_(other)
    plain += 0.3 * torch.ones(N, K)
    packed += 0.3 * torch.ones(N, K)
    assert torch.equal(packed.dequantize(), plain.dequantize())
    assert torch.equal(packed, plain)


def test_writing_into_rows_of_a_packed_weight_is_refused(pair):
    """They are a copy, so nothing would change; the message says what to do."""
    rows = pair[1][16:32]
    with pytest.raises(UnsupportedError, match=r"rows into .* kernel's layout: they are a copy; write the whole"):
        rows.copy_(pair[0][:16])


def test_new_tensors_like_a_packed_weight(pair):
    """empty_like is packed, too; new ones of another size have plain parts that rows can be copied into."""
    plain, packed = pair
    assert torch.empty_like(packed).copy_(plain).kernel_layout == packed.kernel_layout
    padded = packed.new_zeros((64, K))
    padded.narrow(0, 0, N).copy_(packed)
    assert torch.equal(padded[:N].dequantize(), plain.dequantize())


def test_fsdp_sends_plain_rows(pair):
    """What a rank contributes is what it would be without a layout."""
    (sent, _), (expected, _) = pair[1].fsdp_pre_all_gather(None), pair[0].fsdp_pre_all_gather(None)
    assert all(torch.equal(one, other) for one, other in zip(sent, expected, strict=True))


@pytest.mark.parametrize("protocol", ["pickle", "torch.save"])
def test_survives_pickling_with_its_version(protocol, pair):
    """A packed parameter comes back packed, with its bits; the spec that is written has the layout's version."""
    packed = nn.Parameter(pair[1], requires_grad=False)
    if protocol == "pickle":
        back = pickle.loads(pickle.dumps(packed))
    else:
        file = io.BytesIO()
        torch.save(packed, file)
        file.seek(0)
        back = torch.load(file, weights_only=True)
    assert (back.spec, back.matrix, back.kernel_layout) == (packed.spec, packed.matrix, packed.kernel_layout)
    assert packed.spec.rpartition(":")[2] == {"toy": "7", "rows16": "1"}[packed.kernel_layout]
    pairs = zip(back.part_list, packed.part_list, strict=True)
    assert all(torch.equal(raw_bytes(one), raw_bytes(other)) for one, other in pairs)


@pytest.mark.parametrize("tag", ["toy:6", "gone:1"])
def test_another_version_is_refused_with_the_remedy(tag):
    """Parts packed by another version are never taken for this one's, nor those of a layout that is gone."""
    packed = QuantizedTensor.quantize(gaussian(N, K), "int8").in_layout("toy")
    rebuild, (stored, _, *rest) = packed.__reduce_ex__(2)
    assert rebuild is rebuild_quantized_tensor
    with pytest.raises(PartsError, match=r"this lowbit has .*; load the checkpoint again, .*\.in_layout\(''\)"):
        rebuild(stored, f"int8@{tag}", *rest)


def test_a_state_dict_loads_into_plain_and_packed_modules(pair):
    """By copy and by assignment, in both directions."""
    made = []
    for weight in pair:
        layer = nn.Linear(K, N, bias=False)
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        made.append(layer)
    for source, target in (made, reversed(made)):
        for assign in (False, True):
            into = copy.deepcopy(target)
            into.load_state_dict(source.state_dict(), assign=assign)
            assert torch.equal(into(X), source(X))
            kept = source if assign else target
            assert into.weight.kernel_layout == kept.weight.kernel_layout


def test_wrong_parts_are_refused_with_the_remedy(pair):
    """Plain parts, wrong lengths and misaligned storage are found before a kernel reads them."""
    plain, packed = pair
    toy = packed.kernel_layout == "toy"
    with pytest.raises(UnsupportedError, match=r"repack|keep it in plain|cannot be in"):
        generic.run_linear(torch.randn(5, 2 * K), packed.part_list, None, packed.spec)
    if toy:
        with pytest.raises(UnsupportedError, match=r"qdata has shape .* in version 7 of toy; repack"):
            generic.run_linear(X, plain.part_list, None, packed.spec)
        moved = torch.empty(packed.qdata.numel() + 1, dtype=torch.uint8)[1:].view(packed.qdata.shape)
        moved.copy_(raw_bytes(packed.qdata))
        parts = {**packed.parts, "qdata": moved.view(packed.qdata.dtype)}
        with pytest.raises(UnsupportedError, match="must be contiguous and begin at a multiple of 16 bytes for toy"):
            F.linear(X, packed.with_parts(parts))
        assert torch.equal(F.linear(X, packed.with_parts(parts).in_layout("").in_layout("toy")), F.linear(X, plain))


def test_parts_are_looked_at_at_every_call(pair):
    """A part that is replaced, set, resized or freed between two calls is found, and the right one is taken again."""
    packed = pair[1].map_parts(torch.clone)
    y, kept = F.linear(X, packed), packed.parts

    packed.scale = kept["scale"][:1].clone()
    with pytest.raises(UnsupportedError, match="scale has shape"):
        F.linear(X, packed)
    packed.scale = kept["scale"]
    assert torch.equal(F.linear(X, packed), y)

    codes = packed.qdata.data
    packed.qdata.data = codes[:-1].clone()
    with pytest.raises(UnsupportedError, match=r"qdata has shape|cannot be in"):
        F.linear(X, packed)
    packed.qdata.data = codes
    assert torch.equal(F.linear(X, packed), y)

    packed.scale.untyped_storage().resize_(0)
    with pytest.raises(UnsupportedError, match="scale has no memory, which was freed"):
        F.linear(X, packed)


def test_what_parts_must_be_is_remembered_of_so_many_shapes(monkeypatch):
    """Whoever asks for ever new shapes fills no memory, and gets the same answers."""
    packed = QuantizedTensor.quantize(gaussian(N, K), "fp8_e4m3(granularity=row)")
    monkeypatch.setattr(base, "_REMEMBERED", 3)
    monkeypatch.setattr(base, "_EXPECTED", {})
    for columns in range(K, 2 * K):
        found = base.misfit(packed.format, "", packed.parts, N, columns)
        assert (found is None) == (columns == K)
        assert len(base._EXPECTED) <= 3
    assert base.misfit(packed.format, "", packed.parts, N, K) is None


def test_packing_brings_passed_on_parts_into_order():
    """A part that packing only passes on is copied where it lies as the kernels cannot read it."""
    plain = QuantizedTensor.quantize(gaussian(N, K), "fp8_e4m3(granularity=row)")
    odd = torch.empty(N + 1)[1:].view(N, 1).copy_(plain.scale)
    packed = plain.with_parts({**plain.parts, "scale": odd}).in_layout("toy")
    assert packed.scale.data_ptr() % 16 == 0
    assert torch.equal(F.linear(X, packed), F.linear(X, plain))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyTorch's own
@pytest.mark.parametrize("layout", ["", "rows16"])
def test_forward_derivatives_pass_through_a_linear(layout):
    """The tangent of F.linear is the product of the input's; kernels know none, and it must not get lost in them."""
    packed = QuantizedTensor.quantize(gaussian(N, 256), "int8(activations=none)", dtype=torch.float32).in_layout(layout)
    x, tangent = gaussian(2, 256), gaussian(2, 256, seed=3)
    with forward_ad.dual_level():
        y, found = forward_ad.unpack_dual(F.linear(forward_ad.make_dual(x, tangent), packed))

    torch.testing.assert_close(y, x @ packed.dequantize().t(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found, tangent @ packed.dequantize().t(), rtol=1e-3, atol=1e-3)
