"""The option --stats: opening a statistics file for a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowbit.calibration import StatisticsCollection, StatisticsFile
from lowbit.calibration.names import layer_shapes
from lowbit.calibration.source_weights import other_weights
from lowbit.checkpoint.fold_check import check_norms
from lowbit.checkpoint.layer_statistics import LayerStatistics
from lowbit.checkpoint.source import Source
from lowbit.cli.output import warn


@contextmanager
def statistics_of(source: Source, file: Path | None) -> Iterator[LayerStatistics | None]:
    """The statistics in `file`, open, once they are found to be of this source; None without a file.

    Raises `StatisticsError` for those of another model, and of this one before scales were folded into it.
    """
    if file is None:
        yield None
        return
    with StatisticsFile(file) as found:
        found.check(layer_shapes(source))
        check_norms(source, found, str(file))
        yield found


def tell_other_weights(source: Source, statistics: LayerStatistics | None) -> list[str]:
    """Warn of statistics that were taken with other weights than this source's; the warnings, for --json."""
    found = other_weights(source, statistics) if isinstance(statistics, StatisticsCollection) else ""
    if found:
        warn(found)
    return [found] if found else []
