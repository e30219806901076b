"""The names that the tensors of a model have in GGUF files: llama.cpp's, or those that ComfyUI-GGUF looks for.

Its converter changes more than names in many architectures: norms shifted by one, heads reordered, experts stacked.
Only those are served here of which all is known: plain renaming, and for `llama` the order of the rows of queries and
keys, which rotary embeddings of llama.cpp want in pairs. Image models keep their names, without the prefix that they
have in a checkpoint of several models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.errors import CheckpointError

from .dialects.base import join_key
from .gguf_file import GgufFile
from .presets import GENERIC, detect_preset
from .quantized_source import QuantizedComponent

ARCHITECTURES = ("llama", "qwen2", "qwen3")
TOKEN_TABLES = frozenset({"token_embd.weight", "output.weight"})  # the embedding and the head, as llama.cpp has them
_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Naming:
    """Source name -> name in the file, and how many heads the rows of a tensor are reordered by (0: not at all)."""

    names: Mapping[str, str]
    heads: Mapping[str, int]

    def of(self, key: str) -> str:
        """The name of a tensor in the file."""
        return self.names.get(key, key)

    def order(self, key: str, rows: int) -> torch.Tensor | None:
        """The rows (int64 [rows]) of a tensor in the order of the file, or None where it stays."""
        heads = self.heads.get(key, 0)
        if not heads:
            return None
        return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def name_as_llama_cpp(held: QuantizedComponent, architecture: str) -> Naming:
    """How the tensors of a model are named in a file of an architecture in `ARCHITECTURES`; errors as `name_tensors`.

    Of a source that is a GGUF file, names stay.
    """
    if any(isinstance(file, GgufFile) for file in held.component.files.values()):
        return Naming({}, {})
    keys = [join_key(layer, "weight") for layer in held.layers] + held.found.plain
    return name_tensors(keys, architecture, held.configs.get("config.json", {}), held.where)


def model_prefix(keys: Iterable[str]) -> str:
    """What stands before the names of an image model in a checkpoint, and in no file of ComfyUI-GGUF; or ""."""
    keys = list(keys)
    preset = detect_preset(keys) or GENERIC
    return preset.bind(keys).prefix if set(GENERIC.prefixes) & set(preset.prefixes) else ""


def name_tensors(keys: Iterable[str], architecture: str, config: Mapping[str, Any], place: str) -> Naming:
    """How the tensors of a transformers model are named in a GGUF file of an architecture in `ARCHITECTURES`.

    `config`: the model's config.json. Raises `CheckpointError` for a tensor that the architecture does not have, and
    for `llama` where the config does not tell the number of heads. Needs the package gguf.
    """
    import gguf

    keys = list(keys)
    blocks = 1 + max((int(match[1]) for key in keys if (match := _BLOCK.search(key))), default=0)
    number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, blocks)
    names = {key: table.get_name(key, try_suffixes=_SUFFIXES) for key in keys}
    if strange := [key for key, name in names.items() if name is None]:
        raise CheckpointError(
            f"{place}: {strange[0]!r} and {len(strange) - 1} more have no name in the architecture {architecture!r} of "
            "llama.cpp; leave the architecture out to keep all names as they are, or drop these tensors"
        )
    heads = _heads(names, config, place) if architecture == "llama" else {}
    return Naming({key: str(name) for key, name in names.items()}, heads)


def _heads(names: Mapping[str, str | None], config: Mapping[str, Any], place: str) -> dict[str, int]:
    queries = config.get("num_attention_heads")
    keys = config.get("num_key_value_heads", queries)
    if not isinstance(queries, int) or not isinstance(keys, int):
        raise CheckpointError(
            f"{place}: llama.cpp wants the rows of queries and keys in another order, by heads, and no config.json "
            "tells num_attention_heads; name the model's folder, or leave the architecture out"
        )
    found = {}
    for key, name in names.items():
        part = (name or "").rpartition(".")[0].rpartition(".")[2]
        if part in ("attn_q", "attn_k"):
            found[key] = queries if part == "attn_q" else keys
    return found
