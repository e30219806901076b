"""lowbit.integrations.kitchen offers every public name of comfy_kitchen that is about quantization, unchanged."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import pytest

import lowbit.integrations.kitchen as ours
from lowbit.errors import LowbitError
from lowbit.integrations.kitchen import tensor
from lowbit.integrations.kitchen.absent import ABSENT

LAYOUT_NAMES = [name for name in tensor.__all__ if name.endswith("Layout") and name != "QuantizedLayout"]


@pytest.fixture(scope="module")
def theirs():
    """The package that is being stood in for."""
    return pytest.importorskip("comfy_kitchen")


def call_form(function):
    """Names, kinds and defaults of parameters: what a caller relies on."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def public_methods(cls):
    """Public attributes of a class that its bases in torch do not have."""
    return {
        name: value
        for base in cls.__mro__
        if base.__module__.startswith(("lowbit", "comfy_kitchen"))
        for name, value in vars(base).items()
        if not name.startswith("_")
    }


def test_every_public_name_is_offered_or_absent_for_a_reason(theirs):
    """No name of the package is forgotten, and none is both offered and called absent."""
    offered = {name for name in theirs.__all__ if name in ours.__all__}

    assert set(theirs.__all__) - offered == set(ABSENT)
    assert not set(ours.__all__) & set(ABSENT)
    assert set(theirs.tensor.__all__) == set(tensor.__all__)


def test_functions_are_called_the_same_way(theirs):
    """Parameters of every function have the same names, order, kinds and defaults."""
    pairs = [(theirs, ours, name) for name in ours.__all__ if callable(getattr(ours, name))]
    pairs += [(theirs.tensor, tensor, name) for name in tensor.__all__ if name[0].islower()]

    different = {
        name: call_form(getattr(mine, name))
        for other, mine, name in pairs
        if call_form(getattr(mine, name)) != call_form(getattr(other, name))
    }
    assert different == {}


@pytest.mark.parametrize("name", LAYOUT_NAMES)
def test_layouts_have_the_same_methods_and_parameters(theirs, name):
    """Methods of every layout are called the same way; Params has the same fields; hardware limits agree."""
    mine, other = getattr(tensor, name), getattr(theirs.tensor, name)
    fields = [[(f.name, f.default) for f in dataclasses.fields(cls.Params)] for cls in (mine, other)]

    for method, value in public_methods(other).items():
        assert hasattr(mine, method), method
        if isinstance(value, classmethod):
            assert call_form(getattr(mine, method)) == call_form(getattr(other, method)), method
    assert fields[0] == fields[1]
    assert mine.MIN_SM_VERSION == other.MIN_SM_VERSION
    assert getattr(mine, "QUANTIZES_INPUT", None) == getattr(other, "QUANTIZES_INPUT", None)


@pytest.mark.parametrize("name", ["QuantizedTensor", "BaseLayoutParams", "QuantizedLayout"])
def test_classes_have_the_same_methods(theirs, name):
    """Public methods and properties of the tensor and of the base classes are all there and called the same way."""
    mine, other = getattr(tensor, name), getattr(theirs.tensor, name)

    for method, value in public_methods(other).items():
        assert isinstance(getattr(mine, method, None), property) == isinstance(value, property), method
        if callable(getattr(other, method)):
            assert call_form(getattr(mine, method)) == call_form(getattr(other, method)), method


@pytest.mark.parametrize("name", ["apply_rope", "int8_attention", "disable_backend"])
def test_an_absent_name_says_why(name):
    """Asking for a name that is no quantization gives an AttributeError that says so and where to find it."""
    with pytest.raises(AttributeError, match="comfy_kitchen itself"):
        getattr(ours, name)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        ours.no_such_name  # noqa: B018


def test_importing_does_not_import_comfy_kitchen():
    """The module stands alone."""
    program = "import sys, lowbit.integrations.kitchen; sys.exit('comfy_kitchen' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_backends_are_listed_and_chosen_strictly():
    """Every backend says whether it is there; an unknown one cannot be chosen."""
    listed = ours.list_backends()

    assert listed["eager"]["available"]
    assert "quantize_nvfp4" in listed["eager"]["capabilities"]
    assert all(entry["available"] == (entry["unavailable_reason"] is None) for entry in listed.values())
    with ours.registry.use_backend("eager"):
        pass
    with pytest.raises(LowbitError, match="unknown backend 'cudaa'"), ours.use_backend("cudaa"):
        pass
