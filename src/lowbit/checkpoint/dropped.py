"""What a conversion left out on purpose, as the header of its output says, so that nobody takes it for lost."""

from __future__ import annotations

import json
from collections.abc import Iterable

from .plan_data import TensorPlan
from .quantized_source import QuantizedComponent
from .source import Component
from .weight_shape import plain_key

DROPPED = "lowbit_dropped"
"""The header metadata of an output that lists the keys which its source has beside its own."""


def dropped_text(held: QuantizedComponent, tensors: Iterable[TensorPlan]) -> str:
    """The header entry for the tensors that a plan drops, and those that were dropped before; "" without any.

    What describes or belongs to a layer that is converted again is not left out: it has become something else.
    """
    gone = {tensor.key for tensor in tensors if tensor.action == "drop"}
    plain = [key for key in held.found.plain if key in gone]
    layers = [plain_key(stored) for stored in held.layers.values() if stored.keys["qdata"] in gone]
    found = sorted({*plain, *layers, *dropped_keys(held.component)})
    return json.dumps(found) if found else ""


def dropped_keys(component: Component) -> frozenset[str]:
    """The keys that the headers of a component list; none where an entry cannot be read."""
    found: set[str] = set()
    for file in component.files.values():
        try:
            keys = json.loads(file.metadata.get(DROPPED, "[]"))
        except ValueError:
            continue
        if isinstance(keys, list):
            found.update(key for key in keys if isinstance(key, str))
    return frozenset(found)
