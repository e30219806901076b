"""A GGUF file under the names of the checkpoint that it was made from, so that the two can be compared."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

from lowbit.errors import CheckpointError

from .folder import FolderContents
from .gguf_file import TYPES, GgufFile
from .gguf_names import ARCHITECTURES, Naming, model_prefix, name_as_llama_cpp
from .quantized_source import QuantizedComponent, look_for_layers
from .source import Source

_SCALES = (".scale", ".input_scale")


def under_names_of(source: Source, output: Source) -> Source:
    """`output` with the names and the order of rows of `source`, if it is a GGUF file that has others; else itself.

    Others are llama.cpp's, in a file of one of `gguf_names.ARCHITECTURES`, and those without an image model's prefix.
    The files are the same: closing either closes those of both.
    """
    files = list(output.files.values())
    file = files[0]
    if not isinstance(file, GgufFile) or len(files) > 1 or len(source.components) > 1:
        return output
    held = look_for_layers(source, source.components[0], strict=False)
    naming = _naming(held, file)
    back = {new: old for old, new in naming.names.items() if new != old}
    if not back.keys() & file.tensors.keys():
        return output
    for key in file.tensors:
        layer, _, suffix = key.rpartition(".")
        if f".{suffix}" in _SCALES and f"{layer}.weight" in back:
            back[key] = f"{back[f'{layer}.weight'].removesuffix('.weight')}.{suffix}"
    return _renamed(output, file, back, naming)


def keeps_values(before: QuantizedComponent, after: QuantizedComponent, key: str) -> bool:
    """Whether a plain tensor of a GGUF file is wider than what it was made of, as vectors of 16 bits are: no loss."""
    was, now = before.specs[key], after.specs[key]
    if after.dialect is None or after.dialect.name != "gguf" or was.shape != now.shape:
        return False
    floats = was.dtype.is_floating_point and now.dtype.is_floating_point
    return floats and key in before.found.plain and now.dtype.itemsize > was.dtype.itemsize


def _naming(held: QuantizedComponent, file: GgufFile) -> Naming:
    """The names that the source's tensors would have in the file."""
    if any(isinstance(other, GgufFile) for other in held.component.files.values()):
        return Naming({}, {})
    if (architecture := file.metadata.get("general.architecture", "")) in ARCHITECTURES:
        try:
            return name_as_llama_cpp(held, architecture)
        except CheckpointError:  # it was not made from this source, or not by these names
            return Naming({}, {})
    keys = [*held.specs, *(f"{layer}.weight" for layer in held.layers)]
    prefix = model_prefix(keys)
    if not prefix or any(key.startswith(prefix) for key in file.tensors):
        return Naming({}, {})
    return Naming({key: key.removeprefix(prefix) for key in keys if key.startswith(prefix)}, {})


def _renamed(output: Source, file: GgufFile, back: dict[str, str], naming: Naming) -> Source:
    """`output` with its tensors under the names `back` says."""
    view = copy.copy(file)
    view.tensors = {
        back.get(name, name): replace(info, name=back.get(name, name)) for name, info in file.tensors.items()
    }
    types = {back.get(name, name): kind for name, kind in json.loads(file.metadata[TYPES]).items()}
    view.metadata = {**file.metadata, TYPES: json.dumps(types)}
    component = output.components[0]
    component = replace(component, files=dict.fromkeys(component.files, view), tensors=view.tensors)
    made = Source(output.root, output.kind, [component], FolderContents(), output.dialect)
    for key, heads in naming.heads.items():
        rows = view.tensors[key].shape[0] if key in view.tensors else 0
        if rows and rows % (2 * heads) == 0:  # else it is of another model, which comparing the shapes tells
            order = naming.order(key, rows)
            assert order is not None
            made.reorder(component, key, order.argsort())
    return made
