"""From a comparison to the data of its page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lowbit.checkpoint.compare_layer import BIN
from lowbit.checkpoint.comparison import CandidateComparison, Comparison, LayerComparison
from lowbit.checkpoint.layer_groups import fold
from lowbit.report.compare import CompareCandidate, CompareLayer, ComparePage, ErrorCounts
from lowbit.report.end_to_end import EndToEnd

_BLOCK = re.compile(r"(?:.*?\.)??\d+(?=\.)")  # a name up to its first number


def compare_page(found: Comparison, runs: Sequence[EndToEnd], problems: Sequence[str], command: str) -> ComparePage:
    """The page of a comparison; `runs`: end to end, one a candidate or none."""
    candidates = []
    for index, candidate in enumerate(found.candidates):
        total = found.totals(candidate)
        candidates.append(
            CompareCandidate(
                name=candidate.name,
                path=candidate.path,
                bytes=candidate.bytes,
                sqnr=total.sqnr,
                output_sqnr=total.output_sqnr,
                gain=total.gain,
                flips=total.flips,
                at_ends=total.at_ends,
                saturated=total.saturated,
                run=runs[index] if runs else None,
            )
        )
    return ComparePage(
        reference=Path(found.reference).name,
        reference_bytes=found.reference_bytes,
        candidates=candidates,
        layers=[_row(candidate, layer) for candidate in found.candidates for layer in candidate.layers],
        problems=problems,
        absences=[
            *(text for text in found.absences if text not in problems),
            *([found.basis] if found.basis else []),
        ],
        command=command,
    )


def block_of(name: str) -> str:
    """The block that a layer is in: its name up to the first number, "" where it has none.

    >>> block_of("double_blocks.3.img_mlp.0"), block_of("img_in")
    ('double_blocks.3', '')
    """
    match = _BLOCK.match(name)
    return match[0] if match else ""


def _row(candidate: CandidateComparison, layer: LayerComparison) -> CompareLayer:
    measure, counted = layer.measure, layer.histogram
    errors = None
    if counted is not None:
        errors = ErrorCounts(counted.counts, BIN, counted.beyond, counted.largest, counted.rms)
    return CompareLayer(
        candidate=candidate.name,
        name=layer.name,
        kind=fold(layer.name),
        block=block_of(layer.name),
        format=layer.format,
        status=layer.status,
        shape=layer.shape,
        bytes=layer.bytes_after,
        sqnr=layer.accuracy.sqnr,
        output_sqnr=layer.output_sqnr,
        gain=layer.gain,
        cosine=layer.accuracy.cosine,
        worst_row=layer.accuracy.max_row_error,
        flips=None if measure is None else measure.flips,
        at_ends=None if measure is None else measure.at_ends,
        saturated=None if measure is None else measure.scales.saturated,
        errors=errors,
    )
