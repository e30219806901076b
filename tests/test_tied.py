"""Weights that several modules share: quantized once for all of them, or kept for all of them."""

import pytest
import torch
from torch import nn

import lowbit
from lowbit import QuantizedTensor
from lowbit.errors import PlanError
from lowbit.formats import parse_spec


def _tied():
    model = nn.ModuleDict({"embed": nn.Embedding(24, 64), "body": nn.Linear(64, 64), "head": nn.Linear(64, 24)})
    model.head.weight = model.embed.weight
    return model


@pytest.mark.parametrize("policy", ["nvfp4", {"embed|head": "nvfp4"}], ids=["one format", "rule"])
def test_a_shared_weight_is_quantized_once(policy, monkeypatch):
    """Table and head end with the same parameter; the solver saw the weight once."""
    model, solved = _tied(), []
    solve = lowbit.nn.solve
    monkeypatch.setattr("lowbit.nn.solve", lambda w, *a, **k: solved.append(k["where"]) or solve(w, *a, **k))

    changes = lowbit.quantize_(model, policy)

    assert model.embed.weight is model.head.weight
    assert isinstance(model.head.weight, QuantizedTensor)
    assert solved.count("embed") == 1
    assert "head" not in solved
    assert [c.format is not None for c in changes if c.name != "body"] == [True, True]
    assert len({id(p) for p in model.parameters()}) == 4  # shared weight, head's bias, body's weight and bias


def test_moving_and_copying_keeps_the_tie():
    """A tied quantized model stays tied through .to and state dicts."""
    model, other = _tied(), _tied()
    lowbit.quantize_(model, "fp8_e4m3(granularity=row)")
    lowbit.quantize_(other, "fp8_e4m3(granularity=row)")

    other.load_state_dict(model.state_dict())
    model.bfloat16()

    assert model.embed.weight is model.head.weight
    assert other.embed.weight is other.head.weight
    assert torch.equal(other.head.weight.dequantize().bfloat16(), model.head.weight.dequantize())


def test_what_one_of_them_cannot_have_all_keep(monkeypatch):
    """Under one format a table without lookup, or one with max_norm, keeps its head too, with the reason."""
    monkeypatch.setattr(type(parse_spec("svdquant_w4a4")), "supports_embedding", False)

    for policy, why in (("svdquant_w4a4(rank=8)", "has no lookup"), ("int8", "max_norm")):
        model = _tied()
        model.embed.max_norm = 1.0 if why == "max_norm" else None

        changes = {change.name: change for change in lowbit.quantize_(model, policy)}

        assert model.embed.weight is model.head.weight
        assert not isinstance(model.head.weight, QuantizedTensor)
        assert changes["body"].format is not None
        assert changes["head"].format is None
        assert changes["head"].why.startswith("shares its weight with embed: ")
        assert why in changes["head"].why


def test_a_rule_that_keeps_one_keeps_the_other():
    """`head: None` before a rule for all the rest keeps the table too: they are one weight."""
    model = _tied()

    changes = {change.name: change for change in lowbit.quantize_(model, {"head": None, "": "int8"})}

    assert changes["embed"].why == "shares its weight with head: kept by the rule 'head'"
    assert model.embed.weight is model.head.weight
    assert isinstance(model.body.weight, QuantizedTensor)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"embed": "int8"}, r"embed: shares its weight with head \(no rule names it\)"),
        ({"embed": "int8", "head": "fp8_e4m3"}, r"embed: shares its weight with head \(rule 'head'\)"),
    ],
    ids=["unnamed", "two formats"],
)
def test_rules_that_part_them_are_refused(policy, message):
    """Different formats, or a rule for one of them only, are an error that names both; nothing changes."""
    model = _tied()

    with pytest.raises(PlanError, match=message):
        lowbit.quantize_(model, policy)

    assert model.embed.weight is model.head.weight
    assert type(model.head.weight) is nn.Parameter


def test_a_weight_that_something_else_uses_is_kept():
    """A parameter that a module of another kind holds as well would be parted from it: kept, or refused by rule."""
    model = nn.Sequential(nn.Linear(64, 8), nn.Module())
    model[1].prototypes = model[0].weight

    (change,) = lowbit.quantize_(model, "int8")

    assert change.why == "shares its weight with 1.prototypes: which is not the weight of a layer"
    with pytest.raises(PlanError, match=r"0: shares its weight with 1\.prototypes"):
        lowbit.quantize_(model, {"0": "int8"})
