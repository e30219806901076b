"""Comparing checkpoints with the one they were made from: every layer, one at a time, by all measures of its error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lowbit.devices import usable_device
from lowbit.errors import CheckpointError
from lowbit.numerics.groups import row_chunks

from .accuracy import Accuracy, AccuracyMeter
from .compare_layer import LayerReference, error_histogram, measure
from .compare_sources import Candidate, Layer, axes_of, contents_of, layers_of
from .compare_statistics import Moments, RescaledInputs, StatisticsByLayer
from .comparison import Comparison, LayerComparison
from .dialects import StoredLayer
from .dialects.base import join_key
from .folding import folded_like, is_folded, paired
from .gguf_renamed import keeps_values, under_names_of
from .pipeline import Progress, Unit, run_units
from .quantized_source import QuantizedComponent
from .source import Source

_WORKSPACE = 64 << 20  # bytes of temporaries of a worker
_PIECE = 4 << 20  # elements compared at a time in plain tensors
HISTOGRAMS = 6  # how many of each candidate's worst layers get one


def compare(
    reference: Source,
    candidates: Sequence[Source],
    *,
    names: Sequence[str] | None = None,
    statistics: StatisticsByLayer | None = None,
    rtn: bool = True,
    histograms: int = HISTOGRAMS,
    jobs: int | None = None,
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
) -> Comparison:
    """Compare the layers of some checkpoints with the same ones of a reference; one layer in memory a thread.

    What only one of the two has is told (`Absent`). The reference may be quantized itself: its layers are decoded.
    Scales that were folded into a candidate are folded into what it is compared with, too. `names`: of the candidates,
    by default their paths. `statistics`: of the layers' inputs, for output SQNRs; judged on the held-out half where
    there is one. `rtn`: also round the reference plainly in the format of each layer, to say what was gained and which
    weights differ. `histograms`: for how many of each candidate's worst layers the errors are counted. `device`: where
    the products with second moments [K, K] are computed, which take most of the time.

    Raises:
        CheckpointError: a file cannot be read; a layer has another shape, or none is in both; the statistics are those
            of another model.
        PartsError, WeightError: a layer cannot be decoded, a weight of the reference is not finite.
        PlanError: the device cannot be used. SolverError: its memory does not suffice.
    """
    candidates = [under_names_of(reference, source) for source in candidates]
    labels = [str(source.place) for source in candidates] if names is None else list(names)
    there = usable_device(device)
    compared = partial(_compare, rtn=rtn, histograms=histograms, jobs=jobs, progress=progress, device=there)
    if not any(map(is_folded, candidates)):
        return compared(reference, statistics, candidates, labels)
    found = [
        compared(*_folded_alike(reference, source, statistics), [source], [label])
        for source, label in zip(candidates, labels, strict=True)  # each has a reference of its own
    ]
    return dataclasses.replace(
        found[0],
        candidates=tuple(one for each in found for one in each.candidates),
        with_statistics=any(each.with_statistics for each in found),
        unmeasured=tuple(sorted({name for each in found for name in each.unmeasured})),
    )


def _compare(
    reference: Source,
    statistics: StatisticsByLayer | None,
    candidates: Sequence[Source],
    labels: Sequence[str],
    *,
    rtn: bool,
    histograms: int,
    jobs: int | None,
    progress: Progress | None,
    device: torch.device,
) -> Comparison:
    """Compare candidates with one reference."""
    held = contents_of(reference)
    contents = [contents_of(source) for source in candidates]
    axes = {name: axes_of([content, *(c[name] for c in contents if name in c)]) for name, content in held.items()}
    made = [
        Candidate(label, source, content, held, reference, axes)
        for label, source, content in zip(labels, candidates, contents, strict=True)
    ]
    known = Moments(statistics)
    work = _Work(held, made, known, axes, rtn=rtn, device=device)
    run_units(work.units, jobs=jobs, progress=progress)
    if statistics is not None and work.layers_quantized and not known.found:
        raise CheckpointError(
            f"{reference.place}: the statistics know none of its quantized layers; calibrate this model"
        )
    work.count_errors(histograms, jobs)
    return Comparison(
        reference=str(reference.place),
        reference_bytes=sum(file.size for file in reference.files.values()),
        candidates=tuple(candidate.result() for candidate in made),
        with_statistics=bool(known.found),
        unmeasured=tuple(sorted(known.unknown)) if known.found else (),
    )


def _folded_alike(
    reference: Source, candidate: Source, statistics: StatisticsByLayer | None
) -> tuple[Source, StatisticsByLayer | None]:
    """The reference and its statistics with the scales folded in that a candidate has."""
    like, scales = folded_like(reference, candidate, paired(reference, candidate))
    if statistics is None or not scales:
        return like, statistics
    return like, RescaledInputs(statistics, {**{name.partition("/")[2]: s for name, s in scales.items()}, **scales})


class _Work:
    """All there is to measure."""

    def __init__(
        self,
        held: dict[str, QuantizedComponent],
        made: list[Candidate],
        known: Moments,
        axes: dict[str, dict[str, str]],
        *,
        rtn: bool,
        device: torch.device,
    ) -> None:
        self._made, self._known, self._rtn, self._device = made, known, rtn, device
        self._layers: dict[str, Layer] = {}
        self.units: list[Unit] = []
        for component, content in held.items():
            layers = layers_of(component, content, axes[component])
            for layer in (layer for layer in layers if self._candidates_with(layer)):
                self._layers[layer.name] = layer
                self.units.append(Unit(layer.name, self._size(layer), self._memory(layer), partial(self._run, layer)))
            # A bias is compared with its layer.
            done = {layer.key(content) for layer in layers}
            done |= {join_key(layer.layer, "bias") for layer in layers if layer.expert is None}
            for key in content.found.plain:
                if key not in done:
                    self._add_tensor(component, content, key)
        for candidate in made:
            candidate.order = [
                name for name, layer in self._layers.items() if candidate in self._candidates_with(layer)
            ]
        self.layers_quantized = any(candidate.contents[c].layers for candidate in made for c in held)

    def _candidates_with(self, layer: Layer) -> list[Candidate]:
        """The candidates that have a layer."""
        return [candidate for candidate in self._made if candidate.has(layer.component, layer.layer)]

    def _size(self, layer: Layer) -> int:
        return layer.bytes(layer.held)

    def _memory(self, layer: Layer) -> int:
        weight = 4 * layer.shape[0] * layer.shape[1]
        return 2 * weight + 4 * layer.shape[1] ** 2 + _WORKSPACE

    def _run(self, layer: Layer) -> None:
        """Compare one layer with that of every candidate that has it."""
        having = self._candidates_with(layer)
        stored = [candidate.stored(layer.component, layer.layer, layer.shape) for candidate in having]
        hessian = None
        if any(found is not None for found in stored):
            hessian = self._known.hessian(layer.layer, layer.name)
        where = f"{layer.held.where}: layer {layer.layer!r}"
        reference = LayerReference(layer.weight(), hessian, where, self._device)
        for candidate, found in zip(having, stored, strict=True):
            if found is None:
                row = self._plain(layer, candidate, reference)
            else:
                row = self._quantized(layer, candidate, reference, found)
            candidate.layers[layer.name] = row

    def _quantized(
        self, layer: Layer, candidate: Candidate, reference: LayerReference, stored: StoredLayer
    ) -> LayerComparison:
        content = candidate.contents[layer.component]
        parts = layer.parts(content, stored)
        found = measure(reference, stored.format, parts, rtn=self._rtn)
        self._compare_bias(layer, candidate, stored.format.bias_share(parts))
        return self._row(layer, content, "quantized", found.accuracy, found.output_sqnr, measure=found)

    def _plain(self, layer: Layer, candidate: Candidate, reference: LayerReference) -> LayerComparison:
        content = candidate.contents[layer.component]
        weight = layer.plain(content)
        self._compare_bias(layer, candidate, None)
        if layer.stored is None and _same_bytes(weight, reference.w):
            exact = Accuracy(math.inf, 1.0, 0.0)
            return self._row(layer, content, "kept", exact, None if reference.hessian is None else math.inf)
        accuracy, output = reference.compare_plain(weight)
        return self._row(layer, content, "changed", accuracy, output)

    def _row(
        self, layer: Layer, content: QuantizedComponent, status: str, accuracy: Accuracy, output: float | None,
        **more: object,
    ) -> LayerComparison:  # fmt: skip
        row = LayerComparison(
            name=layer.name,
            status=status,
            format=layer.format(content),
            was=layer.format(layer.held),
            shape=layer.shape,
            bytes_before=layer.bytes(layer.held),
            bytes_after=layer.bytes(content),
            accuracy=accuracy,
            output_sqnr=output,
        )
        return dataclasses.replace(row, **more)  # type: ignore[arg-type]

    # ---- everything else --------------------------------------------------------------------------------------------

    def _compare_bias(self, layer: Layer, candidate: Candidate, share: Tensor | None) -> None:
        """Compare the true biases, without the constants that formats put into stored ones."""
        content, key = candidate.contents[layer.component], join_key(layer.layer, "bias")
        if key not in content.found.plain or layer.expert is not None:
            return  # a missing one, and that of a bank, are told elsewhere
        now = content.read(key).float()
        before = layer.held.read(key).float() if key in layer.held.specs else torch.zeros_like(now)
        if before.shape != now.shape:
            candidate.changed[layer.held.full_name(key)] = f"has shape {list(now.shape)} for {list(before.shape)}"
            return
        room = torch.zeros_like(now)
        if share is not None:
            now = now + share
            room += torch.finfo(content.specs[key].dtype).eps * (share.abs() + before.abs() + 1e-6)
        if (was := layer.stored) is not None and was.format.folds_bias:
            old = layer.held.dequantized(was, torch.float32)[1]
            before = before if old is None else before + old
            room += torch.finfo(layer.held.specs[key].dtype).eps * (before.abs() + 1e-6)
        if bool(((now - before).abs() <= 2 * room).all()):
            candidate.identical.append(key)
        else:
            far = float((now - before).norm() / before.norm().clamp_min(1e-30))
            kind = candidate.changed if layer.layer not in content.layers else candidate.biases
            kind[layer.held.full_name(key)] = f"differs by {100 * far:.3g} % of its length"

    def _add_tensor(self, component: str, content: QuantizedComponent, key: str) -> None:
        """Compare a tensor that is not the weight of a layer."""
        spec = content.specs[key]
        memory = min(2 * spec.nbytes, 8 * _PIECE) + (1 << 16)
        run = partial(self._compare_tensor, component, content, key)
        self.units.append(Unit(content.full_name(key), spec.nbytes, memory, run))

    def _compare_tensor(self, component: str, held: QuantizedComponent, key: str) -> None:
        for candidate in self._made:
            made = candidate.contents[component]
            if key in made.specs:
                what = _difference(held, made, key)
                if what:
                    candidate.changed[held.full_name(key)] = what
                else:
                    candidate.identical.append(key)

    # ---- the worst layers again -------------------------------------------------------------------------------------

    def count_errors(self, count: int, jobs: int | None) -> None:
        """Add histograms to the worst quantized layers of each candidate."""
        units = []
        for candidate in self._made:
            worst = [x for x in candidate.result().worst(len(self._layers)) if x.status == "quantized"][:count]
            for row in worst:
                layer = self._layers[row.name]
                run = partial(self._count_errors, candidate, layer)
                units.append(Unit(row.name, self._size(layer), self._memory(layer), run))
        run_units(units, jobs=jobs)

    def _count_errors(self, candidate: Candidate, layer: Layer) -> None:
        stored = candidate.stored(layer.component, layer.layer, layer.shape)
        assert stored is not None
        parts = layer.parts(candidate.contents[layer.component], stored)
        counted = error_histogram(layer.weight(), stored.format, parts)
        candidate.layers[layer.name] = dataclasses.replace(candidate.layers[layer.name], histogram=counted)


def _difference(held: QuantizedComponent, made: QuantizedComponent, key: str) -> str:
    """How a plain tensor differs, in words; "" when every byte is the same, or every value in GGUF's wider dtype."""
    before, after = held.specs[key], made.specs[key]
    if before.shape != after.shape:
        return f"has shape {list(after.shape)} for {list(before.shape)}"
    meter, same = AccuracyMeter(), before == after or keeps_values(held, made, key)
    rows = after.shape[0] if after.shape else 1
    columns = max(1, torch.Size(after.shape).numel() // max(rows, 1))
    for start, stop in row_chunks(rows, columns, elements=_PIECE):
        a, b = (_rows(x, key, start, stop).reshape(stop - start, columns) for x in (held, made))
        same = same and _same_bytes(a.to(b.dtype), b)
        meter.add(a.float(), b.to(torch.float32, copy=True))
    if same:
        return ""
    kinds = f" and is {after.dtype} for {before.dtype}".replace("torch.", "") if before.dtype != after.dtype else ""
    return f"differs (SQNR {meter.result().sqnr:.2f} dB){kinds}"


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b)))


def _rows(content: QuantizedComponent, key: str, start: int, stop: int) -> Tensor:
    if not content.specs[key].shape:
        return content.read(key)
    return content.source.read_rows(content.component, key, start, stop)
