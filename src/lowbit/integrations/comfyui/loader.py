"""Loading models into ComfyUI with lowbit's operations: what its own loaders do, and what they leave to a caller here.

ComfyUI's loaders take `custom_operations`, and then neither convert older files nor choose a dtype to compute in.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint.dialects import Container, TensorSpec, detect_dialect
from lowbit.checkpoint.dialects.comfy import COMFY
from lowbit.errors import CheckpointError, DependencyError
from lowbit.integrations.comfyui.files import ComfyFile, describe_layers, read_file
from lowbit.integrations.comfyui.ops import lowbit_ops

_LOG = logging.getLogger(__name__)


def load_diffusion_model(
    path: str | Path,
    *,
    compute_dtype: torch.dtype | None = None,
    kernels: str = "auto",
    infer_act_unsigned: bool = False,
    dialect: str | None = None,
    model_options: Mapping[str, Any] | None = None,
    disable_dynamic: bool = False,
) -> Any:
    """ComfyUI's ModelPatcher of a diffusion model in any format and convention that lowbit reads.

    compute_dtype: by default what ComfyUI would compute in for this model on this device. kernels,
    infer_act_unsigned: as in `lowbit_ops`. dialect: as in `read_file`. model_options, disable_dynamic: ComfyUI's.

    Raises `CheckpointError`, `PartsError` or `UnknownFormatError` that name file and layer, `DependencyError` outside
    of ComfyUI.
    """
    comfy = _comfy()
    held = _read(comfy, path, dialect)
    _report(path, held)
    options = dict(model_options or {})
    device = options.get("load_device") or comfy.model_management.get_torch_device()
    dtype = compute_dtype or _compute_dtype(comfy, held, device)
    options["custom_operations"] = lowbit_ops(
        dtype, kernels=kernels, infer_act_unsigned=infer_act_unsigned, where=str(path)
    )
    options.setdefault("dtype", dtype)
    more = {"disable_dynamic": True} if disable_dynamic else {}
    model = comfy.sd.load_diffusion_model_state_dict(
        held.state_dict, model_options=options, metadata=held.metadata, **more
    )
    if model is None:
        raise CheckpointError(
            f"{path}: ComfyUI does not know this model by its keys and shapes; update ComfyUI, or convert it again "
            "with the layers kept that it is known by (lowbit's presets keep them)"
        )
    again = {"kernels": kernels, "infer_act_unsigned": infer_act_unsigned, "dialect": dialect}
    model.cached_patcher_init = (_load_again, (path, compute_dtype, again, model_options))
    return model


def _load_again(
    path: str | Path,
    compute_dtype: torch.dtype | None,
    settings: Mapping[str, Any],
    model_options: Mapping[str, Any] | None,
    disable_dynamic: bool = False,
) -> Any:
    """How ComfyUI makes an independent copy of a model, for another device."""
    return load_diffusion_model(
        path,
        compute_dtype=compute_dtype,
        model_options=model_options,
        disable_dynamic=disable_dynamic,
        **settings,
    )


def load_clip(
    paths: Sequence[str | Path],
    clip_type: Any = None,
    *,
    compute_dtype: torch.dtype | None = None,
    kernels: str = "auto",
    infer_act_unsigned: bool = False,
    embedding_directory: Any = None,
    model_options: Mapping[str, Any] | None = None,
) -> Any:
    """ComfyUI's CLIP of one or several text encoders; activations are not rounded, as ComfyUI has it for them.

    clip_type: a `comfy.sd.CLIPType`. Other arguments and errors as in `load_diffusion_model`.
    """
    comfy = _comfy()
    held = [_read(comfy, path, None) for path in paths]
    for path, found in zip(paths, held, strict=True):
        _report(path, found)
    management = comfy.model_management
    dtype = compute_dtype or management.text_encoder_dtype(management.text_encoder_device())
    options = dict(model_options or {})
    options["custom_operations"] = lowbit_ops(
        dtype if dtype in (torch.bfloat16, torch.float16, torch.float32) else torch.float16,
        full_precision_mm=True,
        kernels=kernels,
        infer_act_unsigned=infer_act_unsigned,
        where=", ".join(map(str, paths)),
    )
    options.setdefault("dtype", dtype)
    kind = comfy.sd.CLIPType.STABLE_DIFFUSION if clip_type is None else clip_type
    return comfy.sd.load_text_encoder_state_dicts(
        [found.state_dict for found in held],
        embedding_directory=embedding_directory,
        clip_type=kind,
        model_options=options,
    )


def _comfy() -> Any:
    try:
        import comfy.model_detection
        import comfy.model_management
        import comfy.sd
        import comfy.utils
    except ImportError as error:
        raise DependencyError(
            f"this works inside ComfyUI only: {error}; run it from a custom node, or put ComfyUI's folder on sys.path"
        ) from error
    return comfy


def _read(comfy: Any, path: str | Path, dialect: str | None) -> ComfyFile:
    """A checkpoint as ComfyUI takes it; a file of ComfyUI's own kind as ComfyUI reads it, which is mapped memory."""
    path = Path(path)
    if dialect is not None or path.suffix.lower() not in (".safetensors", ".sft") or not path.is_file():
        return read_file(path, dialect)
    state_dict, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    specs = {key: TensorSpec.of(tensor) for key, tensor in state_dict.items()}
    found = detect_dialect(Container(specs, metadata or {}, where=str(path)))
    if found is not None and found is not COMFY:
        return read_file(path)
    return describe_layers(state_dict, metadata, str(path))


def _compute_dtype(comfy: Any, held: ComfyFile, device: Any) -> torch.dtype:
    """What ComfyUI computes in for this kind of model on a device: as for the quantized files that it loads itself."""
    detection, management = comfy.model_detection, comfy.model_management
    prefix = detection.unet_prefix_from_state_dict(held.state_dict)
    config = detection.model_config_from_unet(held.state_dict, prefix, metadata=held.metadata)
    supported = [torch.bfloat16, torch.float16, torch.float32] if config is None else config.supported_inference_dtypes
    return management.unet_manual_cast(None, device, supported) or torch.float32


def _report(path: str | Path, held: ComfyFile) -> None:
    _LOG.info("%s: %d quantized layers", path, held.quantized)
    for note in held.notes:
        _LOG.info("%s: %s", path, note)
