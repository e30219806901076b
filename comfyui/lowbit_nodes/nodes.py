"""The nodes: load a diffusion model, load text encoders, convert a file, look into one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowbit.formats import formats
from lowbit.integrations.comfyui import KERNELS, convert_file, inspect_text, load_clip, load_diffusion_model

DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FOLDERS = ("diffusion_models", "text_encoders", "checkpoints")
_KERNELS_HELP = (
    "auto: ComfyUI's own code for the formats that it runs on this device, lowbit for all others. "
    "lowbit: lowbit for everything. comfy: ComfyUI's code for everything that it can read."
)
_UNSIGNED_HELP = (
    "For early Qwen-Image svdquant files that do not say act_unsigned: take the layers after a GELU for unsigned. "
    "Wrong for other models; a file that says it is always believed."
)


class LowbitLoadDiffusionModel:
    """Load a diffusion model in any format and convention that lowbit reads."""

    CATEGORY = "lowbit"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  (ComfyUI's name)
        """What ComfyUI asks the user for."""
        return {
            "required": {
                "model_name": (_folder_paths().get_filename_list("diffusion_models"),),
                "compute_dtype": (list(DTYPES), {"default": "auto"}),
                "kernels": (list(KERNELS), {"default": "auto", "tooltip": _KERNELS_HELP}),
                "infer_act_unsigned": ("BOOLEAN", {"default": False, "tooltip": _UNSIGNED_HELP}),
            }
        }

    def load(self, model_name: str, compute_dtype: str, kernels: str, infer_act_unsigned: bool) -> tuple[Any]:
        """Return the model as ComfyUI's MODEL."""
        path = _folder_paths().get_full_path_or_raise("diffusion_models", model_name)
        model = load_diffusion_model(
            path, compute_dtype=DTYPES[compute_dtype], kernels=kernels, infer_act_unsigned=infer_act_unsigned
        )
        return (model,)


class LowbitLoadCLIP:
    """Load one or two text encoders in any format that lowbit reads."""

    CATEGORY = "lowbit"
    FUNCTION = "load"
    RETURN_TYPES = ("CLIP",)
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """What ComfyUI asks the user for."""
        names = _folder_paths().get_filename_list("text_encoders")
        return {
            "required": {
                "clip_name": (names,),
                "type": (_clip_types(), {"default": "stable_diffusion"}),
                "kernels": (list(KERNELS), {"default": "auto", "tooltip": _KERNELS_HELP}),
            },
            "optional": {"second_clip_name": (["none", *names], {"default": "none"})},
        }

    def load(self, clip_name: str, type: str, kernels: str, second_clip_name: str = "none") -> tuple[Any]:  # noqa: A002
        """Return the text encoders as ComfyUI's CLIP."""
        import comfy.sd

        folders = _folder_paths()
        names = [clip_name, *([second_clip_name] if second_clip_name != "none" else [])]
        paths = [folders.get_full_path_or_raise("text_encoders", name) for name in names]
        kind = getattr(comfy.sd.CLIPType, type.upper())
        embeddings = folders.get_folder_paths("embeddings")
        return (load_clip(paths, kind, kernels=kernels, embedding_directory=embeddings),)


class LowbitConvert:
    """Quantize a model file and save it beside the others; nothing that exists is written over."""

    CATEGORY = "lowbit"
    FUNCTION = "convert"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("path",)
    OUTPUT_NODE = True
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """What ComfyUI asks the user for."""
        known = ", ".join(formats())
        return {
            "required": {
                "model": (_all_files(),),
                "format": ("STRING", {"default": "awq_w4a16", "tooltip": f"A spec such as awq_w4a16. Known: {known}"}),
                "solver": ("STRING", {"default": "auto", "tooltip": "auto, rtn, scale_search, ..."}),
                "preset": ("STRING", {"default": "auto", "tooltip": "Which layers stay: auto finds the model family"}),
                "save_as": ("STRING", {"default": "", "tooltip": "A new file name; empty: <model>-<format>"}),
            }
        }

    def convert(self, model: str, format: str, solver: str, preset: str, save_as: str) -> dict[str, Any]:
        """Return the path of the new file, and show what became of the model."""
        source = _path_of(model)
        target = _target(source, save_as or f"{source.stem}-{format.partition('(')[0].strip()}")
        lines: list[str] = []
        done = convert_file(
            source, target, format, solver=solver, preset=preset, progress=_progress(), tell=lines.append
        )
        shrunk = f"{done.bytes_before / 2**20:.0f} MiB to {done.bytes_after / 2**20:.0f} MiB"
        lines.append(f"{target}: {len(done.layers)} layers in {format}, {shrunk} in {done.seconds:.1f} s")
        return {"ui": {"text": ["\n".join(lines)]}, "result": (str(target),)}


class LowbitInspect:
    """Say what is in a model file: layers, formats, sizes, and what is wrong with it."""

    CATEGORY = "lowbit"
    FUNCTION = "inspect"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("text",)
    OUTPUT_NODE = True
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """What ComfyUI asks the user for."""
        return {"required": {"model": (_all_files(),)}}

    def inspect(self, model: str) -> dict[str, Any]:
        """Return a text table."""
        text = inspect_text(_path_of(model))
        return {"ui": {"text": [text]}, "result": (text,)}


def _folder_paths() -> Any:
    """ComfyUI's module of folders; it is there when nodes are asked for."""
    import folder_paths

    return folder_paths


def _clip_types() -> list[str]:
    import comfy.sd

    return [kind.name.lower() for kind in comfy.sd.CLIPType]


def _all_files() -> list[str]:
    """Every model file as "<kind of folder>/<name>"."""
    return [f"{kind}/{name}" for kind in FOLDERS for name in _folder_paths().get_filename_list(kind)]


def _path_of(choice: str) -> Path:
    kind, _, name = choice.partition("/")
    return Path(_folder_paths().get_full_path_or_raise(kind, name))


def _target(source: Path, name: str) -> Path:
    """A file of this name beside the source. A workflow comes from anywhere: a name must not lead out of the folder."""
    if name != Path(name).name or "\\" in name or name in {"", ".", ".."}:
        message = f"save_as is {name!r}: give a file name without folders; the file is saved beside {source}"
        raise ValueError(message)
    return source.parent / (name if name.endswith(".safetensors") else f"{name}.safetensors")


def _progress() -> Callable[[int, int, str], None] | None:
    """A callback for `convert` that moves ComfyUI's progress bar, or None where there is none."""
    try:
        from comfy.utils import ProgressBar
    except ImportError:
        return None
    bars: list[Any] = []

    def update(done: int, total: int, layer: str) -> None:
        if not bars:
            bars.append(ProgressBar(total))
        bars[0].update_absolute(done, total)

    return update


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "LowbitLoadDiffusionModel": LowbitLoadDiffusionModel,
    "LowbitLoadCLIP": LowbitLoadCLIP,
    "LowbitConvert": LowbitConvert,
    "LowbitInspect": LowbitInspect,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LowbitLoadDiffusionModel": "Load Diffusion Model (lowbit)",
    "LowbitLoadCLIP": "Load CLIP (lowbit)",
    "LowbitConvert": "Convert and Save (lowbit)",
    "LowbitInspect": "Inspect (lowbit)",
}
