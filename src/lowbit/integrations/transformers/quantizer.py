"""`LowbitHfQuantizer`: what transformers calls while it loads, saves and dequantizes a model with lowbit's weights."""

from __future__ import annotations

import logging
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from lowbit.checkpoint.dialects import StoredLayer
from lowbit.errors import CheckpointError, LowbitError, PlanError
from lowbit.formats import Format
from lowbit.integrations.hf_files import DescribedFiles, describe_files
from lowbit.integrations.hf_layers import (
    LayerChoice,
    choose_formats,
    dequantize_module_,
    flat_state,
    need_chosen,
    quantized_parameter,
    repack_loaded_,
    stored_bytes,
)
from lowbit.integrations.transformers.config import LowbitConfig
from lowbit.integrations.transformers.loading import LayerConverter, LoadParts, claim_layers, place_layers
from lowbit.integrations.transformers.merging import MergedLayers, wrap_merging
from lowbit.layer_kinds import is_conv1d, matrix_shape, quantized_layers
from lowbit.nn import fold_bias_
from lowbit.tensor import QuantizedTensor

_log = logging.getLogger("lowbit")


class LowbitHfQuantizer(HfQuantizer):
    """Quantizes a model while it loads, or loads one that is quantized already. Made by transformers.

    Attributes: `choices`, for a model quantized while it loaded: layer -> what became of it and why.
    """

    requires_calibration = False
    quantization_config: LowbitConfig

    def __init__(self, quantization_config: LowbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.choices: dict[str, LayerChoice] = {}
        self._paths: list[str] = []
        self._placed: dict[str, StoredLayer] = {}
        self._failed: LowbitError | None = None

    # ---- before the weights come ------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise `PlanError` or `SolverError` for a config that cannot be followed, before anything is loaded."""
        devices = kwargs.get("device_map")
        if isinstance(devices, dict) and "disk" in devices.values():
            raise PlanError(
                "device_map: quantized weights cannot be offloaded to disk; leave disk out (they are small: cpu)"
            )
        if not self.pre_quantized:
            self.quantization_config.rules()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            self._paths = kwargs.get("checkpoint_files") or []  # read later: here every new tensor is without values
            return
        tied = model.all_tied_weights_keys.items()
        ties = {_layer(target): _layer(source) for target, source in tied if target.endswith(".weight")}
        head = model.get_output_embeddings()
        heads = {name for name, module in model.named_modules() if module is head} if head is not None else set()
        self.choices = choose_formats(model, self.quantization_config.rules(), ties=ties, heads=heads)
        need_chosen(model, self.choices)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """transformers' converters with one for the quantized layers in front.

        Raises `CheckpointError` where files and model do not fit.
        """
        if not self.pre_quantized:
            return weight_conversions
        files = _describe(self._paths)
        assert files.dialect is not None  # it has layers
        claims = claim_layers(files, weight_conversions)
        conversions, merged = wrap_merging(weight_conversions, claims, files.dialect)
        if merged.by_key:
            first = next(iter(merged.by_key.values())).stored
            _log.warning(
                "%s: and others are decoded to plain weights: transformers merges them into one tensor (a bank of "
                "experts), which cannot be done to codes",
                first.place,
            )
        self._placed = place_layers(model, files, weight_conversions, merged.by_key.keys())
        for name, stored in self._placed.items():
            layer = model.get_submodule(name)
            if stored.format.folds_bias and isinstance(layer, nn.Linear) and not _has_bias(layer):
                weight: Tensor = layer.weight  # the file has a bias: it holds what the format moves there
                layer.bias = nn.Parameter(torch.empty(weight.shape[0], dtype=weight.dtype, device=weight.device))
        return [LayerConverter(claims.without(merged), files.dialect, LoadParts(self)), *conversions]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype to cast a stored tensor to: none for parts; they only learn in which one to compute."""
        if isinstance(converter, LayerConverter | MergedLayers):
            converter.dtype = dtype
            return None
        return super().get_new_dtype(converter, param, dtype)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes an element of a parameter takes, for planning where it goes."""
        fmt = self._format_of(param_name)
        if fmt is None:
            return float(param.element_size())
        shape = matrix_shape(model.get_submodule(_layer(param_name)))
        return fmt.nbytes(*shape, param.dtype) / max(param.numel(), 1)

    def _format_of(self, name: str) -> Format | None:
        layer, _, attribute = name.rpartition(".")
        chosen = self._placed.get(layer) or self.choices.get(layer)
        return None if chosen is None or attribute != "weight" else chosen.format

    # ---- quantizing while loading -----------------------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is the weight of a layer that is quantized while it loads."""
        return not self.pre_quantized and self._format_of(param_name) is not None

    def get_quantize_ops(self) -> ConversionOps:
        """What makes the quantized weight of a plain one."""
        return QuantizeWeight(self)

    def quantized(self, name: str, weight: Tensor, layer: nn.Module) -> Tensor:
        """A weight that has arrived in its format; as it is after a first error, which is raised when all is loaded.

        (transformers would turn an error here into its own, with the message somewhere in a log.)
        """
        fmt = self._format_of(name)
        if self._failed is None and fmt is not None:
            try:
                solver = self.quantization_config.solver
                return quantized_parameter(weight, fmt, solver, where=_layer(name), transposed=is_conv1d(layer))
            except LowbitError as error:
                self._failed = error
        return weight

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._failed is not None:
            raise self._failed
        for name, choice in self.choices.items():
            layer = model.get_submodule(name)
            if choice.format is not None and not isinstance(layer.weight, QuantizedTensor):
                self.choices[name] = LayerChoice(name, None, "its weight is not in the files: it is new")
        for _, layer in quantized_layers(model) if self.choices else ():
            fold_bias_(layer)
        self._paths, self._placed = [], {}
        if self.pre_quantized and self.quantization_config.dequantize:
            return dequantize_module_(model)
        repack_loaded_(model)
        model.get_memory_footprint = MethodType(get_memory_footprint, model)
        return model

    # ---- afterwards -------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What `save_pretrained` writes: the state with each quantized weight as its stored tensors.

        With adapters loaded, transformers saves only these, and nothing has to be flattened.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        return flat_state(model, ties=model.all_tied_weights_keys), {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        model.__dict__.pop("get_memory_footprint", None)
        return dequantize_module_(model, dtype)

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters on top can be trained: gradients pass through the frozen weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether the model can be compiled."""
        return True


class QuantizeWeight(ConversionOps):
    """The operation that transformers runs on a plain weight that has to be quantized."""

    def __init__(self, quantizer: LowbitHfQuantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
        """The same names with the quantized weights."""
        made = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            made[name] = self.hf_quantizer.quantized(name, weight, model.get_submodule(_layer(name)))
        return made


def get_memory_footprint(model: nn.Module, return_buffers: bool = True) -> int:
    """Bytes that a model takes, quantized weights through their parts; with its buffers or without.

    In place of the method of transformers, which counts two bytes for each element of a bfloat16 weight.
    """
    return stored_bytes(model, buffers=return_buffers)


def _describe(paths: list[str]) -> DescribedFiles:
    if not paths:
        raise CheckpointError("quantized weights are loaded from files: name a folder, not a state dict")
    files = describe_files(paths)
    files.need_layers()
    return files


def _has_bias(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "bias", None), Tensor)


def _layer(name: str) -> str:
    """The layer of a parameter."""
    return name.rpartition(".")[0]
