"""`LowbitQuantizer`: what diffusers calls while it loads, saves and dequantizes a model with lowbit's weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from lowbit.checkpoint.dialects.base import join_key, layer_of
from lowbit.errors import CheckpointError, PlanError
from lowbit.formats import Format
from lowbit.integrations.diffusers.config import LowbitConfig
from lowbit.integrations.diffusers.own_model import Footprint, OwnModel
from lowbit.integrations.diffusers.single_file import WHERE, SingleFile
from lowbit.integrations.diffusers.stored_layers import StoredLayers, add_biases, refuse_missing, widened
from lowbit.integrations.hf_files import describe_files
from lowbit.integrations.hf_layers import (
    LayerChoice,
    choose_formats,
    dequantize_module_,
    flat_state,
    need_chosen,
    quantized_parameter,
    repack_loaded_,
)
from lowbit.nn import fold_bias_
from lowbit.tensor import QuantizedTensor


class LowbitQuantizer(DiffusersQuantizer):
    """Quantizes a model while it loads, or loads one that is quantized already. Made by diffusers.

    Attributes: `choices`, for a model quantized while it loaded: layer -> what became of it and why.
    """

    requires_calibration = False
    use_keep_in_fp32_modules = True
    quantization_config: LowbitConfig

    def __init__(self, quantization_config: LowbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.choices: dict[str, LayerChoice] = {}
        self._where = WHERE
        self._from_folder = False
        self._stored: StoredLayers | None = None
        self._single: SingleFile | None = None
        self._own: OwnModel | None = None

    # ---- what there is to load --------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise `PlanError` or `SolverError` for a config that cannot be followed, before anything is loaded."""
        devices = kwargs.get("device_map")
        places = {str(device) for device in devices.values()} if isinstance(devices, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise PlanError(
                "device_map: quantized weights cannot be offloaded one by one, to disk or CPU; place the model on one "
                "device (device_map=None) and use enable_model_cpu_offload() or enable_group_offload()"
            )
        if self.quantization_config.format is not None and not self.pre_quantized:
            self.quantization_config.rules()

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
        """The keys that the files of a folder bring, with one for each quantized layer.

        Raises `CheckpointError` for files that are not what config.json says, `PlanError` for a format where they are
        quantized already.
        """
        self._from_folder, self._where = True, str(Path(checkpoint_files[0]).parent)
        if not self.pre_quantized and Path(checkpoint_files[0]).suffix != ".safetensors":
            return loaded_keys
        files = describe_files(checkpoint_files)
        self._where = files.where
        if self.pre_quantized:
            files.need_layers()
        elif files.found.layers:
            self._refuse_format()
        else:
            return loaded_keys
        self._stored = StoredLayers(files)
        return self._stored.keys(loaded_keys)

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The tensors of one file, with quantized layers as one tensor each."""
        if not self._from_folder:
            self._single = SingleFile(state_dict)
            if self._single.quantized:
                self._refuse_format()
            return self._single.state
        return widened(state_dict if self._stored is None else self._stored.take(state_dict))

    def _refuse_format(self) -> None:
        if self.quantization_config.format is not None:
            raise PlanError(
                f"{self._where}: is quantized already; load it with LowbitConfig() without a format, or take the "
                f"16-bit original to quantize it to {self.quantization_config.format}"
            )

    # ---- before the weights come ------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self,
        model: Any,
        *,
        state_dict: dict[str, Any] | None = None,
        keep_in_fp32_modules: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._single is not None and state_dict is not None:
            self._single.check(model, state_dict)
        if self._stored is not None:
            self._stored.place(model)
        if self._stored is None and not (self._single is not None and self._single.quantized):
            self._choose(model, keep_in_fp32_modules or [])

    def _choose(self, model: nn.Module, keep: list[str]) -> None:
        rules = self.quantization_config.rules()
        self.choices = choose_formats(model, replace(rules, keep=(*rules.keep, *keep)))
        need_chosen(model, self.choices)

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """The keys that a folder lacks and the model makes by itself. Raises `CheckpointError` for any other."""
        there = model.state_dict().keys() - set(missing_keys)
        if self._stored is not None:
            add_biases(model, self._stored.layers, there, self._where)
        refuse_missing(model, there, self._where)
        return missing_keys

    def get_special_dtypes_update(self, model: Any, torch_dtype: torch.dtype | None) -> dict[str, Any]:
        """Parameter -> a dtype of at least its size, for planning where each goes."""
        layers = [*(self._stored.layers if self._stored is not None else ()), *self.choices]
        weights = [join_key(layer, "weight") for layer in layers]
        return dict.fromkeys((name for name in weights if self._format_of(name) is not None), torch.int8)

    def _format_of(self, name: str) -> Format | None:
        layer = layer_of(name)
        if layer is None:
            return None
        if self._stored is not None and layer in self._stored.layers:
            return self._stored.layers[layer].format
        return self.choices[layer].format if layer in self.choices else None

    # ---- while the weights come -------------------------------------------------------------------------------------

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether a tensor is a quantized weight, one that will be, or a bias that depends on one."""
        return (
            isinstance(param_value, QuantizedTensor)
            or self._format_of(param_name) is not None
            or self._bias_of(param_name) is not None
        )

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """Raises `CheckpointError`: by now every quantized weight has been found to fit."""
        raise CheckpointError(
            f"{self._where}: {param_name!r} has shape {list(loaded_param.shape)}, the model's has "
            f"{list(current_param.shape)}; load it with the class and config that it was made for"
        )

    def create_quantized_param(
        self,
        model: Any,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any] | None = None,
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put a weight in its place, quantized if it is not yet; or a bias that then gives up a share.

        Raises `WeightError` that names the layer for a weight that cannot be quantized.
        """
        name, _, attribute = param_name.rpartition(".")
        layer = model.get_submodule(name)
        value = param_value.to(target_device)
        fmt = self._format_of(join_key(name, "weight")) if self.choices else None
        if isinstance(value, QuantizedTensor):  # rows of another weight become a weight of their own
            layer.weight = nn.Parameter(value.clone() if value.view_of else value.detach(), requires_grad=False)
        elif attribute == "bias":
            layer.bias = nn.Parameter(value, requires_grad=layer.bias.requires_grad)
        else:
            assert fmt is not None  # by check_if_quantized_param
            layer.weight = quantized_parameter(value, fmt, self.quantization_config.solver, where=name)
        if fmt is not None and not any(parameter.is_meta for parameter in layer.parameters()):
            fold_bias_(layer)

    def _bias_of(self, name: str) -> Format | None:
        """The format of the layer of a bias, where that is quantized now and keeps a share of its weight there."""
        layer, _, attribute = name.rpartition(".")
        fmt = self._format_of(join_key(layer, "weight")) if attribute == "bias" and self.choices else None
        return fmt if fmt is not None and fmt.folds_bias else None

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._stored is not None:
            self._stored.refuse_incomplete()
        self._stored = self._single = None
        self._own = OwnModel(model)
        model.register_to_config(quantization_config=self.quantization_config)
        if self.quantization_config.dequantize:
            model.is_quantized = False
            return self._dequantize(model)
        repack_loaded_(model)
        model.get_memory_footprint = Footprint(model)
        return model

    # ---- afterwards -------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the state with each quantized weight as its stored tensors.

        Raises `CheckpointError` for a pickle instead of safetensors, and for a model that carries adapters.
        """
        assert self._own is not None  # only what has been loaded is saved
        if not safe_serialization:
            raise CheckpointError("quantized weights are saved as safetensors only; drop safe_serialization=False")
        if any(".base_layer." in key for key in state_dict):
            raise CheckpointError(
                f"{type(self._own.model).__name__}: carries adapters, which would be mixed with the weights; save "
                "them by themselves (peft.get_peft_model_state_dict), call fuse_lora() where they are to stay in "
                "the weights, then unload_lora(), and save"
            )
        return flat_state(self._own.model), {}

    def _dequantize(self, model: Any) -> Any:
        model.__dict__.pop("get_memory_footprint", None)
        fields = {name: value for name, value in model.config.items() if name != "quantization_config"}
        model._internal_dict = FrozenDict(fields)  # noqa: SLF001  (an entry cannot be taken out of a FrozenDict)
        return dequantize_module_(model)

    @property
    def supports_parallel_loading(self) -> bool:
        """Whether several threads may load files: no, the tensors of one layer may be in two of them."""
        return False

    @property
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
