"""quantize_: layers inside a module or bare, by one format or by rules, all or nothing."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import lowbit
from lowbit import QuantizedTensor
from lowbit.errors import FormatError, PlanError, WeightError
from lowbit.numerics.rotations import rotate_groups
from lowbit.solvers.base import Statistics
from tests.support import sqnr


def _model():
    return nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8, bias=False))


def _snapshot(model):
    return {name: (type(p), p.detach().clone()) for name, p in model.named_parameters()}


def test_all_layers_of_a_module():
    """Every linear and embedding becomes quantized in place; the output stays close."""
    model = _model()
    indices = torch.arange(20)
    before = model(indices)

    changes = lowbit.quantize_(model, "int8(activations=none)")

    assert [(c.name, c.format.name) for c in changes] == [("0", "int8"), ("1", "int8"), ("3", "int8")]
    assert all(isinstance(model[i].weight, QuantizedTensor) for i in (0, 1, 3))
    assert all(not model[i].weight.requires_grad for i in (0, 1, 3))
    assert sqnr(before, model(indices)) > 30


@pytest.mark.parametrize("layer", [nn.Linear(64, 8), nn.Embedding(8, 64)])
def test_a_bare_layer(layer):
    """A linear or embedding handed over by itself is quantized too."""
    (change,) = lowbit.quantize_(layer, "fp8_e5m2")

    assert change.name == "weight"
    assert isinstance(layer.weight, QuantizedTensor)


def test_rules_by_name_first_match_wins():
    """A mapping of regular expressions decides layer by layer; None keeps; unnamed layers are kept."""
    model = _model()

    changes = lowbit.quantize_(model, {"^3$": None, r"^\d$": "fp8_e4m3(granularity=row)"})

    assert [c.format is not None for c in changes] == [True, True, False]
    assert changes[2].why == "kept by the rule '^3$'"
    assert type(model[3].weight) is nn.Parameter


def test_layers_that_a_blanket_format_cannot_hold_are_kept_and_said_so():
    """K not a multiple of the group keeps that layer under a single spec, with the reason."""
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(40, 8))

    kept = lowbit.quantize_(model, "awq_w4a16(group_size=64)")[1]

    assert kept.format is None
    assert "group" in kept.why
    assert type(model[1].weight) is nn.Parameter


def test_a_rule_that_cannot_be_followed_raises_and_changes_nothing():
    """An explicit rule for an impossible layer is an error that names it; no layer was touched."""
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(40, 8))
    before = _snapshot(model)

    with pytest.raises(WeightError, match=r"1: \[8, 40\].*the rule '1' asks for awq_w4a16"):
        lowbit.quantize_(model, {"0": "awq_w4a16", "1": "awq_w4a16"})

    assert {name: kind for name, (kind, _) in _snapshot(model).items()} == {n: kind for n, (kind, _) in before.items()}


def test_a_nan_weight_anywhere_changes_nothing():
    """The last layer's NaN is found before the first layer is converted."""
    model = _model()
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")

    with pytest.raises(WeightError, match="3: holds NaN or infinity"):
        lowbit.quantize_(model, "fp8_e4m3")

    assert type(model[0].weight) is nn.Parameter


def test_an_unknown_format_and_an_empty_module_are_errors():
    """A typing error in the spec, or nothing to do, is said."""
    with pytest.raises(FormatError, match="unknown format 'fp8'"):
        lowbit.quantize_(_model(), "fp8")
    with pytest.raises(PlanError, match=r"has no nn\.Linear or nn\.Embedding"):
        lowbit.quantize_(nn.LayerNorm(8), "fp8_e4m3")


def test_a_rule_that_matches_no_layer_is_an_error():
    """A typing error in a pattern must not leave the model as it is without a word, also beside rules that match."""
    model = _model()
    for rules in ({"nomatch": "int8"}, {"0": "int8", "nomatch": None}):
        with pytest.raises(PlanError, match="the rule 'nomatch' matches no layer; correct it"):
            lowbit.quantize_(model, rules)
    assert type(model[0].weight) is nn.Parameter


def test_what_is_quantized_already_is_named_as_the_reason():
    """A second call has nothing to do; a rule for such layers contradicts what they are, one that keeps them fits."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    lowbit.quantize_(model[0], "int8")

    with pytest.raises(PlanError, match="the rule '0' matches only layers that are quantized already"):
        lowbit.quantize_(model, {"0": "fp8_e4m3", "1": "int8"})
    lowbit.quantize_(model, {"0": None, "1": "int8"})
    with pytest.raises(PlanError, match=r"Sequential: every layer .* is quantized already \(0: int8\)"):
        lowbit.quantize_(model, "int8")
    with pytest.raises(PlanError, match=r"quantized already \(weight: int8\)"):
        lowbit.quantize_(model[1], "int8")


def test_tied_weights_stay_tied():
    """An embedding and a head that share a weight share the quantized one."""
    model = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 20, bias=False))
    model[1].weight = model[0].weight

    lowbit.quantize_(model, "fp8_e4m3(granularity=row)")

    assert model[0].weight is model[1].weight


def test_the_unsigned_shift_is_folded_into_the_bias():
    """With act_unsigned the layer's output after GELU stays right, with a bias and without one."""
    torch.manual_seed(0)
    x = nn.functional.gelu(torch.randn(512, 128))
    for bias in (True, False):
        layer = nn.Linear(128, 64, bias=bias)
        plain, signed = copy.deepcopy(layer), copy.deepcopy(layer)

        lowbit.quantize_(layer, "svdquant_w4a4(rank=8,act_unsigned=true)")
        lowbit.quantize_(signed, "svdquant_w4a4(rank=8)")

        assert layer.bias is not None
        assert sqnr(plain(x), layer(x)) > sqnr(plain(x), signed(x)) > 10
        share = layer.weight.format.bias_share(layer.weight.in_layout("").parts)
        dequantized = nn.functional.linear(x, layer.weight.dequantize(), layer.bias + share)
        assert sqnr(plain(x), dequantized) > sqnr(plain(x), layer(x))


def test_inputs_that_a_calibration_saw_choose_the_variant():
    """As convert does: a layer behind a GELU gets unsigned activations, which lose less; others and ties do not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    batches = [torch.randn(32, 64) for _ in range(4)]
    known = lowbit.calibrate(model, batches)
    x = torch.randn(256, 64)
    with torch.no_grad():
        right = model(x)
        fitted, signed = copy.deepcopy(model), copy.deepcopy(model)
        changes = lowbit.quantize_(fitted, "svdquant_w4a4(rank=16)", statistics=known)
        unknown = {name: replace(seen, minimum=None) for name, seen in known.items()}
        lowbit.quantize_(signed, "svdquant_w4a4(rank=16)", statistics=unknown)
        lost, plain = ((each(x) - right).square().mean() for each in (fitted, signed))

    assert [change.format.act_unsigned for change in changes] == [False, True]
    assert "never below -0.1" in changes[1].why
    assert fitted[2].weight.format == changes[1].format
    assert lost < 0.8 * plain

    tied = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
    tied[1].weight = tied[0].weight
    positive = {name: Statistics(minimum=torch.zeros(64), tokens=8) for name in ("0", "1")}
    lowbit.quantize_(tied, "svdquant_w4a4(rank=16)", solver="rtn", statistics=positive)
    assert tied[1].weight is tied[0].weight
    assert not tied[0].weight.format.act_unsigned


def test_statistics_of_other_weights_are_told(caplog):
    """One warning for all layers; none for the model itself, for it in another dtype, nor for a plain dictionary."""
    model, other = (nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2))
    known = lowbit.calibrate(model, [torch.randn(64, 64) for _ in range(4)])

    for same in (copy.deepcopy(model).half().bfloat16(), copy.deepcopy(model)):
        lowbit.quantize_(same, "int8", statistics=known)
    lowbit.quantize_(copy.deepcopy(other), "int8", statistics=dict(known))
    assert not caplog.records

    lowbit.quantize_(other, "int8", statistics=known)
    (record,) = caplog.records
    assert "the statistics of Sequential: are of a model with other weights" in record.getMessage()
    assert "2 of 2 layers compared differ (0, 2)" in record.getMessage()


def test_lora_trains_over_a_frozen_quantized_linear():
    """Low-rank adapters on top of a quantized layer receive gradients; the weight does not."""
    layer = nn.Linear(64, 32)
    lowbit.quantize_(layer, "awq_w4a16")
    down, up = nn.Linear(64, 4, bias=False), nn.Linear(4, 32, bias=False)
    x = torch.randn(5, 64, requires_grad=True)

    (layer(x) + up(down(x))).square().sum().backward()

    assert x.grad is not None
    assert down.weight.grad is not None
    assert layer.weight.grad is None


@pytest.mark.parametrize("policy", ["int8", {"": "int8"}], ids=["one format", "rule"])
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda m: nn.utils.parametrizations.weight_norm(m[3]), "parametrization"),
        (
            lambda m: setattr(m[3], "weight", nn.Parameter(torch.ones(8, 32, dtype=torch.int8), requires_grad=False)),
            "is int8",
        ),
        (lambda m: setattr(m[3], "weight", nn.Parameter(torch.ones(8, 32).to(torch.float8_e5m2))), "is float8_e5m2"),
        (lambda m: setattr(m[0], "max_norm", 1.0), "max_norm"),
    ],
    ids=["parametrized", "int8", "float8", "max_norm"],
)
def test_layers_that_no_format_can_hold(spoil, why, policy):
    """What is no plain float weight is kept under a blanket format and refused under a rule; nothing else changes."""
    model = _model()
    spoil(model)
    if isinstance(policy, dict):
        with pytest.raises(WeightError, match=why):
            lowbit.quantize_(model, policy)
        assert not any(isinstance(m.weight, QuantizedTensor) for m in model if hasattr(m, "weight"))
        return

    kept = [change for change in lowbit.quantize_(model, policy) if change.format is None]

    assert len(kept) == 1
    assert why in kept[0].why


def test_an_error_in_the_middle_changes_nothing():
    """A weight that only overflows while it is quantized is named, and the layers before it are as they were."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight.data.copy_(rotate_groups(torch.eye(64), 64).sign() * 3e38)  # rows that add up in one of the sums

    with pytest.raises(WeightError, match=r"1: .*exceed float32"):
        lowbit.quantize_(model, "int8(rotation=64)")

    assert type(model[0].weight) is nn.Parameter


def test_the_meta_device_and_bad_rules_are_errors_that_say_so():
    """No values, or no regular expression: one error each."""
    with pytest.raises(WeightError, match="0: is on the meta device, without values; load"):
        lowbit.quantize_(nn.Sequential(nn.Linear(4, 4, device="meta")), "int8")
    with pytest.raises(PlanError, match=r"the rule '\(' is no regular expression"):
        lowbit.quantize_(_model(), {"(": "int8"})
