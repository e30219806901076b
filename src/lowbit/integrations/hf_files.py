"""Quantized layers in weight files that another library reads: what each tensor belongs to, and the weight they make.

The integrations of Hugging Face libraries do not open files for their tensors, those libraries do. What is needed here
is the description: headers, markers and config.json say which layers are quantized and how (`describe_files`); the
tensors then come one by one, and become a weight (`restored_parameter`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.checkpoint.dialects import (
    CONFIG_FILES,
    Container,
    Dialect,
    FoundLayers,
    StoredLayer,
    TensorSpec,
    detect_dialect,
)
from lowbit.checkpoint.load import OPTIONS
from lowbit.checkpoint.safetensors_file import SafetensorsFile
from lowbit.checkpoint.strict_json import parse_object
from lowbit.checkpoint.weight_shape import KERNEL, TURNED
from lowbit.errors import CheckpointError
from lowbit.integrations.hf_layers import KINDS, is_matrix_layer
from lowbit.layer_kinds import is_conv1d, matrix_shape, shaped_weight


@dataclass(frozen=True)
class DescribedFiles:
    """What the weight files of one model say: `where` they are, every tensor, and their quantized layers.

    `dialect` is None where nothing is quantized. `found.layers` are the layers, `found.plain` all keys of other
    tensors, `found.container` keys that only describe.
    """

    where: str
    specs: dict[str, TensorSpec]
    dialect: Dialect | None
    found: FoundLayers

    def __post_init__(self) -> None:
        """Plain tensors come from the frameworks, as the file has them: refuse those in a kernel's order."""
        if self.found.orders:
            raise CheckpointError(
                f"{self.where}: {next(iter(self.found.orders))!r} lies in the order of a kernel, which the framework "
                "does not undo; write the model anew first (lowbit migrate --to comfy, or lowbit dequantize)"
            )

    def need_layers(self) -> None:
        """Raise `CheckpointError` unless there are quantized layers, as config.json says."""
        if not self.found.layers:
            raise CheckpointError(
                f"{self.where}: config.json says that the model is quantized by lowbit, but no layer in the weight "
                "files is; remove quantization_config from config.json, or convert the folder again"
            )

    def owners(self) -> dict[str, tuple[StoredLayer, str]]:
        """Key -> the layer it belongs to and its role there (a part's name, or "marker")."""
        return {key: (stored, role) for stored in self.found.layers.values() for role, key in stored.keys.items()}


def describe_files(paths: Sequence[str | Path]) -> DescribedFiles:
    """Read the headers, markers and JSON files of a model's safetensors files.

    Raises `CheckpointError` (or `PartsError`, `FormatError`, `UnknownFormatError`) naming the file and the layer for
    whatever is not sound.
    """
    files = [Path(path) for path in paths]
    if not files:
        raise CheckpointError("no weight files to read; name a folder with safetensors files")
    for path in files:
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: is no safetensors file; quantized weights are only read from those")
    where = str(files[0] if len(files) == 1 else files[0].parent)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(SafetensorsFile(path)) for path in files]
        holder: dict[str, SafetensorsFile] = {}
        metadata: dict[str, str] = {}
        for file in opened:
            if twice := sorted(holder.keys() & file.tensors.keys()):
                raise CheckpointError(f"{file.path}: has {twice[0]!r}, which {holder[twice[0]].path} has, too")
            holder |= dict.fromkeys(file.tensors, file)
            for name, value in file.metadata.items():
                metadata.setdefault(name, value)
        specs = {key: TensorSpec(file.tensors[key].dtype, file.tensors[key].shape) for key, file in holder.items()}
        held = Container(specs, metadata, _configs(files[0].parent), where)
        dialect = detect_dialect(held)
        found = FoundLayers(plain=list(specs))
        if dialect is not None:
            found = dialect.find_layers(held, lambda key: holder[key].read(key))
    return DescribedFiles(where, specs, dialect, found)


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in (folder / name for name in CONFIG_FILES):
        if not path.is_file():
            continue
        try:
            found[path.name] = parse_object(path.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}; download it again") from error
    return found


def fitted_to(stored: StoredLayer, layer: nn.Module, name: str) -> StoredLayer:
    """The stored layer at the shape of the module's layer `name`, on which the file may only know more (padding).

    Raises `CheckpointError` where the layer is of another kind than those quantized here, or of another shape.
    """
    turned = bool(stored.options.get(TURNED))
    if not is_matrix_layer(layer) or KERNEL in stored.options or turned != is_conv1d(layer):
        raise CheckpointError(
            f"{stored.place}: is quantized, but the model's {name!r} is a {type(layer).__name__}; only an {KINDS} "
            "holds a quantized weight, and one of the kind that was saved: convert with this layer kept, or dequantize "
            "the file (lowbit dequantize)"
        )
    if isinstance(layer, nn.Embedding) and not stored.format.supports_embedding:
        raise CheckpointError(
            f"{stored.place}: {stored.format.name} has no lookup for an nn.Embedding; convert it to another format"
        )
    n, k = matrix_shape(layer)
    padded = bool(stored.notes) and stored.format.part_shapes(n, k) == stored.format.part_shapes(*stored.shape)
    if stored.shape != (n, k) and not padded:
        raise CheckpointError(
            f"{stored.place}: holds a weight of shape {list(stored.shape)}, the model's {name!r} has {[n, k]}; load it "
            "into the right model"
        )
    return replace(stored, shape=(n, k))


def restored_parameter(
    layer: nn.Module, stored: StoredLayer, dialect: Dialect, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> nn.Parameter:
    """The weight of a module's layer that the stored tensors (by key, on one device) mean, as a frozen parameter.

    `dtype` is the logical dtype, in which results are computed; the parts are taken as they are. Raises `PartsError`.
    """
    parts = dialect.load_parts(stored, tensors.__getitem__)
    assert is_matrix_layer(layer)  # `fitted_to` has said so
    return nn.Parameter(shaped_weight(layer, parts, stored.format, dtype), requires_grad=False)


def remember_options(layer: nn.Module, stored: StoredLayer) -> None:
    """Keep on a layer what its file says beside its format, for saving it again."""
    setattr(layer, OPTIONS, (stored.format.name, stored.options))
