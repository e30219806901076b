"""What a user points at: a safetensors or GGUF file, shards by their index, or a model folder; opened and checked."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lowbit.errors import CheckpointError

from .folder import FolderContents, WeightSet, scan_folder
from .gguf_file import GgufFile
from .index import check_weight_map, read_index, refuse_pickle, shard_paths
from .rescaling import Rescaling
from .safetensors_file import SafetensorsFile, TensorInfo
from .weight_file import WeightFile

_log = logging.getLogger("lowbit")


@dataclass(frozen=True)
class Shard:
    """One weight file; `relative` is its path below the source's root, with forward slashes."""

    path: Path
    relative: str


@dataclass(frozen=True)
class Component:
    """One model in a source: its weight files and tensors.

    Attributes:
        name: "" for the root, else the subfolder, such as "transformer".
        shards: its weight files, sorted by name.
        files: the same, open, by their path relative to the source's root.
        tensors: every tensor by its name in the files, shard after shard, in the order of the data.
        index: the parsed index file, if it has one, and `index_name`, its file name.
    """

    name: str
    shards: tuple[Shard, ...]
    files: dict[str, WeightFile]
    tensors: dict[str, TensorInfo]
    index: dict[str, Any] | None
    index_name: str | None


class Source:
    """An open checkpoint; made by `open_source`. A context manager; threads may read at the same time.

    Attributes:
        root: the folder that relative paths start from.
        kind: "file", "sharded" (an index file was named) or "folder".
        components: the models in it, sorted by name.
        files: every weight file by its path relative to the root.
        tensors: every tensor; where there are several components, by "<component>/<name>".
        extra_files: for a folder, what goes with the weights and is copied unchanged (config, tokenizer).
        dialect: the name of the dialect that it is read in, whatever it looks like; None finds out.
        skipped_files: for a folder, what is left out: pickles, other weights, hidden files, links to the outside.
    """

    def __init__(
        self,
        root: Path,
        kind: Literal["file", "sharded", "folder"],
        components: list[Component],
        contents: FolderContents,
        dialect: str | None = None,
    ) -> None:
        self.dialect = dialect
        self.root = root
        self.kind = kind
        self.components = components
        self.files = {name: file for component in components for name, file in component.files.items()}
        several = len(components) > 1
        self.tensors = {
            f"{component.name}/{name}" if several and component.name else name: info
            for component in components
            for name, info in component.tensors.items()
        }
        self.extra_files = contents.extra_files
        self.skipped_files = contents.skipped_files
        self._by_path = {file.path: file for file in self.files.values()}
        self._places: dict[tuple[str, str], torch.Tensor] = {}
        self._rescalings: Mapping[tuple[str, str], Rescaling] = {}

    @property
    def place(self) -> Path:
        """What messages call it: the file, where there is but one, or the folder."""
        return self.components[0].shards[0].path if self.kind == "file" else self.root

    def component(self, name: str) -> Component:
        """Return the component of a name. Raises CheckpointError if there is none."""
        for component in self.components:
            if component.name == name:
                return component
        known = ", ".join(repr(component.name) for component in self.components)
        raise CheckpointError(f"{self.root}: has no component {name!r}; it has {known}")

    def _locate(self, component: Component | str, key: str) -> WeightFile:
        found = self.component(component) if isinstance(component, str) else component
        if key not in found.tensors:
            where = f" in component {found.name!r}" if found.name else ""
            raise CheckpointError(f"{self.root}: there is no tensor {key!r}{where}; `lowbit inspect` lists its tensors")
        return self._by_path[found.tensors[key].path]

    def read(self, component: Component | str, key: str) -> torch.Tensor:
        """Return a tensor of a component (or of the component of that name) as fresh CPU memory.

        Raises:
            CheckpointError: no such component or tensor, a dtype that torch lacks, or the file cannot be read.
        """
        file, places = self._locate(component, key), self._places_of(component, key)
        tensor = file.read(key)
        return self._rescaled(component, key, tensor if places is None else tensor[places])

    def read_rows(self, component: Component | str, key: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor along dimension 0; otherwise as `read`."""
        if self._places_of(component, key) is not None:
            return self.read(component, key)[start:stop]
        return self._rescaled(component, key, self._locate(component, key).read_rows(key, start, stop), start)

    def read_elements(self, component: Component, key: str, places: Sequence[int]) -> torch.Tensor:
        """Return the elements of a tensor at these indices of it, flattened; otherwise as `read`."""
        if (component.name, key) in self._places or (component.name, key) in self._rescalings:
            return self.read(component, key).flatten()[list(places)]
        return self._locate(component, key).read_elements(key, places)

    def reorder(self, component: Component, key: str, places: torch.Tensor) -> None:
        """From now on `read` gives the values of a tensor in another order along dimension 0: value i is places[i]."""
        self._places[component.name, key] = places

    def rescaled(self, rescalings: Mapping[tuple[str, str], Rescaling]) -> Source:
        """The same files, some tensors of which, by the names of component and tensor, are read with a scale folded in.

        Closing either closes the files of both.
        """
        view = copy.copy(self)
        view._rescalings = dict(rescalings)  # noqa: SLF001
        return view

    def _rescaled(self, component: Component | str, key: str, tensor: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Rows of a tensor, the first of which is its row `start`, as this source gives them."""
        name = component if isinstance(component, str) else component.name
        change = self._rescalings.get((name, key))
        return tensor if change is None else change.apply(tensor, start, f"{self.place}: tensor {key!r}")

    def _places_of(self, component: Component | str, key: str) -> torch.Tensor | None:
        return self._places.get((component if isinstance(component, str) else component.name, key))

    def read_bytes(self, component: Component | str, key: str) -> bytes:
        """Return a tensor's bytes as stored; works for every dtype, known to torch or not."""
        return self._locate(component, key).read_bytes(key)

    def fingerprint(self) -> str:
        """Return a hex digest that changes when a weight file is added, renamed, replaced or rewritten.

        It covers names, sizes, times of modification and headers, not the data: reading that would take as long as
        converting it.
        """
        facts = [(name, file.size, file.mtime_ns, file.header_sha256) for name, file in sorted(self.files.items())]
        return hashlib.sha256(json.dumps(facts).encode("ascii")).hexdigest()

    def close(self) -> None:
        """Close every file."""
        for file in self.files.values():
            file.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_source(path: str | Path, dialect: str | None = None) -> Source:
    """Open a safetensors or .gguf file, a `*.safetensors.index.json` with its shards, or a model folder, and check it.

    `dialect`: read it in that one, for files that do not say how their weights are stored.

    Raises:
        CheckpointError: the path is missing or a pickle, a file or index is unsound, or two tensors have one name.
    """
    path = Path(path)
    contents = FolderContents()
    kind: Literal["file", "sharded", "folder"]
    if path.is_dir():
        kind, root, contents = "folder", path, scan_folder(path)
        sets = contents.weight_sets
    elif path.name.endswith(".json"):
        refuse_pickle(path)
        kind, root, index = "sharded", path.parent, read_index(path)
        sets = [WeightSet("", shard_paths(index), index)]
    else:
        refuse_pickle(path)
        kind, root, sets = "file", path.parent, [WeightSet("", [path], None)]
    with contextlib.ExitStack() as stack:
        components = [_open_component(weights, root, stack) for weights in sets]
        stack.pop_all()  # every file is sound: the source closes them
    return Source(root, kind, components, contents, dialect)


def _open_file(path: Path) -> WeightFile:
    return GgufFile(path) if path.suffix.lower() == ".gguf" else SafetensorsFile(path)


def _open_component(weights: WeightSet, root: Path, stack: contextlib.ExitStack) -> Component:
    shards = tuple(Shard(path, path.relative_to(root).as_posix()) for path in weights.shards)
    files = {shard.relative: stack.enter_context(_open_file(shard.path)) for shard in shards}
    tensors: dict[str, TensorInfo] = {}
    for file in files.values():
        for name, info in file.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{file.path}: tensor {name!r} is also in {tensors[name].path}: two layers with one name, and one "
                    "of them would be lost; remove the shard that does not belong to the set"
                )
            tensors[name] = info
    index = weights.index
    if index is None:
        return Component(weights.folder, shards, files, tensors, None, None)
    check_weight_map(index, files.values())
    unnamed = tensors.keys() - index.weight_map.keys()
    if unnamed:
        _log.warning("%s: %d tensors are in the shards but not in the index (%s); they are read too",
                     index.path, len(unnamed), min(unnamed))  # fmt: skip
    return Component(weights.folder, shards, files, tensors, index.content, index.path.name)
