"""Opening what is to be rewritten: one shard of a model is rarely what was meant."""

from __future__ import annotations

from pathlib import Path

from lowbit.checkpoint.index import index_over
from lowbit.checkpoint.source import Source, open_source
from lowbit.cli.output import warn


def open_whole(path: Path, dialect: str | None = None) -> Source:
    """As `open_source`, with a warning where the file is one of several that an index beside it joins."""
    source = open_source(path, dialect)
    index = index_over(path) if source.kind == "file" else None
    if index is not None:
        count = len(set(index.weight_map.values()))
        warn(
            f"{path}: is one of {count} shards, and the others are not read; for the whole model give the index "
            f"{index.path}, or the folder {index.path.parent}"
        )
    return source
