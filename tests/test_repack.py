"""Packing the weights of modules for the kernels on their device: at load, on request, and undone."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import lowbit
from lowbit import QuantizedTensor, dispatch
from lowbit.errors import FormatError
from lowbit.formats.parts import raw_bytes
from lowbit.tensor_ops import copies
from tests.support import toy_layout

SPEC = "fp8_e4m3(granularity=row)"


@pytest.fixture
def toy():
    """A cpu backend with a linear in the toy layout."""
    with toy_layout.toy_backend("linear"):
        yield


class Model(nn.Module):
    """A table, a kernel, linears, and a head that may share the table's weight."""

    def __init__(self, *, tied=False):
        super().__init__()
        self.table = nn.Embedding(40, 64)
        self.conv = nn.Conv1d(64, 32, 2)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        self.head = nn.Linear(64, 40, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x):
        """[..] -> [.., 40]."""
        return self.head(self.down(self.up(self.table(x))))


def _layouts(model):
    return {name: weight.kernel_layout for name, weight in model.named_parameters() if hasattr(weight, "kernel_layout")}


def _bits(model):
    parts = [part for weight in model.parameters() if isinstance(weight, QuantizedTensor) for part in weight.part_list]
    return [raw_bytes(part).clone() for part in parts]


def test_without_other_kernels_auto_is_plain():
    """Where only eager runs, no weight is packed, although eager can read layouts."""
    model = Model()
    with toy_layout.toy_backend():
        lowbit.quantize_(model, "wna16(group_size=32)")
        changes = lowbit.repack_(model)
        assert dispatch.preferred_layout("linear", lowbit.parse_spec("svdquant_w4a4"), 128, 64, "cpu") == ""
    assert set(_layouts(model).values()) == {""}
    assert {change.layout for change in changes} == {""}
    assert next(change.why for change in changes if change.name == "up.weight") == "no kernel has another layout on cpu"


def test_repacking_packs_what_its_kernels_read_and_undoes_it_bit_for_bit(toy):
    """Linears are packed; a table without a kernel for its lookups, and a convolution, are not. "" undoes all."""
    model, x = Model(), torch.tensor([[1, 2, 39]])
    lowbit.quantize_(model, SPEC, layout="plain")
    before, expected, weight = _bits(model), model(x), model.up.weight

    changes = {change.name: change for change in lowbit.repack_(model)}

    assert _layouts(model) == {name: change.layout for name, change in changes.items()}
    packed = {name for name, layout in _layouts(model).items() if layout == "toy"}
    assert packed == {"up.weight", "down.weight", "head.weight"}
    assert model.up.weight is weight
    assert "nn.Linear or nn.Embedding" in changes["conv.weight"].why
    assert torch.equal(model(x), expected)
    assert toy_layout.CALLS == ["linear"] * 3

    lowbit.repack_(model, "")
    assert set(_layouts(model).values()) == {""}
    assert all(torch.equal(one, other) for one, other in zip(_bits(model), before, strict=True))


def test_a_table_is_packed_for_lookups_and_a_shared_one_for_the_head():
    """Its own op decides; the head's where both share the weight, which stays one parameter."""
    with toy_layout.toy_backend("embedding"):
        model = Model()
        lowbit.quantize_(model, SPEC)
        assert {name for name, layout in _layouts(model).items() if layout} == {"table.weight"}
    with toy_layout.toy_backend("linear"):
        model = Model(tied=True)
        lowbit.quantize_(model, SPEC)
        assert model.head.weight is model.table.weight
        assert model.head.weight.kernel_layout == "toy"
        assert model(torch.tensor([3])).shape == (1, 40)


def test_quantizing_packs_unless_told_otherwise(toy):
    """quantize_ takes the same `layout`; what was quantized before is left alone."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    lowbit.quantize_(model, {"^0$": SPEC}, layout="plain")
    lowbit.quantize_(model, {"^1$": SPEC})
    assert _layouts(model) == {"0.weight": "", "1.weight": "toy"}
    with pytest.raises(FormatError, match=r"no layout 'toi'; choose 'auto', 'plain' or one of .*toy"):
        lowbit.repack_(model, "toi")
    with pytest.raises(FormatError, match="no layout 'toi'"):
        lowbit.quantize_(nn.Linear(64, 64), SPEC, layout="toi")


def test_a_layout_by_name_is_for_the_weights_that_fit_it(toy):
    """Others keep their plain parts, and the change says why."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(96, 32))
    lowbit.quantize_(model, {"^0$": SPEC, "^1$": "wna16(group_size=32)", "^2$": "wna16(group_size=0)"})
    changes = lowbit.repack_(model, "coalesced_int4")
    assert [change.layout for change in changes] == ["", "coalesced_int4", ""]
    assert changes[0].why == "fp8_e4m3 has no layout coalesced_int4"
    assert "groups of 96" in changes[2].why


def test_values_that_a_layout_cannot_hold_stay_plain():
    """A weight whose offsets are no zero points is not changed by packing: it keeps its parts, with the reason."""
    layer = nn.Linear(128, 24)
    lowbit.quantize_(layer, "awq_w4a16(group_size=64)", layout="plain")
    before = _bits(layer)
    (change,) = lowbit.repack_(layer, "coalesced_int4")
    assert (change.name, change.layout) == ("weight", "")
    assert "no multiples of its scales" in change.why
    assert all(torch.equal(one, other) for one, other in zip(_bits(layer), before, strict=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_load_packs_each_layer_or_leaves_it_plain(tied, meta, toy, tmp_path):
    """Under "auto" weights are packed and under "plain" not, with the same values; saving gives the same file again."""
    model, x = Model(tied=tied), torch.tensor([[1, 2, 39]])
    lowbit.quantize_(model, SPEC)
    path = lowbit.save(model, tmp_path / "model.safetensors")
    found = {}
    for layout in ("auto", "plain"):
        blank = Model(tied=tied)
        if meta:
            blank.to("meta")
            if tied:
                blank.head.weight = blank.table.weight
        lowbit.load(blank, path, layout=layout)
        found[layout] = blank
        assert torch.equal(blank(x), model(x))
        assert lowbit.save(blank, tmp_path / layout).read_bytes() == path.read_bytes()
    assert _layouts(found["auto"]) == _layouts(model)
    assert _layouts(model)["up.weight"] == "toy"
    assert set(_layouts(found["plain"]).values()) == {""}
    with pytest.raises(FormatError, match="no layout 'fast'"):
        lowbit.load(Model(), path, layout="fast")


def test_load_follows_use_backend(toy, tmp_path):
    """Under use_backend("eager") nothing is packed, although threads read the layers."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    path = lowbit.save(_quantized(model), tmp_path / "model.safetensors")
    with lowbit.use_backend("eager"):
        lowbit.load(model, path)
    assert set(_layouts(model).values()) == {""}
    lowbit.load(model, path)
    assert set(_layouts(model).values()) == {"toy"}


def _quantized(model):
    made = copy.deepcopy(model)
    lowbit.quantize_(made, SPEC)
    return made


def test_a_folded_bias_is_that_of_the_plain_parts(toy):
    """The share of a format that shifts its activations does not depend on the layout."""
    plain = nn.Linear(64, 64)
    packed = copy.deepcopy(plain)
    lowbit.quantize_(plain, "svdquant_w4a4(rank=8,act_unsigned=true)", layout="plain")
    lowbit.quantize_(packed, "svdquant_w4a4(rank=8,act_unsigned=true)")
    assert packed.weight.kernel_layout == "toy"
    assert torch.equal(plain.bias, packed.bias)
    x = torch.rand(3, 64)
    assert torch.equal(plain(x), packed(x))


class _Held(TorchDispatchMode):
    """The most bytes that a module's parts and all new storages held at a time."""

    def __init__(self, model):
        super().__init__()
        self.made, self.peak = {}, 0
        for weight in model.parameters():
            self._count(weight.part_list)

    def _count(self, tensors):
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.made[storage._cdata] = storage._weak_ref(), storage.nbytes()
        self.made = {key: held for key, held in self.made.items() if not torch.UntypedStorage._expired(held[0])}
        self.peak = max(self.peak, sum(size for _, size in self.made.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_iter(result) if isinstance(one, torch.Tensor)]
        self._count([one for one in tensors if not isinstance(one, QuantizedTensor)])
        return result


def test_repacking_holds_one_weight_twice(toy):
    """At no time is more than one weight there in both arrangements: the peak is all of them and the largest again."""
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))
    lowbit.quantize_(model, SPEC, layout="plain")
    one = model[0].weight.nbytes_stored()
    with _Held(model) as held:
        lowbit.repack_(model)
    assert set(_layouts(model).values()) == {"toy"}
    assert 8 * one < held.peak <= 9 * one


def test_preferred_layout_asks_backends_in_order(monkeypatch):
    """The first backend's packed kernel whose layout the weight fits, else its plain one; eager has no say."""
    fmt = lowbit.parse_spec(SPEC)
    with toy_layout.toy_backend("linear"):
        assert dispatch.preferred_layout("linear", fmt, 128, 64, "cpu") == "toy"
        assert dispatch.preferred_layout("linear", fmt, toy_layout.MOST_ROWS + 1, 64, "cpu") == ""
        assert dispatch.preferred_layout("linear", fmt, 128, 64, "cuda") == ""
        assert dispatch.preferred_layout("embedding", fmt, 128, 64, "cpu") == ""
        assert dispatch.preferred_layout("linear", lowbit.parse_spec("mxfp8"), 128, 64, "cpu") == ""
        with lowbit.use_backend("eager"):
            assert dispatch.preferred_layout("linear", fmt, 128, 64, "cpu") == ""
        with lowbit.use_backend("cpu"):
            assert dispatch.preferred_layout("linear", fmt, 128, 64, "cpu") == "toy"
        dispatch.kernel("linear", backend="cpu", format="fp8_e4m3")(toy_layout.linear_toy)
        assert dispatch.preferred_layout("linear", fmt, 128, 64, "cpu") == "toy"
        monkeypatch.setitem(dispatch.BACKENDS, "triton", ("cpu",))
        dispatch._STATE.loaded["triton"] = None
        dispatch._STATE.candidates.clear()
        dispatch.kernel("linear", backend="triton", format="fp8_e4m3")(toy_layout.linear_toy)
        assert dispatch.preferred_layout("linear", fmt, 128, 64, "cpu") == ""


def test_a_weight_stays_packed_where_its_kernel_is(toy):
    """Dtypes, copies on the same device and the meta device keep the layout; a device without its kernel does not."""
    layer = _quantized(nn.Linear(64, 64))
    plain = layer.weight.in_layout("")
    assert layer.to(torch.bfloat16).weight.kernel_layout == "toy"
    assert layer.weight.to("cpu", copy=True).kernel_layout == "toy"
    assert layer.weight.to("meta").kernel_layout == "toy"
    assert dispatch.has_kernel("fp8_e4m3", "toy", "cpu")
    assert not dispatch.has_kernel("fp8_e4m3", "toy", "cuda")
    arriving = copies._readable_on(layer.weight, torch.device("cuda"))
    assert torch.equal(arriving, plain)
    assert arriving.kernel_layout == ""


@pytest.mark.gpu
def test_a_module_that_moves_to_a_gpu_has_plain_parts_there(toy):
    """And is packed again by `repack_` when it is back."""
    layer, x = _quantized(nn.Linear(64, 64)), torch.randn(3, 64)
    expected = layer(x)
    layer.to("cuda")
    assert layer.weight.kernel_layout == ""
    torch.testing.assert_close(layer(x.cuda()).cpu(), expected)
    layer.to("cpu")
    lowbit.repack_(layer)
    assert layer.weight.kernel_layout == "toy"
    assert torch.equal(layer(x), expected)
