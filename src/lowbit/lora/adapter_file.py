"""Reading adapter files: the names that trainers give to the tensors of a LoRA, LoHa, LoKr or DoRA.

    kohya, OneTrainer    lora_unet_blocks_0_attn.lora_down.weight  .lora_up.weight  .alpha
    diffusers            transformer.blocks.0.attn.lora_A.weight   .lora_B.weight   [.alpha]
                         unet...attn.processor.to_q_lora.down.weight, ...to_q.lora.up.weight   (older ones)
    PEFT                 base_model.model.blocks.0.attn.lora_A.weight (or lora_A.default.weight), adapter_config.json

    LyCORIS, kohya       lora_unet_blocks_0_attn.hada_w1_a  .lokr_w1  .dora_scale  .alpha ... (`adapter_forms`)

down is lora_A, [R, K]; up is lora_B, [N, R]. The change is alpha / R times their product; without an alpha, 1 times.
Where a file brings its PEFT configuration (beside it, or in its header as diffusers writes it), alpha comes from there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.checkpoint.safetensors_file import SafetensorsFile
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.lora.adapter import Adapter
from lowbit.lora.adapter_delta import Delta
from lowbit.lora.adapter_forms import LayerTensors, change_of

_DOWN = r"lora_down|lora_A|lora\.down|lora_linear_layer\.down"
_UP = r"lora_up|lora_B|lora\.up|lora_linear_layer\.up"
_ROLE = re.compile(rf"^(?P<layer>.+)\.(?:(?P<down>{_DOWN})|(?P<up>{_UP}))(?:\.(?!weight$)[^.]+)?(?:\.weight)?$")
_PROCESSOR = re.compile(r"^(?P<layer>.+?)(?:\.processor)?\.(?P<proj>to_[a-z_]+?)_lora\.(?P<role>down|up)\.weight$")
_MID = re.compile(r"^(?P<layer>.+)\.lora_mid\.weight$")
_OTHER_ROLE = re.compile(
    r"^(?P<layer>.+)\.(?P<role>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|dora_scale|lora_magnitude_vector)"
    r"(?:\.(?!weight$)[^.]+)?(?:\.weight)?$"
)
_ALPHA = re.compile(r"^(?P<layer>.+?)(?:\.lora_(?:A|B|down|up))?\.alpha$")
# Other methods, and parts of LoRA that are no low-rank change: what matches their keys -> what they are. Only whole
# parts of a key count: layers have names like "diffusion_model" and "soft_gate", too.
_OTHERS = {
    r"(^|\.)oft_": "OFT",
    r"(^|\.)boft_": "BOFT",
    r"(^|\.)vera_lambda": "VeRA",
    r"(^|\.)ia3_": "IA3",
    r"(^|\.)glora": "GLoRA",
    r"(^|\.)lora_embedding_": "LoRA on an embedding",
    r"\.lora_(A|B|up|down)(\.[^.]+)?\.bias$": "LoRA with a bias",
    r"\.diff_b$": "a full difference of biases",
    r"\.diff$": "a full difference of weights",
    r"(^|\.)modules_to_save\.": "a layer trained in full",
}
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_HEADER = "lora_adapter_metadata"  # diffusers: {"transformer.r": 16, "transformer.lora_alpha": 32, ...}


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter: a safetensors file, or PEFT's folder with adapter_model.safetensors and adapter_config.json.

    Raises:
        CheckpointError: the file is unsound, a factor is missing or has a wrong shape, or it holds keys that nothing is
            known of.
        UnsupportedError: another method than LoRA, LoHa, LoKr and DoRA, with the keys that say so.
    """
    path = Path(path)
    file_path = path / _WEIGHTS if path.is_dir() else path
    config = _config(file_path)
    with SafetensorsFile(file_path) as file:
        header = _header_config(file.metadata, file_path)
        found = _sort_keys(list(file.tensors), file_path)
        notes: list[str] = []
        alphas = _Alphas(config, header, notes)
        layers = {name: _change(LayerTensors(file, name, keys), alphas) for name, keys in found.items()}
    return Adapter(layers, str(file_path), tuple(notes))


def _sort_keys(keys: list[str], path: Path) -> dict[str, dict[str, str]]:
    """Layer -> role -> key. Raises for those of other methods and for those that are nothing known."""
    _refuse_other_methods(keys, path)
    found: dict[str, dict[str, str]] = {}
    unknown = []
    for key in keys:
        layer, role = _role(key)
        if not role:
            unknown.append(key)
            continue
        entry = found.setdefault(layer, {})
        if role in entry:
            raise CheckpointError(
                f"{path}: {entry[role]!r} and {key!r} are the same thing twice; it holds several adapters: "
                "save one of them alone"
            )
        entry[role] = key
    if unknown:
        raise CheckpointError(
            f"{path}: {unknown[0]!r} and {len(unknown) - 1} more keys are no LoRA that is known (lora_down and "
            "lora_up, lora_A and lora_B, lora.down and lora.up, hada_ of LoHa, lokr_ of LoKr); is it a LoRA?"
        )
    if not found:
        raise CheckpointError(f"{path}: holds no LoRA")
    return found


def _role(key: str) -> tuple[str, str]:
    """The layer of a key, and "down", "up", "alpha" or what other tensors are called; "" for one that is unknown."""
    if match := _PROCESSOR.match(key):
        proj = "to_out.0" if match["proj"] == "to_out" else match["proj"]
        return f"{match['layer']}.{proj}", match["role"]
    if match := _ALPHA.match(key):
        return match["layer"], "alpha"
    if match := _ROLE.match(key):
        return match["layer"], "down" if match["down"] else "up"
    if match := _MID.match(key):
        return match["layer"], "mid"
    if match := _OTHER_ROLE.match(key):
        return match["layer"], match["role"]
    return key, ""


def _refuse_other_methods(keys: list[str], path: Path) -> None:
    for mark, method in _OTHERS.items():
        if mine := [key for key in keys if re.search(mark, key)]:
            more = f" and {len(mine) - 1} more" if len(mine) > 1 else ""
            raise UnsupportedError(
                f"{path}: is {method}, by its keys {mine[0]!r}{more}; only LoRA, LoHa, LoKr and DoRA can be used here. "
                "Merge it into the 16-bit model with the program that made it and convert that, or extract a LoRA from "
                "it"
            )


class _Alphas:
    """What alpha / R is where no alpha tensor says so."""

    def __init__(self, config: Mapping[str, Any] | None, header: Mapping[str, Any] | None, notes: list[str]) -> None:
        self._config, self._header, self._notes = config, header, notes

    def scale(self, layer: str, rank: int | None) -> float:
        """Of a layer, with rank None for a change without factors, which only PEFT scales."""
        if self._config is not None:
            return self._of(self._config, layer, rank or _matching(self._config, "rank_pattern", layer, "r") or 1)
        if rank is None:
            return 1.0
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
        alpha = _matching(config, "alpha_pattern", layer, "lora_alpha" if "lora_alpha" in config else "alpha")
        if alpha is None:
            return 1.0
        return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _matching(config: Mapping[str, Any], patterns: str, layer: str, name: str) -> Any:
    """A value of PEFT's configuration: that of the first pattern for the end of a layer's name, or that for all."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return config.get(name)


def _change(tensors: LayerTensors, alphas: _Alphas) -> Delta:
    """The change of a layer, scaled by its alpha, or as the file's configuration says."""

    def scale(layer: str, rank: int | None) -> float:
        if "alpha" not in tensors.keys:
            return alphas.scale(layer, rank)
        return 1.0 if rank is None else _alpha(tensors.file, tensors.keys["alpha"]) / rank

    return change_of(tensors, scale)


def _alpha(file: SafetensorsFile, key: str) -> float:
    value = file.read(key)
    if value.numel() != 1:
        raise CheckpointError(f"{file.path}: {key!r} has shape {list(value.shape)}, expected one number")
    if not math.isfinite(float(value)):
        raise CheckpointError(f"{file.path}: {key!r} is {float(value)}, no finite number; download it again")
    return float(value)


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
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise UnsupportedError(f"{path}: is {kind}; only LoRA, LoHa, LoKr and DoRA can be used here")
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
