"""Statistics as a file holds them, in memory or in one: tensor by tensor, with second moments packed.

Tensors are named `<input>.<field>`, and those of gradients `<output>.<field>`, with the fields of `Statistics` and
their dtypes. A field of second moments holds the diagonal; where the whole matrix is known, `<field>.correlations`
beside it holds the rest (`packed_moment`), and where its blocks are known, that of one block after the other.
"""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.layer_statistics import judging_moments
from lowbit.numerics.block_diagonal import blocks
from lowbit.ops.column_ranges import BINS
from lowbit.solvers.base import Statistics

from .accumulate import ROWS_KEPT
from .collection import CHANNELS, INPUT_MOMENTS, Field, InputFacts, StatisticsCollection
from .packed_moment import pack_moment, packed_size, unpack_moment

FIELDS = (*INPUT_MOMENTS, *CHANNELS, "samples", "magnitudes")
OUTPUT_FIELDS = ("output_hessian", "output_held_out")
_MOMENTS = (*INPUT_MOMENTS, *OUTPUT_FIELDS)
CORRELATIONS = ".correlations"
_CACHED = 2  # inputs kept in memory: layers that share one are mostly asked for one after another

Entry = tuple[str, torch.dtype, tuple[int, ...]]


class StoredStatistics(StatisticsCollection):
    """Statistics that are unpacked when a layer is asked for. Threads may ask at the same time."""

    def __init__(self) -> None:
        self._cache: OrderedDict[tuple[str, tuple[str, ...]], _Once] = OrderedDict()
        self._lock = threading.Lock()

    @abstractmethod
    def stored(self, name: str) -> Tensor:
        """The tensor of a name."""

    @abstractmethod
    def stored_field(self, name: str) -> Field | None:
        """The dtype and shape of the tensor of a name; None where there is none."""

    def load_input(self, key: str) -> Statistics:
        """The statistics of an input, among the last ones asked for or made now."""
        return self._load(key, FIELDS)

    def _load(self, key: str, names: tuple[str, ...]) -> Statistics:
        """Some fields of an input. What a thread is making the others wait for, and other inputs meanwhile go on."""
        with self._lock:
            found = self._cache.setdefault((key, names), _Once())
            self._cache.move_to_end((key, names))
            while len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        with found.lock:
            if found.made is None:
                facts = self.contents.inputs[key]
                tensors: dict[str, Any] = {name: self._tensor(key, name) for name in self.fields(key) if name in names}
                found.made = Statistics(tokens=facts.tokens, held_out_tokens=facts.held_out_tokens, **tensors)
            return found.made

    def _tensor(self, key: str, field: str) -> Tensor:
        name = f"{key}.{field}"
        rest = f"{name}{CORRELATIONS}"
        tensor = self.stored(name)
        return tensor if self.stored_field(rest) is None else unpack_moment(tensor, self.stored(rest))

    def judging_moments(self, layer: str, /) -> Tensor | None:
        """See `StatisticsCollection`; takes one of the two moments, and none of the rows."""
        if layer not in self.contents.layers:
            return None
        key = self.contents.layers[layer].input
        name = "held_out" if "held_out" in self.fields(key) else "hessian"
        return judging_moments(self._load(key, (name,)))

    def fields(self, key: str) -> dict[str, Field]:
        """The tensors of an input: dtype and shape by field."""
        found = {}
        for name in FIELDS:
            if (field := self.stored_field(f"{key}.{name}")) is not None:
                whole = self.stored_field(f"{key}.{name}{CORRELATIONS}") is not None
                found[name] = (field[0], field[1] * 2) if whole else field
        return found

    def load_output(self, key: str) -> dict[str, Tensor]:
        """The moments of the gradient at an output, by the field of `Statistics`."""
        count = self.contents.outputs[key][0] if len(self.contents.outputs[key]) == 3 else 1
        return {name: self._blocks(key, name, count) for name in OUTPUT_FIELDS}

    def _blocks(self, key: str, field: str, count: int) -> Tensor:
        """A moment that is stored in `count` blocks."""
        if count == 1:
            return self._tensor(key, field)
        name = f"{key}.{field}"
        diagonals, packed = self.stored(name).chunk(count), self.stored(f"{name}{CORRELATIONS}").chunk(count)
        return torch.stack([unpack_moment(*pair) for pair in zip(diagonals, packed, strict=True)])

    def minimum(self, key: str) -> Tensor | None:
        """The smallest value of each channel of an input, [K]; takes nothing else."""
        return self.stored(f"{key}.minimum") if "minimum" in self.fields(key) else None

    def input_vectors(self, key: str) -> dict[str, Tensor]:
        """See `StatisticsCollection`; takes nothing else."""
        return {name: self.stored(f"{key}.{name}") for name in self.fields(key) if name in (*INPUT_MOMENTS, *CHANNELS)}

    def output_vectors(self, key: str) -> dict[str, Tensor]:
        """See `StatisticsCollection`; takes nothing else."""
        return {name: self.stored(f"{key}.{name}") for name in OUTPUT_FIELDS}


class _Once:
    """What one thread makes for all."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.made: Statistics | None = None


def fields_of(statistics: Statistics) -> dict[str, Tensor]:
    """The tensors of the input of `statistics` by field."""
    return {name: tensor for name in FIELDS if (tensor := getattr(statistics, name)) is not None}


def packed_fields(key: str, fields: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors to store, by name, for those of an input or output by field.

    Raises `StatisticsError`, naming `where`, for second moments that are none.
    """
    found: dict[str, Tensor] = {}
    for field, tensor in fields.items():
        name = f"{key}.{field}"
        if field in _MOMENTS and tensor.dim() > 1:
            packed = zip(*(pack_moment(block, where) for _, block in blocks(tensor)), strict=True)
            found[name], found[f"{name}{CORRELATIONS}"] = (torch.cat(some) for some in packed)
        else:
            found[name] = tensor
    return found


def packed_entries(key: str, fields: Mapping[str, Field]) -> list[Entry]:
    """What `packed_fields` gives for fields of these dtypes and shapes."""
    found: list[Entry] = []
    for field, (dtype, shape) in fields.items():
        name = f"{key}.{field}"
        if field in _MOMENTS and len(shape) > 1:
            count, size = math.prod(shape[:-2]), shape[-1]
            found += [(name, dtype, (count * size,))]
            found += [(f"{name}{CORRELATIONS}", torch.int16, (count * packed_size(size),))]
        else:
            found.append((name, dtype, shape))
    return found


def expected_fields(facts: InputFacts) -> dict[str, Field]:
    """The fields of an input that a calibration run takes, as they are known before it is finished."""
    moment = (facts.k, facts.k) if facts.kind == "full" else (facts.k,)
    shapes = {"hessian": moment, "held_out": moment, **dict.fromkeys(CHANNELS, (facts.k,))}
    shapes["samples"] = (min(facts.tokens, ROWS_KEPT), facts.k)
    absent = {"hessian": not facts.tokens, "held_out": not facts.held_out_tokens}
    found: dict[str, Field] = {name: (torch.float32, shape) for name, shape in shapes.items() if not absent.get(name)}
    return {**found, "magnitudes": (torch.int64, (BINS,))}


def output_entries(key: str, shape: tuple[int, ...]) -> list[Entry]:
    """The tensors of the gradient at an output with moments of a shape."""
    return packed_entries(key, dict.fromkeys(OUTPUT_FIELDS, (torch.float32, shape)))
