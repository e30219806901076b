"""Banks of experts in files: every tensor of a layer with a leading axis E, and `num_experts` in its marker.

A dialect knows one matrix; a bank is stored as its experts would be, stacked, and read expert by expert. Markers are
not stacked: one describes all. `StoredLayer.shape` is that of one expert, and `options` say what else there is
(`weight_shape`). The parts of a bank [E, K, N] are those of [E, N, K] all the same.

The layer of a bank that is a parameter (`experts.down_proj`) has the parameter's name; its codes are at
`experts.down_proj.weight`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.experts import QuantizedBank
from lowbit.formats.parts import Parts, raw_bytes
from lowbit.tensor import QuantizedTensor

from .dialects import Dialect, StoredLayer, TensorSpec
from .dialects.base import Read, layer_of, name_place
from .dialects.comfy_banks import EXPERTS
from .dialects.comfy_marker import MARKER
from .quantized_source import QuantizedComponent
from .weight_shape import PARAMETER, TRANSPOSED, plain_shape


def stored_bank(name: str, bank: QuantizedBank) -> StoredLayer:
    """The bank at a parameter of this name, as it is to be written."""
    layer = layer_of(name)
    options = {EXPERTS: bank.shape[0], **({TRANSPOSED: True} if bank.transposed else {})}
    if layer is None:
        options[PARAMETER] = True
    return StoredLayer(
        name if layer is None else layer,
        bank.format,
        bank.matrix,
        bank.dtype,
        options=options,
        dtypes={part: tensor.dtype for part, tensor in bank.parts.items()},
    )


def experts_of(stored: StoredLayer) -> int:
    """How many experts a stored layer holds; 0 for one that is no bank."""
    return int(stored.options.get(EXPERTS, 0))


def check_bank_dialect(dialect: Dialect, stored: StoredLayer) -> None:
    """Raise `CheckpointError` for a dialect without banks."""
    if dialect.name != "comfy":
        raise CheckpointError(
            f"{name_place('', stored.layer)}: the dialect {dialect.name} has no place for a bank of experts; save in "
            "comfy"
        )


def stored_specs(dialect: Dialect, stored: StoredLayer) -> dict[str, TensorSpec]:
    """Key -> spec of what a layer becomes, before the data exists: with a leading axis E where it is a bank."""
    specs, experts = dialect.stored_specs(stored), experts_of(stored)
    if not experts:
        return specs
    return {
        key: spec if is_marker(key) else TensorSpec(spec.dtype, (experts, *spec.shape)) for key, spec in specs.items()
    }


def one_expert(stored: StoredLayer) -> StoredLayer:
    """A bank as if it were one of its experts, for dialects, which know matrices only."""
    return replace(stored, options={name: value for name, value in stored.options.items() if name != EXPERTS})


def expert_parts(held: QuantizedComponent, stored: StoredLayer, index: int) -> Parts:
    """The canonical parts of one expert of a bank; nothing of the others is read. Raises `PartsError`."""
    assert held.dialect is not None  # a layer was found, so there is one

    def read(key: str) -> Tensor:
        if is_marker(key):
            return held.read(key)
        return held.source.read_rows(held.component, key, index, index + 1)[0]

    return held.dialect.load_parts(one_expert(stored), read)


def decoded_expert(held: QuantizedComponent, stored: StoredLayer, index: int, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] of one expert in `dtype`; of a layer that is no bank, its own. Raises `PartsError`."""
    if not experts_of(stored):
        return held.dequantized(stored, dtype)[0]
    return stored.format.dequantize(expert_parts(held, stored, index), stored.shape, dtype)


def store_bank(dialect: Dialect, stored: StoredLayer, bank: QuantizedBank) -> dict[str, Tensor]:
    """Key -> tensor to be written for a bank. Raises `PartsError` for parts that are not those of its format."""
    plain = bank.in_layout("")
    experts = [
        dialect.store_parts(stored, {name: part[index].cpu() for name, part in plain.parts.items()})
        for index in range(experts_of(stored))
    ]
    return {
        key: first if is_marker(key) else _stacked([one[key] for one in experts]) for key, first in experts[0].items()
    }


def fit_bank(stored: StoredLayer, shape: tuple[int, ...]) -> StoredLayer:
    """A stored bank at the shape of a parameter. Where the file only knows the padded shape, the parameter's is right.

    Raises `CheckpointError` for one that does not fit.
    """
    turned, experts, fmt = bool(stored.options.get(TRANSPOSED)), experts_of(stored), stored.format
    held = plain_shape(stored)
    if held == shape:
        return stored
    if len(shape) == 3 and shape[0] == experts and stored.notes:
        n, k = (shape[2], shape[1]) if turned else (shape[1], shape[2])
        if fmt.part_shapes(n, k) == fmt.part_shapes(*stored.shape):
            return replace(stored, shape=(n, k))
    raise CheckpointError(
        f"{stored.place}: holds a bank of shape {list(held)}, the module expects {list(shape)}; load it into the right "
        "model"
    )


def load_bank(dialect: Dialect, stored: StoredLayer, read: Read, dtype: torch.dtype) -> QuantizedBank:
    """The bank that a stored layer describes. Raises `PartsError`."""
    held: dict[str, Tensor] = {}

    def reader(index: int) -> Read:
        def read_one(key: str) -> Tensor:
            if key not in held:
                held[key] = read(key)
            return held[key] if is_marker(key) else held[key][index]

        return read_one

    single = one_expert(stored)
    experts = [
        QuantizedTensor(dialect.load_parts(single, reader(index)), stored.format, stored.shape, dtype)
        for index in range(experts_of(stored))
    ]
    return QuantizedBank.stack(experts, transposed=bool(stored.options.get(TRANSPOSED)))


def _stacked(tensors: list[Tensor]) -> Tensor:
    return torch.stack([raw_bytes(tensor) for tensor in tensors]).view(tensors[0].dtype)


def is_marker(key: str) -> bool:
    """Whether it is the key of a marker, which one bank has one of."""
    return key.rpartition(".")[2] == MARKER
