"""The plan for a size or a quality is the best that the measured errors of the layers allow."""

from __future__ import annotations

import dataclasses

import pytest
from safetensors.torch import load_file

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.layer_statistics import InMemory
from lowbit.checkpoint.mixed_precision import FORMATS, find_choices, for_size, for_sqnr
from lowbit.checkpoint.plan import Plan
from lowbit.checkpoint.sensitivity import measure
from lowbit.errors import PlanError
from lowbit.formats import get_format
from tests.support.sensitivities import SPECS, measured, with_gradients


@pytest.fixture
def selection(source):
    """Its measured choices."""
    return measured(source)


def test_the_size_counts_every_tensor_and_is_kept(source, selection, tmp_path):
    """For each budget the plan has at most that size, its file exactly the planned one, and more bytes lose less."""
    whole = selection.base.bytes_before
    errors = []
    for share in (0.42, 0.5, 0.62, 0.8, 1.0):
        mixed = for_size(selection, int(share * whole))
        plan = mixed.plan()
        assert plan.bytes_after == mixed.nbytes <= share * whole
        errors.append(mixed.error)
        if plan.count("quantize"):
            convert(source, tmp_path / "out.safetensors", plan)
            written = load_file(tmp_path / "out.safetensors").values()
            assert sum(tensor.nbytes for tensor in written) == mixed.nbytes

    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_a_sensitive_layer_gets_more_bits(source):
    """Where one layer loses a hundred times as much, it is the one that gets 8 bits."""
    found = find_choices(source, SPECS, preset="none", only=[r"\.up$"])
    layers = [
        dataclasses.replace(
            layer,
            choices=tuple(
                dataclasses.replace(c, error=c.nbytes**-2 * (100 if layer.name == "blocks.1.up" else 1))
                for c in layer.choices
            ),
        )
        for layer in found.layers
    ]
    selection = dataclasses.replace(found, layers=tuple(layers))
    smallest = selection.fixed_bytes + sum(min(c.nbytes for c in layer.choices) for layer in layers)

    mixed = for_size(selection, smallest + 192 * 128 * 5 // 8)

    assert {layer.name: choice.name for layer, choice in mixed.picked}["blocks.1.up"].startswith("int8")
    assert sum(choice.name.startswith("int8") for _, choice in mixed.picked) == 1


def test_the_plan_survives_its_file_and_gives_reasons(selection, tmp_path):
    """Saved and loaded it is the same plan; each layer's reason names its error and what another format would do."""
    plan = for_size(selection, int(0.55 * selection.base.bytes_before)).plan("a note")

    plan.save(tmp_path / "plan.json")

    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.notes[0] == "a note"
    reasons = [tensor.why for tensor in plan.tensors() if tensor.action == "quantize"]
    assert reasons
    assert all("output SQNR" in why and "would be" in why and why.endswith(" more") for why in reasons)


def test_a_mixed_plan_says_what_auto_rotated(source):
    """In the reason of each such layer, and once for all; not where `int8` was written with its options."""
    for spec, rotated in (("int8", True), ("int8(rotation=0)", False)):
        found = measured(source, (spec,))
        plan = for_size(found, int(found.base.bytes_before * 0.6)).plan()
        quantized = [tensor for tensor in plan.tensors() if tensor.action == "quantize"]
        assert any("rotation" in tensor.format for tensor in quantized) == rotated
        assert all(tensor.why.endswith("; rotated by auto") == ("rotation" in tensor.format) for tensor in quantized)
        assert [note for note in plan.notes if "int8(rotation=0)" in note] == ["".join(plan.notes[-1:])] * rotated


def test_rules_hold(source):
    """Kept layers stay, a layer rule's format is the only choice, and layers that a format cannot hold lack it."""
    found = find_choices(source, SPECS, preset="none", keep=["down"], layer_rules=[(r"0\.up", "mxfp8")])

    names = {layer.name: [choice.name for choice in layer.choices] for layer in found.layers}
    assert names == {
        "blocks.0.up": ["mxfp8"],
        "blocks.1.up": [*SPECS, "as it is"],
        "blocks.2.up": [*SPECS, "as it is"],
        "ragged": [*[s for s in SPECS if get_format(s.partition("(")[0])().check_shape(64, 100) is None], "as it is"],
    }


def test_a_quality_is_reached_with_few_bytes(selection):
    """The SQNR is at least what was asked; less quality takes no more bytes; a tenth of a percent less does not do."""
    sizes = []
    for wanted in (20.0, 25.0, 32.0, 45.0):
        mixed = for_sqnr(selection, wanted)
        assert mixed.sqnr >= wanted
        assert for_size(selection, int(mixed.nbytes / 1.0011)).sqnr < wanted
        sizes.append(mixed.nbytes)

    assert sizes == sorted(sizes)


# ---- with gradients -------------------------------------------------------------------------------------------------


def test_layers_that_matter_more_to_the_model_get_more_bits(source):
    """Of equal layers those with the stronger gradients are the better ones in a plan of the same size."""
    sizes = []
    for strength in (1e-3, 1e3):
        known = with_gradients(source, {"blocks.0": strength})
        found = find_choices(source, SPECS, preset="none", statistics=known)
        errors = measure(source, found.candidates, known, measure_with="rtn", rows=0)
        selection = found.with_errors(errors, "rtn")
        mixed = for_size(selection, int(selection.base.bytes_before * 0.4))
        sizes.append(sum(choice.nbytes for layer, choice in mixed.picked if layer.name.startswith("blocks.0")))

    assert sizes[0] < sizes[1]


def test_without_the_gradients_of_some_layers_all_count_the_same(source):
    """Weights of some layers alone cannot be compared with the others, so they are left out."""
    whole = with_gradients(source, {})
    some = InMemory(
        {
            name: whole.get(name).without_outputs if name == "blocks.0.up" else whole.get(name)
            for name in ("blocks.0.up", "blocks.1.up")
        }
    )
    found = find_choices(source, SPECS, preset="none", statistics=some)

    selection = found.with_errors(measure(source, found.candidates, some, measure_with="rtn", rows=0), "rtn")

    assert not selection.by_gradients
    assert {layer.weight for layer in selection.layers} == {1.0}


# ---- what cannot be done --------------------------------------------------------------------------------------------


def test_a_size_out_of_reach_names_the_smallest(selection):
    """The smallest size that the message names can be reached, a byte less cannot."""
    with pytest.raises(PlanError, match="cannot be reached") as caught:
        for_size(selection, 1000)

    smallest = int(str(caught.value).partition("smallest size is ")[2].partition(" bytes")[0])
    assert for_size(selection, smallest).nbytes == smallest
    with pytest.raises(PlanError, match="cannot be reached"):
        for_size(selection, smallest - 1)


def test_a_quality_out_of_reach_names_the_best(source):
    """A rule that fixes a format limits the SQNR; the message says to what."""
    selection = measured(source, ("nvfp4",), layer_rules=[("up", "nvfp4")])
    best = for_size(selection, selection.base.bytes_before).sqnr

    with pytest.raises(PlanError, match=f"the best is {best:.2f} dB"):
        for_sqnr(selection, 60)


def test_nothing_to_choose_is_refused(source):
    """No formats, or no layer that could take one."""
    with pytest.raises(PlanError, match="no formats to choose from"):
        find_choices(source, ())
    with pytest.raises(PlanError, match="no layer can be quantized; the reasons are"):
        find_choices(source, FORMATS, preset="none", keep=["."])
