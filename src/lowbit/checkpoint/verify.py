"""Verifying a conversion: every layer of the output decoded and compared with its source, all else by bytes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, LowbitError
from lowbit.formats.parts import Parts, narrow_rows
from lowbit.numerics.groups import row_chunks
from lowbit.ops.encode import row_errors

from .accuracy import Accuracy, AccuracyMeter
from .banks import decoded_expert, expert_parts
from .dialects import StoredLayer
from .dialects.base import join_key, layer_of
from .dropped import dropped_keys
from .folding import folded_like, paired
from .gguf_renamed import keeps_values, under_names_of
from .pipeline import Progress, Unit, run_units
from .quantized_source import QuantizedComponent, look_for_layers
from .source import Source
from .weight_shape import CAST_DTYPES, KERNEL_AXES, WeightShape, may_pad, plain_key, weight_shape

_PIECE = 16 << 20  # bytes compared at a time


@dataclass(frozen=True)
class LayerResult:
    """One quantized layer of the output: how close it is, or the problem that keeps it from being compared."""

    name: str
    format: str
    shape: tuple[int, ...]
    accuracy: Accuracy | None
    problem: str = ""

    def passes(self, threshold: float) -> bool:
        """Whether its SQNR reaches `threshold` dB. A layer with a problem, or NaN, does not."""
        return not self.problem and self.accuracy is not None and self.accuracy.sqnr >= threshold

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        accuracy = None if self.accuracy is None else self.accuracy.to_json()
        return {**vars(self), "shape": list(self.shape), "accuracy": accuracy}


@dataclass(frozen=True)
class VerifyResult:
    """All quantized layers in the output's order, and what is wrong elsewhere, in words."""

    layers: tuple[LayerResult, ...]
    problems: tuple[str, ...]
    identical: int
    """How many other tensors have the very bytes of the source, or its values in a wider dtype: 8-bit floats, in GGUF
    files any."""
    dropped: tuple[str, ...] = ()
    """Tensors of the source that the conversion left out, as the output's header says (`--drop-unused`)."""
    unmatched: int = 0
    """How many quantized layers of the output the source has under no such name."""

    def failing(self, threshold: float) -> list[LayerResult]:
        """The layers whose SQNR is below `threshold` dB, or that could not be compared."""
        return [layer for layer in self.layers if not layer.passes(threshold)]

    def worst(self, count: int = 5) -> list[LayerResult]:
        """The compared layers with the lowest SQNR, the worst first."""
        compared = [layer for layer in self.layers if layer.accuracy is not None]
        return sorted(compared, key=_sqnr)[:count]

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        layers = [layer.to_json() for layer in self.layers]
        found = {"problems": list(self.problems), "identical": self.identical, "dropped": list(self.dropped)}
        return {"layers": layers, **found, "unmatched": self.unmatched}


def _sqnr(layer: LayerResult) -> float:
    """For sorting: a layer that decodes to NaN is the worst."""
    return -math.inf if layer.accuracy is None or math.isnan(layer.accuracy.sqnr) else layer.accuracy.sqnr


def verify(
    source: Source, output: Source, *, jobs: int | None = None, progress: Progress | None = None
) -> VerifyResult:
    """Compare a converted checkpoint with what it was made from, a few MiB of each weight at a time.

    The source may be quantized itself: its layers are decoded too. Biases that a format has put a constant into are
    compared with it taken out again, and so are scales that were folded in. Differences are results, not errors.

    Raises:
        CheckpointError: a file cannot be read, or the two are not models of the same parts.
    """
    tasks: list[_Task] = []
    problems: list[str] = []
    dropped: list[str] = []
    unmatched = 0
    output = under_names_of(source, output)
    pairs = paired(source, output)
    source, _ = folded_like(source, output, pairs)
    for before, after in pairs:
        held, made = look_for_layers(source, before, strict=False), look_for_layers(output, after, strict=False)
        problems += [problem.message for problem in made.found.problems]
        problems += _missing(held, made)
        dropped += [made.full_name(key) for key in _left_out(held, made)]
        found = _tasks(held, made)
        unmatched += len(made.layers) - sum(task.layer is not None for task in found)
        tasks += found
    units = [Unit(task.name, task.size, task.memory, task.run) for task in tasks]
    run_units(units, jobs=jobs, progress=progress)
    return VerifyResult(
        tuple(task.result for task in tasks if task.result is not None),
        (*problems, *(task.problem for task in tasks if task.problem)),
        sum(task.same for task in tasks),
        tuple(dropped),
        unmatched,
    )


def _keys(held: QuantizedComponent) -> set[str]:
    """The keys of all weights and tensors, as if none were quantized."""
    return {*held.found.plain, *map(plain_key, held.layers.values())}


def _left_out(held: QuantizedComponent, made: QuantizedComponent) -> list[str]:
    """The keys that only the source has, because the conversion dropped them."""
    return sorted((_keys(held) - _keys(made)) & dropped_keys(made.component))


def _missing(held: QuantizedComponent, made: QuantizedComponent) -> list[str]:
    """Tensors that only one of the two has, in words. Those of a layer that cannot be read are its own problem."""
    before, after = _keys(held) - set(_left_out(held, made)), _keys(made)
    made_biases = {join_key(layer, "bias") for layer, stored in made.layers.items() if stored.format.folds_bias}
    place = made.component.shards[0].path
    lost = [f"{place}: {key!r} of the source is missing" for key in sorted(before - after) if not _broken(made, key)]
    more = sorted(after - before - made_biases)
    if before and more and not before & after:
        why = (
            f"no tensor has the name of one of the source ({more[0]!r} here, {min(before)!r} there), so that nothing "
            "can be compared: it was made from another model, or its names were translated in a way not known here"
        )
        return [f"{place}: {why}; compare a checkpoint with the one it was made from"]
    return lost + [f"{place}: {key!r} is not in the source" for key in more if not _broken(made, key)]


def _broken(made: QuantizedComponent, key: str) -> bool:
    """Whether a tensor belongs to a layer that cannot be read."""
    return any(key.rpartition(".")[0] == problem.layer for problem in made.found.problems)


def _tasks(held: QuantizedComponent, made: QuantizedComponent) -> list[_Task]:
    weights = {*held.specs, *map(plain_key, held.layers.values())}
    keys = {layer: plain_key(stored) for layer, stored in made.layers.items()}
    layers = [_Task(held, made, key, layer) for layer, key in keys.items() if key in weights]
    folded = {
        join_key(layer, "bias") for layer, stored in (*held.layers.items(), *made.layers.items())
        if stored.format.folds_bias
    }  # fmt: skip
    plain = (key for key in made.found.plain if key in held.specs and not _broken(made, key))
    both = [key for key in plain if key not in folded]
    return [*layers, *(_Task(held, made, key, None) for key in both)]


class _Task:
    """Comparing one layer, or one plain tensor, and what came of it."""

    def __init__(self, held: QuantizedComponent, made: QuantizedComponent, key: str, layer: str | None) -> None:
        self.held, self.made, self.key, self.layer = held, made, key, layer
        self.name = made.full_name(layer or key)
        self.result: LayerResult | None = None
        self.problem = ""
        self.same = 0
        spec = made.specs[key if layer is None else made.layers[layer].keys["qdata"]]
        self.size = spec.nbytes
        self.memory = min(spec.nbytes, 2 * _PIECE) if layer is None else 4 * spec.nbytes + _PIECE

    def run(self) -> None:
        if self.layer is None:
            self._compare_bytes()
        else:
            self.result = self._compare_layer(self.made.layers[self.layer])

    def _compare_layer(self, stored: StoredLayer) -> LayerResult:
        accuracy, problem = None, ""
        shape: tuple[int, ...] = stored.shape
        try:
            weight = weight_shape(stored)
            shape = weight.shape
            weight = self._source_shape(weight)
            shape = weight.shape
            stored = dataclasses.replace(stored, shape=weight.matrix)  # a padded file may not tell it
            meter = AccuracyMeter()
            for index in range(weight.count):
                parts = self.made.load(stored) if not weight.is_bank else expert_parts(self.made, stored, index)
                _add(meter, stored, parts, self._source_rows(weight, index))
            accuracy = meter.result()
            problem = self._compare_bias(stored, stored.format.bias_share(parts))
        except LowbitError as error:
            problem = str(error)
        return LayerResult(self.name, stored.format.spec, shape, accuracy, problem)

    def _source_shape(self, weight: WeightShape) -> WeightShape:
        """The true shape of a weight of the output: that of the source's."""
        before = self.held.layers.get(self.layer or "")
        if before is not None:
            found = weight_shape(before)
        else:
            found = WeightShape(self.held.specs[self.key].shape, weight.axes)
        fits = found.axes == weight.axes and found.problem is None and found.experts == weight.experts
        if weight.axes == KERNEL_AXES:
            fits = fits and found.shape == weight.shape
        elif fits:
            fits = may_pad(weight.matrix, found.matrix)
        if not fits:
            raise CheckpointError(
                f"{self.name}: has shape {list(weight.shape)} here and {list(found.shape)} in the source"
            )
        return found

    def _source_rows(self, weight: WeightShape, index: int) -> Callable[[int, int], Tensor]:
        """What gives rows [start, stop) of the source's matrix; `index`: of which expert, in a bank."""
        held, before = self.held, self.held.layers.get(self.layer or "")
        if before is not None:
            w = decoded_expert(held, before, index, torch.float32)
        elif weight.is_bank:
            w = weight.as_matrix(held.source.read_rows(held.component, self.key, index, index + 1)[0]).contiguous()
        elif weight.turned:
            w = weight.as_matrix(held.read(self.key)).contiguous()
        else:
            return lambda a, b: weight.as_matrix(held.source.read_rows(held.component, self.key, a, b))
        return lambda start, stop: w[start:stop]

    def _compare_bias(self, stored: StoredLayer, share: Tensor | None) -> str:
        """Whether the true bias is what it was, when the format put a constant into the stored one."""
        if share is None:
            return ""
        key = join_key(stored.layer, "bias")
        if key not in self.made.specs:
            return f"{stored.place}: has no bias, but {stored.format} puts a constant into it"
        now = self.made.read(key).float() + share
        before = self.held.read(key).float() if key in self.held.specs else torch.zeros_like(now)
        if (was := self.held.layers.get(stored.layer)) is not None:
            _, old_share = self.held.dequantized(was, torch.float32)
            before = before if old_share is None else before + old_share
        room = torch.finfo(self.made.specs[key].dtype).eps * (share.abs() + before.abs() + 1e-6)
        if bool(((now - before).abs() > 2 * room).any()):
            return f"{stored.place}: the bias without the constant of {stored.format} is not that of the source"
        return ""

    def _compare_bytes(self) -> None:
        before, after = self.held.specs[self.key], self.made.specs[self.key]
        if before != after and self._widened():
            self.same = 1
        elif before != after:
            self.problem = f"{self.name}: is {after} here and {before} in the source{self._distance()}"
        elif self._bytes_equal(after.shape, after.nbytes):
            self.same = 1
        else:
            self.problem = f"{self.name}: differs from the source{self._distance()}"

    def _widened(self) -> bool:
        """Whether these are the values in a wider dtype: of 8-bit floats, as `dequantize` writes them, or in GGUF."""
        before, after = self.held.specs[self.key], self.made.specs[self.key]
        values = self.key in self.held.found.plain and before.dtype in CAST_DTYPES
        values = values or keeps_values(self.held, self.made, self.key)
        wider = after.dtype.is_floating_point and after.dtype.itemsize > before.dtype.itemsize
        if not values or not wider or before.shape != after.shape:
            return False
        return self._bytes_equal(after.shape, after.nbytes)

    def _distance(self) -> str:
        """How far a plain weight is from the source's, in words; of a dequantized file that is what one asks."""
        before, after = self.held.specs[self.key], self.made.specs[self.key]
        floats = before.dtype.is_floating_point and after.dtype.is_floating_point
        coded = layer_of(self.key) in self.held.layers
        if coded or not floats or before.shape != after.shape or len(after.shape) != 2:
            return ""
        meter = AccuracyMeter()
        for start, stop in row_chunks(after.shape[0], after.shape[1]):
            w, a = (x.source.read_rows(x.component, self.key, start, stop).float() for x in (self.held, self.made))
            meter.add(w, a)
        return f" (SQNR {meter.result().sqnr:.2f} dB)"

    def _bytes_equal(self, shape: tuple[int, ...], size: int) -> bool:
        if size <= _PIECE or not shape:
            return self._same(self.held.read(self.key), self.made.read(self.key))
        rows = max(1, _PIECE * shape[0] // size)
        return all(
            self._same(
                *(x.source.read_rows(x.component, self.key, a, min(a + rows, shape[0])) for x in (self.held, self.made))
            )
            for a in range(0, shape[0], rows)
        )

    def _same(self, before: Tensor, after: Tensor) -> bool:
        before = before if before.dtype == after.dtype else before.to(after.dtype)
        return torch.equal(before.reshape(-1).view(torch.uint8), after.reshape(-1).view(torch.uint8))


def _add(meter: AccuracyMeter, stored: StoredLayer, parts: Parts, rows: Callable[[int, int], Tensor]) -> None:
    """Add a matrix that the parts decode to, and the rows of the true one, to a meter."""
    n, k = stored.shape
    fmt = stored.format
    sums = [
        row_errors(fmt, narrow_rows(fmt.rules, parts, start, stop), rows(start, stop))
        for start, stop in row_chunks(n, k, fmt.row_multiple)
    ]
    meter.add_sums(torch.cat(sums, dim=1))  # at once, as the conversion adds them: the same number to the last bit
