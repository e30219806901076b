"""The gguf dialect: layers found by the types of the header, decoded as the gguf package decodes them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.dequantize import dequantize
from lowbit.checkpoint.dialects import get_dialect
from lowbit.checkpoint.migrate import migrate
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.quantized_source import look_for_layers
from lowbit.checkpoint.source import open_source
from lowbit.errors import CheckpointError, LowbitError
from lowbit.numerics.gguf_blocks import READABLE
from tests.checkpoint.gguf_files import blocks, gguf, write_file


def look(path):
    """The layers of a file, with their parts."""
    with open_source(path) as source:
        held = look_for_layers(source, source.components[0])
        return held, {name: held.load(stored) for name, stored in held.layers.items()}


@pytest.mark.parametrize("kind", READABLE)
def test_every_type_decodes_as_the_package_does(tmp_path, kind):
    """A file of any readable type gives, through dialect and format, the values of gguf.dequantize."""
    raw = blocks(kind, 5, 512)
    path = write_file(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (kind, raw)})

    held, parts = look(path)
    stored = held.layers["blk.0.attn_q"]
    found = stored.format.dequantize(parts["blk.0.attn_q"], stored.shape, torch.float32)

    assert held.dialect is get_dialect("gguf")
    assert stored.format.spec == f"gguf(type={kind})"
    assert stored.shape == (5, 512)
    assert np.array_equal(found.numpy(), gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize("name", ["q.scale", "q.weight.scale"])
def test_a_scale_beside_blocks_multiplies(tmp_path, name):
    """NVFP4 weights have a float32 scale in a tensor of their own, under either of two names; input scales are kept."""
    raw = blocks("NVFP4", 4, 128)
    tensors = {
        "q.weight": ("NVFP4", raw),
        name: ("F32", np.array([0.25], dtype=np.float32)),
        "q.input_scale": ("F32", np.array([3.0], dtype=np.float32)),
        "norm.scale": ("F32", np.ones(7, dtype=np.float32)),
    }

    held, parts = look(write_file(tmp_path / "m.gguf", tensors))
    stored = held.layers["q"]

    assert set(stored.format.part_names) == {"qdata", "global_scale", "input_scale"}
    assert held.found.plain == ["norm.scale"]
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType.NVFP4) * np.float32(0.25)
    assert np.array_equal(stored.format.dequantize(parts["q"], (4, 128), torch.float32).numpy(), expected)


def test_a_plain_file_has_no_layers(tmp_path):
    """A GGUF file of floats is one of the dialect without layers, so that what describes GGUF is not written on."""
    held, _ = look(write_file(tmp_path / "m.gguf", {"a.weight": ("F32", np.ones((4, 8), dtype=np.float32))}))

    assert held.dialect is get_dialect("gguf")
    assert held.layers == {}
    assert held.found.plain == ["a.weight"]


BAD = {
    "bank.*has 3 axes": {"bank.weight": ("Q8_0", blocks("Q8_0", 6, 64).reshape(2, 3, 68))},
    "is no layer's weight by its name": {"table": ("Q8_0", blocks("Q8_0", 6, 64))},
    "layer 'a': is of the GGUF type IQ4_NL, which is not read here": {"a.weight": ("IQ4_NL", blocks("IQ4_NL", 2, 64))},
    "layer 'a': 'a.scale' is float32 \\[3\\], expected one float32 value": {
        "a.weight": ("Q8_0", blocks("Q8_0", 3, 64)),
        "a.scale": ("F32", np.ones(3, dtype=np.float32)),
    },
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_read_is_named(tmp_path, message):
    """Banks of experts, names without a layer, other types and strange scales are problems that name file and layer."""
    path = write_file(tmp_path / "m.gguf", {**BAD[message], "good.weight": ("Q4_0", blocks("Q4_0", 2, 32))})

    with pytest.raises(CheckpointError, match=message):
        look(path)
    with open_source(path) as source:
        held = look_for_layers(source, source.components[0], strict=False)
        assert list(held.layers) == ["good"]
        assert len(held.found.problems) == 1


def test_blocks_over_the_ends_of_rows_are_refused(tmp_path):
    """K-quants of a weight whose rows their blocks do not divide, as ComfyUI-GGUF makes them, are named."""
    path = write_file(
        tmp_path / "m.gguf", {"a.weight": ("Q4_K", blocks("Q4_K", 3, 256))}, {"comfy.gguf.orig_shape.a.weight": [8, 96]}
    )
    with pytest.raises(
        CheckpointError, match=r"layer 'a': its shape is .8, 96., but its blocks are cut by rows of 256"
    ):
        look(path)


def test_nothing_is_written_in_it(tmp_path):
    """The dialect says that it is for reading, and what writes GGUF files."""
    held, parts = look(write_file(tmp_path / "m.gguf", {"a.weight": ("Q8_0", blocks("Q8_0", 3, 64))}))
    dialect = get_dialect("gguf")

    assert not dialect.writes
    assert "export_gguf" in dialect.refuses(held.layers["a"])
    for write in (lambda: dialect.stored_specs(held.layers["a"]), lambda: dialect.store_parts(held.layers["a"], parts)):
        with pytest.raises(LowbitError, match="export_gguf"):
            write()


def test_converting_and_decoding_a_file(tmp_path):
    """dequantize and convert --requantize take a GGUF file as any other, and nothing of its description stays."""
    raw = blocks("Q6_K", 64, 256)
    path = write_file(tmp_path / "m.gguf", {"a.weight": ("Q6_K", raw), "norm.weight": ("F32", np.ones(8, np.float32))})
    expected = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType.Q6_K))
    with open_source(path) as source:
        dequantize(source, tmp_path / "plain.safetensors", dtype=torch.float32)
        plan = make_plan(source, "int8(granularity=row)", preset="none", solver="rtn", requantize=True)
        convert(source, tmp_path / "int8.safetensors", plan)

    with open_source(tmp_path / "plain.safetensors") as plain:
        assert torch.equal(plain.read("", "a.weight"), expected)
        assert "gguf.types" not in next(iter(plain.files.values())).metadata
    held, parts = look(tmp_path / "int8.safetensors")
    assert held.dialect is get_dialect("comfy")
    assert parts["a"]["qdata"].dtype == torch.int8


def test_codes_go_to_another_dialect(tmp_path):
    """migrate writes NVFP4 as the nvfp4 that ComfyUI knows, and other blocks, which it does not, as they are."""
    tensors = {"a.weight": ("Q4_K", blocks("Q4_K", 64, 256)), "b.weight": ("NVFP4", blocks("NVFP4", 64, 128))}
    with open_source(write_file(tmp_path / "m.gguf", tensors)) as source:
        migrate(source, tmp_path / "out.safetensors", "comfy")

    held, parts = look(tmp_path / "out.safetensors")
    weight = held.layers["b"].format.dequantize(parts["b"], (64, 128), torch.float32)
    expected = torch.from_numpy(gguf.dequantize(tensors["b.weight"][1], gguf.GGMLQuantizationType.NVFP4))

    assert [stored.format.spec for stored in held.layers.values()] == ["gguf(type=Q4_K)", "nvfp4"]
    assert np.array_equal(parts["a"]["qdata"].numpy(), tensors["a.weight"][1])
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "MXFP4", "NVFP4"])
def test_compressed_tensors_has_a_place_for_the_codes(tmp_path, kind):
    """What that dialect refuses as blocks it takes as the format of the same codes, which migrating a folder uses."""
    held, _ = look(write_file(tmp_path / "m.gguf", {"a.weight": (kind, blocks(kind, 64, 128))}))
    stored, dialect = held.layers["a"], get_dialect("compressed_tensors")

    assert dialect.refuses(stored)
    assert None in [dialect.refuses(replace(stored, format=other)) for other in stored.format.equivalents()]
