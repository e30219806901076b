"""What a serving engine loads for an NVFP4 layer: the parameters before loading, and the checks after it.

Engines load shard by shard and do not say when a tensor was missing. So parameters start out as what no checkpoint
holds: scales as NaN, and codes, of which every byte is valid, as a pattern that no row of weights has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.errors import PartsError
from lowbit.formats.global_scale import LARGEST_GROUP
from lowbit.formats.nvfp4 import GROUP
from lowbit.numerics.floats import E2M1_MAX, from_fp8

# Read the right way, weights lie far below this; read the other way, a weight of magnitude a becomes 2688**2 / a.
LARGEST_WEIGHT = LARGEST_GROUP
_FUSED = {"q": 0, "k": 1, "v": 2}
_NAN = 0x7F  # of an e4m3 value


@dataclass(frozen=True)
class Convention:
    """The keys of a layer's tensors, and whether their global scale divides (2688 / amax) or multiplies."""

    name: str
    qdata: str
    scale: str
    global_scale: str
    input_scale: str
    divides: bool

    @property
    def keys(self) -> dict[str, str]:
        """Part name -> key."""
        return {"qdata": self.qdata, "scale": self.scale, "global_scale": self.global_scale}


COMPRESSED_TENSORS = Convention(
    "compressed-tensors", "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", divides=True
)
MODELOPT = Convention("modelopt", "weight", "weight_scale", "weight_scale_2", "input_scale", divides=False)


@dataclass(frozen=True)
class Loaded:
    """A layer [sum(sizes), k] whose shards of `sizes` rows are being loaded."""

    where: str
    convention: Convention
    sizes: tuple[int, ...]
    k: int

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return sum(self.sizes), self.k

    @property
    def starts(self) -> list[int]:
        """The first row of each shard."""
        return [sum(self.sizes[:index]) for index in range(len(self.sizes))]

    def empty(self, device: str | None = None) -> dict[str, Tensor]:
        """Uninitialised tensors by key, on the current device or another."""
        names, (n, k), shards = self.convention, self.shape, (len(self.sizes),)
        return {
            names.qdata: torch.empty((n, k // 2), dtype=torch.uint8, device=device),
            names.scale: torch.empty((n, k // GROUP), dtype=torch.uint8, device=device).view(torch.float8_e4m3fn),
            names.global_scale: torch.empty(shards, dtype=torch.float32, device=device),
            names.input_scale: torch.empty(shards, dtype=torch.float32, device=device),
        }

    def attributes(self, key: str) -> dict[str, object]:
        """What engines' loaders ask a parameter for: which axes are N and K, or that each shard has one value."""
        if key in (self.convention.global_scale, self.convention.input_scale):
            return {"needs_scalar_to_array": True}
        packed = {"packed_dim": 1, "packed_factor": 2} if key == self.convention.qdata else {}
        return {"output_dim": 0, "input_dim": 1, **packed}

    def put(self, parameter: nn.Parameter, tensor: Tensor, shard: int | str | None = None) -> None:
        """The loader where an engine has none: a tensor of one shard (0, 1 ..., or q, k, v), or of all of them.

        Raises `PartsError` for a shard that there is not, or a tensor that does not have its shape.
        """
        index = _FUSED.get(shard, -1) if isinstance(shard, str) else shard
        if index is not None and not 0 <= index < len(self.sizes):
            raise PartsError(f"{self.where}: has no shard {shard!r}, only {len(self.sizes)}")
        place = parameter.data
        if parameter.dim() == 1 and tensor.numel() == 1:
            tensor = tensor.reshape(1)
            place = place[:1] if index is None else place[index : index + 1]
        elif index is not None and parameter.dim() > 1:
            place = place.narrow(0, self.starts[index], self.sizes[index])
        if place.shape != tensor.shape or place.dtype != tensor.dtype:
            raise PartsError(f"{self.where}: a tensor is {_kind(tensor)}, expected {_kind(place)}")
        place.copy_(tensor)


def mark_unloaded(layer: nn.Module, loaded: Loaded) -> None:
    """Fill the parameters with what no checkpoint holds."""
    names = loaded.convention
    for key in (names.global_scale, names.input_scale):
        getattr(layer, key).data.fill_(torch.nan)
    getattr(layer, names.scale).data.view(torch.uint8).fill_(_NAN)
    qdata = getattr(layer, names.qdata).data
    qdata.copy_(_pattern(qdata).expand_as(qdata))


def check_loaded(layer: nn.Module, loaded: Loaded) -> None:
    """Raise `PartsError`, naming layer, parameter and shard, unless every parameter was loaded and makes sense."""
    names, n = loaded.convention, loaded.shape[0]
    for key, expected in loaded.empty("meta").items():
        found = getattr(layer, key, None)
        if key != names.input_scale and (found is None or _kind(found) != _kind(expected)):
            raise PartsError(f"{loaded.where}: {key} is {_kind(found)}, expected {_kind(expected)} for N = {n}")
    for index, (start, size) in enumerate(zip(loaded.starts, loaded.sizes, strict=True)):
        shard = f" of shard {index} (rows {start} to {start + size})" if len(loaded.sizes) > 1 else ""
        qdata, scale = (getattr(layer, key).data.narrow(0, start, size) for key in (names.qdata, names.scale))
        value = getattr(layer, names.global_scale).data[index]
        if bool((qdata == _pattern(qdata)).all(1).any()):
            raise PartsError(f"{loaded.where}: {names.qdata}{shard} was never loaded; {_MISSING}")
        values = from_fp8(scale)
        _check_scales(values, f"{loaded.where}: {names.scale}{shard}")
        if bool(value.isnan()):
            raise PartsError(f"{loaded.where}: {names.global_scale}{shard} was never loaded, or is NaN; {_MISSING}")
        if not bool(value.isfinite()) or float(value) <= 0:
            raise PartsError(
                f"{loaded.where}: {names.global_scale}{shard} is {float(value)}, expected a finite value above 0"
            )
        if size:
            _check_reading(names, float(values.max()), float(value), f"{loaded.where}: {names.global_scale}{shard}")


_MISSING = "the checkpoint lacks it, or holds it under another name"


def _check_scales(values: Tensor, what: str) -> None:
    unknown = values.isnan()
    if bool(unknown.all(1).any()):
        raise PartsError(f"{what} was never loaded, or is NaN; {_MISSING}")
    if bool(unknown.any()):
        raise PartsError(f"{what} holds NaN; the checkpoint is damaged")
    if bool((values < 0).any()):
        raise PartsError(f"{what} holds negative scales; the checkpoint is damaged or its dtype is another")


def _check_reading(names: Convention, scale: float, value: float, what: str) -> None:
    """Refuse a divisor where a factor is expected, or the other way round: weights would be immense."""
    divided, multiplied = E2M1_MAX * scale / value, E2M1_MAX * scale * value
    found, other = (divided, multiplied) if names.divides else (multiplied, divided)
    if found <= LARGEST_WEIGHT:
        return
    kinds = ("divisor", "factor") if names.divides else ("factor", "divisor")
    raise PartsError(
        f"{what} is {value:.6g}: as a {kinds[0]}, which {names.name} stores, the largest weight would be "
        f"{found:.3g}; as a {kinds[1]} {other:.3g}. It is probably the reciprocal of what {names.name} means"
    )


def _pattern(qdata: Tensor) -> Tensor:
    """Bytes [K / 2] that no row of weights has: of 8 bytes and more, a chance of 2**-64."""
    return ((torch.arange(qdata.shape[1], device=qdata.device) * 167 + 89) % 256).to(torch.uint8)


def _kind(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
