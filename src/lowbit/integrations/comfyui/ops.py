"""ComfyUI's mixed-precision operations that read every format lowbit knows: pass them as `custom_operations`.

    Ops = lowbit_ops(torch.bfloat16)
    model = comfy.sd.load_diffusion_model(path, model_options={"custom_operations": Ops})

`comfyui.loader` does this and what ComfyUI leaves to a caller that brings its own operations. The formats that ComfyUI
runs itself stay with its own code, unless it cannot run them on the device at hand.
"""

# ruff: noqa: SLF001  (ComfyUI's operations are extended through names that begin with an underscore)

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.checkpoint.dialects import StoredLayer
from lowbit.checkpoint.dialects.base import name_place
from lowbit.checkpoint.dialects.comfy_marker import MARKER
from lowbit.errors import CheckpointError, DependencyError, PartsError, UnsupportedError
from lowbit.integrations.comfyui.layers import Reading, check_bank, find_layer, on_disk_name, saved_layer, take_parts
from lowbit.integrations.comfyui.layout import LowbitLayout, is_lowbit, layout_for, parts_of
from lowbit.ops import generic
from lowbit.tensor import AUTO, choose_layout

_LOG = logging.getLogger(__name__)
KERNELS = ("auto", "lowbit", "comfy")
_OWN = "lowbit_"
_TOO_OLD = "this ComfyUI is too old for lowbit's operations: update it to 0.29 or later"
_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d")
# ComfyUI's questions about a device, and the formats of its table that hang on the answer.
_SUPPORT = {
    "supports_nvfp4_compute": ("nvfp4",),
    "supports_mxfp8_compute": ("mxfp8",),
    "supports_fp8_compute": ("float8_e4m3fn", "float8_e5m2"),
    "supports_int8_compute": ("int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8"),
}


def lowbit_ops(
    compute_dtype: torch.dtype = torch.bfloat16,
    *,
    full_precision_mm: bool = False,
    disabled: Collection[str] | None = None,
    kernels: str = "auto",
    infer_act_unsigned: bool = False,
    where: str = "",
) -> Any:
    """A class of operations: a subclass of `comfy.ops.mixed_precision_ops(...)` for `custom_operations`.

    compute_dtype: what weights decode to and unquantized ones are cast to. full_precision_mm: activations are never
    rounded (ComfyUI asks that of text encoders). disabled: formats that ComfyUI cannot run on its device; by default it
    is asked. kernels: "auto", "lowbit" or "comfy", see `layers.Reading`. infer_act_unsigned: take svdquant layers
    whose markers do not say act_unsigned for unsigned where early Qwen-Image files have them so; each is logged. An
    explicit false stays false. where: the file, for messages.

    Raises `DependencyError` outside of ComfyUI or in one that is too old, `UnsupportedError` for unknown `kernels`.
    """
    if kernels not in KERNELS:
        raise UnsupportedError(f"kernels is {kernels!r}, expected one of {', '.join(KERNELS)}")
    comfy, table = _comfy()
    unavailable = frozenset(_unavailable(comfy) if disabled is None else disabled)
    reading = Reading(table, kernels, unavailable, infer_act_unsigned, where)
    base = comfy.ops.mixed_precision_ops(
        {}, compute_dtype, full_precision_mm=full_precision_mm, disabled=set(unavailable)
    )
    if not hasattr(base.Linear, "_forward") or not _knows_weight_only(table):
        raise DependencyError(_TOO_OLD)
    own = {"lowbit_reading": reading, "lowbit_comfy": comfy, "__module__": __name__}
    members: dict[str, Any] = {
        "Linear": type("Linear", (_Linear, base.Linear), dict(own)),
        "Embedding": type("Embedding", (_Embedding, base.Embedding), dict(own)),
        "__doc__": "ComfyUI's mixed-precision operations with lowbit's formats.",
        "__module__": __name__,
    }
    for name in (*_CONVOLUTIONS, "MoEExperts"):
        if hasattr(base, name):
            members[name] = type(name, (_Unquantized if name != "MoEExperts" else _Experts, getattr(base, name)), own)
    return type("LowbitOps", (base,), members)


def _comfy() -> tuple[Any, Any]:
    """The package `comfy`, and its table of formats."""
    try:
        import comfy.model_management
        import comfy.ops
        import comfy.quant_ops
    except ImportError as error:
        raise DependencyError(
            f"this works inside ComfyUI only: {error}; run it from a custom node, or put ComfyUI's folder on sys.path"
        ) from error
    if not hasattr(comfy.ops, "mixed_precision_ops"):
        raise DependencyError(_TOO_OLD)
    return comfy, comfy.quant_ops.QUANT_ALGOS


def _knows_weight_only(table: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether this ComfyUI has formats whose input it leaves alone: an older one would quantize every input."""
    return any(not entry.get("quantize_input", True) for name, entry in table.items() if not name.startswith(_OWN))


def _unavailable(comfy: Any) -> set[str]:
    """The formats of ComfyUI's table that it says it cannot run on its device."""
    management = comfy.model_management
    device = management.get_torch_device()
    asked = {name: getattr(management, name, None) for name in _SUPPORT}
    return {fmt for name, ask in asked.items() if ask is not None and not ask(device) for fmt in _SUPPORT[name]}


def _register_format(table: Any, name: str, layout: Any) -> str:
    """The name by which ComfyUI's table says of a format that its input is not quantized before the product.

    It is none that a file has: the table's own entries, and what stock operations say of a format, stay as they are.
    """
    entry = {
        "storage_t": torch.uint8,
        "parameters": set(),
        "comfy_tensor_layout": layout.NAME,
        "quantize_input": layout.QUANTIZES_INPUT,
    }
    table.setdefault(f"{_OWN}{name}", entry)
    return f"{_OWN}{name}"


class _Layer(nn.Module):
    """What linears and embeddings share: loading a quantized weight and writing it back. Mixed in before ComfyUI's."""

    lowbit_reading: Reading
    lowbit_comfy: Any
    lowbit_stored: StoredLayer | None = None
    lowbit_layout: type[LowbitLayout] | None = None
    lowbit_bias_dtype: torch.dtype | None = None
    factory_kwargs: Mapping[str, Any] = MappingProxyType({})
    weight: Any
    bias: Any

    def _lowbit_shape(self) -> tuple[int, int]:
        raise NotImplementedError

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        stored = find_layer(state_dict, prefix, self._lowbit_shape(), self.lowbit_reading)
        self.lowbit_stored = stored
        if stored is None and (f"{prefix}weight" in state_dict or isinstance(self, _Embedding)):
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        if stored is None:
            self._lowbit_fill()
            nn.Module._load_from_state_dict(self, state_dict, prefix, *rest)
            return
        self._lowbit_take(stored, state_dict)
        bias = state_dict.get(f"{prefix}bias")
        self.lowbit_bias_dtype = None if bias is None else bias.dtype
        if stored.format.folds_bias and self.bias is None and bias is not None:
            self.bias = nn.Parameter(bias.clone(), requires_grad=False)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *rest)
        missing_keys[:] = [key for key in missing_keys if key != f"{prefix}weight"]

    def _lowbit_fill(self) -> None:
        """Zeros for a weight that no file has (a CLIP-L without its projection), where ComfyUI would leave None."""
        if getattr(self, "weight", None) is None:
            self.weight = nn.Parameter(torch.zeros(self._lowbit_shape(), **self.factory_kwargs), requires_grad=False)

    def _lowbit_take(self, stored: StoredLayer, state_dict: dict[str, Tensor]) -> None:
        """Put the weight in place; everything that a forward needs to know is settled here, once."""
        kept = self.factory_kwargs
        dtype = kept.get("dtype") or getattr(self, "weight_comfy_model_dtype", None) or stored.dtype
        parts = take_parts(stored, state_dict, kept.get("device"))
        layout, weight = self._lowbit_wrap(stored, parts, dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lowbit_layout, self.layout_type = layout, layout.NAME
        self.quant_format = _register_format(self.lowbit_reading.table, on_disk_name(stored), layout)
        asked = bool(stored.options.get("full_precision_matrix_mult"))
        self._full_precision_mm_config = asked
        self._full_precision_mm = asked or getattr(self, "_full_precision_mm", False)
        for note in stored.notes:
            _LOG.info("%s: %s", stored.place, note)

    def _lowbit_wrap(self, stored: StoredLayer, parts: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Any, Any]:
        """The layout class and the weight: packed for lowbit's kernels where ComfyUI computes on the CPU alone.

        Elsewhere ComfyUI moves weights between devices part by part, and every device must be able to read them.
        """
        device = self.lowbit_comfy.model_management.get_torch_device()
        if device.type == "cpu" and isinstance(self, _Linear):
            chosen, _ = choose_layout(AUTO, stored.format, stored.shape, "cpu", "linear")
            with contextlib.suppress(PartsError):  # values that it cannot hold exactly
                layout = layout_for(stored.format, chosen)
                return layout, layout.wrap(parts, dtype, stored.shape)
        layout = layout_for(stored.format)
        return layout, layout.wrap(parts, dtype, stored.shape)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", **kwargs: Any) -> Any:
        """As ComfyUI's, with canonical keys and all that the marker has to say of a lowbit weight."""
        if self.lowbit_stored is None or not is_lowbit(self.weight):
            return super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        made = {} if destination is None else destination
        made.update(saved_layer(self.lowbit_stored, self.weight, self.bias, prefix, self.lowbit_bias_dtype))
        return made


class _Linear(_Layer):
    """ComfyUI's quantized linear with lowbit's formats."""

    in_features: int
    out_features: int

    def _lowbit_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _forward(self, input: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        """The product, with the weight as ComfyUI hands it over: quantized, or decoded and maybe changed by a LoRA."""
        if is_lowbit(weight):
            if not (self._full_precision_mm and weight.layout_cls.FORMAT.rounds_input):
                return F.linear(input, weight, bias)
            weight = weight.dequantize().to(input.dtype)
        elif isinstance(weight, self.lowbit_comfy.quant_ops.QuantizedTensor) or not is_lowbit(self.weight):
            return super()._forward(input, weight, bias)  # type: ignore[misc]
        share = self.weight._params.folded_share  # a decoded weight does not have what the stored bias lacks
        if share is not None:
            share = share.to(input.device)
            bias = (share if bias is None else bias.float() + share).to(input.dtype)
        return F.linear(input, weight, bias)

    def set_weight(
        self,
        weight: Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **others: Any,
    ) -> Any:
        """Bake a LoRA: quantize the changed weight again, by chance with a seed; decoded if its format is read only."""
        if is_lowbit(self.weight) and not self.weight.layout_cls.FORMAT.encodable:
            decoded = weight.to(self.weight.dtype)
            if return_weight:
                return decoded
            self.weight = nn.Parameter(decoded, requires_grad=False)
            return None
        return super().set_weight(  # type: ignore[misc]
            weight, inplace_update=inplace_update, seed=seed, return_weight=return_weight, **others
        )


class _Embedding(_Layer):
    """ComfyUI's embedding with lowbit's formats: only the rows that are looked up are decoded."""

    num_embeddings: int
    embedding_dim: int

    def _lowbit_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def _lowbit_take(self, stored: StoredLayer, state_dict: dict[str, Tensor]) -> None:
        if not stored.format.supports_embedding:
            raise CheckpointError(
                f"{stored.place}: is an embedding table in {stored.format}, which has no lookup; convert it again and "
                "keep this layer"
            )
        super()._lowbit_take(stored, state_dict)

    def forward_comfy_cast_weights(self, input: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """Rows by index. With a LoRA on the table, ComfyUI's way: the whole table is decoded."""
        if not is_lowbit(self.weight) or len(self.weight_function):  # type: ignore[arg-type]
            return super().forward_comfy_cast_weights(input, out_dtype=out_dtype)  # type: ignore[misc]
        ops = self.lowbit_comfy.ops
        weight, bias, offloaded = ops.cast_bias_weight(
            self, device=input.device, dtype=self.weight.dtype, offloadable=True
        )
        try:
            parts, fmt = list(parts_of(weight).values()), weight.layout_cls.FORMAT
            return generic.embedding(input, parts, self.embedding_dim, fmt.spec, out_dtype or weight.dtype)
        finally:
            ops.uncast_bias_weight(self, weight, bias, offloaded)


class _Unquantized(nn.Module):
    """A convolution: ComfyUI would use the codes of a quantized kernel as its weights, without a word."""

    lowbit_reading: Reading

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        if f"{prefix}{MARKER}" in state_dict:
            raise CheckpointError(
                f"{name_place(self.lowbit_reading.where, prefix.removesuffix('.'))}: is quantized, and ComfyUI runs no "
                f"quantized {type(self).__name__}; convert the original again and keep this layer"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Experts(nn.Module):
    """A bank of experts: ComfyUI's own formats only."""

    lowbit_reading: Reading

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        check_bank(state_dict, prefix, self.lowbit_reading)
        super()._load_from_state_dict(state_dict, prefix, *rest)
