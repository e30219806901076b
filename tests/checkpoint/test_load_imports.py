"""What loading a checkpoint costs beside reading it."""

from __future__ import annotations

import subprocess
import sys

from safetensors.torch import save_file

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from tests.support import gaussian

PROGRAM = """
import sys, torch, lowbit
module = torch.nn.ModuleDict({"layer": torch.nn.Linear(128, 128, bias=False, device="meta")})
before = set(sys.modules)
lowbit.load(module, sys.argv[1])
module.requires_grad_(False)
print(sorted(name for name in set(sys.modules) - before if name.split(".")[0] in ("sympy", "torch")))
"""


def test_nothing_of_torch_is_imported_to_load(tmp_path):
    """Neither torch.distributed.tensor nor sympy, which PyTorch imports at the first op on a tensor subclass: 0.7 s."""
    save_file({"layer.weight": gaussian(128, 128).bfloat16()}, tmp_path / "plain.safetensors")
    with open_source(tmp_path / "plain.safetensors") as source:
        convert(source, tmp_path / "quantized.safetensors", make_plan(source, "nvfp4"))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "quantized.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
