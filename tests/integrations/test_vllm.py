"""The vLLM plugin against a stand-in of the interface that vLLM gives to out-of-tree quantization methods."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from lowbit.errors import DependencyError, PlanError, UnsupportedError
from lowbit.integrations import vllm as plugin
from tests.integrations.nvfp4_layers import checkpoint, exact

QUANTIZATION = "vllm.model_executor.layers.quantization"
WEIGHTS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}},
    "ignore": ["lm_head", "re:.*vision.*"],
}


class _QuantizationConfig(ABC):
    """What vLLM's base class asks every config to state."""

    def __init__(self):
        self.packed_modules_mapping = {}

    @abstractmethod
    def get_name(self): ...

    @abstractmethod
    def get_supported_act_dtypes(self): ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls): ...

    @staticmethod
    @abstractmethod
    def get_config_filenames(): ...

    @classmethod
    @abstractmethod
    def from_config(cls, config): ...

    @abstractmethod
    def get_quant_method(self, layer, prefix): ...


class _LinearMethodBase(ABC):
    @abstractmethod
    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra
    ): ...

    @abstractmethod
    def apply(self, layer, x, bias=None): ...


class _UnquantizedLinearMethod:
    """What vLLM takes for layers in 16 bits."""


class _LinearBase(nn.Module):
    """A fused, tensor-parallel linear as vLLM drives it: creates, loads by shard, processes, applies."""

    def __init__(self, sizes, k, config, prefix, dtype=torch.float32):
        super().__init__()
        self.sizes, self.prefix = sizes, prefix
        self.quant_method = config.get_quant_method(self, prefix)
        if not isinstance(self.quant_method, _UnquantizedLinearMethod):
            self.quant_method.create_weights(
                layer=self, input_size_per_partition=k, output_partition_sizes=list(sizes), input_size=k,
                output_size=sum(sizes), params_dtype=dtype, weight_loader=self.weight_loader,
            )  # fmt: skip

    def weight_loader(self, param, loaded, loaded_shard_id=None):
        data, index = param.data, {"q": 0, "k": 1, "v": 2, None: 0}[loaded_shard_id]
        if getattr(param, "needs_scalar_to_array", False):
            data[index] = loaded.reshape(())
            return
        if loaded_shard_id is not None:
            data = data.narrow(param.output_dim, sum(self.sizes[:index]), self.sizes[index])
        assert data.shape == loaded.shape
        data.copy_(loaded)


@pytest.fixture
def registered(monkeypatch):
    """The stand-in in place of vLLM, lowbit registered with it: name -> config class."""
    methods: dict[str, type] = {}
    modules = {name: ModuleType(name) for name in (
        "vllm", "vllm.model_executor", "vllm.model_executor.layers", "vllm.model_executor.layers.linear",
        QUANTIZATION, f"{QUANTIZATION}.base_config",
    )}  # fmt: skip

    def register_quantization_config(name):
        def put(cls):
            assert issubclass(cls, _QuantizationConfig)
            assert name not in methods
            methods[name] = cls
            return cls

        return put

    modules[QUANTIZATION].register_quantization_config = register_quantization_config
    modules[QUANTIZATION].QUANTIZATION_METHODS = methods
    modules[f"{QUANTIZATION}.base_config"].QuantizationConfig = _QuantizationConfig
    linear = modules["vllm.model_executor.layers.linear"]
    linear.LinearBase, linear.LinearMethodBase = _LinearBase, _LinearMethodBase
    linear.UnquantizedLinearMethod = _UnquantizedLinearMethod
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    plugin.register()
    return methods


@pytest.fixture
def config(registered):
    """The config of a checkpoint as vLLM makes it."""
    made = registered["lowbit"].from_config(CONFIG)
    made.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return made


def test_registering_twice_is_registering_once(registered):
    """The name is lowbit, and a second call changes nothing, as plugins are loaded in every process."""
    before = dict(registered)

    plugin.register()

    assert registered == before
    assert list(registered) == ["lowbit"]


def test_without_vllm_the_error_says_what_to_install(monkeypatch):
    """Importing the module needs no vLLM; registering does, and says so."""
    monkeypatch.setitem(sys.modules, "vllm", None)

    with pytest.raises(DependencyError, match=r"serving with vLLM needs vLLM .*pip install vllm"):
        plugin.register()


def test_another_interface_is_an_error_that_names_it(registered, monkeypatch):
    """If vLLM lacks a name that is needed, the error names it."""
    registered.clear()
    monkeypatch.delattr(sys.modules["vllm.model_executor.layers.linear"], "LinearMethodBase")

    with pytest.raises(DependencyError, match=r"has another interface than lowbit knows: .*LinearMethodBase"):
        plugin.register()


def test_what_the_config_states(config, registered):
    """16-bit activations, any device, no file of its own."""
    assert config.get_name() == "lowbit"
    assert config.get_supported_act_dtypes() == [torch.bfloat16, torch.float16]
    assert registered["lowbit"].get_min_capability() == 0
    assert registered["lowbit"].get_config_filenames() == []


@pytest.mark.parametrize(
    ("method", "asked", "expected"),
    [
        ("compressed-tensors", "lowbit", "lowbit"),
        ("lowbit", "lowbit", "lowbit"),
        ("compressed-tensors", None, None),
        ("compressed-tensors", "compressed-tensors", None),
        ("gptq", "lowbit", None),
    ],
)
def test_it_takes_a_checkpoint_only_when_asked(registered, method, asked, expected):
    """`--quantization lowbit` takes over compressed-tensors; without it vLLM's own method stays."""
    override = registered["lowbit"].override_quantization_method

    assert override({"quant_method": method}, asked) == expected
    assert override({"quant_method": method}, asked, SimpleNamespace()) == expected
    assert override(None, asked) is None


def test_a_fused_layer_from_loading_to_product(config):
    """q, k and v loaded by vLLM's loader with unequal global scales give the float64 product, bias included."""
    sizes, k = (64, 16, 16), 48
    shards = checkpoint(sizes, k)
    layer = _LinearBase(sizes, k, config, "model.layers.0.self_attn.qkv_proj")
    for shard, parts in zip("qkv", shards, strict=True):
        for key, tensor in (
            ("weight_packed", parts["qdata"]),
            ("weight_scale", parts["scale"]),
            ("weight_global_scale", parts["global_scale"].reshape(1)),
            ("input_global_scale", torch.tensor([77.0])),
        ):
            parameter = getattr(layer, key)
            parameter.weight_loader(parameter, tensor, shard)
    layer.quant_method.process_weights_after_loading(layer)
    x, bias = torch.randn(2, 3, k), torch.randn(96)

    out = layer.quant_method.apply(layer, x, bias)

    expected = exact(x, shards, k, bias)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_layer_that_is_fused_on_disk(config):
    """A tensor without a shard, whose scale vLLM puts in the first place alone, counts for all shards."""
    whole = checkpoint((32,), 64)[0]
    layer = _LinearBase((16, 16), 64, config, "model.layers.0.mlp.gate_up_proj")
    for key, part in (("weight_packed", "qdata"), ("weight_scale", "scale"), ("weight_global_scale", "global_scale")):
        parameter = getattr(layer, key)
        parameter.weight_loader(parameter, whole[part])
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(2, 64)

    expected = exact(x, [whole], 64)
    torch.testing.assert_close(layer.quant_method.apply(layer, x).double(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_ignored_stays_in_16_bits(config):
    """Layers on the ignore list, by name or expression, are left to vLLM, as is what is no linear layer."""
    for prefix in ("lm_head", "model.vision.blocks.0.fc1"):
        assert isinstance(_LinearBase((16,), 32, config, prefix).quant_method, _UnquantizedLinearMethod)
    assert config.get_quant_method(nn.Embedding(4, 4), "model.embed") is None


def test_a_fused_layer_is_quantized_whole_or_not_at_all(registered):
    """If all shards of a fused layer are ignored it is in 16 bits; if some are, the error names them."""
    for ignored, parts in ((["q_proj", "k_proj", "v_proj"], 3), (["k_proj"], 1)):
        config = registered["lowbit"].from_config({**CONFIG, "ignore": [f"model.0.{name}" for name in ignored]})
        config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
        if parts == 3:
            layer = _LinearBase((16, 16, 16), 32, config, "model.0.qkv_proj")
            assert isinstance(layer.quant_method, _UnquantizedLinearMethod)
        else:
            with pytest.raises(UnsupportedError, match=r"qkv_proj: joins quantized layers .* \(model\.0\.k_proj\)"):
                _LinearBase((16, 16, 16), 32, config, "model.0.qkv_proj")


def test_targets_may_name_layers(registered):
    """Only layers that a group's targets name are quantized."""
    group = {"targets": ["re:.*mlp.*", "model.out"], "weights": WEIGHTS, "input_activations": None}
    config = registered["lowbit"].from_config({**CONFIG, "config_groups": {"g": group}, "ignore": None})

    kinds = {name: config.get_quant_method(_LinearBase.__new__(_LinearBase), name) for name in (
        "model.0.mlp.up", "model.out", "model.0.attn.q")}  # fmt: skip
    assert [isinstance(kind, _UnquantizedLinearMethod) for kind in kinds.values()] == [False, False, True]


def test_names_follow_the_model_of_vllm(config):
    """vLLM's own names for layers replace those of the checkpoint."""
    config.apply_vllm_mapper(
        SimpleNamespace(apply_list=lambda names: [name.replace("lm_head", "head") for name in names])
    )

    assert isinstance(_LinearBase((16,), 32, config, "head").quant_method, _UnquantizedLinearMethod)
    assert not isinstance(_LinearBase((16,), 32, config, "lm_head").quant_method, _UnquantizedLinearMethod)


@pytest.mark.parametrize(
    ("groups", "complaint"),
    [
        ({}, "has no config_groups"),
        ({"g": {"weights": WEIGHTS, "input_activations": {"num_bits": 4}}}, "g rounds its activations"),
        (
            {"g": {"weights": {**WEIGHTS, "type": "int"}, "input_activations": None}},
            "g has other weights; lowbit serves nvfp4",
        ),
        ({"g": {"weights": None, "input_activations": None}}, "g has other weights; lowbit serves nvfp4"),
    ],
)
def test_other_schemes_are_refused(registered, groups, complaint):
    """A group that is not nvfp4 weights alone is refused by name, null entries included."""
    with pytest.raises(PlanError, match=complaint):
        registered["lowbit"].from_config({**CONFIG, "config_groups": groups})


def test_experts_are_refused(config):
    """A fused layer of experts would be taken for an unquantized one; it is refused instead."""

    class FusedMoE(nn.Module):
        pass

    with pytest.raises(UnsupportedError, match=r"model\.0\.experts: lowbit does not serve fused experts yet"):
        config.get_quant_method(FusedMoE(), "model.0.experts")
