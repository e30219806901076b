"""A tiny model on disk, and the command as a function."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from lowbit.cli import app


def tiny_model(path, seed=0, **more):
    """Write a model of two blocks, with norms and a small layer, in bfloat16; `more` replaces tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for block in range(2):
        for name, shape in {"attn.q": (64, 64), "mlp.up": (128, 64), "mlp.down": (64, 128)}.items():
            tensors[f"blocks.{block}.{name}.weight"] = torch.randn(shape, generator=generator).bfloat16()
            tensors[f"blocks.{block}.{name}.bias"] = torch.randn(shape[:1], generator=generator).bfloat16()
        tensors[f"blocks.{block}.norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    tensors["small.weight"] = torch.randn((4, 64), generator=generator).bfloat16()
    save_file({**tensors, **{key.replace("__", "."): value for key, value in more.items()}}, path)
    return path


class Outcome:
    """What a run of the command gave."""

    def __init__(self, result):
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception

    @property
    def json(self):
        """stdout as the one JSON document that it must be."""
        return json.loads(self.out)


@pytest.fixture
def lowbit():
    """The command: `lowbit("convert", path, ...)` runs it in this process; `columns` is how wide its terminal is."""

    def run(*arguments, columns=200):
        return Outcome(CliRunner(env={"COLUMNS": str(columns)}).invoke(app, [str(argument) for argument in arguments]))

    return run


@pytest.fixture
def model(tmp_path):
    """A tiny bfloat16 checkpoint."""
    return tiny_model(tmp_path / "model.safetensors")


@pytest.fixture
def quantized(lowbit, model, tmp_path):
    """The same in fp8."""
    path = tmp_path / "fp8.safetensors"
    assert lowbit("convert", model, "-o", path, "--format", "fp8_e4m3").code == 0
    return path
