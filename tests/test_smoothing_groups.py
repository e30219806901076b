"""Which groups the names of parameters show, and which they leave open."""

from __future__ import annotations

import pytest
import torch

from lowbit.smoothing import find_groups, held_by_norm, held_by_rows

K, WIDE = 8, 16
APART = {
    "self_attn.q_proj.weight": (K, K), "self_attn.k_proj.weight": (K, K), "self_attn.v_proj.weight": (K, K),
    "self_attn.o_proj.weight": (K, K), "mlp.gate_proj.weight": (WIDE, K), "mlp.up_proj.weight": (WIDE, K),
    "mlp.down_proj.weight": (K, WIDE),
}  # fmt: skip
JOINED = {
    "self_attn.qkv_proj.weight": (3 * K, K), "self_attn.o_proj.weight": (K, K),
    "mlp.gate_up_proj.weight": (2 * WIDE, K), "mlp.down_proj.weight": (K, WIDE),
}  # fmt: skip
FIRST, SECOND = {"input_layernorm.weight": (K,)}, {"post_attention_layernorm.weight": (K,)}


def found(shapes, start="model.layers.3."):
    """What stands before -> what stands behind it, or why not, in the block."""
    groups = find_groups({start + name: shape for name, shape in shapes.items()})
    return {
        group.before.removeprefix(start): group.why_not or [name.removeprefix(start) for name in group.linears]
        for group in groups
    }


def test_a_block_as_llamas_has_four_groups():
    """Norms before their linears, v before o and up before down, under any prefix and under none."""
    expected = {
        "input_layernorm": [f"self_attn.{n}_proj" for n in "qkv"],
        "self_attn.v_proj": ["self_attn.o_proj"],
        "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.up_proj": ["mlp.down_proj"],
    }
    for start in ("", "model.layers.3.", "text_encoder/layers.12."):
        assert found({**APART, **FIRST, **SECOND, "self_attn.q_norm.weight": (2,)}, start) == expected


def test_joined_linears_stand_before_what_their_last_rows_feed():
    """q, k, v and gate, up in one: the norm before the whole, the whole before o and down."""
    assert found({**JOINED, **FIRST, **SECOND}) == {
        "input_layernorm": ["self_attn.qkv_proj"],
        "self_attn.qkv_proj": ["self_attn.o_proj"],
        "post_attention_layernorm": ["mlp.gate_up_proj"],
        "mlp.gate_up_proj": ["mlp.down_proj"],
    }


def test_the_norm_before_the_mlp_is_told_from_those_behind():
    """With one right before the MLP it is that one (Gemma 2); with one behind it and none before, none (OLMo 2)."""
    behind = {"post_feedforward_layernorm.weight": (K,)}
    gemma = found({**APART, **FIRST, **SECOND, **behind, "pre_feedforward_layernorm.weight": (K,)})
    olmo = found({**APART, **SECOND, **behind})

    assert "post_attention_layernorm" not in gemma
    assert gemma["pre_feedforward_layernorm"] == ["mlp.gate_proj", "mlp.up_proj"]
    assert set(olmo) == {"self_attn.v_proj", "mlp.up_proj"}


@pytest.mark.parametrize(
    ("added", "before", "why"),
    [
        ({"mlp.gate.weight": (4, K)}, "post_attention_layernorm", "what mlp.gate.weight takes"),
        ({"self_attn.sinks": (4,)}, "input_layernorm", "what self_attn.sinks takes"),
        ({"cross_attn.q.weight": (K, K)}, "input_layernorm", "what cross_attn.q.weight takes"),
        ({"self_attn.v_proj.weight": (K // 2, K)}, "self_attn.v_proj", "one by one"),
        ({"input_layernorm.weight": (4,)}, "input_layernorm", "one by one"),
    ],
)
def test_what_the_names_leave_open_is_not_folded(added, before, why):
    """Routers, sinks, further attentions and widths that do not fit: listed, with the reason."""
    assert why in found({**APART, **FIRST, **SECOND, **added})[before]


def test_a_norm_that_the_mlp_may_read_too_takes_no_scale():
    """In a block with one norm, attention and MLP may stand side by side."""
    assert "no other norm stands before the MLP" in found({**APART, **FIRST})["input_layernorm"]


def test_joined_linears_with_fewer_key_value_heads_take_no_scale():
    """Then the values are not the last third of the rows."""
    shapes = {**JOINED, **FIRST, **SECOND, "self_attn.qkv_proj.weight": (2 * K, K)}
    assert "one by one" in found(shapes)["self_attn.qkv_proj"]


def test_a_router_does_not_keep_the_attention_from_its_scale():
    """What is strange in the MLP says nothing about the attention's norm."""
    groups = found({**APART, **FIRST, **SECOND, "mlp.gate.weight": (4, K)})

    assert groups["input_layernorm"] == [f"self_attn.{n}_proj" for n in "qkv"]
    assert isinstance(groups["mlp.up_proj"], str)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["weight", "1 + weight"])
def test_norms_hold_their_scales_exactly(dtype, kind):
    """The norm's stored product, rounded, is the product; the scale is near the one wanted, or one for a zero."""
    offset = 1.0 if kind == "1 + weight" else 0.0
    weight = (torch.linspace(-2, 5, 64) + 0.03).to(dtype)
    weight[7] = -offset
    wanted = torch.linspace(0.2, 6, 64)
    scale = held_by_norm(weight, kind)(wanted)
    product = (weight.float() + offset) * scale
    stored = (product - offset).to(dtype).float() + offset

    torch.testing.assert_close(stored, product, rtol=1e-6, atol=3e-7)
    assert scale[7] == 1
    near = (scale / wanted).log2().abs() < 0.05
    assert int(near.sum()) >= 55
    assert bool(((scale / wanted).log2().abs() < 0.6).logical_or(scale == 1).all())


def test_scales_of_rows_are_eighths_of_an_octave():
    """Each is 2^(n / 8), at most half a step from the one wanted."""
    wanted = torch.linspace(0.01, 40, 999)
    steps = held_by_rows(wanted).log2() * 8

    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=2e-5)
    assert float((held_by_rows(wanted) / wanted).log2().abs().max()) < 1 / 16 + 1e-5
