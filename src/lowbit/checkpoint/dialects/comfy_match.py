"""Whether the tensors of a file fit what is said of them, and taking them as that: dtypes, shapes, keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lowbit.checkpoint.dialects.base import StoredLayer, TensorSpec
from lowbit.checkpoint.dialects.comfy_formats import UNFOLDED, disk_specs, storage_of
from lowbit.errors import PartsError
from lowbit.formats import Format


def suffixes(cls: type[Format], parts: Iterable[str]) -> dict[str, str]:
    """Part name -> the last piece of its key: what the format states, else the part's own name."""
    stated = comfy_keys(cls)
    return {part: stated.get(part, "weight" if part == "qdata" else part) for part in parts}


def comfy_keys(cls: type[Format]) -> Mapping[str, str]:
    """The keys that a format states for this dialect."""
    return cls.keys.get("comfy", {})


def open_dtypes(fmt: Format, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Those of the given dtypes that belong to a part for which the format allows several, and that it allows."""
    rules = {rule.name: rule.dtypes for rule in fmt.rules}
    named = {role.replace(UNFOLDED, "proj_down"): dtype for role, dtype in dtypes.items()}
    return {
        part: dtype for part, dtype in named.items() if len(allowed := rules.get(part, ())) > 1 and dtype in allowed
    }


def wanted_specs(layer: StoredLayer, dtypes: Mapping[str, torch.dtype]) -> dict[str, TensorSpec]:
    """Role -> what should be stored of a layer; `dtypes`, by role, count where the format leaves the dtype open."""
    wanted = disk_specs(layer.format, layer.shape, layer.dtype, layer.layout, open_dtypes(layer.format, dtypes))
    return {UNFOLDED if part == "proj_down" and UNFOLDED in layer.keys else part: spec for part, spec in wanted.items()}


def check_stored(layer: StoredLayer, found: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Role -> what should be stored.

    Raises `PartsError` unless the stored tensors are that, or can be taken as that.
    """
    (n, k), fmt, aliases = layer.shape, layer.format, storage_of(layer.format).aliases
    if why := fmt.check_shape(n, k):
        raise PartsError(f"{layer.place}: a weight {[n, k]} cannot be {fmt}: it {why}; convert the original again")
    wanted = wanted_specs(layer, {role: spec.dtype for role, spec in found.items()})
    for role, spec in wanted.items():
        if role not in found:
            key = suffixes(type(fmt), [role])[role]
            raise PartsError(
                f"{layer.place}: {key} ({role}) is missing, and {fmt} needs it; the file is incomplete, get or "
                "convert it again"
            )
        got, key = found[role], layer.keys.get(role, role)
        if got.dtype not in (spec.dtype, *aliases.get(role, ()), *_narrower(spec.dtype)):
            raise PartsError(
                f"{layer.place}: {key!r} is {got}, expected {spec} for {fmt} of a weight {[n, k]}; "
                "the label or the tensor is wrong, convert the original again"
            )
        if got.shape != spec.shape and (role == "qdata" or _squeezed(got.shape) != _squeezed(spec.shape)):
            raise PartsError(
                f"{layer.place}: {key!r} has shape {list(got.shape)}, expected {list(spec.shape)} for {fmt} of a "
                f"weight {[n, k]}; the file does not fit this layer or is in another layout"
            )
    return wanted


def taken_as(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """A stored tensor with the dtype and shape that it should have: bytes reinterpreted, 16-bit scales widened."""
    if tensor.dtype != spec.dtype:
        same_size = tensor.dtype.itemsize == spec.dtype.itemsize == 1
        tensor = tensor.view(spec.dtype) if same_size else tensor.to(spec.dtype)
    return tensor.reshape(spec.shape)


def _narrower(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Dtypes that widen exactly: programs that cast whole files leave 16-bit scales."""
    return (torch.bfloat16, torch.float16) if dtype == torch.float32 else ()


def _squeezed(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]
