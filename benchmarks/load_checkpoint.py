"""Load a quantized single file into a module: seconds against those of reading the file, and the peak of memory.

    python -m benchmarks.load_checkpoint [--formats SPEC...] [--size 2.7] [--folder DIR] [--json FILE]

The file holds linears of a Qwen-Image block (3072, 12288, 18432) until it has the size wanted. Each measurement is a
process of its own: reading the whole file into fresh memory, and `lowbit.load` into a module on the meta device, one
after the other, several times; the file is in the page cache. Memory is the process's own peak above what it had before
loading, so what the page cache holds does not count. Loaded parts are compared with those that were written first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import lowbit
from benchmarks.minilm_model import machine
from lowbit.checkpoint.save import save
from lowbit.formats import parse_spec
from lowbit.formats.parts import raw_bytes
from lowbit.tensor import QuantizedTensor

RESULT = Path(__file__).parent / "results" / "load_checkpoint.json"
FORMATS = ("fp8_e4m3", "int8", "awq_w4a16", "nvfp4", "mxfp8", "svdquant_w4a4", "wna16")
SHAPES = ((18432, 3072), (3072, 3072), (3072, 3072), (3072, 3072), (3072, 3072), (12288, 3072), (3072, 12288))
ROUNDS = 5


class Block(nn.Module):
    """The linears of one block."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16) for n, k in SHAPES)


def blocks_for(spec: str, size: float) -> int:
    """How many blocks make a file of this many bytes."""
    fmt = parse_spec(spec)
    return max(1, round(size / sum(fmt.nbytes(n, k) for n, k in SHAPES)))


def model(count: int, device: str = "meta") -> nn.Module:
    """A stack of blocks."""
    return nn.ModuleDict({"blocks": nn.ModuleList(Block(device) for _ in range(count))})


def write(path: Path, spec: str, count: int) -> None:
    """Write the file: the same seven weights in every block, quantized once."""
    fmt = parse_spec(spec)
    weights = []
    for index, (n, k) in enumerate(SHAPES):
        w = torch.randn(n, k, generator=torch.Generator().manual_seed(index)).bfloat16()
        weights.append(QuantizedTensor(fmt.quantize(w), fmt, (n, k), torch.bfloat16))
    module = model(count)
    for block in module["blocks"]:
        for layer, weight in zip(block.layers, weights, strict=True):
            clone = QuantizedTensor(dict(weight.parts), fmt, weight.matrix, torch.bfloat16)
            layer.weight = nn.Parameter(clone, requires_grad=False)
    save(module, path)


def check(path: Path, spec: str, count: int) -> None:
    """The last block's first weight is what was written."""
    n, k = SHAPES[0]
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    module = model(count)
    lowbit.load(module, path)
    found = module["blocks"][-1].layers[0].weight
    for name, part in parse_spec(spec).quantize(w).items():
        assert torch.equal(raw_bytes(found.parts[name]), raw_bytes(part)), name


def once(kind: str, path: Path, count: int) -> dict[str, float]:
    """Seconds and bytes of memory of one way, in this process."""
    module = model(count)
    before = _memory("VmRSS")
    began = time.perf_counter()
    if kind == "read":
        buffer = torch.empty(path.stat().st_size, dtype=torch.uint8)
        with path.open("rb", buffering=0) as file:
            view, done = memoryview(buffer.numpy()), 0
            while done < len(view):
                done += file.readinto(view[done : done + (64 << 20)])
    else:
        lowbit.load(module, path)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "bytes": _memory("VmHWM") - before}


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def measure(spec: str, size: float, folder: Path) -> dict[str, object]:
    """One format: both ways, alternating."""
    count, path = blocks_for(spec, size), folder / "model.safetensors"
    write(path, spec, count)
    check(path, spec, count)
    found: dict[str, list[dict[str, float]]] = {"read": [], "load": []}
    for _ in range(ROUNDS):
        for kind, rows in found.items():
            command = [sys.executable, "-m", "benchmarks.load_checkpoint", "--once", kind, str(path), str(count)]
            rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    bytes_ = path.stat().st_size
    path.unlink()
    seconds = {kind: statistics.median(row["seconds"] for row in rows) for kind, rows in found.items()}
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(found["read"], found["load"], strict=True)]
    row = {
        "format": spec,
        "bytes": bytes_,
        "read_seconds": seconds["read"],
        "load_seconds": seconds["load"],
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "above_size_mb": (statistics.median(row["bytes"] for row in found["load"]) - bytes_) / 1e6,
    }
    print(
        f"{spec:16s} {bytes_ / 1e9:.2f} GB  read {seconds['read']:.2f} s  load {seconds['load']:.2f} s  "
        f"ratio {row['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})  "
        f"peak {row['above_size_mb']:.0f} MB above the size",
        flush=True,
    )
    return row


def main() -> None:
    """Measure, print and write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--formats", nargs="+", default=list(FORMATS))
    arguments.add_argument("--size", type=float, default=2.7, help="GB")
    arguments.add_argument("--folder", type=Path, default=None, help="where the file is put meanwhile")
    arguments.add_argument("--json", type=Path, default=RESULT)
    arguments.add_argument("--once", nargs=3, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.once:
        print(json.dumps(once(given.once[0], Path(given.once[1]), int(given.once[2]))))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        rows = [measure(spec, given.size * 1e9, Path(folder)) for spec in given.formats]
    result = {"machine": machine(), "load": os.getloadavg()[0], "rows": rows}
    given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
