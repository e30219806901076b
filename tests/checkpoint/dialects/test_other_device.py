"""Every dialect with the tensors of another device, as models give them that are saved or loaded there.

Without a GPU a stand-in refuses what a GPU would (`tests.support.other_device`).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.checkpoint.dialects import StoredLayer, TensorSpec, dialects
from lowbit.checkpoint.respell import described
from lowbit.formats import parse_spec
from lowbit.formats.parts import raw_bytes
from tests.checkpoint.dialects.comfy_files import every_spec
from tests.checkpoint.dialects.test_every_pair import WRITTEN, layer_and_parts
from tests.support import gaussian
from tests.support.other_device import Elsewhere, needs_stand_in, other_device, there

pytestmark = needs_stand_in


def pairs() -> list[tuple[str, str]]:
    """Each dialect with each format that it takes."""
    made = [(spec, layer_and_parts(spec)) for spec in every_spec()]
    return [
        (name, spec)
        for name in WRITTEN
        for spec, known in made
        if known is not None and dialects()[name].refuses(known[0]) is None
    ]


def values(x: Tensor) -> Tensor:
    """Of a tensor of either device; what files hold besides weights (markers, shapes) may be made on the CPU."""
    return raw_bytes(x.inner if isinstance(x, Elsewhere) else x)


def test_codes_beyond_the_last_column_are_filled_on_the_device():
    """Of compressed-tensors' rows that do not end with a byte, in words and in bytes."""
    fmt, dialect = parse_spec("wna16(bits=4,group_size=0)"), dialects()["compressed_tensors"]
    stored, parts = StoredLayer("blocks.0.proj", fmt, (16, 100)), fmt.quantize(gaussian(16, 100))
    expected = dialect.store_parts(stored, parts)
    specs = {key: TensorSpec.of(tensor) for key, tensor in expected.items()}
    (layer,) = dialect.find_layers(described(dialect, stored, specs), expected.__getitem__).layers.values()
    with other_device():
        back = dialect.load_parts(replace(layer, where="file"), there(expected).__getitem__)
    assert all(isinstance(back[part], Elsewhere) for part in parts)
    assert all(torch.equal(values(back[part]), values(tensor)) for part, tensor in parts.items())


@pytest.mark.parametrize(("name", "spec"), pairs())
def test_a_pair_is_stored_and_loaded_on_the_device(name, spec):
    """What is stored has the same values, and the parts that are made of it are on the device."""
    dialect = dialects()[name]
    stored, parts = layer_and_parts(spec)
    expected = dialect.store_parts(stored, parts)
    with other_device():
        tensors = dialect.store_parts(stored, there(parts))
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(values(tensors[key]), values(expected[key])) for key in expected)
        held = there(expected)
        specs = {key: TensorSpec.of(tensor) for key, tensor in held.items()}
        found = dialect.find_layers(described(dialect, stored, specs), held.__getitem__)
        (layer,) = found.layers.values()
        back = dialect.load_parts(replace(layer, where="file"), held.__getitem__)
    assert all(isinstance(back[part], Elsewhere) for part in parts)
    assert all(torch.equal(values(back[part]), values(tensor)) for part, tensor in parts.items())
