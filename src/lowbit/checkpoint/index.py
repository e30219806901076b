"""The index of a sharded checkpoint (`*.safetensors.index.json`): which shard holds which tensor.

An index comes from a stranger, so the paths in it are checked before any of them is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lowbit.errors import CheckpointError

from .strict_json import DuplicateNameError, parse_object
from .weight_file import WeightFile

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


@dataclass(frozen=True)
class ShardIndex:
    """An index file: its parsed `content`, whose `weight_map` gives the shard of each tensor."""

    path: Path
    content: dict[str, Any]

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> name of the shard, a path relative to the index's folder."""
        weight_map: dict[str, str] = self.content["weight_map"]
        return weight_map


def refuse_pickle(path: Path) -> None:
    """Raise CheckpointError if the path names a pickle file, or the index of some."""
    name = path.name.removesuffix(".index.json")
    if Path(name).suffix.lower() in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path}: is a pickle checkpoint; lowbit reads only safetensors, never pickle, because loading a pickle "
            "can run any program hidden in it. Take the model's safetensors files, or convert with "
            "safetensors.torch.save_file in an environment you can afford to lose"
        )


def read_index(path: Path) -> ShardIndex:
    """Read an index file.

    Raises:
        CheckpointError: it cannot be read, is no JSON object, names a tensor twice, or has no sound `weight_map`.
    """
    try:
        content = parse_object(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: the index cannot be opened: {error.strerror}; check the path") from error
    except DuplicateNameError as error:
        raise CheckpointError(
            f"{path}: the index has {error.name!r} twice: two layers with one name; write the checkpoint again"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: the index cannot be read: {error}; download or write it again") from error
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(
            f"{path}: the index has no 'weight_map' from tensor names to file names; download or write it again"
        )
    if not weight_map:
        raise CheckpointError(f"{path}: the index names no tensors; download or write it again")
    return ShardIndex(path, content)


def index_over(path: Path) -> ShardIndex | None:
    """The index beside a weight file that names it and others; one that cannot be read says nothing about it."""
    for place in sorted(path.parent.glob("*.safetensors.index.json")):
        try:
            index = read_index(place)
        except CheckpointError:
            continue
        names = {Path(name).name for name in index.weight_map.values()}
        if path.name in names and len(names) > 1:
            return index
    return None


def allowed_folders(folder: Path) -> list[Path]:
    """Return the real folders that links in `folder` may lead into: itself, and its blobs if it is in a hub cache.

    The Hugging Face cache keeps `<repo>/snapshots/<revision>/...` as links into `<repo>/blobs`.
    """
    real = Path(os.path.realpath(folder))
    allowed = [real]
    for inner in (real, *real.parents):
        blobs = inner.parent.parent / "blobs"
        if inner.parent.name == "snapshots" and blobs.is_dir():
            allowed.append(Path(os.path.realpath(blobs)))
    return allowed


def stays_inside(path: Path, folder: Path) -> bool:
    """Say whether a path, all links followed, ends inside a folder (or its hub cache's blobs)."""
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(allowed) for allowed in allowed_folders(folder))


def shard_paths(index: ShardIndex) -> list[Path]:
    """Return the shards that an index names, sorted by name.

    Raises:
        CheckpointError: a shard is missing, is a pickle, or lies outside the index's folder.
    """
    folder = index.path.parent
    found: set[Path] = set()  # two spellings of one file (a.safetensors, ./a.safetensors) are one path
    for name in sorted(set(index.weight_map.values())):
        _refuse_foreign_name(name, index.path)
        path = folder / name
        refuse_pickle(path)
        if not stays_inside(path, folder):
            raise CheckpointError(
                f"{index.path}: the index names {name!r}, a link that leads outside the folder, to "
                f"{os.path.realpath(path)}; put the file itself there if you trust it"
            )
        if not path.is_file():
            raise CheckpointError(f"{index.path}: the index names the shard {name!r}, which is missing; download it")
        found.add(path)
    return sorted(found)


def _refuse_foreign_name(name: str, index_path: Path) -> None:
    """Refuse what leaves the folder by its spelling, as any system reads it."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    inside = not (posix.is_absolute() or windows.anchor or ".." in posix.parts or ".." in windows.parts)
    if not inside or not name or "\0" in name:
        raise CheckpointError(
            f"{index_path}: the index names {name!r} as a shard, which is outside the folder; "
            "such an index is damaged or hostile, so nothing was opened. Get the checkpoint from its source again"
        )


def check_weight_map(index: ShardIndex, shards: Iterable[WeightFile]) -> None:
    """Raise CheckpointError if the index places a tensor in a shard that does not have it."""
    by_path = {shard.path: shard for shard in shards}
    for tensor, name in index.weight_map.items():
        if tensor not in by_path[index.path.parent / name].tensors:
            raise CheckpointError(
                f"{index.path}: the index places tensor {tensor!r} in {name!r}, which does not have it; "
                "the index and the shards are of different versions: download them together"
            )
