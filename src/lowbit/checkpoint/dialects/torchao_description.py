"""How torchao describes tensors in the header of a safetensors file, and where their data lies.

    header metadata     tensor_names           a JSON list of the tensors of this file
                        layers.0.q.weight      {"_type": "Int8Tensor", "_data": {..}, "_tensor_data_names": [..]}
                        layers.0.q.bias        {"_type": "Tensor"}
    tensors             layers.0.q._weight_qdata, layers.0.q._weight_scale, layers.0.q.bias

`_data` holds the attributes of a class; dtypes, enumerations and settings in it are objects with `_type` and `_data` of
their own. A shard's `tensor_names` names its own tensors only, so it is the entries that count.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.checkpoint.dialects.base import Container, name_place
from lowbit.checkpoint.dialects.described import LayerTensors
from lowbit.errors import CheckpointError

NAMES = "tensor_names"
PLAIN = "Tensor"
_DTYPE = "torch.dtype"


@dataclass(frozen=True)
class Described:
    """One quantized tensor as its header entry has it; `tensors` by the names of its data."""

    tensors: LayerTensors
    kind: str
    data: Mapping[str, Any]
    names: tuple[str, ...]

    def dtype(self, attribute: str, default: torch.dtype | None = None) -> torch.dtype:
        """An attribute that is a dtype. Raises `CheckpointError` where it is none and there is no default."""
        value = self.data.get(attribute)
        name = value.get("_data") if isinstance(value, Mapping) and value.get("_type") == _DTYPE else None
        found = getattr(torch, str(name), None) if name is not None else default
        if not isinstance(found, torch.dtype):
            raise self.tensors.error(f"its {attribute} is {value!r}, expected a dtype; download the file again")
        return found

    def sizes(self, attribute: str) -> tuple[int, int] | None:
        """An attribute that gives two sizes, such as `block_size`, or None where there is none or it is empty."""
        value = self.data.get(attribute)
        if value is None or value == []:
            return None
        good = isinstance(value, Sequence) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)
        if not good:
            raise self.tensors.error(f"its {attribute} is {value!r}, expected two sizes; only matrices are read")
        return int(value[0]), int(value[1])

    def flag(self, attribute: str) -> bool:
        """An attribute that is true or false; false where it is missing."""
        value = self.data.get(attribute, False)
        if not isinstance(value, bool):
            raise self.tensors.error(f"its {attribute} is {value!r}, expected true or false; download the file again")
        return value


def tagged(kind: str, data: Any) -> dict[str, Any]:
    """An object of torchao as JSON."""
    return {"_type": kind, "_data": data}


def dtype_json(dtype: torch.dtype) -> dict[str, Any]:
    """A dtype as JSON."""
    return tagged(_DTYPE, str(dtype).removeprefix("torch."))


def data_key(tensor: str, name: str) -> str:
    """The key of a tensor's data: "a.weight", "scale" -> "a._weight_scale"."""
    module, _, parameter = tensor.rpartition(".")
    return f"{module}._{parameter}_{name}"


def entries(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Tensor -> its entry, of all tensors that a header describes, plain ones included."""
    found = {}
    for name, text in metadata.items():
        if not text.startswith("{"):
            continue
        try:
            entry = json.loads(text)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("_type"), str):
            found[name] = entry
    return found


def describe(held: Container, layer: str, tensor: str, entry: Mapping[str, Any]) -> Described | None:
    """A quantized tensor and its data, or None where all of that is in another file.

    Raises `CheckpointError` for an entry without the fields that torchao writes, and where some of the data is missing.
    """
    data, names, place = entry.get("_data"), entry.get("_tensor_data_names"), name_place(held.where, layer)
    if not isinstance(data, Mapping) or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f"{place}: its entry in the header lacks _data or _tensor_data_names; it was written by another version of "
            "torchao, or is damaged. Save the model again with a current one"
        )
    keys = {name: data_key(tensor, name) for name in names}
    present = {name: key for name, key in keys.items() if key in held.tensors}
    if not present:
        return None
    if missing := [key for name, key in keys.items() if name not in present]:
        raise CheckpointError(f"{place}: lacks {', '.join(missing)}; name the index or the folder, not one shard of it")
    specs = {name: held.tensors[key] for name, key in keys.items()}
    return Described(LayerTensors(layer, held.where, keys, specs), str(entry["_type"]), data, tuple(names))
