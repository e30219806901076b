"""lowbit inside vLLM: `--quantization lowbit` serves NVFP4 weight-only checkpoints on any device.

vLLM loads plugins by the entry point `vllm.general_plugins`; `register` is one. It can also be called by hand, before
the engine is made:

    import lowbit.integrations.vllm
    lowbit.integrations.vllm.register()
    llm = vllm.LLM(model, quantization="lowbit")

vLLM is imported when `register` runs, never before. It serves checkpoints of compressed-tensors whose groups are
nvfp4 weights with 16-bit activations (preset NVFP4A16); any other group is refused by name.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import DependencyError, PlanError, UnsupportedError
from lowbit.integrations.nvfp4_serving import Nvfp4WeightOnly, is_nvfp4_weight_only

NAME = "lowbit"
_READ = ("compressed-tensors", NAME)  # the `quant_method` of configs that it can serve


def register() -> None:
    """Make the quantization method "lowbit" known to vLLM. A second call changes nothing.

    Raises `DependencyError` when vLLM is not installed or lacks what is needed.
    """
    try:
        quantization = importlib.import_module("vllm.model_executor.layers.quantization")
        base = importlib.import_module("vllm.model_executor.layers.quantization.base_config")
        linear = importlib.import_module("vllm.model_executor.layers.linear")
    except ImportError as error:
        raise DependencyError(f"serving with vLLM needs vLLM ({error}): pip install vllm") from error
    if NAME in getattr(quantization, "QUANTIZATION_METHODS", ()):
        return
    try:
        method = _linear_method(linear.LinearMethodBase)
        config = _config(base.QuantizationConfig, linear, method)
        quantization.register_quantization_config(NAME)(config)
    except AttributeError as error:
        raise DependencyError(f"this vLLM has another interface than lowbit knows: {error}; update lowbit") from error


@dataclass(frozen=True)
class Groups:
    """Which layers of a checkpoint are quantized: targets and layers to ignore, as compressed-tensors writes them."""

    targets: tuple[str, ...]
    ignore: tuple[str, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Groups:
        """Of a `quantization_config`. Raises `PlanError` for a group that is not nvfp4 weights alone."""
        groups = config.get("config_groups") or {}
        if not groups:
            raise PlanError("the model's quantization_config has no config_groups; lowbit serves compressed-tensors'")
        targets: list[str] = []
        for name, group in groups.items():
            weights, activations = group.get("weights"), group.get("input_activations")
            if not is_nvfp4_weight_only(weights, activations):
                asked = "rounds its activations" if activations is not None else "has other weights"
                raise PlanError(
                    f"quantization_config: {name} {asked}; lowbit serves nvfp4 weights (4-bit float, tensor_group of "
                    "16) with 16-bit activations here. Take vLLM's own method for this checkpoint"
                )
            targets += group.get("targets") or ["Linear"]
        return cls(tuple(targets), tuple(config.get("ignore") or ()))

    def quantized(self, layer: str, shards: Iterable[str]) -> bool:
        """Whether a linear layer is quantized; of a fused one, all shards (by name) or none.

        Raises `UnsupportedError` where some shards are and others are not.
        """
        found = {name: self._has(self.targets, name) and not self._has(self.ignore, name) for name in shards}
        if len(set(found.values())) > 1:
            kept = ", ".join(name for name, quantized in found.items() if not quantized)
            raise UnsupportedError(f"{layer}: joins quantized layers with ones that are not ({kept})")
        return all(found.values())

    def mapped(self, names: Any) -> Groups:
        """With names that vLLM's model gives to what the checkpoint calls otherwise."""
        return Groups(tuple(names.apply_list(list(self.targets))), tuple(names.apply_list(list(self.ignore))))

    def _has(self, patterns: Iterable[str], name: str) -> bool:
        for pattern in patterns:
            if pattern.startswith("re:"):
                if re.match(pattern[3:], name):
                    return True
            elif pattern in (name, "Linear"):
                return True
        return False


def _linear_method(base: Any) -> Any:
    """The scheme behind vLLM's names for its methods."""

    class LowbitLinearMethod(base):
        def __init__(self, prefix: str) -> None:
            self.prefix, self.scheme = prefix, Nvfp4WeightOnly()

        def create_weights(
            self,
            layer: nn.Module,
            input_size_per_partition: int,
            output_partition_sizes: list[int],
            input_size: int,
            output_size: int,
            params_dtype: torch.dtype,
            **attributes: Any,
        ) -> None:
            sizes = (output_partition_sizes, input_size_per_partition)
            self.scheme.create_weights(layer, *sizes, params_dtype, prefix=self.prefix, **attributes)

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            self.scheme.process_weights_after_loading(layer)

        def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            return self.scheme.apply_weights(layer, x, bias)

    return LowbitLinearMethod


def _config(base: Any, linear: Any, method: Any) -> Any:
    """The class that vLLM makes of a model's quantization_config."""

    class LowbitConfig(base):
        def __init__(self, groups: Groups) -> None:
            super().__init__()
            self.groups = groups

        def get_name(self) -> str:
            return NAME

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0  # what has no faster kernel is decoded and multiplied

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []  # config.json holds it

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> LowbitConfig:
            return cls(Groups.from_config(config))

        @classmethod
        def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, *_: Any) -> str | None:
            return NAME if user_quant == NAME and _serves(hf_quant_cfg) else None

        def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
            self.groups = self.groups.mapped(hf_to_vllm_mapper)

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            if any("FusedMoE" in kind.__name__ for kind in type(layer).__mro__):
                raise UnsupportedError(f"{prefix}: lowbit does not serve fused experts yet; take vLLM's own method")
            if not isinstance(layer, linear.LinearBase):
                return None
            quantized = self.groups.quantized(prefix, _shards(prefix, self.packed_modules_mapping))
            return method(prefix) if quantized else linear.UnquantizedLinearMethod()

    return LowbitConfig


def _serves(config: Any) -> bool:
    return isinstance(config, Mapping) and config.get("quant_method") in _READ


def _shards(layer: str, fused: Mapping[str, list[str]]) -> list[str]:
    """The layers of the checkpoint that vLLM joins into this one; itself where it joins none."""
    parent, dot, last = layer.rpartition(".")
    return [parent + dot + name for name in fused.get(last) or [last]]
