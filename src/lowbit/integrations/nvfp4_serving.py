"""NVFP4 weights with 16-bit activations inside a serving engine: create, load, check, pad, multiply.

An engine (vLLM, SGLang, any other that loads shard by shard) makes one `Nvfp4WeightOnly` and calls

    create_weights(layer, [n_q, n_k, n_v], k, dtype, loader)   parameters that tell whether they were loaded
    process_weights_after_loading(layer)                       checks, joins the shards' scales, pads
    apply_weights(layer, x, bias)                              x [..., K] -> [..., N] through `lowbit.ops.linear`

What it holds to:
- Activations stay as they are. A checkpoint's `input_global_scale` is loaded and dropped, and none is made up: the
  range of the weights says nothing about that of the activations.
- Shards of a fused layer keep their own global scales, row by row. Taking their maximum is wrong unless all are equal.
- Where a backend wants other sizes (`Alignment`), weights are padded with zeros once, activations at every call; the
  result is cut to N before the bias is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit import ops
from lowbit.errors import PartsError, UnsupportedError
from lowbit.formats.nvfp4 import GROUP, Nvfp4
from lowbit.formats.parts import FLOATS, Parts
from lowbit.integrations.nvfp4_loaded import COMPRESSED_TENSORS, Convention, Loaded, check_loaded, mark_unloaded
from lowbit.numerics.groups import pad_to, round_up

_STATE = "_lowbit_nvfp4"


@dataclass(frozen=True)
class Alignment:
    """What a backend needs N and K to be multiples of. K is always one of 16, the group of a scale."""

    rows: int = 1
    columns: int = GROUP

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < GROUP or self.columns % GROUP:
            raise UnsupportedError(f"{self}: rows must be at least 1, and columns a multiple of {GROUP}")

    def padded(self, n: int, k: int) -> tuple[int, int]:
        """N and K as stored."""
        return round_up(n, self.rows), round_up(k, self.columns)


ANY_SIZE = Alignment()
MARLIN = Alignment(64, 16)
CUTLASS = Alignment(32, 32)
TRTLLM = Alignment(128, 64)


@dataclass(frozen=True)
class _Ready:
    """A layer that can be multiplied with: the format of its parts, their keys, and its sizes without padding."""

    where: str
    spec: str
    keys: tuple[str, ...]
    n: int
    k: int
    padded: tuple[int, int]


class Nvfp4WeightOnly:
    """The scheme for linear layers. One object serves all layers of a model; what a layer needs lies on the layer."""

    def __init__(self, convention: Convention = COMPRESSED_TENSORS, alignment: Alignment = ANY_SIZE) -> None:
        self.convention, self.alignment = convention, alignment

    def create_weights(
        self,
        layer: nn.Module,
        output_partition_sizes: Sequence[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., None] | None = None,
        *,
        prefix: str = "",
        **attributes: Any,
    ) -> None:
        """Register the parameters that a checkpoint fills; until then they hold what no checkpoint does.

        output_partition_sizes     rows of each shard that is fused into this layer, on this rank
        weight_loader              called as (parameter, tensor[, shard]); by default one that puts a shard in its rows
        prefix                     the layer's name, for errors
        attributes                 set on every parameter

        Raises `UnsupportedError` when K is no multiple of 16 or `params_dtype` no 16- or 32-bit float.
        """
        where = prefix or str(getattr(layer, "prefix", "")) or type(layer).__name__
        sizes, k = tuple(output_partition_sizes), input_size_per_partition
        if k % GROUP or k < GROUP:
            raise UnsupportedError(
                f"{where}: K = {k} on this rank is not a multiple of {GROUP}, the weights that share a scale; "
                "use another tensor-parallel size or leave this layer in 16 bits"
            )
        if params_dtype not in FLOATS:
            raise UnsupportedError(f"{where}: activations in {params_dtype}; use bfloat16, float16 or float32")
        loaded = Loaded(where, self.convention, sizes, k)
        for key, tensor in loaded.empty().items():
            parameter = nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(key, parameter)
            named = {**loaded.attributes(key), **attributes}
            named["weight_loader"] = _whole_too(weight_loader or loaded.put)
            for name, value in named.items():
                setattr(parameter, name, value)
        mark_unloaded(layer, loaded)
        setattr(layer, _STATE, loaded)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check what was loaded, and keep it as the parts of a format, padded. A second call changes nothing.

        Raises `PartsError`, naming layer and parameter, for what was never loaded, has a wrong dtype or shape, is not
        finite or negative, or is a global scale of the other convention.
        """
        loaded = getattr(layer, _STATE, None)
        if isinstance(loaded, _Ready):
            return
        if not isinstance(loaded, Loaded):
            raise PartsError(f"{type(layer).__name__}: create_weights must run before process_weights_after_loading")
        check_loaded(layer, loaded)
        names, (n, k) = loaded.convention, loaded.shape
        fmt, parts = _joined(loaded, getattr(layer, names.global_scale).data)
        parts |= {"qdata": getattr(layer, names.qdata).data, "scale": getattr(layer, names.scale).data}
        sizes = self.alignment.padded(n, k)
        for part, tensor in _padded(parts, *sizes).items():
            setattr(layer, names.keys[part], nn.Parameter(tensor, requires_grad=False))
        delattr(layer, names.input_scale)
        keys = tuple(names.keys[part] for part in fmt.part_names)
        setattr(layer, _STATE, _Ready(loaded.where, fmt.spec, keys, n, k, sizes))

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x, plus bias [N]. Any number of axes from 1, any of them empty.

        Raises `PartsError` before `process_weights_after_loading`, `UnsupportedError` for another K, or when no backend
        takes the layer.
        """
        ready = getattr(layer, _STATE, None)
        if not isinstance(ready, _Ready):
            raise PartsError(f"{type(layer).__name__}: process_weights_after_loading must run before apply_weights")
        if x.dim() < 1 or x.shape[-1] != ready.k:
            raise UnsupportedError(f"{ready.where}: x is {list(x.shape)}, expected [..., {ready.k}]")
        rows, columns = ready.padded
        if columns != ready.k:
            x = F.pad(x, (0, columns - ready.k))
        parts = [getattr(layer, key) for key in ready.keys]
        if rows == ready.n:
            return ops.linear(x, parts, bias, ready.spec)
        out: Tensor = ops.linear(x, parts, None, ready.spec)[..., : ready.n]
        return out.contiguous() if bias is None else out + bias


def is_nvfp4_weight_only(weights: Any, input_activations: Any) -> bool:
    """Whether a quantization scheme is 4-bit NVFP4 weights with activations left alone.

    Both are what a compressed-tensors config group holds, as mappings or objects, and either may be None.
    """
    if weights is None or input_activations is not None:
        return False
    wanted = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": GROUP}
    same = all(_field(weights, name) == value for name, value in wanted.items())
    return same and _field(weights, "symmetric") in (None, True) and not _field(weights, "dynamic")


def _field(config: Any, name: str) -> Any:
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return getattr(value, "value", value)  # an enum's


def _joined(loaded: Loaded, global_scale: Tensor) -> tuple[Nvfp4, Parts]:
    """The format and the global scale of all shards: one if they agree, else one for each row."""
    divides = loaded.convention.divides
    if bool((global_scale == global_scale[0]).all()):
        return Nvfp4(global_scale_divides=divides), {"global_scale": global_scale[0].clone()}
    rows = torch.tensor(loaded.sizes, device=global_scale.device)
    fmt = Nvfp4(global_scale_divides=divides, row_global_scale=True)
    return fmt, {"global_scale": global_scale.repeat_interleave(rows)}


def _padded(parts: Parts, rows: int, columns: int) -> Parts:
    """The parts of a weight [rows, columns], whose further codes and scales are zero bytes."""
    qdata, scale, value = parts["qdata"], parts["scale"], parts["global_scale"]
    if value.dim():
        value = F.pad(value, (0, rows - value.shape[0]), value=1.0)  # any but 0: these rows are zero
    padded = pad_to(scale.view(torch.uint8), rows, columns // GROUP).view(scale.dtype)
    return {"qdata": pad_to(qdata, rows, columns // 2), "scale": padded, "global_scale": value}


def _whole_too(loader: Callable[..., None]) -> Callable[..., None]:
    """A loader that gives every shard the one scale of a weight that is fused on disk already.

    Engines put the scale of a tensor without a shard into the first place alone.
    """

    def load(parameter: nn.Parameter, tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        loader(parameter, tensor, *args, **kwargs)
        if not args and not kwargs and parameter.dim() == 1 and tensor.numel() == 1:
            parameter.data.fill_(tensor.reshape(()))

    return load
