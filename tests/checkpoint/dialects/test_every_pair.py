"""Every dialect with every format: written and read back with the same bits, or refused in words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.checkpoint.dialects import StoredLayer, TensorSpec, dialects
from lowbit.checkpoint.respell import described
from lowbit.errors import PartsError
from lowbit.formats import parse_spec
from tests.checkpoint.dialects.comfy_files import assert_same_bits, every_spec
from tests.support import gaussian

SHAPE = (128, 1024)  # whole groups, tiles and words of every format
WRITTEN = [name for name, dialect in dialects().items() if dialect.writes]


WEIGHTS = {"Gaussian": gaussian(*SHAPE, dtype=torch.bfloat16), "zeros": torch.zeros(SHAPE, dtype=torch.bfloat16)}


def layer_and_parts(spec: str, weight: str = "Gaussian") -> tuple[StoredLayer, dict[str, torch.Tensor]] | None:
    """A weight in a format, its optional parts included; None for a format that is only decoded."""
    fmt = parse_spec(spec)
    if not fmt.encodable:
        return None
    parts = fmt.plain.quantize(WEIGHTS[weight])
    if fmt.pre_quant_scale:
        parts["pre_quant_scale"] = torch.linspace(0.5, 2, SHAPE[1]).bfloat16()
    if fmt.input_scale:
        parts["input_scale"] = torch.tensor(0.25)
    return StoredLayer("blocks.0.proj", fmt, SHAPE), parts


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("spec", every_spec())
@pytest.mark.parametrize("name", WRITTEN)
def test_a_pair_comes_back_or_is_refused(name, spec, weight):
    """What a dialect takes it gives back bit for bit, described by itself alone; all else it refuses before writing."""
    dialect, made = dialects()[name], layer_and_parts(spec, weight)
    if made is None:
        pytest.skip("a format that is only read")
    stored, parts = made
    why = dialect.refuses(stored)
    if why is not None:
        assert len(why.split()) > 3
        with pytest.raises(PartsError, match=stored.layer):
            dialect.stored_specs(stored)
        return
    tensors = dialect.store_parts(stored, parts)
    specs = {key: TensorSpec.of(tensor) for key, tensor in tensors.items()}
    assert specs == dialect.stored_specs(stored)
    found = dialect.find_layers(described(dialect, stored, specs), tensors.__getitem__)
    (layer,) = found.layers.values()
    assert (layer.layer, layer.format, layer.shape) == (stored.layer, stored.format, stored.shape)
    assert set(layer.keys.values()) == set(tensors)
    back = dialect.load_parts(replace(layer, where="file"), tensors.__getitem__)
    assert back.keys() == parts.keys()
    for part, tensor in parts.items():
        assert_same_bits(back[part], tensor)


def test_every_dialect_says_what_it_is():
    """A dialect has a name, a line about itself, and either writes or says that it does not."""
    for name, dialect in dialects().items():
        assert dialect.name == name
        assert len(dialect.summary) > 10
        if not dialect.writes:
            assert dialect.refuses(StoredLayer("a", parse_spec("int8"), SHAPE))
