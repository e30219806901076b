"""Changes of several forms, of one layer and of the parts of a fused one, are one change; or it is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lowbit
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.lora import Adapter, DoraDelta, LohaDelta, LokrDelta, LoraDelta, bake_lora, combined, read_adapter
from tests.lora.test_forms import LORA, N, change, rand


def test_combined_forms_are_one_change():
    """LoRA, LoHa and LoKr of several adapters add up, a thin one as a LoRA; a DoRA stays alone."""
    lora, loha = (LoraDelta(rand(2, 48), rand(64, 2), 0.5) for _ in range(2))
    loha = LohaDelta(loha, LoraDelta(rand(2, 48), rand(64, 2)), 2.0)
    thick = LokrDelta(rand(8, 6), rand(8, 8))
    dora = DoraDelta(lora, torch.rand(64) + 1, by_row=True)
    weight = torch.randn(64, 48)

    both = combined([({"x": lora, "y": lora}, 0.5), ({"x": loha, "y": thick, "z": dora}, -2.0)])

    assert isinstance(both["x"], LoraDelta)
    torch.testing.assert_close(both["x"].dense(), lora.dense(0.5) + loha.dense(-2.0))
    assert (both["y"].kind, both["y"].low_rank(), both["y"].needs_weight) == ("LoRA + LoKr", None, False)
    torch.testing.assert_close(both["y"].dense(0.5), lora.dense(0.25) + thick.dense(-1.0))
    torch.testing.assert_close(both["z"].dense(0.5, weight=weight), dora.dense(-1.0, weight=weight))
    with pytest.raises(UnsupportedError, match=r"x: a DoRA and other changes \(LoRA\) .* one after the other"):
        combined([({"x": dora}, 1.0), ({"x": lora}, 1.0)])


def test_forms_side_by_side_add_up_and_are_rounded_once(tmp_path):
    """LoRA, LoHa and LoKr tensors of one layer are one change, each by the layer's alpha over its own rank."""
    torch.manual_seed(1)
    tensors = {
        "lora_down.weight": rand(4, 64),
        "lora_up.weight": rand(128, 4),
        "lokr_w1_a": rand(8, 2) / 4,
        "lokr_w1_b": rand(2, 8),
        "lokr_w2": rand(16, 8),
        **{f"hada_w{i}_{side}": rand(*s) for i in (1, 2) for side, s in (("a", (128, 2)), ("b", (2, 64)))},
        "alpha": torch.tensor(1.0),
    }
    alone = {
        mark: change(tmp_path, {key: t for key, t in tensors.items() if key.startswith((mark, "alpha"))})
        for mark in ("lora_", "hada_", "lokr_")
    }

    delta = change(tmp_path, tensors)

    assert delta.kind == "LoRA + LoHa + LoKr"
    assert [part.scale for part in alone.values()] == [0.25, 0.5, 0.5]
    wanted = sum(part.dense(0.5) for part in alone.values())
    torch.testing.assert_close(delta.dense(0.5), wanted)
    weight = torch.randn(128, 64).bfloat16()
    layer = nn.Linear(64, 128, bias=False)
    layer.weight = nn.Parameter(weight.clone())
    bake_lora(layer, {"": delta}, strength=0.5)
    assert torch.equal(layer.weight, (weight.float() + delta.dense(0.5)).bfloat16())


def test_layers_that_share_a_weight_round_once():
    """Their changes are summed before the codes move, and both layers' accounts are of the whole."""
    torch.manual_seed(2)
    table, head = nn.Embedding(48, 64), nn.Linear(64, 48, bias=False)
    head.weight = table.weight
    module = nn.ModuleDict({"table": table, "head": head})
    lowbit.quantize_(module, "int8(granularity=row)")
    step = table.weight.parts["scale"].reshape(-1, 1)
    small = LoraDelta(torch.ones(1, 64), 0.3 * step)  # less than half a step: lost, if rounded alone
    before = table.weight.dequantize().float()

    handle = bake_lora(module, {"table": small, "head": small}, rounding="nearest")

    assert handle.layers["table"] == handle.layers["head"]
    moved = (table.weight.dequantize().float() - before) / step
    assert float(((moved - 1).abs() < 1e-3).float().mean()) > 0.9  # all but the rows whose scale grew
    assert head.weight is table.weight
    dora = DoraDelta(small, torch.ones(48), by_row=True)
    with pytest.raises(UnsupportedError, match="table and head: a DoRA"):
        bake_lora(module, {"table": small, "head": dora})


def test_a_whole_and_its_parts_are_one_change(tmp_path):
    """An adapter that changes q, and q, k and v together: the fused weight takes both."""
    tensors = {
        "attn.to_q.lora_down.weight": rand(2, 16),
        "attn.to_q.lora_up.weight": rand(24, 2),
        "attn.to_qkv.lora_down.weight": rand(3, 16),
        "attn.to_qkv.lora_up.weight": rand(72, 3),
    }
    save_file(tensors, tmp_path / "adapter.safetensors")
    adapter = read_adapter(tmp_path / "adapter.safetensors")

    matched = adapter.match({"attn.to_qkv": (72, 16)})

    wanted = adapter.layers["attn.to_qkv"].dense()
    wanted[:24] += adapter.layers["attn.to_q"].dense()
    torch.testing.assert_close(matched.layers["attn.to_qkv"].dense(), wanted)
    assert matched.unmatched == ()


def test_a_dora_beside_two_forms_is_refused(tmp_path):
    """Of which change the magnitude is cannot be told."""
    shapes = {**LORA, "lokr_w1": (4, 4), "lokr_w2": (6, 4), "dora_scale": (N, 1)}
    with pytest.raises(UnsupportedError, match=r"layer 'x': 'x\.dora_scale' makes a DoRA of one change.*keep one"):
        change(tmp_path, {key: rand(*shape) for key, shape in shapes.items()})


def test_parts_of_a_fused_projection_may_be_of_any_form(tmp_path):
    """q by a LoHa, v by a DoRA: each changes its own rows, whose own weight the DoRA sees."""
    q = {f"attn.to_q.hada_w{i}_{side}": rand(*s) for i in (1, 2) for side, s in (("a", (24, 2)), ("b", (2, 16)))}
    v = {
        "attn.to_v.lora_down.weight": rand(2, 16),
        "attn.to_v.lora_up.weight": rand(24, 2),
        "attn.to_v.dora_scale": torch.rand(24, 1),
    }
    save_file({**q, **v}, tmp_path / "adapter.safetensors")
    adapter = read_adapter(tmp_path / "adapter.safetensors")
    weight = torch.randn(72, 16)

    delta = adapter.match({"attn.to_qkv": (72, 16)}).layers["attn.to_qkv"]

    made = delta.dense(0.5, weight=weight)
    torch.testing.assert_close(made[:24], adapter.layers["attn.to_q"].dense(0.5))
    assert not made[24:48].any()
    torch.testing.assert_close(made[48:], adapter.layers["attn.to_v"].dense(0.5, weight=weight[48:]))


def test_parts_of_an_added_projection_count_once():
    """A name "add_q_proj" also ends in "q_proj": it is one part of "add_qkv_proj", with its own rows."""
    parts = {name: LoraDelta(rand(2, 16), rand(24, 2)) for name in ("q", "k", "v")}
    adapter = Adapter({f"attn.add_{name}_proj": delta for name, delta in parts.items()})

    matched = adapter.match({"attn.add_qkv_proj": (72, 16)})

    wanted = torch.cat([delta.dense() for delta in parts.values()])
    torch.testing.assert_close(matched.layers["attn.add_qkv_proj"].dense(), wanted)


def test_two_names_of_one_part_are_refused():
    """The second took the first's place in the fused weight, whose change was lost."""
    parts = {name: LoraDelta(rand(2, 16), rand(24, 2)) for name in ("attn.to_q", "transformer.attn.to_q", "attn.to_k")}
    said = r"'attn.to_q' and 'transformer.attn.to_q' both change the part to_q of 'attn.to_qkv'; remove one"
    with pytest.raises(CheckpointError, match=said):
        Adapter(parts).match({"attn.to_qkv": (72, 16)})
