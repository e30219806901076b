"""The statistics file: one safetensors file with the tensors of every input and, in its header, which layers have it.

Tensors are named `<input>.<field>`, and those of gradients `<output>.<field>`, with the fields of `Statistics` and
their dtypes. The header's `lowbit.statistics` is JSON: version, model, layers, inputs, never_called, options. A
layer has its input, shape and output, and the mark of its weight where that was at hand.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.layer_statistics import judging_moments
from lowbit.checkpoint.safetensors_file import SafetensorsFile
from lowbit.checkpoint.writer import CheckpointWriter
from lowbit.errors import StatisticsError
from lowbit.numerics.weight_marks import check_mark
from lowbit.ops.column_ranges import BINS
from lowbit.solvers.base import Statistics

from .accumulate import ROWS_KEPT
from .collection import CHANNELS, INPUT_MOMENTS, Contents, Field, InputFacts, LayerInput, StatisticsCollection

KEY = "lowbit.statistics"
VERSION = 1
_CACHED = 2  # inputs kept in memory: layers that share one are mostly asked for one after another
FIELDS = (*INPUT_MOMENTS, *CHANNELS, "samples", "magnitudes")
OUTPUT_FIELDS = ("output_hessian", "output_held_out")

Entry = tuple[str, torch.dtype, tuple[int, ...]]


class StatisticsFile(StatisticsCollection):
    """A statistics file, open; tensors are read when a layer is asked for. A context manager.

    A mapping: `file.get(layer)` is a `Statistics`, or None for a layer without. Raises `CheckpointError` when the file
    cannot be read, `StatisticsError` when it holds no statistics of this version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = SafetensorsFile(self.path)
        try:
            self.contents = _parse(self._file)
        except BaseException:
            self._file.close()
            raise
        self._cache: OrderedDict[tuple[str, tuple[str, ...]], Statistics] = OrderedDict()
        self._lock = threading.Lock()  # a conversion asks from several threads

    @classmethod
    def open(cls, path: str | Path) -> StatisticsFile:
        """Open a file; the same as the constructor."""
        return cls(path)

    @property
    def place(self) -> str:
        """What messages call it."""
        return str(self.path)

    def load_input(self, key: str) -> Statistics:
        """The statistics of an input, from the file or among the last ones read."""
        return self._load(key, FIELDS)

    def _load(self, key: str, names: tuple[str, ...]) -> Statistics:
        """Some fields of an input, from the file or among the last ones read."""
        with self._lock:
            if (key, names) in self._cache:
                self._cache.move_to_end((key, names))
                return self._cache[key, names]
            facts = self.contents.inputs[key]
            there = [name for name in self.fields(key) if name in names]
            tensors: dict[str, Any] = {name: self._file.read(f"{key}.{name}") for name in there}
            found = Statistics(tokens=facts.tokens, held_out_tokens=facts.held_out_tokens, **tensors)
            self._cache[key, names] = found
            while len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
            return found

    def judging_moments(self, layer: str, /) -> Tensor | None:
        """See `StatisticsCollection`; reads one of the two moments, and none of the rows."""
        if layer not in self.contents.layers:
            return None
        key = self.contents.layers[layer].input
        name = "held_out" if "held_out" in self.fields(key) else "hessian"
        return judging_moments(self._load(key, (name,)))

    def fields(self, key: str) -> dict[str, Field]:
        """The tensors of an input: dtype and shape by field."""
        infos = {name: self._file.tensors.get(f"{key}.{name}") for name in FIELDS}
        return {name: (info.dtype, info.shape) for name, info in infos.items() if info is not None}

    def load_output(self, key: str) -> dict[str, Tensor]:
        """The moments of the gradient at an output, by the field of `Statistics`."""
        return {name: self._file.read(f"{key}.{name}") for name in OUTPUT_FIELDS}

    def minimum(self, key: str) -> Tensor | None:
        """The smallest value of each channel of an input, [K]; reads nothing else."""
        return self._file.read(f"{key}.minimum") if "minimum" in self.fields(key) else None

    def input_vectors(self, key: str) -> dict[str, Tensor]:
        """See `StatisticsCollection`; reads nothing else."""
        names = {name: shape for name, (_, shape) in self.fields(key).items() if name in (*INPUT_MOMENTS, *CHANNELS)}
        return {
            name: self._file.read(f"{key}.{name}") if len(shape) == 1 else self._file.read_diagonal(f"{key}.{name}")
            for name, shape in names.items()
        }

    def output_vectors(self, key: str) -> dict[str, Tensor]:
        """See `StatisticsCollection`; reads nothing else."""
        return {name: self._file.read_diagonal(f"{key}.{name}") for name in OUTPUT_FIELDS}

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
    fields = {key: collection.fields(key) for key in collection.contents.inputs}
    entries = [(f"{key}.{name}", *field) for key, found in fields.items() for name, field in found.items()]
    outputs = collection.contents.outputs
    entries += [entry for key, n in outputs.items() for entry in output_entries(key, n)]
    writer = CheckpointWriter(path, entries, header(collection.contents), fingerprint="statistics", resume=False)
    try:
        for key in fields:
            for name, tensor in stored_fields(collection.load_input(key)).items():
                writer.write(f"{key}.{name}", tensor)
        for key in outputs:
            for name, tensor in collection.load_output(key).items():
                writer.write(f"{key}.{name}", tensor)
        return writer.finish()
    except BaseException:
        writer.abort(keep=False)
        raise


def stored_fields(statistics: Statistics) -> dict[str, Tensor]:
    """The tensors of `statistics` by field."""
    return {name: tensor for name in FIELDS if (tensor := getattr(statistics, name)) is not None}


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
        contents = parse_contents(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StatisticsError(f"{file.path}: its header cannot be read ({error!r}); calibrate again") from error
    for key, facts in contents.inputs.items():
        for name, shape in _expected(facts).items():
            info = file.tensors.get(f"{key}.{name}")
            if info is not None and info.shape != shape:
                raise StatisticsError(
                    f"{file.path}: {info.name} has shape {list(info.shape)}, expected {list(shape)}; calibrate again"
                )
    for key, n in contents.outputs.items():
        for name, dtype, shape in output_entries(key, n):
            info = file.tensors.get(name)
            if info is None or (info.dtype, info.shape) != (dtype, shape):
                raise StatisticsError(f"{file.path}: {name} of shape {list(shape)} is not there; calibrate again")
    return contents


def parse_contents(data: Mapping[str, Any]) -> Contents:
    """The directory from JSON data. Raises `ValueError`, `KeyError` or `TypeError` for other data."""
    if data["version"] != VERSION:
        raise ValueError(f"version {data['version']!r}, this lowbit reads {VERSION}")
    inputs = {str(key): InputFacts(**facts) for key, facts in data["inputs"].items()}
    layers, outputs = {}, dict[str, int]()
    for name, layer in data["layers"].items():
        n, k = layer["shape"]
        if inputs[layer["input"]].k != k:
            raise ValueError(f"{name}: K = {k}, its input has {inputs[layer['input']].k}")
        layers[name] = LayerInput(layer["input"], (n, k), str(layer.get("output", "")), str(layer.get("weight", "")))
        if layers[name].weight:
            check_mark(layers[name].weight, n * k)
        first = outputs.setdefault(layers[name].output, n)
        if layers[name].output and first != n:
            raise ValueError(f"{name}: N = {n}, its output has {first}")
    return Contents(data["model"], layers, inputs, tuple(data["never_called"]), dict(data["options"]))


def _expected(facts: InputFacts) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of an input, apart from its samples."""
    moment = (facts.k, facts.k) if facts.kind == "full" else (facts.k,)
    return {"hessian": moment, "held_out": moment, **dict.fromkeys(CHANNELS, (facts.k,)), "magnitudes": (BINS,)}


def entries_of(key: str, facts: InputFacts) -> list[Entry]:
    """The tensors that an input of a calibration run will have, known before it is finished."""
    shapes = {**_expected(facts), "samples": (min(facts.tokens, ROWS_KEPT), facts.k)}
    absent = {"hessian": not facts.tokens, "held_out": not facts.held_out_tokens}
    return [
        (f"{key}.{name}", torch.int64 if name == "magnitudes" else torch.float32, shape)
        for name, shape in shapes.items()
        if not absent.get(name)
    ]


def output_entries(key: str, n: int) -> list[Entry]:
    """The tensors of the gradient at an output of N channels."""
    return [(f"{key}.{name}", torch.float32, (n, n)) for name in OUTPUT_FIELDS]
