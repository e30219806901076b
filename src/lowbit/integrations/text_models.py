"""Text models of Hugging Face folders; needs the extra `calibrate`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.calibration.names import checkpoint_names, layer_shapes
from lowbit.checkpoint.source import open_source
from lowbit.devices import usable_device
from lowbit.dispatch import load
from lowbit.errors import CheckpointError, PlanError

NEEDED = ("transformers", "tokenizers")


@dataclass
class TextModel:
    """A model in memory with its tokenizer. `causal`: it predicts the next token, so long text is cut into windows."""

    folder: Path
    model: nn.Module
    tokenizer: Any
    causal: bool

    def names(self) -> dict[str, str | None]:
        """The name of each linear in the folder's safetensors files, where it is another; None where it has none."""
        with open_source(self.folder) as source:
            return checkpoint_names(self.model, layer_shapes(source))


def load_text_model(folder: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None) -> TextModel:
    """Load the model of a folder as the class that its config.json names, in `dtype` (by default float32 on a CPU).

    Raises:
        PlanError: transformers is not installed, or the device is wrong.
        CheckpointError: no model folder, or one that transformers cannot load.
    """
    folder = Path(folder)
    if missing := [name for name in NEEDED if util.find_spec(name) is None]:
        raise PlanError(f"calibrating on text needs {' and '.join(missing)}: pip install 'lowbit[calibrate]'")
    usable_device(device)
    architecture = _architecture(folder)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # a report of unused weights, table and all
    wanted: torch.dtype | str = dtype or (torch.float32 if torch.device(device).type == "cpu" else "auto")
    maker = getattr(transformers, architecture, None) or transformers.AutoModel
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = maker.from_pretrained(folder, local_files_only=True, dtype=wanted).eval()
        model = model.to(device)
    except Exception as error:  # of transformers, tokenizers and safetensors, each with kinds of its own
        if any(folder.glob("*.safetensors")):
            open_source(
                folder
            ).close()  # a weight file that is damaged, or a part that is missing, is named by this one
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{folder}: transformers cannot load it as {architecture}: {said[0]}; see that the folder has config.json, "
            "the tokenizer's files and the weights"
        ) from error
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False
    return TextModel(folder, model, tokenizer, architecture.endswith(("ForCausalLM", "LMHeadModel")))


def calibration_dtype(device: str) -> torch.dtype | None:
    """What a model is best run in for its statistics: on a processor that is fast at it bfloat16, else float32.

    None on other devices: what the checkpoint has. Rounding each input to 8 bits moves H by far less than another text
    of the same kind does. Raises `PlanError` for a wrong device.
    """
    if usable_device(device).type != "cpu":
        return None
    if load("cpu") is not None:  # no compiled kernels, which know the processor
        return torch.float32
    native: Any = sys.modules["lowbit.backends.cpu.native"]
    return torch.bfloat16 if native.isa() == "amx" or native.bf16_dots() else torch.float32


def _architecture(folder: Path) -> str:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no config.json, so it is no model folder of transformers; name such a folder, or use "
            "--module for other models"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return str(config["architectures"][0])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path}: does not name the model's class (architectures): {error!r}") from error
