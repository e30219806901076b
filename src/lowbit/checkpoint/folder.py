"""Finding the weights in a model folder of Hugging Face transformers or diffusers, and the files that go with them.

transformers: `model.safetensors`, or shards with `model.safetensors.index.json`, beside config and tokenizer files.
diffusers: `model_index.json` names the subfolders (`transformer/`, `text_encoder/`, ...), each laid out that way.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from lowbit.errors import CheckpointError

from .index import PICKLE_SUFFIXES, ShardIndex, read_index, shard_paths, stays_inside
from .strict_json import parse_object

_log = logging.getLogger("lowbit")

_INDEX = re.compile(r"\.safetensors\.index(\.[\w-]+)?\.json$")  # the middle part is diffusers' variant (fp16)
_SHARD = re.compile(r"^(?P<stem>.*)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors$")
_STEMS = ("model", "diffusion_pytorch_model")  # what transformers and diffusers load when there is a choice
_PIPELINE = "model_index.json"
# The unquantized weights in another container: of no use beside the quantized ones, and large.
_OTHER_WEIGHTS = frozenset(
    {".onnx", ".onnx_data", ".h5", ".msgpack", ".ot", ".tflite", ".gguf", ".mlmodel", ".partial"}
)


@dataclass
class WeightSet:
    """The weight files of one component: `folder` relative to the root ("" for the root itself), and its shards."""

    folder: str
    shards: list[Path]
    index: ShardIndex | None


@dataclass
class FolderContents:
    """What a model folder holds. `extra_files` are copied unchanged; `skipped_files` (and folders) are not."""

    weight_sets: list[WeightSet] = field(default_factory=list)
    extra_files: list[Path] = field(default_factory=list)
    skipped_files: list[Path] = field(default_factory=list)


def scan_folder(root: Path) -> FolderContents:
    """Look through a model folder.

    Raises:
        CheckpointError: no safetensors in it, shards missing, files among which the weights cannot be told, or an
            unsound index.
    """
    contents = FolderContents()
    components = _pipeline_components(root)
    claimed: set[Path] = set()
    for folder, names in _walk(root, contents):
        relative = folder.relative_to(root).as_posix().removeprefix(".")
        weights = [name for name in names if name.endswith(".safetensors") and folder / name not in claimed]
        indexes = [name for name in names if _INDEX.search(name)]
        is_component = components is None or relative in components
        chosen = _choose(folder, weights, indexes) if is_component and (weights or indexes) else None
        if chosen is not None:
            chosen.folder = relative
            claimed.update(chosen.shards)
            contents.weight_sets.append(chosen)
        elif any(Path(name).suffix.lower() in PICKLE_SUFFIXES for name in names):
            _log.warning("%s: has weights only as pickle files, which are never read: they are left out", folder)
        for name in names:
            if folder / name not in claimed and name not in indexes:
                _sort_out(folder / name, root, contents)
        unused = [
            folder / name
            for name in indexes
            if chosen is None or chosen.index is None or chosen.index.path.name != name
        ]
        contents.skipped_files += unused
    if not contents.weight_sets:
        pickles = any(path.suffix.lower() in PICKLE_SUFFIXES for path in contents.skipped_files)
        hint = "; it has pickle files, which lowbit never reads: take the model's safetensors files" if pickles else ""
        raise CheckpointError(f"{root}: no safetensors weights in this folder{hint or '; check the path'}")
    contents.skipped_files.sort()
    return contents


def _pipeline_components(root: Path) -> set[str] | None:
    """Return the subfolders that a diffusers pipeline loads, or None where the folder is no pipeline."""
    path = root / _PIPELINE
    if not path.is_file():
        return None
    try:
        content = parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; download it again") from error
    return {name for name, loader in content.items() if isinstance(loader, list) and not name.startswith("_")}


def _walk(root: Path, contents: FolderContents) -> list[tuple[Path, list[str]]]:
    """Return every folder with its file names, sorted, from the top; note hidden and linked folders as skipped."""

    def refuse(error: OSError) -> None:
        raise CheckpointError(f"{error.filename}: cannot be listed: {error.strerror}; check its permissions") from error

    found = []
    for folder_name, folders, names in os.walk(root, onerror=refuse):
        folder = Path(folder_name)
        hidden = [name for name in (*folders, *names) if name.startswith(".")]
        links = [name for name in folders if name not in hidden and (folder / name).is_symlink()]
        for name in links:
            _log.warning("%s: is a link to a folder, left out; name that folder itself to convert it", folder / name)
        contents.skipped_files += [folder / name for name in (*hidden, *links)]
        folders[:] = sorted(set(folders) - set(hidden) - set(links))  # os.walk goes on into these
        found.append((folder, sorted(set(names) - set(hidden))))
    return found


def _sort_out(path: Path, root: Path, contents: FolderContents) -> None:
    """Decide whether a file that is no weight in use is copied."""
    suffix = Path(path.name.removesuffix(".index.json")).suffix.lower()
    if suffix == ".safetensors":
        _log.warning("%s: is not among the weights that the model loads, left out", path)
        contents.skipped_files.append(path)
        return
    other_weights = suffix in _OTHER_WEIGHTS | PICKLE_SUFFIXES
    ours = path.name.endswith(".partial.journal")
    copied = not other_weights and not ours and path.is_file() and stays_inside(path, root)
    (contents.extra_files if copied else contents.skipped_files).append(path)


def _choose(folder: Path, weights: list[str], indexes: list[str]) -> WeightSet:
    """Tell which of a folder's files are its weights."""
    preferred = [name for name in indexes if name in {f"{stem}.safetensors.index.json" for stem in _STEMS}]
    indexes = preferred if len(indexes) > 1 and preferred else indexes
    if len(indexes) > 1:
        raise CheckpointError(
            f"{folder}: has several indexes ({', '.join(indexes)}); name the index file that should be read"
        )
    if indexes:
        index = read_index(folder / indexes[0])
        return WeightSet("", shard_paths(index), index)
    if len(weights) > 1:
        weights = [name for name in weights if name in {f"{stem}.safetensors" for stem in _STEMS}] or weights
    if len(weights) > 1:
        _require_full_set(folder, weights)
    return WeightSet("", [folder / name for name in weights], None)


def _require_full_set(folder: Path, weights: list[str]) -> None:
    """Refuse several files without an index unless their names say that they are all the shards of one set."""
    matches = [match for match in map(_SHARD.match, weights) if match]
    sets = {(match["stem"], match["count"]) for match in matches}
    if len(matches) < len(weights) or len(sets) > 1:
        raise CheckpointError(
            f"{folder}: has {len(weights)} safetensors files ({', '.join(weights[:3])}, ...) and no index that says "
            "which belong together; name the one file that should be read"
        )
    stem, count = sets.pop()
    missing = sorted(set(range(1, int(count) + 1)) - {int(match["number"]) for match in matches})
    if missing:
        name = f"{stem}-{missing[0]:0{len(count)}d}-of-{count}.safetensors"
        raise CheckpointError(
            f"{folder}: {len(missing)} of {count} shards are missing, the first is {name}; download the rest"
        )
