"""A source with scales folded into some of its norms and linears: the same model, easier to quantize.

Nothing but the scales [K] is held: tensors are multiplied as they are read, and statistics as they are asked for, so
that whatever works on a source works on the folded one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, PlanError
from lowbit.numerics.groups import row_chunks
from lowbit.ops.encode import decode_rows
from lowbit.smoothing import ONE_PLUS, held_by_norm, held_by_rows, input_factor, norm_gain, rescaled, rescaled_outputs
from lowbit.smoothing.choice import Held
from lowbit.solvers import Statistics

from .dialects.base import join_key
from .fold_data import FOLDED, ROWS, Fold, folds_from_text, misfit
from .fold_groups import refuse_other_groups
from .layer_statistics import LayerStatistics
from .plan_data import Plan
from .quantized_source import QuantizedComponent, look_for_layers
from .rescaling import Rescaling, found_again, joined
from .source import Component, Source

Rescalings = dict[tuple[str, str], Rescaling]


class RescaledStatistics:
    """Statistics of layers, some of whose inputs or last outputs are multiplied by a scale; a `LayerStatistics`.

    `scales` [K] of inputs and `rows` [n] of outputs, by layer.
    """

    def __init__(
        self, statistics: LayerStatistics, scales: Mapping[str, Tensor], rows: Mapping[str, Tensor] | None = None
    ) -> None:
        self._statistics, self._scales, self._rows = statistics, scales, dict(rows or {})

    def get(self, layer: str, /) -> Statistics | None:
        """See `LayerStatistics`."""
        known = self._rescaled(self._statistics.get(layer), layer)
        if known is not None and layer in self._rows:
            known = rescaled_outputs(known, self._rows[layer])
        return known

    def get_input(self, layer: str, /) -> Statistics | None:
        """See `LayerStatistics`."""
        return self._rescaled(self._statistics.get_input(layer), layer)

    def _rescaled(self, known: Statistics | None, layer: str) -> Statistics | None:
        return known if known is None or layer not in self._scales else rescaled(known, self._scales[layer])

    def kind(self, layer: str, /) -> str:
        """See `LayerStatistics`."""
        return self._statistics.kind(layer)

    def gradient_size(self, layer: str, /) -> int:
        """See `LayerStatistics`."""
        return self._statistics.gradient_size(layer)

    def smallest(self, layer: str, /) -> float | None:
        """See `LayerStatistics`."""
        if layer not in self._scales:
            return self._statistics.smallest(layer)
        known = self.get_input(layer)
        return None if known is None or known.minimum is None else float(known.minimum.min())

    def fingerprint(self) -> str:
        """See `LayerStatistics`; that of the statistics as they were: the plan tells the rest."""
        return self._statistics.fingerprint()


def folded(source: Source, plan: Plan, statistics: LayerStatistics | None) -> tuple[Source, LayerStatistics | None]:
    """The source and its statistics with the plan's scales folded in; themselves where it has none.

    Raises `PlanError` for a group of whose input nothing is known, and for one that the model does not have.
    """
    changes: Rescalings = {}
    scales: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for part in plan.components:
        component = source.component(part.name)
        active = [fold for fold in part.folds if fold.active]
        if active:
            refuse_other_groups(look_for_layers(source, component), active)
        for fold in active:
            names = [layer_name(component, linear) for linear in fold.linears]
            known = known_of(statistics, names)
            if statistics is None or known is None:
                raise PlanError(
                    f"{source.place}: {fold.before!r} takes a scale by the input of {fold.linears[0]!r}, of which "
                    "nothing is known; give the statistics of the plan with --stats, or set the fold's exponent to 0"
                )
            scale = input_factor(known, fold.exponent, held_by(source, component, fold))
            add_rescalings(changes, component, fold, scale)
            scales |= dict.fromkeys(names, scale)
            if fold.kind == ROWS:
                rows[layer_name(component, fold.before)] = scale
    if not changes or statistics is None:
        return source, statistics
    return source.rescaled(changes), RescaledStatistics(statistics, scales, rows)


def layer_name(component: Component, layer: str) -> str:
    """A layer's name in statistics and messages."""
    return f"{component.name}/{layer}" if component.name else layer


def known_of(statistics: LayerStatistics | None, names: Iterable[str]) -> Statistics | None:
    """What is known of the input that some linears share: of the first of them with second moments."""
    if statistics is None:
        return None
    return next((statistics.get_input(name) for name in names if statistics.kind(name)), None)


def held_by(source: Source, component: Component, fold: Fold) -> Held:
    """The scales that the norm or linear of a fold can take."""
    if fold.kind == ROWS:
        return held_by_rows
    return held_by_norm(source.read(component, fold.keys[0]), fold.kind)


def add_rescalings(changes: Rescalings, component: Component, fold: Fold, scale: Tensor) -> None:
    """Add what a scale [K] does to the tensors of a fold."""

    def add(key: str, change: Rescaling) -> None:
        changes[component.name, key] = joined(changes.get((component.name, key)), change)

    first = component.tensors[fold.keys[0]].shape[0] - scale.shape[0]
    add(fold.keys[0], Rescaling(rows=scale, first_row=first, offset=1.0 if fold.kind == ONE_PLUS else 0.0))
    bias = join_key(fold.before, "bias")
    if bias in component.tensors:
        add(bias, Rescaling(rows=scale, first_row=first))
    for key in fold.keys[1:]:
        add(key, Rescaling(columns=scale))


def paired(source: Source, output: Source) -> list[tuple[Component, Component]]:
    """The models of both, each beside the one that it was made from. Raises `CheckpointError` for other models."""
    if len(source.components) == len(output.components) == 1:
        return [(source.components[0], output.components[0])]
    mine, theirs = {c.name for c in source.components}, {c.name for c in output.components}
    if mine != theirs:
        raise CheckpointError(
            f"{output.root}: holds the models {sorted(theirs)}, {source.root} holds {sorted(mine)}; "
            "compare a checkpoint with the one it was made from"
        )
    return [(component, output.component(component.name)) for component in source.components]


def is_folded(output: Source) -> bool:
    """Whether its headers say that scales were folded into it."""
    return any(FOLDED in file.metadata for file in output.files.values())


def folded_like(
    source: Source, output: Source, pairs: Iterable[tuple[Component, Component]]
) -> tuple[Source, dict[str, Tensor]]:
    """The source with the scales folded in that `output`, which was made of it, has; itself where it has none.

    `pairs`: the same models in both. The scales are found again from the weights: of a norm as the quotient of the two,
    of rows by least squares, with the columns behind them; in quantized layers of a few dozen channels one may be off
    by a step. They come with it, [K] by the names of the linears whose inputs they multiply. Groups of which the source
    has a layer quantized are passed over: nothing is folded into codes, so their scales were in it before.

    Raises `PlanError` for a header that names other groups than the two have.
    """
    changes: Rescalings = {}
    scales: dict[str, Tensor] = {}
    for component, made in pairs:
        folds = folds_of(output, made)
        before_it = look_for_layers(source, component, strict=False).layers if folds else {}
        held = look_for_layers(output, made, strict=False)
        for fold in sorted(folds, key=lambda fold: fold.kind == ROWS):  # rows last: norms have divided their columns
            if before_it.keys() & {fold.before, *fold.linears}:
                continue
            _check_there(component, held, fold)
            k = component.tensors[fold.keys[1]].shape[1]
            if fold.kind == ROWS:
                scale = _rows_ratio(source.rescaled(changes), component, held, fold, k)
            else:
                before, after = source.read(component, fold.keys[0]), held.read(fold.keys[0])
                scale = found_again(norm_gain(before, fold.kind), norm_gain(after, fold.kind), before.dtype)
            add_rescalings(changes, component, fold, scale)
            scales |= {layer_name(component, name): scale for name in fold.linears}
    return (source.rescaled(changes) if changes else source), scales


def folds_of(output: Source, component: Component) -> list[Fold]:
    """The groups that scales were folded into, as its headers say. Raises `PlanError` for a header that is wrong."""
    texts = [file.metadata[FOLDED] for file in component.files.values() if FOLDED in file.metadata]
    return folds_from_text(texts[0], str(output.place)) if texts else []


def _check_there(component: Component, made: QuantizedComponent, fold: Fold) -> None:
    """Raise `PlanError` unless both have the weights of a fold, in the same shapes, and these are a group."""
    shapes = {key: spec.shape for key, spec in made.specs.items()}
    shapes |= {join_key(name, "weight"): layer.shape for name, layer in made.layers.items()}
    why = ""
    for key in fold.keys:
        if key not in component.tensors or key not in shapes:
            why = why or f"there is no {key!r} in both"
        elif component.tensors[key].shape != shapes[key]:
            why = why or f"{key!r} is {list(shapes[key])}, and {list(component.tensors[key].shape)} in the other"
    if why := why or misfit(fold.kind, [shapes[key] for key in fold.keys]):
        raise PlanError(
            f"{made.where}: its header says that a scale was folded into {fold.before!r}, and {why}; compare a "
            "checkpoint with the one it was made from"
        )


def _rows_ratio(source: Source, component: Component, made: QuantizedComponent, fold: Fold, k: int) -> Tensor:
    """What the last K rows of a linear were multiplied by, from these rows and the columns behind them, as stored."""
    logs, counts = torch.zeros(k), torch.zeros(k)
    for name, key in zip((fold.before, *fold.linears), fold.keys, strict=True):
        by_row = name == fold.before
        like, whole = _products(source, component, made, name, key, by_row=by_row)
        elements = component.tensors[key].shape[1 if by_row else 0]
        found = (like / whole).log()[-k:]
        usable = found.isfinite()  # not of rows or columns of zeros
        logs += torch.where(usable, found, 0.0) * (elements if by_row else -elements)
        counts += usable * elements
    return held_by_rows((logs / counts.clamp_min(1)).exp())


def _products(
    source: Source, component: Component, made: QuantizedComponent, name: str, key: str, *, by_row: bool
) -> tuple[Tensor, Tensor]:
    """The sums over each row, or each column, of a weight as stored times as it was, and of that squared."""
    n, columns = component.tensors[key].shape
    stored = made.layers.get(name)
    parts = None if stored is None else made.load(stored)
    sums = torch.zeros(2, n if by_row else columns)
    for start, stop in row_chunks(n, columns, 1 if stored is None else stored.format.row_multiple):
        before = source.read_rows(component, key, start, stop).float()
        if stored is None or parts is None:
            after = made.source.read_rows(made.component, key, start, stop).float()
        else:
            after = decode_rows(stored.format, parts, columns, start, stop)
        for index, product in enumerate((after * before, before.square())):
            if by_row:
                sums[index, start:stop] = product.sum(1)
            else:
                sums[index] += product.sum(0)
    return sums[0], sums[1]
