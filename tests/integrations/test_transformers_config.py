"""The config for transformers, its registration, and what is refused before anything is loaded."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from importlib import metadata

import pytest
import torch

pytest.importorskip("transformers", "5.21", reason="needs transformers 5.21")

from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
)

import lowbit.integrations.transformers as integration
from lowbit.errors import DependencyError, FormatError, LowbitError, PlanError, SolverError, WeightError
from lowbit.formats import parse_spec
from lowbit.integrations.requirements import require
from lowbit.integrations.transformers import LowbitConfig, LowbitHfQuantizer
from tests.support.tiny_transformers import llama, saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a plain language model."""
    return saved(llama(layers=1), tmp_path_factory.mktemp("plain"))


def test_json_round_trip():
    """A config is the same after JSON, keeps the order of its rules, and leaves defaults out."""
    rules = {"z": "keep", "a": parse_spec("awq_w4a16(group_size=128)")}
    config = LowbitConfig("int8", layers=rules, modules_to_not_convert=["lm_head"], solver="rtn", preset="none")
    data = json.loads(config.to_json_string())

    assert AutoQuantizationConfig.from_dict(data).to_dict() == config.to_dict() == data
    assert data["layers"] == [["z", "keep"], ["a", "awq_w4a16(group_size=128)"]]
    assert LowbitConfig("int8").to_dict() == {"quant_method": "lowbit", "format": "int8"}
    assert "int8" in repr(config)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"format": "int9"}, FormatError, "unknown format 'int9'"),
        ({"format": "int8", "group": 3}, PlanError, "unknown field 'group'; the fields are format, layers"),
        ({"format": "int8", "quant_method": "gptq"}, PlanError, "quant_method is 'gptq'"),
        ({"format": "int8", "layers": [("a",)]}, PlanError, r"layers holds \('a',\)"),
        ({"format": "int8", "layers": {"a": 4}}, PlanError, "the rule 'a' says 4"),
        ({"format": "int8", "layers": {"a": "int9"}}, FormatError, "unknown format 'int9'"),
        ({"format": "int8", "modules_to_not_convert": "lm_head"}, PlanError, "expected a list of names"),
        ({"format": "int8", "solver": "magic"}, SolverError, "unknown solver 'magic'"),
    ],
)
def test_values_that_are_none(arguments, kind, message):
    """A wrong value is refused where it is given, with the name of the field."""
    with pytest.raises(kind, match=message):
        LowbitConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({}, PlanError, "names no format"),
        ({"format": "int8", "solver": "gptq"}, PlanError, "needs second moments"),
        ({"format": "int8(input_scale=true)"}, PlanError, "needs calibration"),
        ({"format": "svdquant_w4a4@kitchen_tile_packed_w4a4"}, PlanError, "names a layout"),
        ({"format": "int8", "layers": {"q_projj": "keep"}}, PlanError, "'q_projj' matches no layer"),
        ({"format": "int8", "layers": {"(": "keep"}}, PlanError, "no regular expression"),
        ({"format": "int8", "layers": {"q_proj": "awq_w4a16(group_size=96)"}}, WeightError, "not a multiple"),
        ({"format": "int8", "preset": "lama"}, PlanError, "unknown preset 'lama'"),
        ({"format": "int8", "modules_to_not_convert": ["model"]}, PlanError, "no layer of the model is to be quant"),
    ],
)
def test_what_cannot_be_done_while_loading(folder, arguments, kind, message):
    """A config that cannot be followed is refused before any weight is read."""
    with pytest.raises(kind, match=message):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=LowbitConfig(**arguments))


def test_rules_that_part_a_shared_weight(tmp_path):
    """Two rules that give layers with one weight different formats are refused, naming both."""
    config = LowbitConfig("int8", layers={"lm_head": "int8", "embed_tokens": "keep"})
    with pytest.raises(PlanError, match=r"embed_tokens .* and lm_head .* share one weight"):
        AutoModelForCausalLM.from_pretrained(saved(llama(tied=True), tmp_path), quantization_config=config)


def test_offloading_to_disk_is_refused(folder):
    """Quantized weights cannot lie on disk, which is said before loading."""
    quantizer = AutoHfQuantizer.from_config(LowbitConfig("int8"), pre_quantized=False)
    with pytest.raises(PlanError, match="offloaded to disk"):
        quantizer.validate_environment(device_map={"model": "disk", "lm_head": "cpu"})


def test_a_state_dict_cannot_be_quantized_already():
    """A quantized model without files to read is refused."""
    quantizer = LowbitHfQuantizer(LowbitConfig("int8"), pre_quantized=True)
    with pytest.raises(LowbitError, match="name a folder, not a state dict"):
        quantizer.update_weight_conversions([], torch.nn.Linear(4, 4))


# ---- registration ---------------------------------------------------------------------------------------------------


def test_importing_twice_is_importing_once():
    """Registering again changes nothing, and a reload of the package puts its classes in place of the old ones."""
    integration.register()
    assert AUTO_QUANTIZER_MAPPING["lowbit"] is LowbitHfQuantizer

    importlib.reload(integration)
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["lowbit"] is integration.LowbitConfig


def test_classes_from_before_a_reload_give_way(monkeypatch):
    """A class of the same module and name is replaced: it is this package, loaded before."""
    old = type("LowbitConfig", (LowbitConfig,), {"__module__": LowbitConfig.__module__})
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "lowbit", old)

    integration.register()
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["lowbit"] is LowbitConfig


def test_a_name_that_is_taken(monkeypatch):
    """A class of another package under our name is not replaced but reported."""
    other = type("Config", (), {"__module__": "elsewhere"})
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "lowbit", other)

    with pytest.raises(DependencyError, match="already, of elsewhere"):
        integration.register()
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["lowbit"] is other


def test_without_the_import_transformers_only_warns(monkeypatch, caplog):
    """What the documentation warns of: an unknown method is skipped with a warning."""
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "lowbit")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING), caplog.at_level(logging.WARNING, logger="transformers"):
        assert not AutoHfQuantizer.supports_quant_method({"quant_method": "lowbit"})
    assert "Unknown quantization type, got lowbit" in caplog.text


def test_an_old_transformers_is_refused_at_import(monkeypatch):
    """With transformers 4 the import gives one error that names both versions and the remedy, and is an ImportError."""
    monkeypatch.setattr(metadata, "version", lambda _package: "4.57.1")
    for name in [name for name in sys.modules if name.startswith(integration.__name__)]:
        monkeypatch.delitem(sys.modules, name)

    with pytest.raises(
        DependencyError, match=r"needs transformers 5\.21 or later, and 4\.57\.1 .* pip install"
    ) as caught:
        importlib.import_module(integration.__name__)
    assert isinstance(caught.value, ImportError)


def test_a_missing_package_is_named():
    """A package that is not installed is named with the way to get it."""
    with pytest.raises(DependencyError, match=r"needs no-such-package 1\.2 or later, which is not installed"):
        require("no-such-package", "1.2", "the test")
