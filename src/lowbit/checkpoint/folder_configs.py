"""The JSON files beside a model's weights that describe its quantization, written anew with other fields.

`config.json` of Hugging Face holds `quantization_config` among fields that are not ours; other tools write a file of
their own. A rewritten checkpoint must not keep the description of what its layers were.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

import torch

from lowbit.errors import PlanError

from .dialects.base import Dialect, StoredLayer, TensorSpec, needed_dtype
from .eligibility import dtype_name
from .quantized_source import QuantizedComponent
from .weight_shape import value_dtype

_CONFIG = "config.json"
_DTYPES = ("dtype", "torch_dtype")  # what transformers calls it, now and before


class FolderConfigs:
    """The new content of the JSON files of an output folder, by path relative to its root; None leaves a file out."""

    def __init__(self) -> None:
        self.contents: dict[str, dict[str, Any] | None] = {}

    def strip(self, held: QuantizedComponent) -> None:
        """Take out what the dialect of the source says about its layers."""
        for name, fields in held.dialect.owned_configs.items() if held.dialect is not None else ():
            if name not in held.configs:
                continue
            kept = {key: value for key, value in held.configs[name].items() if key not in fields}
            self.contents[_path(held, name)] = kept if fields else None

    def describe(
        self, held: QuantizedComponent, dialect: Dialect, layers: Iterable[StoredLayer], plain: Mapping[str, TensorSpec]
    ) -> None:
        """Put in what a dialect says about its layers. A file that the source lacks is made only where it is needed.

        Where the dialect's readers need a model of one dtype, config.json gives it that.
        """
        layers = list(layers)
        dtype = needed_dtype(dialect, (layer.format for layer in layers))
        for name, fields in dialect.config_fields(layers, plain).items():
            path = _path(held, name)
            content = self.contents[path] if path in self.contents else held.configs.get(name)
            if name in held.configs or (dialect.needs_folder and name != _CONFIG):
                self.contents[path] = _with_dtype({**(content or {}), **fields}, dtype)

    def decode(self, held: QuantizedComponent, were: Iterable[torch.dtype], dtype: torch.dtype | None) -> None:
        """Name in config.json the dtype that decoded weights have: `dtype`, or what each was before.

        were: what the weights were before they were quantized, or the 8-bit floats that they were cast to. A part of
        the model that is named with another dtype than the whole and these (a vision tower in float32) keeps it.
        """
        path = _path(held, _CONFIG)
        content = self.contents.get(path, held.configs.get(_CONFIG))
        if content is None:
            return
        named = {dtype_name(was): dtype_name(dtype or value_dtype(was)) for was in were}
        if dtype is not None:
            outer = [content[name] for name in _DTYPES if isinstance(content.get(name), str)]
            named |= dict.fromkeys(map(_plain_name, outer or _named_dtypes(content)), dtype_name(dtype))
        changed = _with_names(content, named)
        if changed != content:
            self.contents[path] = changed

    def texts(self) -> dict[str, str | None]:
        """What takes the place of the source's files, by path; None for a file that is left out."""
        return {
            path: None if content is None else json.dumps(content, indent=2) + "\n"
            for path, content in self.contents.items()
        }


def _with_dtype(config: dict[str, Any], dtype: torch.dtype | None, *, whole: bool = True) -> dict[str, Any]:
    """A configuration, and those of a model's parts in it, with another dtype wherever one is named.

    `whole`: it is that of a whole model, which has to name one.
    """
    if dtype is None:
        return config
    changed = dict(config)
    if whole and not any(isinstance(config.get(name), str) for name in _DTYPES):
        changed["torch_dtype"] = dtype_name(dtype)  # the name that all versions of transformers read
    for name, value in config.items():
        if name in _DTYPES and isinstance(value, str):
            changed[name] = dtype_name(dtype)
        elif _is_part(name, value):
            changed[name] = _with_dtype(value, dtype, whole=False)
    return changed


def _with_names(config: dict[str, Any], named: Mapping[str, str]) -> dict[str, Any]:
    """A configuration, and those of a model's parts in it, with other names for dtypes: named before -> now."""
    changed = dict(config)
    for name, value in config.items():
        if name in _DTYPES and isinstance(value, str):
            own = _plain_name(value)
            changed[name] = value if named.get(own, own) == own else named[own]
        elif _is_part(name, value):
            changed[name] = _with_names(value, named)
    return changed


def _named_dtypes(config: dict[str, Any]) -> list[str]:
    """The dtypes that a configuration and those of a model's parts in it name."""
    own = [config[name] for name in _DTYPES if isinstance(config.get(name), str)]
    return own + [found for name, value in config.items() if _is_part(name, value) for found in _named_dtypes(value)]


def _is_part(name: str, value: object) -> bool:
    """Whether an entry of a configuration is that of a part of the model."""
    return name.endswith("_config") and name != "quantization_config" and isinstance(value, dict)


def _plain_name(dtype: str) -> str:
    return dtype.removeprefix("torch.")


def changed_dtype(dialect: Dialect, stored: StoredLayer) -> str:
    """What to know where a layer makes `describe` give the model another dtype; "" where it does not."""
    dtype = needed_dtype(dialect, (stored.format,))
    if dtype is None or dtype == stored.dtype:
        return ""
    now = dtype_name(dtype)
    return (
        f"{stored.format.name}: programs that read {dialect.name} decode it to {now}, so config.json says {now} "
        f"instead of {dtype_name(stored.dtype)}; tensors that are kept are rounded to it when they are loaded"
    )


def refuse_target(held: QuantizedComponent, dialect: Dialect, *, single: bool) -> None:
    """Raise `PlanError` where a dialect cannot be written: it is only read, or needs a model folder."""
    if not dialect.writes:
        raise PlanError(f"{held.where}: the dialect {dialect.name} is only read; choose another one to write")
    if dialect.needs_folder and (single or _CONFIG not in held.configs):
        raise PlanError(
            f"{held.where}: the dialect {dialect.name} describes its layers in config.json, so it needs a model folder "
            "with one; name the folder as source and a folder as target, or choose another dialect, such as comfy"
        )


def _path(held: QuantizedComponent, name: str) -> str:
    return (PurePosixPath(held.component.name) / name).as_posix()
