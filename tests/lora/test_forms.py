"""LoHa, LoKr and DoRA: what their tensors mean, where they fit, and what is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import lowbit
from lowbit.errors import CheckpointError, FormatError, UnsupportedError
from lowbit.lora import DoraDelta, LohaDelta, LokrDelta, LoraDelta, attach_lora, bake_lora, read_adapter
from tests.lora.models import FORMATS, model

N, K, R = 24, 16, 4


def rand(*shape: int) -> torch.Tensor:
    """Small random numbers, others each time."""
    return torch.randn(shape) / 4


def change(tmp_path, tensors: dict, name: str = "x"):
    """The change that a file with these tensors of one layer makes to it."""
    path = tmp_path / "adapter.safetensors"
    save_file({f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}, path)
    return read_adapter(path).layers[name]


def test_loha_is_the_product_of_two_low_ranks(tmp_path):
    """Element by element, times alpha / R; as a LoRA it has rank R * R and the same values."""
    a1, b1, a2, b2 = rand(64, 2), rand(2, 48), rand(64, 2), rand(2, 48)
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(3.0)}

    delta = change(tmp_path, tensors)

    assert isinstance(delta, LohaDelta)
    assert (delta.shape, delta.rank) == ((64, 48), 2)
    torch.testing.assert_close(delta.dense(-0.5), -0.5 * 1.5 * (a1 @ b1) * (a2 @ b2))
    assert delta.low_rank().rank == 4
    torch.testing.assert_close(delta.low_rank().dense(2.0), delta.dense(2.0))


def test_loha_with_cores_is_a_kernel(tmp_path):
    """Tucker's form of a convolution: a core [R, R, kh, kw] between the factors of outputs and inputs."""
    made = {f"hada_w{i}_{side}": rand(2, size) for i in (1, 2) for side, size in (("a", 12), ("b", 6))}
    cores = {f"hada_t{i}": rand(2, 2, 3, 3) for i in (1, 2)}

    delta = change(tmp_path, {**made, **cores})

    kernels = [
        sum(
            made[f"hada_w{i}_a"][p][:, None, None, None]
            * made[f"hada_w{i}_b"][q][None, :, None, None]
            * cores[f"hada_t{i}"][p, q]
            for p in range(2)
            for q in range(2)
        )
        for i in (1, 2)
    ]
    assert delta.shape == (12, 6, 3, 3)
    torch.testing.assert_close(delta.dense(), (kernels[0] * kernels[1]).flatten(1))


@pytest.mark.parametrize("first", ["whole", "factors"])
@pytest.mark.parametrize("second", ["whole", "factors", "kernel", "core"])
def test_lokr_is_a_kronecker_product(tmp_path, first, second):
    """Either part may be whole or a product, the second a kernel. The scale is alpha / R, 1 if both are whole."""
    tensors = {"alpha": torch.tensor(6.0)}
    if first == "whole":
        tensors["lokr_w1"] = w1 = rand(4, 3)
    else:
        tensors |= {"lokr_w1_a": rand(4, 2), "lokr_w1_b": rand(2, 3)}
        w1 = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    if second == "factors":
        tensors |= {"lokr_w2_a": rand(6, 2), "lokr_w2_b": rand(2, 5)}
        w2 = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    elif second == "core":
        a, b, t = rand(2, 6), rand(2, 5), rand(2, 2, 3, 3)
        tensors |= {"lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t}
        w2 = (a.t() @ (t.permute(2, 3, 0, 1) @ b)).permute(2, 3, 0, 1).contiguous()
    else:
        tensors["lokr_w2"] = w2 = rand(6, 5, *((3, 3) if second == "kernel" else ()))

    delta = change(tmp_path, tensors)

    scale = 1.0 if first == "whole" and second in ("whole", "kernel") else 3.0
    wanted = torch.kron(w1.reshape(4, 3, *[1] * (w2.dim() - 2)), w2)
    assert isinstance(delta, LokrDelta)
    assert delta.shape == tuple(wanted.shape)
    assert delta.scale == scale
    torch.testing.assert_close(delta.dense(0.5), 0.5 * scale * wanted.flatten(1))
    low, r1, r2 = (
        delta.low_rank(),
        2 if first == "factors" else 3,
        2 if second in ("factors", "core") else 5 if second == "whole" else 6,
    )
    n, k = wanted.flatten(1).shape
    assert (low is None) == (r1 * r2 * (n + k) >= n * k)
    if low is not None:
        torch.testing.assert_close(low.dense(), delta.dense())


def test_a_core_between_the_factors_of_a_lora(tmp_path):
    """LyCORIS's LoCon with `lora_mid` is a LoRA whose down factor has the kernel in it."""
    up, mid, down = rand(12, 2), rand(2, 2, 3, 3), rand(2, 6)
    tensors = {
        "lora_up.weight": up[:, :, None, None],
        "lora_mid.weight": mid,
        "lora_down.weight": down[:, :, None, None],
    }

    delta = change(tmp_path, tensors)

    wanted = torch.einsum("nr,rskl,si->nikl", up, mid, down)
    assert isinstance(delta, LoraDelta)
    assert delta.shape == (12, 6, 3, 3)
    torch.testing.assert_close(delta.dense(), wanted.flatten(1))


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_dora_sets_norms(tmp_path, axis, kernel):
    """Rows, or input channels, of W' have the norms of dora_scale; half the strength goes half of the way."""
    weight, down, up = torch.randn(N, K, *kernel), rand(R, K, *kernel), rand(N, R)
    magnitude = torch.rand(N if axis == "rows" else K) + 0.5
    magnitude[2] = 0
    scale = magnitude.view((-1, 1) if axis == "rows" else (1, -1)).view(
        *((-1, 1) if axis == "rows" else (1, -1)), *[1] * len(kernel)
    )
    delta = change(tmp_path, {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": scale})

    assert isinstance(delta, DoraDelta)
    new = weight.flatten(1) + delta.dense(weight=weight.flatten(1))
    direction = (weight.flatten(1) + up @ down.flatten(1)).view(weight.shape)
    norms = new.view(weight.shape).movedim(0 if axis == "rows" else 1, 0).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, magnitude)
    lined_up = F.cosine_similarity(
        new.view(weight.shape).movedim(0 if axis == "rows" else 1, 0).flatten(1),
        direction.movedim(0 if axis == "rows" else 1, 0).flatten(1),
    )
    lined_up[2] = 1  # of length 0
    torch.testing.assert_close(lined_up, torch.ones_like(lined_up))
    torch.testing.assert_close(delta.dense(0.5, weight=weight.flatten(1)), 0.5 * (new - weight.flatten(1)))
    with pytest.raises(UnsupportedError, match="bake it in"):
        delta.dense()


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
def test_peft_agrees(tmp_path, kind):
    """What PEFT merges into a weight is what this reads from PEFT's folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = nn.ModuleDict({"up": nn.Linear(64, 96)})
    before = net["up"].weight.detach().clone()
    config = {
        "loha": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=["up"], init_weights=False),
        "lokr": lambda: peft.LoKrConfig(r=3, alpha=6, target_modules=["up"], init_weights=False),
        "dora": lambda: peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=["up"], use_dora=True, init_lora_weights=False
        ),
    }[kind]()
    wrapped = peft.get_peft_model(net, config)
    for name, parameter in wrapped.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.2 * torch.rand_like(parameter))
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = copy.deepcopy(wrapped).merge_and_unload()["up"].weight.detach()

    delta = read_adapter(tmp_path / "adapter").match({"up": (96, 64)}).layers["up"]

    assert float((merged - before).norm()) > 0.1
    torch.testing.assert_close(delta.dense(weight=before), merged - before, rtol=1e-4, atol=1e-5)


def forms(block: nn.Module) -> dict:
    """A change of each kind: a LoHa, a LoKr and a DoRA, of a tenth of the weights' size and more."""
    torch.manual_seed(3)
    rows = block.out.weight.detach().norm(dim=1)
    lora = [LoraDelta(rand(2, 64), rand(128, 2)) for _ in range(2)]
    return {
        "up": LohaDelta(*lora, scale=0.5),
        "down": LokrDelta(rand(8, 4) / 20, LoraDelta(rand(2, 32), rand(8, 2))),
        "out": DoraDelta(LoraDelta(rand(2, 64) / 4, rand(48, 2)), rows * (1 + 0.1 * torch.rand(48)), by_row=True),
    }


@pytest.mark.parametrize("formats", [FORMATS, None])
def test_every_form_is_baked(formats):
    """Codes take the change of each kind, in every format and in plain weights; taken out again, nothing is left."""
    block = model()
    changes = forms(block)
    if formats is not None:
        lowbit.quantize_(block, formats)
    before = {name: _weight(block, name) for name in changes}

    handle = bake_lora(block, changes, strength=0.8)

    for name, delta in changes.items():
        wanted = delta.dense(0.8, weight=before[name])
        gained = _weight(block, name) - before[name]
        share = float((gained * wanted).sum() / wanted.square().sum())
        assert 0.9 < share < 1.1, name
        assert share == pytest.approx(handle.layers[name].recovered, abs=2e-2)
        assert (handle.layers[name].method == "plain") == (formats is None)
    handle.unbake()
    for name, weight in before.items():
        assert torch.equal(_weight(block, name), weight)


def _weight(block: nn.Module, name: str) -> torch.Tensor:
    weight = getattr(block, name).weight
    return weight.dequantize().float() if isinstance(weight, lowbit.QuantizedTensor) else weight.detach().clone()


def test_thin_forms_run_beside_the_weight():
    """A LoHa and a LoKr whose ranks make a thin LoRA are attached; a DoRA is an error that says what to do."""
    block, x = model(), torch.randn(5, 64)
    changes = forms(block)
    plain = block.up(x)
    with attach_lora(block, {"up": changes["up"]}, strength=0.5):
        torch.testing.assert_close(block.up(x), plain + 0.5 * x @ changes["up"].dense().t(), rtol=1e-4, atol=1e-5)
    thick = LokrDelta(rand(8, 4), rand(16, 16))
    for name, delta, why in (("out", changes["out"], "DoRA and rescales"), ("up", thick, "LoKr and has no factors")):
        with pytest.raises(UnsupportedError, match=rf"{name}: .*{why}.*bake_lora"):
            attach_lora(block, {name: delta})


def test_a_low_rank_takes_what_is_one(tmp_path):
    """svdquant's low rank takes a LoHa on demand, exactly; a form that is no thin LoRA is refused there."""
    block = model()
    lowbit.quantize_(block, FORMATS)
    small = LohaDelta(LoraDelta(rand(2, 128), rand(64, 2)), LoraDelta(rand(2, 128), rand(64, 2)))
    before = _weight(block, "down")

    handle = bake_lora(block, {"down": small}, rounding="low_rank")

    assert handle.layers["down"].method == "low_rank"
    torch.testing.assert_close(_weight(block, "down") - before, small.dense(), rtol=0.05, atol=2e-2)
    with pytest.raises(FormatError, match="no thin product"):
        bake_lora(block, {"down": LokrDelta(rand(8, 8), rand(8, 16))}, rounding="low_rank")


LOHA = {"hada_w1_a": (N, R), "hada_w1_b": (R, K), "hada_w2_a": (N, R), "hada_w2_b": (R, K)}
LORA = {"lora_down.weight": (R, K), "lora_up.weight": (N, R)}


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({key: shape for key, shape in LOHA.items() if key != "hada_w2_b"}, "without its counterpart hada_w2_b"),
        ({**LOHA, "hada_t1": (R, R, 3, 3)}, "without its counterpart hada_t2"),
        ({**LOHA, "hada_w1_b": (R + 1, K)}, r"'x.hada_w1_a' \[24, 4\], 'x.hada_w1_b' \[5, 16\] do not fit"),
        ({**LOHA, "hada_w2_b": (R, K + 1)}, r"\[24, 16\] and \[24, 17\], expected one shape"),
        ({**LOHA, "hada_w2_a": (N, R, 1)}, r"'x.hada_w2_a' has shape \[24, 4, 1\], expected 2 axes"),
        ({**LOHA, "lora_up.weight": (N, R)}, "'x.lora_up.weight' without its counterpart lora_down"),
        ({"lokr_w1": (4, 4)}, "'x.lokr_w1' without its counterpart lokr_w2_a"),
        ({"lokr_w1": (4, 4), "lokr_w2_a": (6, R)}, "without its counterpart lokr_w2_b"),
        ({"lokr_w1": (4,), "lokr_w2": (6, 4)}, r"'x.lokr_w1' \[4\] is no matrix"),
        (
            {"lokr_w1": (4, 4), "lokr_w2_a": (R, 6), "lokr_w2_b": (R, 4), "lokr_t2": (R, 3, 3, 3)},
            "lokr_t2.* do not fit",
        ),
        ({"dora_scale": (N, 1)}, "'x.dora_scale' without its counterpart lora_down"),
        (
            {**LORA, "dora_scale": (N + 1, 1)},
            r"'x.dora_scale' \[25, 1\] is neither of the 24 rows nor of the 16 columns",
        ),
        ({**LORA, "lora_magnitude_vector": (K,)}, r"lora_magnitude_vector' \[16\] is neither"),
        ({**LORA, "lora_mid.weight": (R, R + 1, 3, 3)}, r"'x.lora_mid.weight' \[4, 5, 3, 3\].* do not fit"),
    ],
)
def test_what_does_not_fit_is_one_error_with_key_and_file(tmp_path, shapes, said):
    """A missing partner and a wrong shape name the layer, the key and the file."""
    with pytest.raises(CheckpointError, match=rf"adapter\.safetensors: layer 'x': .*{said}"):
        change(tmp_path, {key: rand(*shape) for key, shape in shapes.items()})
