"""Small checkpoints to convert: a file, shards and folders, with one tensor of every kind that a converter meets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.tensors import outlier_weight


def model_tensors(seed: int = 0, blocks: int = 3) -> dict[str, Tensor]:
    """A small bf16 transformer: per block two linears with biases and a norm; an input layer, and odd ones out."""
    tensors: dict[str, Tensor] = {}
    for i in range(blocks):
        up = outlier_weight(192, 128, seed=seed + 2 * i, dtype=torch.bfloat16)
        down = outlier_weight(128, 192, seed=seed + 2 * i + 1, dtype=torch.bfloat16)
        tensors |= {f"blocks.{i}.up.weight": up, f"blocks.{i}.down.weight": down}
        tensors |= {f"blocks.{i}.up.bias": torch.linspace(-1, 1, 192).bfloat16()}
        tensors |= {f"blocks.{i}.norm.weight": torch.ones(128, dtype=torch.bfloat16)}
    generator = torch.Generator().manual_seed(seed)
    tensors["patch.weight"] = torch.randn((8, 4, 2, 2), generator=generator).bfloat16()
    tensors["experts.weight"] = torch.randn((2, 64, 64), generator=generator).bfloat16()
    tensors["tiny.weight"] = torch.randn((8, 16), generator=generator).bfloat16()
    tensors["ragged.weight"] = torch.randn((64, 100), generator=generator)
    tensors["steps"] = torch.arange(10)
    tensors["scale"] = torch.tensor(2.5)
    return tensors


def flux_tensors(prefix: str = "") -> dict[str, Tensor]:
    """FLUX.1's names, enough of them to be recognized."""
    names = ("img_in", "final_layer.linear", "double_blocks.0.img_mod.lin", "single_blocks.0.linear1")
    tensors = {f"{name}.weight": outlier_weight(16, 256, seed=i).bfloat16() for i, name in enumerate(names)}
    tensors["double_blocks.0.img_attn.norm.key_norm.scale"] = torch.rand(64).bfloat16()
    return {prefix + name: tensor for name, tensor in tensors.items()}


def save_model(path: Path, seed: int = 0, blocks: int = 3, **changes: Tensor) -> Path:
    """Write `model_tensors` as one file, some of them replaced ("__" stands for "." in names)."""
    tensors = model_tensors(seed, blocks) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file(tensors, path, metadata={"format": "pt", "author": "test"})
    return path


def save_shards(folder: Path, stem: str = "model", seed: int = 0) -> Path:
    """Write `model_tensors` as two shards with an index, biases in the second; returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = model_tensors(seed)
    names = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {key: names[key.endswith("bias") or "blocks.2" in key] for key in tensors}
    for name in names:
        save_file({k: tensors[k] for k, shard in weight_map.items() if shard == name}, folder / name, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total, "note": 1}, "weight_map": weight_map}))
    return index


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file in a folder by its path below it."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Write a file again with its tensors changed by `change(tensors)`."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata)
