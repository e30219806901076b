"""The statistics file: one safetensors file with the tensors of every input and, in its header, which layers have it.

Its tensors are those of `stored`. The header's `lowbit.statistics` is JSON: version, model, layers, inputs,
never_called, options. A layer has its input, shape and output, and the mark of its weight where that was at hand.
Version 2 packs second moments; files of version 1, which held them whole in float32, are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.checkpoint.safetensors_file import SafetensorsFile
from lowbit.checkpoint.writer import CheckpointWriter
from lowbit.errors import StatisticsError
from lowbit.numerics.block_diagonal import shape_of
from lowbit.numerics.weight_marks import check_mark

from .accumulate import ROWS_KEPT
from .collection import INPUT_MOMENTS, Contents, Field, InputFacts, LayerInput, StatisticsCollection
from .stored import (
    CORRELATIONS,
    Entry,
    StoredStatistics,
    expected_fields,
    fields_of,
    output_entries,
    packed_entries,
    packed_fields,
)

KEY = "lowbit.statistics"
VERSION = 2


class StatisticsFile(StoredStatistics):
    """A statistics file, open; tensors are read when a layer is asked for. A context manager.

    A mapping: `file.get(layer)` is a `Statistics`, or None for a layer without. Raises `CheckpointError` when the file
    cannot be read, `StatisticsError` when it holds no statistics of this version.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._file = SafetensorsFile(self.path)
        try:
            self.contents = _parse(self._file)
        except BaseException:
            self._file.close()
            raise

    @classmethod
    def open(cls, path: str | Path) -> StatisticsFile:
        """Open a file; the same as the constructor."""
        return cls(path)

    @property
    def place(self) -> str:
        """What messages call it."""
        return str(self.path)

    def stored(self, name: str) -> Tensor:
        """The tensor of a name, read now."""
        return self._file.read(name)

    def stored_field(self, name: str) -> Field | None:
        """The dtype and shape of the tensor of a name; None where there is none."""
        info = self._file.tensors.get(name)
        return None if info is None else (info.dtype, info.shape)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __del__(self) -> None:  # `calibrate` returns an open file, which its caller may simply drop
        if hasattr(self, "_file"):
            self._file.close()

    def __enter__(self) -> StatisticsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def save_statistics(collection: StatisticsCollection, path: str | Path) -> Path:
    """Write a collection as a statistics file, one input after the other; it appears when it is complete.

    Raises `WriteError`.
    """
    contents = collection.contents
    entries = [entry for key in contents.inputs for entry in packed_entries(key, collection.fields(key))]
    entries += [entry for key, shape in contents.outputs.items() for entry in output_entries(key, shape)]
    writer = CheckpointWriter(path, entries, header(contents), fingerprint="statistics", resume=False)
    try:
        for name, tensor in _tensors(collection, entries):
            writer.write(name, tensor)
        return writer.finish()
    except BaseException:
        writer.abort(keep=False)
        raise


def _tensors(collection: StatisticsCollection, entries: Sequence[Entry]) -> Iterator[tuple[str, Tensor]]:
    """The tensors to store, by name."""
    if isinstance(collection, StoredStatistics):  # packed already
        yield from ((name, collection.stored(name)) for name, *_ in entries)
        return
    contents = collection.contents
    for key in contents.inputs:
        yield from packed_fields(key, fields_of(collection.load_input(key)), contents.first_with(key)).items()
    for key in contents.outputs:
        yield from packed_fields(key, collection.load_output(key), contents.first_with(key)).items()


def header(contents: Contents) -> dict[str, str]:
    """The metadata of a statistics file."""
    return {KEY: json.dumps({"version": VERSION, **contents.to_json()}, separators=(",", ":"))}


def _parse(file: SafetensorsFile) -> Contents:
    text = file.metadata.get(KEY)
    if text is None:
        raise StatisticsError(
            f"{file.path}: is no statistics file ({KEY!r} is missing); write one by `lowbit calibrate`"
        )
    try:
        data = json.loads(text)
        contents = None if data["version"] in range(VERSION) else parse_contents(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StatisticsError(f"{file.path}: its header cannot be read ({error!r}); calibrate again") from error
    if contents is None:
        raise StatisticsError(
            f"{file.path}: was written by an earlier lowbit (its statistics are of version {data['version']}, this "
            f"one reads {VERSION}); calibrate again"
        )
    for key, facts in contents.inputs.items():
        _check_input(file, key, facts)
    for key, moment in contents.outputs.items():
        for name, dtype, shape in output_entries(key, moment):
            info = file.tensors.get(name)
            if info is None or (info.dtype, info.shape) != (dtype, shape):
                raise StatisticsError(f"{file.path}: {name} of shape {list(shape)} is not there; calibrate again")
    return contents


def _check_input(file: SafetensorsFile, key: str, facts: InputFacts) -> None:
    """Raise `StatisticsError` unless the moments of tokens are there, and each field that is there as it should be."""
    needed = expected_fields(facts).keys() & set(INPUT_MOMENTS)
    for field, (dtype, shape) in expected_fields(replace(facts, tokens=ROWS_KEPT, held_out_tokens=1)).items():
        first = f"{key}.{field}"
        there = file.tensors.get(first)
        if there is None and field not in needed:
            continue
        size = (*there.shape[:1], facts.k) if there is not None and field == "samples" else shape
        wanted = {name: (dtype, shape) for name, dtype, shape in packed_entries(key, {field: (dtype, size)})}
        for name in (first, f"{first}{CORRELATIONS}"):
            info = file.tensors.get(name)
            found = None if info is None else (info.dtype, info.shape)
            if found != wanted.get(name):
                raise StatisticsError(
                    f"{file.path}: {name} is {_said(found)}, expected {_said(wanted.get(name))}; calibrate again"
                )


def _said(field: Field | None) -> str:
    return "absent" if field is None else f"{str(field[0]).removeprefix('torch.')} {list(field[1])}"


def parse_contents(data: Mapping[str, Any]) -> Contents:
    """The directory from JSON data. Raises `ValueError`, `KeyError` or `TypeError` for other data."""
    if data["version"] != VERSION:
        raise ValueError(f"version {data['version']!r}, this lowbit reads {VERSION}")
    inputs = {str(key): InputFacts(**facts) for key, facts in data["inputs"].items()}
    layers, outputs = {}, dict[str, tuple[int, ...]]()
    for name, layer in data["layers"].items():
        n, k = layer["shape"]
        if inputs[layer["input"]].k != k:
            raise ValueError(f"{name}: K = {k}, its input has {inputs[layer['input']].k}")
        more = str(layer.get("output", "")), str(layer.get("weight", "")), int(layer.get("blocks", 1))
        layers[name] = LayerInput(layer["input"], (n, k), *more)
        if layers[name].weight:
            check_mark(layers[name].weight, n * k)
        moment = shape_of(n, layers[name].blocks)
        first = outputs.setdefault(layers[name].output, moment)
        if layers[name].output and first != moment:
            raise ValueError(f"{name}: the moments of its output are {list(moment)}, another layer has {list(first)}")
    return Contents(data["model"], layers, inputs, tuple(data["never_called"]), dict(data["options"]))


def entries_of(key: str, facts: InputFacts) -> list[Entry]:
    """The tensors that an input of a calibration run will have, known before it is finished."""
    return packed_entries(key, expected_fields(facts))
