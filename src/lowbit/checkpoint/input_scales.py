"""Static scales of activations that another tool found: given by layer in a file, instead of calibrating for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import PlanError
from lowbit.solvers import scale_problem

from .source import Source, open_source
from .strict_json import parse_object

_SUFFIX = ".input_scale"


@dataclass(frozen=True)
class InputScales:
    """The scale of the input of each layer, by the layer's name ("<model>/<layer>" where there are several models).

    `where`: the file, for errors. Raises `PlanError`, naming file and layer, for what is no finite number above zero,
    and when there are none.
    """

    by_layer: Mapping[str, float]
    where: str = "input scales"

    def __post_init__(self) -> None:
        if not self.by_layer:
            raise PlanError(
                f"{self.where}: holds no scales; give a JSON object of numbers by layer, or a checkpoint whose tensors "
                f"are named <layer>{_SUFFIX}"
            )
        for layer, value in self.by_layer.items():
            if why := scale_problem(value):
                raise PlanError(f"{self.where}: the input scale of layer {layer!r} {why}; correct or remove it")

    @classmethod
    def load(cls, path: str | Path) -> InputScales:
        """Read a JSON object of numbers by layer, or the tensors `<layer>.input_scale` of a checkpoint.

        A checkpoint may be what `open_source` takes: a safetensors file, an index with its shards, a model folder.

        Raises:
            PlanError: a value is no scale, or there are none; the JSON file cannot be read.
            CheckpointError: the checkpoint cannot be read.
        """
        path = Path(path)
        if path.suffix != ".json" or path.name.endswith(".index.json"):
            with open_source(path) as source:
                return cls(_of_checkpoint(source), str(path))
        try:
            return cls(parse_object(path.read_bytes()), str(path))
        except OSError as error:
            raise PlanError(f"{path}: the input scales cannot be read: {error.strerror}; check the path") from error
        except PlanError:
            raise
        except ValueError as error:
            raise PlanError(f"{path}: {error}; give a JSON object of numbers by layer") from error

    def refuse_unknown(self, layers: Collection[str], stored: Collection[str]) -> None:
        """Raise `PlanError` for a layer that the model does not have, and when none of the scales is stored.

        `layers`: all of the model; `stored`: those that store a scale of their input.
        """
        if strange := next((layer for layer in self.by_layer if layer not in layers), None):
            near = sorted(stored or layers)
            raise PlanError(
                f"{self.where}: the model has no layer {strange!r}; a layer's name is, for example, "
                f"{near[len(near) // 2]!r}. Rename or remove it"
            )
        if not self.by_layer.keys() & set(stored):
            raise PlanError(
                f"{self.where}: none of its {len(self.by_layer)} scales would be stored: no layer that it names is "
                "converted to a format with input_scale=true; give such a format, or leave the file out"
            )

    def note(self, stored: Collection[str]) -> str:
        """How many of them are stored, for a plan; without the path, which says nothing of the result."""
        used = len(self.by_layer.keys() & set(stored))
        rest = len(self.by_layer) - used
        also = f"; {rest} more are of layers that store none" if rest else ""
        return f"input scales of {used} layers are given{also}"


def _of_checkpoint(source: Source) -> dict[str, Any]:
    """Every tensor `<layer>.input_scale`; that of one element as a number, of more as they are, which is no scale."""
    found: dict[str, Any] = {}
    for component in source.components:
        prefix = f"{component.name}/" if component.name else ""
        for key, info in component.tensors.items():
            if key.endswith(_SUFFIX):
                one = info.shape in ((), (1,), (1, 1))
                name = prefix + key.removesuffix(_SUFFIX)
                found[name] = float(source.read(component, key)) if one else f"a tensor {list(info.shape)}"
    return found
