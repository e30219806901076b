"""Convert a 2.7 GB checkpoint of Qwen-Image shapes: ours against `ctq --simple --low-memory` (convert-to-quant 1.3.4).

    python benchmarks/convert_qwen_image.py --dir /big/disk [--blocks 12] [--formats fp8_e4m3 nvfp4] [--no-peer]

Makes a bf16 checkpoint of 12 blocks (four 3072x3072, one 12288x3072 and one 3072x12288 weight each: 72 layers),
Gaussian with outlier columns. Each conversion is a process of its own, timed from start to end with the import of
torch; peak memory is that of the process. Ours verifies what it wrote; the result is then checked again by `verify`,
and no number is reported when that fails. A plain copy of the file gives the speed of the disk. The result goes to
benchmarks/results/ as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lowbit.checkpoint.source import open_source
from lowbit.checkpoint.verify import verify
from lowbit.checkpoint.writer import CheckpointWriter

SHAPES = {
    "attn.to_q": (3072, 3072),
    "attn.to_k": (3072, 3072),
    "attn.to_v": (3072, 3072),
    "attn.to_out.0": (3072, 3072),
    "img_mlp.net.0.proj": (12288, 3072),
    "img_mlp.net.2": (3072, 12288),
}
MIN_SQNR = {"fp8_e4m3": 31.0, "nvfp4": 20.0, "mxfp8": 30.0, "int8": 30.0}  # dB; rounding to nearest gives more
PEER_FLAGS = {"fp8_e4m3": [], "nvfp4": ["--nvfp4"], "mxfp8": ["--mxfp8"], "int8": ["--int8", "--scaling_mode", "row"]}
OURS = """
import sys
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
with open_source(sys.argv[1]) as source:
    convert(source, sys.argv[2], make_plan(source, sys.argv[3], solver=sys.argv[4], preset="none"))
"""
# Starts a command, waits for it, and prints its time in seconds and the peak memory of the largest process below it.
MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[2:], stdout=open(sys.argv[1], "wb"), stderr=subprocess.STDOUT).returncode
seconds = time.perf_counter() - start
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
cpu = usage.ru_utime + usage.ru_stime
print(json.dumps({"code": code, "seconds": seconds, "peak_mb": usage.ru_maxrss / 1024, "cpu_seconds": cpu}))
"""


def make_checkpoint(path: Path, blocks: int) -> None:
    layers = {f"transformer_blocks.{i}.{name}": shape for i in range(blocks) for name, shape in SHAPES.items()}
    entries = [(f"{name}.weight", torch.bfloat16, shape) for name, shape in layers.items()]
    entries += [(f"{name}.bias", torch.bfloat16, shape[:1]) for name, shape in layers.items()]
    writer = CheckpointWriter(path, entries, {"format": "pt"}, fingerprint=f"qwen {blocks}", resume=False)
    generator = torch.Generator().manual_seed(0)
    for name, (n, k) in layers.items():
        columns = torch.exp(0.6 * torch.randn(k, generator=generator)) * 0.02
        w = torch.randn((n, k), generator=generator).mul_(columns).bfloat16()
        bias = torch.zeros(n, dtype=torch.bfloat16)
        writer.write(f"{name}.weight", w)
        writer.write(f"{name}.bias", bias)
    writer.finish()


def measure(command: list[str], log: Path) -> dict:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(log), *command], capture_output=True, text=True, check=True
    )
    result = json.loads(run.stdout)
    if result["code"]:
        raise SystemExit(f"{command[:3]} failed:\n{log.read_text(errors='replace')[-2000:]}")
    return result


def check(source: Path, target: Path, spec: str, layers: int) -> float:
    with open_source(source) as before, open_source(target) as after:
        result = verify(before, after)
    if result.problems or len(result.layers) != layers or result.failing(MIN_SQNR[spec.partition("(")[0]]):
        raise SystemExit(f"{target}: our result is wrong: {result.problems[:3]} {result.worst(3)}")
    return result.worst(1)[0].accuracy.sqnr


def run_format(source: Path, folder: Path, spec: str, solver: str, layers: int, *, peer: bool) -> dict:
    ours, theirs, log = folder / "ours.safetensors", folder / "theirs.safetensors", folder / "log"
    row = {"format": spec, "solver": solver, "load_before": os.getloadavg()[0]}
    row["ours"] = measure([sys.executable, "-c", OURS, str(source), str(ours), spec, solver], log)
    row["worst_sqnr_db"] = check(source, ours, spec, layers)
    ours.unlink()
    if peer and solver == "rtn":
        name = spec.partition("(")[0]
        command = [str(Path(sys.executable).parent / "ctq"), "-i", str(source), "-o", str(theirs), "--simple"]
        row["ctq"] = measure([*command, "--low-memory", "--save-quant-metadata", *PEER_FLAGS[name]], log)
        theirs.unlink()
        row["times_faster"] = row["ctq"]["seconds"] / row["ours"]["seconds"]
    return row


def copy_seconds(source: Path, folder: Path) -> float:
    start = time.perf_counter()
    shutil.copyfile(source, folder / "copy")
    fd = os.open(folder / "copy", os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    seconds = time.perf_counter() - start
    (folder / "copy").unlink()
    return seconds


def machine() -> dict:
    model = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "")
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": model.partition(":")[2].strip() or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git.stdout.strip(),
    }


def print_table(rows: list[dict], size: int, copied: float) -> None:
    print(f"\n{size / 1e9:.2f} GB bf16; copying the file: {copied:.1f} s")
    print(f"{'format':12} {'solver':13} {'ours s':>8} {'MB':>6} {'worst dB':>9} {'ctq s':>8} {'MB':>6} {'faster':>7}")
    for row in rows:
        peer = row.get("ctq")
        theirs = f"{peer['seconds']:8.1f} {peer['peak_mb']:6.0f} {row['times_faster']:6.1f}x" if peer else ""
        ours = row["ours"]
        print(f"{row['format']:12} {row['solver']:13} {ours['seconds']:8.1f} {ours['peak_mb']:6.0f} "
              f"{row['worst_sqnr_db']:9.2f} {theirs}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="a folder with 8 GB of space")
    parser.add_argument("--blocks", type=int, default=12, help="225 MB each")
    parser.add_argument("--formats", nargs="+", default=["fp8_e4m3", "nvfp4"], choices=sorted(MIN_SQNR))
    parser.add_argument("--solvers", nargs="+", default=["rtn"], help="ours; the peer runs beside rtn")
    parser.add_argument("--no-peer", action="store_true")
    args = parser.parse_args()
    about = machine()
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        source = folder / "source.safetensors"
        make_checkpoint(source, args.blocks)
        layers, copied = args.blocks * len(SHAPES), copy_seconds(source, folder)
        pairs = [(spec, solver) for spec in args.formats for solver in args.solvers]
        rows = [run_format(source, folder, *pair, layers, peer=not args.no_peer) for pair in pairs]
        size = source.stat().st_size
    print_table(rows, size, copied)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    data = {"machine": about, "bytes": size, "copy_seconds": copied, "rows": rows}
    (results / "convert_qwen_image.json").write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
