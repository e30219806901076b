"""Small comfy files in memory: tensors by key, and what the dialect finds in them."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from lowbit.checkpoint.dialects import Container, FoundLayers, StoredLayer, TensorSpec, get_dialect
from lowbit.formats import Format, Parts, formats, parse_spec
from tests.support import gaussian, widened

COMFY = get_dialect("comfy")
WHERE = "model.safetensors"
LAYER = "blocks.0.attn.to_q"


def specs_of(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    """What a file's header would say of these tensors."""
    return {key: TensorSpec.of(tensor) for key, tensor in tensors.items()}


def marker(fields: object) -> Tensor:
    """A marker tensor as ComfyUI writes it."""
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def marker_fields(tensors: dict[str, Tensor], layer: str = LAYER) -> dict:
    """The JSON in a layer's marker tensor."""
    return json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist()))


def find(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, **options) -> FoundLayers:
    """What the dialect finds in a file of these tensors; data is read only where it is allowed to be."""

    def read(key: str) -> Tensor:
        assert tensors[key].numel() <= 4096, f"{key} was read to find layers"
        return tensors[key]

    return COMFY.find_layers(Container(specs_of(tensors), metadata or {}, where=WHERE), read, **options)


def find_one(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, **options) -> StoredLayer:
    """The only layer of a file."""
    (layer,) = find(tensors, metadata, **options).layers.values()
    return layer


def load(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> tuple[StoredLayer, Parts]:
    """The only layer of a file and its canonical parts."""
    layer = find_one(tensors, metadata)
    return layer, COMFY.load_parts(layer, tensors.__getitem__)


def make_parts(fmt: Format, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Parts:
    """Parts of a Gaussian weight, the optional ones included."""
    parts = fmt.plain.quantize(gaussian(*shape, dtype=dtype))
    if fmt.pre_quant_scale:
        parts["pre_quant_scale"] = torch.linspace(0.5, 2, shape[1]).to(dtype)
    if fmt.input_scale:
        parts["input_scale"] = torch.tensor(0.25)
    return parts


def stored(
    spec: str, shape: tuple[int, int] = (128, 256), layout: str = "", dtype: torch.dtype = torch.bfloat16, **options
) -> dict[str, Tensor]:
    """The tensors of a file with one layer of a Gaussian weight in this format."""
    fmt = parse_spec(spec)
    parts = make_parts(fmt, shape, dtype)
    if dtype == torch.float32:
        parts = widened(parts)
    return COMFY.store_parts(StoredLayer(LAYER, fmt, shape, dtype, options=options, layout=layout), parts)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    """Dtype, shape and every bit are equal."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    raw, wanted = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (got, expected))
    assert torch.equal(raw, wanted)


def every_spec() -> list[str]:
    """Specs of every registered format: as it is, as it states golden numbers for, with optional parts, and more."""
    specs = []
    for name, cls in formats().items():
        specs += [name, *cls.golden_sqnr, f"{name}(pre_quant_scale=true,input_scale=true)"]
    extra = (
        "fp8_e4m3(granularity=block,block_size=32x32)",
        "fp8_e5m2(granularity=block,block_size=1x128)",
        "fp8_e4m3(block_size=64x64)",
        "int8(granularity=tensor)",
        "int8(granularity=block)",
        "int8(granularity=block,block_size=16x64,activations=none)",
        "int8(rotation=16)",
        "int8(rotation=256,activations=none)",
        "int8(block_size=64x64)",
        "awq_w4a16(group_size=16)",
        "svdquant_w4a4(rank=8,act_unsigned=true)",
    )
    specs += [spec for spec in extra if spec.partition("(")[0] in formats()]
    return sorted(set(specs))
