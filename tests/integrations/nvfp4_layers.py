"""Layers of NVFP4 weights as serving engines load them, and their exact product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.formats import Parts, parse_spec
from tests.support import gaussian

DIVISOR, FACTOR = parse_spec("nvfp4(global_scale_divides=true)"), parse_spec("nvfp4")


def checkpoint(sizes: tuple[int, ...], k: int, ratio: float = 2.14, *, divides: bool = True) -> list[Parts]:
    """The parts of shards whose global scales differ by up to `ratio`."""
    fmt = DIVISOR if divides else FACTOR
    sizing = torch.linspace(1, ratio, len(sizes)).tolist()
    shards = [gaussian(n, k, seed=n + index) for index, n in enumerate(sizes)]
    return [fmt.quantize(w * (0.1 * size / w.abs().max())) for w, size in zip(shards, sizing, strict=True)]


def load(layer: nn.Module, scheme, shards: list[Parts], input_scale: float | None = None) -> None:
    """Give every shard to the parameters' own loaders, as an engine does."""
    names = scheme.convention
    for index, parts in enumerate(shards):
        shard = () if len(shards) == 1 else (index,)
        for part, key in names.keys.items():
            parameter = getattr(layer, key)
            tensor = parts[part].reshape(1) if part == "global_scale" else parts[part]
            parameter.weight_loader(parameter, tensor, *shard)
        if input_scale is not None:
            parameter = getattr(layer, names.input_scale)
            parameter.weight_loader(parameter, torch.tensor([input_scale]), *shard)


def exact(x: Tensor, shards: list[Parts], k: int, bias: Tensor | None = None, *, divides: bool = True) -> Tensor:
    """The product in float64, from codes and scales alone: every shard under its own global scale."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    outputs = []
    for parts in shards:
        codes = torch.stack([parts["qdata"] & 15, parts["qdata"] >> 4], dim=-1).flatten(1).long()
        signed = values[codes & 7] * torch.where(codes > 7, -1.0, 1.0).double()
        value = parts["global_scale"].double()
        scale = parts["scale"].float().double() * (1 / value if divides else value)
        outputs.append(x.double() @ (signed * scale.repeat_interleave(16, dim=1))[:, :k].t())
    out = torch.cat(outputs, dim=-1)
    return out if bias is None else out + bias.double()
