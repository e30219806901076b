"""Reading adapter files: the names that trainers give to the tensors of a LoRA.

    kohya, OneTrainer    lora_unet_blocks_0_attn.lora_down.weight  .lora_up.weight  .alpha
    diffusers            transformer.blocks.0.attn.lora_A.weight   .lora_B.weight   [.alpha]
                         unet...attn.processor.to_q_lora.down.weight, ...to_q.lora.up.weight   (older ones)
    PEFT                 base_model.model.blocks.0.attn.lora_A.weight (or lora_A.default.weight), adapter_config.json

down is lora_A, [R, K]; up is lora_B, [N, R]. The change is alpha / R times their product; without an alpha, 1 times.
Where a file brings its PEFT configuration (beside it, or in its header as diffusers writes it), alpha comes from there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.checkpoint.safetensors_file import SafetensorsFile
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats.parts import FLOATS
from lowbit.lora.adapter import Adapter
from lowbit.lora.adapter_delta import LoraDelta

_DOWN = r"lora_down|lora_A|lora\.down|lora_linear_layer\.down"
_UP = r"lora_up|lora_B|lora\.up|lora_linear_layer\.up"
_ROLE = re.compile(rf"^(?P<layer>.+)\.(?:(?P<down>{_DOWN})|(?P<up>{_UP}))(?:\.(?!weight$)[^.]+)?(?:\.weight)?$")
_PROCESSOR = re.compile(r"^(?P<layer>.+?)(?:\.processor)?\.(?P<proj>to_[a-z_]+?)_lora\.(?P<role>down|up)\.weight$")
_ALPHA = re.compile(r"^(?P<layer>.+?)(?:\.lora_(?:A|B|down|up))?\.alpha$")
# Other methods, and parts of LoRA that are no low-rank change: what their keys hold -> what they are.
_OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "lora_mid": "Tucker-decomposed LoCon",
    "oft_": "OFT",
    "boft_": "BOFT",
    "vera_lambda": "VeRA",
    "ia3_": "IA3",
    "glora": "GLoRA",
    "lora_embedding_": "LoRA on an embedding",
    "lora_A.bias": "LoRA with a bias",
    "lora_B.bias": "LoRA with a bias",
    "lora_up.bias": "LoRA with a bias",
    ".diff_b": "a full difference of biases",
    ".diff": "a full difference of weights",
    "modules_to_save": "a layer trained in full",
}
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_HEADER = "lora_adapter_metadata"  # diffusers: {"transformer.r": 16, "transformer.lora_alpha": 32, ...}


@dataclass
class _Found:
    """The tensors of one layer, by their keys."""

    down: str = ""
    up: str = ""
    alpha: str = ""
    seen: list[str] = field(default_factory=list)


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter: a safetensors file, or PEFT's folder with adapter_model.safetensors and adapter_config.json.

    Raises:
        CheckpointError: the file is unsound, half of a pair is missing, or it holds keys that nothing is known of.
        UnsupportedError: another method than LoRA (DoRA, LoKr, LoHa ...), with the keys that say so.
    """
    path = Path(path)
    file_path = path / _WEIGHTS if path.is_dir() else path
    config = _config(file_path)
    with SafetensorsFile(file_path) as file:
        header = _header_config(file.metadata, file_path)
        found = _sort_keys(list(file.tensors), file_path)
        notes: list[str] = []
        alphas = _Alphas(config, header, notes)
        layers = {name: _delta(file, name, keys, alphas) for name, keys in found.items()}
    return Adapter(layers, str(file_path), tuple(notes))


def _sort_keys(keys: list[str], path: Path) -> dict[str, _Found]:
    """The keys of each layer. Raises for those of other methods and for those that are nothing known."""
    _refuse_other_methods(keys, path)
    found: dict[str, _Found] = {}
    unknown = []
    for key in keys:
        layer, role = _role(key)
        if not role:
            unknown.append(key)
            continue
        entry = found.setdefault(layer, _Found())
        if getattr(entry, role):
            raise CheckpointError(
                f"{path}: {getattr(entry, role)!r} and {key!r} are the same thing twice; it holds several adapters: "
                "save one of them alone"
            )
        setattr(entry, role, key)
    if unknown:
        raise CheckpointError(
            f"{path}: {unknown[0]!r} and {len(unknown) - 1} more keys are no LoRA that is known (lora_down and "
            "lora_up, lora_A and lora_B, lora.down and lora.up); is it a LoRA?"
        )
    if not found:
        raise CheckpointError(f"{path}: holds no LoRA")
    for layer, entry in found.items():
        if not entry.down or not entry.up:
            have = entry.down or entry.up or entry.alpha
            raise CheckpointError(f"{path}: layer {layer!r} has {have!r} without its counterpart; download it again")
    return found


def _role(key: str) -> tuple[str, str]:
    """The layer of a key, and "down", "up" or "alpha"; "" for one that is none of them."""
    if match := _PROCESSOR.match(key):
        proj = "to_out.0" if match["proj"] == "to_out" else match["proj"]
        return f"{match['layer']}.{proj}", match["role"]
    if match := _ALPHA.match(key):
        return match["layer"], "alpha"
    if match := _ROLE.match(key):
        return match["layer"], "down" if match["down"] else "up"
    return key, ""


def _refuse_other_methods(keys: list[str], path: Path) -> None:
    for mark, method in _OTHERS.items():
        if mine := [key for key in keys if mark in key]:
            more = f" and {len(mine) - 1} more" if len(mine) > 1 else ""
            raise UnsupportedError(
                f"{path}: is {method}, by its keys {mine[0]!r}{more}; only plain LoRA can be used here. Merge it into "
                "the 16-bit model with the program that made it and convert that, or extract a LoRA from it"
            )


class _Alphas:
    """What alpha / R is where no alpha tensor says so."""

    def __init__(self, config: Mapping[str, Any] | None, header: Mapping[str, Any] | None, notes: list[str]) -> None:
        self._config, self._header, self._notes = config, header, notes

    def scale(self, layer: str, rank: int) -> float:
        if self._config is not None:
            return self._of(self._config, layer, rank)
        if self._header is not None:
            head = layer.partition(".")[0]
            mine = {key[len(head) + 1 :]: value for key, value in self._header.items() if key.startswith(f"{head}.")}
            return self._of(mine or self._header, layer, rank)
        note = "no alpha in the file: each change counts once (alpha = rank), as diffusers and ComfyUI read it"
        if note not in self._notes:
            self._notes.append(note)
        return 1.0

    @staticmethod
    def _of(config: Mapping[str, Any], layer: str, rank: int) -> float:
        alpha = config.get("lora_alpha")
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer):  # PEFT: a regular expression for the end of the name
                alpha = value
                break
        if alpha is None:
            return 1.0
        return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _delta(file: SafetensorsFile, layer: str, keys: _Found, alphas: _Alphas) -> LoraDelta:
    down, up = file.read(keys.down), file.read(keys.up)
    place = f"{file.path}: layer {layer!r}"
    for key, tensor in ((keys.down, down), (keys.up, up)):
        if tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{place}: {key!r} is {kind}, not float of 16 or 32 bits; save the LoRA in bfloat16")
    up = _matrix(up)
    if down.dim() < 2 or up.dim() != 2 or up.shape[1] != down.shape[0] or not down.shape[0]:
        raise CheckpointError(
            f"{place}: down {list(down.shape)} and up {list(up.shape)} do not fit [R, K] and [N, R]; download it again"
        )
    scale = alphas.scale(layer, down.shape[0]) if not keys.alpha else _alpha(file, keys.alpha) / down.shape[0]
    return LoraDelta(down, up, scale)


def _alpha(file: SafetensorsFile, key: str) -> float:
    value = file.read(key)
    if value.numel() != 1:
        raise CheckpointError(f"{file.path}: {key!r} has shape {list(value.shape)}, expected one number")
    return float(value)


def _matrix(up: Tensor) -> Tensor:
    """The up factor of a convolution, [N, R, 1, 1], as a matrix."""
    return up.flatten(1) if up.dim() > 2 and up[0, 0].numel() == 1 else up


def _config(file_path: Path) -> Mapping[str, Any] | None:
    """PEFT's configuration beside a file of PEFT, or None. Raises `UnsupportedError` for another method."""
    path = file_path.with_name(_CONFIG)
    if file_path.name != _WEIGHTS or not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; save the adapter again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is no JSON object; save the adapter again")
    kind = config.get("peft_type", "LORA")
    if kind != "LORA" or config.get("use_dora"):
        raise UnsupportedError(f"{path}: is {'DoRA' if kind == 'LORA' else kind}; only plain LoRA can be used here")
    return config


def _header_config(metadata: Mapping[str, str], path: Path) -> Mapping[str, Any] | None:
    """The PEFT configuration that diffusers puts into the header, or None."""
    text = metadata.get(_HEADER)
    if text is None:
        return None
    try:
        config = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: its header entry {_HEADER} is no JSON: {error}; save the LoRA again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: its header entry {_HEADER} is no JSON object; save the LoRA again")
    return config
