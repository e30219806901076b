"""`auto` rotates int8 where runtimes run that, a linear rounds its input, and nobody said otherwise."""

from __future__ import annotations

import torch

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.formats import parse_spec
from tests.checkpoint.test_plan import TABLE, by_key, opened


def test_auto_rotates_what_is_asked_for_by_name_alone(tmp_path):
    """`int8` gets the largest group up to 256 that divides K, where a linear rounds its input; and the plan says so."""
    sizes = {"a": 512, "b": 192, "c": 336, "d": 200}
    tensors = {f"layers.{name}.weight": torch.randn(64, k) for name, k in sizes.items()}
    tensors |= {"experts.weight": torch.randn(4, 64, 64), "conv.weight": torch.randn(64, 64, 3, 3)}
    with opened(tmp_path / "a.safetensors", tensors) as source:

        def formats(asked, **options):
            plan = make_plan(source, asked, **{"preset": "none", "layer_rules": [("experts|conv", "int8")], **options})
            return {tensor.layer: tensor.format for tensor in plan.tensors()}, plan

        found, plan = formats("int8")
        assert found == {
            "layers.a": "int8(rotation=256)",
            "layers.b": "int8(rotation=64)",
            "layers.c": "int8(rotation=16)",
            "layers.d": "int8",
            "experts": "int8",
            "conv": "int8",
        }
        assert len([note for note in plan.notes if "rotated by auto" in note and "int8(rotation=0)" in note]) == 1
        assert by_key(plan)["layers.a.weight"].why.endswith("; rotated by auto")
        everywhere_plain = (
            {"asked": "int8(rotation=0)"},
            {"asked": parse_spec("int8")},
            {"asked": "int8(activations=none)"},
            {"asked": "int8", "solver": "rtn"},
            {"asked": "int8", "dialect": "torchao", "layer_rules": ()},
        )
        for wishes in everywhere_plain:
            assert not [fmt for fmt in formats(**wishes)[0].values() if "rotation" in fmt], wishes
        assert formats("int8(rotation=64)", keep=["c", "d"], layer_rules=())[0]["layers.a"] == "int8(rotation=64)"


def test_what_was_int8_stays_in_its_basis(tmp_path):
    """Its codes would be rounded a second time in another one; what was in another format is rotated."""
    specs = {
        "int8(rotation=0)": "int8",
        "int8(rotation=64)": "int8(rotation=64)",
        "int8": "int8(rotation=256)",
        "fp8_e4m3": "int8(rotation=256)",
    }
    for number, (before, after) in enumerate(specs.items()):
        with opened(tmp_path / "a.safetensors", {"layers.a.weight": torch.randn(64, 512)}) as source:
            convert(source, tmp_path / f"{number}.safetensors", make_plan(source, before, preset="none"))
        with open_source(tmp_path / f"{number}.safetensors") as again:
            plan = make_plan(again, "int8", preset="none", requantize=True)
        assert by_key(plan)["layers.a.weight"].format == after, before


def test_a_quantized_table_is_not_rotated(tmp_path):
    """Nobody rounds the input of a table, which is looked up in."""
    tensors = {f"{name}.weight": torch.randn(128, 128) for name in (TABLE, "encoder.layer.0.attention.self.query")}
    with opened(tmp_path / "a.safetensors", tensors) as source:
        plan = by_key(make_plan(source, "int8", layer_rules=[(TABLE, "int8")]))
    assert plan[f"{TABLE}.weight"].format == "int8"
    assert plan["encoder.layer.0.attention.self.query.weight"].format == "int8(rotation=64)"
