"""A stand-in for the parts of ComfyUI that lowbit touches: written from the contract, for machines without ComfyUI.

It keeps what matters to a quantized weight: the order in which operations are asked, weights cast to a device and a
dtype before a product, functions (a LoRA) run on a decoded weight, a weight baked through `convert_weight` and
`set_weight`. Of ComfyUI's own formats it runs float8_e4m3fn and int8_tensorwise. Models are one linear ("lin") behind a
prefix.
"""

from __future__ import annotations

import enum
import json
import sys
import types
from typing import ClassVar

import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F


class Cast:
    """What ComfyUI mixes into every operation."""

    comfy_cast_weights = True
    weight_function = ()
    bias_function = ()


def cast_bias_weight(op, input=None, dtype=None, device=None, bias_dtype=None, offloadable=False, **others):
    """Weight and bias for a product: decoded where a function changes them or the dtype is another one."""
    dtype = input.dtype if dtype is None else dtype
    weight, bias = op.weight, getattr(op, "bias", None)
    if bias is not None:
        bias = bias.to(bias_dtype or dtype)
    if op.weight_function or weight.dtype != dtype:
        weight = weight.to(dtype=dtype)
        weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        for function in op.weight_function:
            weight = function(weight)
    return (weight, bias, None) if offloadable else (weight, bias)


def mixed_precision_ops(quant_config=None, compute_dtype=torch.bfloat16, full_precision_mm=False, disabled=()):
    """Operations whose linears take a `comfy_quant` marker."""
    table = sys.modules["comfy.quant_ops"].QUANT_ALGOS
    members = {"Linear": _linear_class(table, compute_dtype, full_precision_mm), "Embedding": Embedding}
    return type("Ops", (), {**members, "Conv2d": Conv2d, "MoEExperts": MoEExperts})


def _wrapped(op, weight, marker, scale, table):
    """A quantized weight of one of ComfyUI's own formats."""
    op.quant_format = json.loads(marker.numpy().tobytes())["format"]
    op.layout_type = table[op.quant_format]["comfy_tensor_layout"]
    shape, dtype = (op.out_features, op.in_features), op.factory_kwargs["dtype"]
    params = get_layout_class(op.layout_type).Params(scale=scale, orig_dtype=dtype, orig_shape=shape)
    return QuantizedTensor(weight, op.layout_type, params)


def _saved(op, made, prefix):
    """The tensors of a linear, put into `made`."""
    if isinstance(op.weight, QuantizedTensor):
        made.update(op.weight.state_dict(f"{prefix}weight"))
        text = json.dumps({"format": op.quant_format}).encode()
        made[f"{prefix}comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    else:
        made[f"{prefix}weight"] = op.weight
    if op.bias is not None:
        made[f"{prefix}bias"] = op.bias
    return made


def _linear_class(table, compute_dtype, full_precision_mm):
    class Linear(nn.Module, Cast):
        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            super().__init__()
            self.in_features, self.out_features = in_features, out_features
            self.factory_kwargs = {"device": device, "dtype": compute_dtype}
            self.bias = nn.Parameter(torch.zeros(out_features, **self.factory_kwargs)) if bias else None
            self._full_precision_mm, self._full_precision_mm_config = full_precision_mm, False

        def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
            weight, marker = state.pop(f"{prefix}weight"), state.pop(f"{prefix}comfy_quant", None)
            if marker is None:
                self.weight = nn.Parameter(weight.to(**self.factory_kwargs), requires_grad=False)
            else:
                scale = state.pop(f"{prefix}weight_scale")
                self.weight = nn.Parameter(_wrapped(self, weight, marker, scale, table), requires_grad=False)
            super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
            missing[:] = [key for key in missing if key != f"{prefix}weight"]

        def state_dict(self, *args, destination=None, prefix="", **kwargs):
            return _saved(self, {} if destination is None else destination, prefix)

        def _forward(self, input, weight, bias):
            return F.linear(input, weight, bias)

        def forward(self, input):
            plain = self._full_precision_mm or bool(self.weight_function)
            entry = table.get(getattr(self, "quant_format", None), {})
            if isinstance(self.weight, QuantizedTensor) and not plain and not entry.get("quantize_input", True):
                weight, bias = cast_bias_weight(self, dtype=self.weight.dtype, bias_dtype=input.dtype)
                return self._forward(input, weight.to(dtype=input.dtype), bias)
            return self._forward(input, *cast_bias_weight(self, input))

        def convert_weight(self, weight, inplace=False, **kwargs):
            return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

        def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
            made = self.weight.requantize_from_float(
                weight, scale="recalculate", stochastic_rounding=seed, inplace_ops=True
            ).to(self.weight.dtype)
            if return_weight:
                return made
            self.weight = nn.Parameter(made, requires_grad=False)
            return None

        def _apply(self, fn, recurse=True):
            self.weight = nn.Parameter(fn(self.weight), requires_grad=False)
            return self

    return Linear


class Embedding(nn.Embedding, Cast):
    """A table; with a function on it, all of it is decoded."""

    bias = None

    def forward_comfy_cast_weights(self, input, out_dtype=None):
        """Rows by index."""
        weight = cast_bias_weight(self, dtype=out_dtype or self.weight.dtype)[0]
        return F.embedding(input, weight)

    forward = forward_comfy_cast_weights


class Conv2d(nn.Conv2d, Cast):
    """A convolution."""


class MoEExperts(nn.Module, Cast):
    """A bank of experts, which takes its weight as it is."""

    def __init__(self, experts, in_features, out_features):
        super().__init__()

    def _load_from_state_dict(self, state, prefix, *rest):
        self.loaded = state.pop(f"{prefix}weight")
        state.pop(f"{prefix}comfy_quant", None)


def _load_torch_file(path, return_metadata=False, **kwargs):
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (a safe_open is no dict)
        return (tensors, file.metadata()) if return_metadata else tensors


def _load_model(state, model_options=None, metadata=None, **kwargs):
    """A patcher of a model of one linear; None for a file without one."""
    cut = {key.removeprefix("model.diffusion_model."): tensor for key, tensor in state.items()}
    if "lin.weight" not in cut:
        return None
    model = nn.Module()
    model.lin = model_options["custom_operations"].Linear(*cut.pop("in_out").tolist())
    model.load_state_dict(cut)
    return types.SimpleNamespace(model=model, options=model_options, metadata=metadata)


class ProgressBar:
    """Remembers what it was told."""

    seen: ClassVar[list] = []

    def __init__(self, total):
        self.total = total

    def update_absolute(self, value, total=None):
        """How far it is."""
        ProgressBar.seen.append((value, total))


def make_modules() -> dict[str, types.ModuleType]:
    """ComfyUI's modules by name, fresh."""
    content = {
        "quant_ops": {
            "QuantizedTensor": QuantizedTensor,
            "QUANT_ALGOS": {
                "float8_e4m3fn": {"storage_t": torch.float8_e4m3fn, "comfy_tensor_layout": "TensorCoreFP8Layout"},
                "int8_tensorwise": {"comfy_tensor_layout": "TensorWiseINT8Layout", "quantize_input": False},
            },
        },
        "ops": {
            "mixed_precision_ops": mixed_precision_ops,
            "cast_bias_weight": cast_bias_weight,
            "uncast_bias_weight": lambda *_: None,
        },
        "model_management": {
            "get_torch_device": lambda: torch.device("cpu"),
            "supports_fp8_compute": lambda _: True,
            "unet_manual_cast": lambda *asked: asked[-1][0],
            "text_encoder_device": lambda: torch.device("cpu"),
            "text_encoder_dtype": lambda _: torch.float16,
        },
        "model_detection": {
            "unet_prefix_from_state_dict": lambda _: "model.diffusion_model.",
            "model_config_from_unet": lambda *_, **__: types.SimpleNamespace(
                supported_inference_dtypes=[torch.bfloat16, torch.float32]
            ),
        },
        "utils": {"load_torch_file": _load_torch_file, "ProgressBar": ProgressBar},
        "sd": {
            "load_diffusion_model_state_dict": _load_model,
            "load_text_encoder_state_dicts": lambda states, model_options=None, **kwargs: (
                _load_model(states[0], model_options),
                kwargs,
            ),
            "CLIPType": enum.Enum("CLIPType", ["STABLE_DIFFUSION", "QWEN_IMAGE"]),
        },
    }
    package = types.ModuleType("comfy")
    package.__path__ = []
    modules = {"comfy": package}
    for name, members in content.items():
        modules[f"comfy.{name}"] = module = types.ModuleType(f"comfy.{name}")
        vars(module).update(members)
        setattr(package, name, module)
    return modules
