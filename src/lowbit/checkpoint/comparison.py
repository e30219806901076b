"""The result of comparing checkpoints layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .accuracy import Accuracy
from .compare_layer import Histogram, LayerMeasure, to_json
from .layer_groups import grouped


@dataclass(frozen=True)
class LayerComparison:
    """One weight of a candidate.

    `status` is "quantized"; or "kept" or "changed" for a plain one, equal to the reference's or not. `format` is a
    spec, or a dtype where the weight is plain; `was` is the same of the reference. `accuracy` and `output_sqnr` (dB,
    None without statistics) are those of the decoded weight; `measure` has the rest.
    """

    name: str
    status: str
    format: str
    was: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    accuracy: Accuracy
    output_sqnr: float | None
    measure: LayerMeasure | None = None
    histogram: Histogram | None = None

    @property
    def weights(self) -> int:
        """How many there are."""
        return self.shape[0] * self.shape[1]

    @property
    def sqnr(self) -> float:
        """Of the output where that is known, else of the weight, in dB."""
        return self.accuracy.sqnr if self.output_sqnr is None else self.output_sqnr

    @property
    def gain(self) -> float | None:
        """By how many dB it is better than plain rounding: in its output where that is known, else in its weight."""
        if self.measure is None or self.measure.rtn is None:
            return None
        plain = self.measure.rtn.sqnr if self.measure.rtn_output_sqnr is None else self.measure.rtn_output_sqnr
        return _gain(self.sqnr, plain)

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        data = {name: getattr(self, name) for name in ("name", "status", "format", "was", "bytes_before")}
        data |= {"bytes_after": self.bytes_after, "shape": list(self.shape), **to_json(self.measure)}
        data |= {"accuracy": self.accuracy.to_json(), "output_sqnr": self.output_sqnr, "gain": self.gain}
        return {**data, "histogram": to_json(self.histogram) or None}


def _gain(sqnr: float, plain: float) -> float | None:
    """The difference of two SQNRs; 0 where both are infinite, None where only one is."""
    return sqnr - plain if math.isfinite(sqnr) and math.isfinite(plain) else 0.0 if sqnr == plain else None


@dataclass(frozen=True)
class Totals:
    """Over the layers that any candidate quantizes, one that is kept exactly counting as free of noise.

    `sqnr`, `output_sqnr`, `rtn_sqnr`, `rtn_output_sqnr`: -10 log10 of the mean noise-to-signal ratio, each layer
    counting as much as it has weights, in dB. Those of outputs are over the layers that there are statistics for,
    which are the same ones for all candidates; None where there are none. `flips`, `at_ends`, `saturated`: shares of
    the weights, codes and scales of the quantized layers.
    """

    sqnr: float
    output_sqnr: float | None
    rtn_sqnr: float | None
    rtn_output_sqnr: float | None
    flips: float | None
    at_ends: float
    saturated: float
    not_finite: int

    @property
    def quality(self) -> float:
        """The output SQNR where it is known, else that of the weights, dB."""
        return self.sqnr if self.output_sqnr is None else self.output_sqnr

    @property
    def gain(self) -> float | None:
        """By how many dB that is better than if every layer had been rounded plainly."""
        plain = self.rtn_sqnr if self.output_sqnr is None else self.rtn_output_sqnr
        return None if plain is None else _gain(self.quality, plain)

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {**vars(self), "gain": self.gain}


@dataclass(frozen=True)
class Absent:
    """What only one of the two has, by name: layers; `missing`, `extra`: tensors that are no weights of layers.

    `missing...`: what the candidate lacks; `extra...`: what the reference lacks; `dropped`: keys that the
    conversion left out on purpose, as the candidate's header says.
    """

    missing_layers: list[str] = field(default_factory=list)
    extra_layers: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def absences(name: str, absent: Absent, *, dropped: bool = False) -> list[str]:
    """What only one of the two has, in words, layers that are numbered alike as one; `dropped`: that, too."""
    kinds = (
        ("lacks the layers", absent.missing_layers),
        ("lacks the tensors", absent.missing),
        ("the reference lacks its layers", absent.extra_layers),
        ("the reference lacks its tensors", absent.extra),
        ("the conversion left out", absent.dropped if dropped else []),
    )
    found = []
    for what, which in kinds:
        names = [group for group, _ in grouped(which, lambda key: key, lambda _: "")]
        found += [f"{name}: {what} {', '.join(names)} ({len(which)})"] if which else []
    return found


@dataclass(frozen=True)
class CandidateComparison:
    """One candidate. `bytes` and `layer_bytes`: of its files, and of the compared weights.

    `layers`: those that both have. `identical`: how many other tensors have the reference's bytes; `changed`: those
    that do not, in words; `biases`: changed biases of quantized layers (a correction, or damage).
    """

    name: str
    path: str
    bytes: int
    layers: tuple[LayerComparison, ...]
    identical: int
    changed: tuple[str, ...]
    biases: tuple[str, ...]
    absent: Absent

    @property
    def quantized(self) -> list[LayerComparison]:
        """The quantized layers."""
        return [layer for layer in self.layers if layer.status == "quantized"]

    @property
    def altered(self) -> list[LayerComparison]:
        """Layers that were kept, but are not what they were."""
        return [layer for layer in self.layers if layer.status == "changed"]

    @property
    def layer_bytes(self) -> int:
        """Bytes of all compared weights, with their scales."""
        return sum(layer.bytes_after for layer in self.layers)

    def worst(self, count: int) -> list[LayerComparison]:
        """The layers that are not exact with the lowest SQNR (of the output where known), the worst first."""
        return sorted((x for x in self.layers if x.status != "kept"), key=_badness)[:count]


def _badness(layer: LayerComparison) -> float:
    return -math.inf if math.isnan(layer.sqnr) else layer.sqnr


@dataclass(frozen=True)
class Comparison:
    """A reference and its candidates. `with_statistics`: output SQNRs were measured for some layer."""

    reference: str
    reference_bytes: int
    candidates: tuple[CandidateComparison, ...]
    with_statistics: bool
    unmeasured: tuple[str, ...] = ()
    """Quantized layers for which the statistics have nothing."""

    @property
    def absences(self) -> list[str]:
        """What only one of the reference and a candidate has, in words."""
        return [text for x in self.candidates for text in absences(x.name, x.absent, dropped=True)]

    @property
    def partial(self) -> bool:
        """Whether the totals are not over all layers that a candidate quantizes, as another one lacks some."""
        return any(x.name not in self.judged for c in self.candidates for x in c.quantized)

    @property
    def basis(self) -> str:
        """In words what the totals are over, where that is not all that a candidate quantizes or changes; else ""."""
        if all(self.judged <= {x.name for x in candidate.layers} for candidate in self.candidates):
            return "the totals are over the layers that all candidates have" if self.partial else ""
        return "no layer that a candidate quantizes is in all of them: each one's totals are over other layers"

    @property
    def judged(self) -> frozenset[str]:
        """The layers that any candidate quantizes or changes; of these only what all have, if there is any."""
        found = frozenset(x.name for candidate in self.candidates for x in candidate.layers if x.status != "kept")
        return found.intersection(*({x.name for x in candidate.layers} for candidate in self.candidates)) or found

    def totals(self, candidate: CandidateComparison) -> Totals:
        """What a candidate lost over all judged layers."""
        names = self.judged
        layers = [layer for layer in candidate.layers if layer.name in names]
        known = [layer for layer in layers if layer.output_sqnr is not None]
        measured = [layer.measure for layer in candidate.quantized if layer.measure is not None]
        quantized = max(sum(layer.weights for layer in candidate.quantized), 1)
        flips = [(x.weights, x.measure.flips) for x in candidate.quantized if x.measure is not None]
        flipped = bool(flips) and all(share is not None for _, share in flips)
        scales = max(sum(m.scales.count for m in measured), 1)
        return Totals(
            sqnr=_mean_sqnr((x.weights, x.accuracy.sqnr) for x in layers) or 0.0,
            output_sqnr=_mean_sqnr((x.weights, x.output_sqnr) for x in known),
            rtn_sqnr=_mean_sqnr(_plain(layers, output=False)),
            rtn_output_sqnr=_mean_sqnr(_plain(known, output=True)),
            flips=sum(n * (share or 0.0) for n, share in flips) / quantized if flipped else None,
            at_ends=sum(x.weights * x.measure.at_ends for x in candidate.quantized if x.measure) / quantized,
            saturated=sum(m.scales.at_top + m.scales.zero for m in measured) / scales,
            not_finite=sum(m.scales.not_finite for m in measured),
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        made = []
        for x in self.candidates:
            data = {name: getattr(x, name) for name in ("name", "path", "bytes", "layer_bytes", "identical")}
            data |= {"changed": list(x.changed), "biases": list(x.biases), **vars(x.absent)}
            made.append({**data, "totals": self.totals(x).to_json(), "layers": [layer.to_json() for layer in x.layers]})
        return {
            "reference": self.reference,
            "reference_bytes": self.reference_bytes,
            "with_statistics": self.with_statistics,
            "unmeasured": list(self.unmeasured),
            "candidates": made,
        }


def _plain(layers: Sequence[LayerComparison], *, output: bool) -> Iterator[tuple[int, float | None]]:
    """Weights and SQNR that plain rounding would have had, of every layer; a plain layer stays as it is."""
    for x in layers:
        if x.measure is None:
            yield x.weights, x.output_sqnr if output else x.accuracy.sqnr
        elif output:
            yield x.weights, x.measure.rtn_output_sqnr
        else:
            yield x.weights, None if x.measure.rtn is None else x.measure.rtn.sqnr


def _mean_sqnr(layers: Iterable[tuple[int, float | None]]) -> float | None:
    """-10 log10 of the mean noise-to-signal ratio over (weights, SQNR); None where one is unknown or there is none."""
    found = list(layers)
    if not found or any(sqnr is None for _, sqnr in found):
        return None
    whole = max(sum(count for count, _ in found), 1)
    ratio = sum(count * _power(-(sqnr or 0.0) / 10) for count, sqnr in found) / whole
    return math.inf if ratio == 0 else math.nan if math.isnan(ratio) else -10 * math.log10(ratio)


def _power(exponent: float) -> float:
    """10 ** exponent, infinite where it is too large for a float."""
    return 10.0**exponent if exponent < 300 else math.inf
