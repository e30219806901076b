"""convert_to_quant as an oracle: the files it writes load here and decode to what their fields say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowbit.checkpoint.dialects import Container
from lowbit.formats import parse_spec
from tests.checkpoint.dialects.comfy_files import COMFY, WHERE, specs_of
from tests.support import gaussian, sqnr

LAYERS = {"blocks.0.a": (128, 256), "blocks.0.b": (96, 80)}
HEADER = "--save-quant-metadata"
CASES = [
    ([], "fp8_e4m3", 31),
    ([HEADER], "fp8_e4m3", 31),
    (["--scaling_mode", "row"], "fp8_e4m3(granularity=row)", 31),
    (["--scaling_mode", "block", "--block_size", "32"], "fp8_e4m3(granularity=block,block_size=32x32)", 31),
    (["--int8"], "int8(granularity=tensor)", 36),
    (["--int8", "--scaling_mode", "row"], "int8", 38),
    (["--int8", "--scaling_mode", "row", HEADER], "int8", 38),
    (["--int8", "--scaling_mode", "row", "--convrot", "--convrot-group-size", "16", HEADER], "int8(rotation=16)", 38),
    (["--int8", "--scaling_mode", "block", "--block_size", "16"], "int8(granularity=block,block_size=16x16)", 40),
    (["--nvfp4"], "nvfp4", 20),
    (["--mxfp8"], "mxfp8", 31),
]


# All conversions in one process of their own: starting the converter takes seconds, and it installs what it likes.
PROGRAM = """
import json, sys
from convert_to_quant import convert_to_quant
for arguments in json.load(sys.stdin):
    sys.argv = ["ctq", *arguments]
    convert_to_quant.main()
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> list[Path]:
    """The files that convert_to_quant makes of the same two layers, one a case."""
    pytest.importorskip("convert_to_quant")
    folder = tmp_path_factory.mktemp("ctq")
    source = folder / "in.safetensors"
    save_file({f"{name}.weight": w for name, w in weights().items()}, source)
    targets = [folder / f"{index}.safetensors" for index in range(len(CASES))]
    common = ["--simple", "--device", "cpu", "-i", str(source)]
    runs = [[*common, "-o", str(target), *case[0]] for case, target in zip(CASES, targets, strict=True)]
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, input=json.dumps(runs), capture_output=True, text=True, check=False)
    assert all(target.exists() for target in targets), done.stdout[-3000:] + done.stderr[-3000:]
    return targets


def weights() -> dict[str, Tensor]:
    """The weights by layer."""
    return {name: gaussian(*shape, seed=i, dtype=torch.bfloat16) for i, (name, shape) in enumerate(LAYERS.items())}


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(CASES)), ids=[" ".join(arguments) or "plain" for arguments, _, _ in CASES])
def test_its_files_load(converted, case):
    """Every format that convert_to_quant writes is found with its fields and decodes to the weight, near enough."""
    arguments, spec, least = CASES[case]
    with safe_open(converted[case], "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        metadata = file.metadata() or {}
    assert ("_quantization_metadata" in metadata) == bool({HEADER, "--nvfp4", "--mxfp8"} & set(arguments))
    found = COMFY.find_layers(Container(specs_of(tensors), metadata, where=WHERE), tensors.__getitem__)
    assert set(found.layers) == set(LAYERS)
    for name, layer in found.layers.items():
        ragged = "block" in spec and any(size % parse_spec(spec).block_size[0] for size in LAYERS[name])
        fmt = parse_spec("fp8_e4m3(granularity=row)") if ragged else parse_spec(spec)
        assert layer.format.plain == fmt
        assert any("labelled" in note for note in layer.notes) == ragged
        assert layer.shape == LAYERS[name]
        w = layer.format.dequantize(COMFY.load_parts(layer, tensors.__getitem__), layer.shape, torch.float32)
        assert sqnr(weights()[name].float(), w) > least
