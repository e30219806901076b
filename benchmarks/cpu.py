"""Every format's kernels on this processor: linears against PyTorch's and other people's, encoders against copying.

    python -m benchmarks.cpu [--shapes NxK...] [--tokens M...] [--formats SPEC...] [--all] [--isa NAME] [--quick]
                             [--sections linears codecs curve] [--json FILE]

Kernels are those that the dispatch table chooses, and named. All contenders of a shape and a number of tokens are timed
in turn in one process, on bfloat16 inputs and weights in so many copies that no cache holds them, together with reading
a large buffer, which says what the memory gives at that moment. A wrong result ends the program before anything is
timed. A ratio above 1 says that ours is faster; behind it stand the quartiles over the rounds.

`curve` measures many numbers of tokens for the plot in the docs. Sections that are not measured keep what the file has.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import cpu_codecs, cpu_machine, cpu_peers
from benchmarks.cpu_linears import MORE, SPECS, Entry, WrongResultError, ours
from benchmarks.cpu_timing import SLOW, TOO_SLOW, Contender, alternate, expected, quartiles, ratio
from lowbit import dispatch

RESULTS = Path(__file__).parent / "results"
SHAPES = ("12288x3072", "18432x3072")
TOKENS = (1, 8, 64, 512)
CURVE = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CURVE_SPECS = ("awq_w4a16", "nvfp4", "fp8_e4m3", "int8", "int4_plain_mm", "svdquant_w4a4")
SECTIONS = ("linears", "codecs", "curve")
ROUNDS, BUDGET = 15, 8.0  # of a shape and a number of tokens; seconds, which slow contenders exceed
SLOW_ROUNDS = 3  # at least, of ours and of PyTorch's where a call takes long; of others one where it takes a second
CURVE_ROUNDS, CURVE_BUDGET = 7, 4.0
READ = "reading"
ALL_PEERS = (cpu_peers.BF16, cpu_peers.FLOAT32)  # of every format
PEERS = "x its peers"


def measure_shape(
    shape: str, tokens: Sequence[int], specs: Sequence[str], *, rounds: int, budget: float, others: bool, read_mb: int
) -> list[dict[str, Any]]:
    """One weight shape with all numbers of tokens. Raises `WrongResultError`."""
    n, k = (int(size) for size in shape.split("x"))
    cache = cpu_machine.cache_bytes()
    made = {spec: ours(spec, n, k, cache) for spec in specs}
    entries = [entry for entry, _ in made.values()]
    entries += cpu_peers.peers({spec: drawn for spec, (_, drawn) in made.items()}, n, k, cache, others=others)
    readers = cpu_machine.readers(read_mb)
    generator = torch.Generator().manual_seed(2)
    history: dict[str, list[tuple[int, float]]] = {entry.name: [] for entry in entries}
    found = []
    for count in sorted(tokens):
        x = torch.randn(count, k, generator=generator).bfloat16()
        waits = {entry.name: expected(history[entry.name], count) for entry in entries}
        present = [entry for entry in entries if entry.kernel is not None or waits[entry.name] < TOO_SLOW]
        with torch.inference_mode():
            reading = [Contender(f"{READ}: {name}", run) for name, run in readers.items()]
            known = [_checked(entry, x, (n, k)) for entry in present]
            contenders = [_contender(entry, x, fact) for entry, fact in zip(present, known, strict=True)]
            alternate([*reading, *contenders], rounds, budget)
        for contender in contenders:
            history[contender.name].append((count, contender.median))
        read = max((read_mb << 20) / one.median / 1e9 for one in reading)
        rows = _rows(present, contenders, known)
        for row in rows:
            row["share"] = row["gb_s"] / read
        slow = {name: wait for name, wait in waits.items() if name not in {entry.name for entry in present}}
        found.append({"shape": [n, k], "tokens": count, "read_gb_s": read, "rows": rows, "too_slow": slow})
    return found


def _contender(entry: Entry, x: torch.Tensor, fact: dict[str, Any]) -> Contender:
    given, weights, run = entry.input(x), entry.weights, entry.run
    first = fact.pop("first")
    least = entry.least if first < SLOW else min(entry.least, SLOW_ROUNDS)
    if first > 1 and entry.least < SLOW_ROUNDS:
        least = 1
    return Contender(entry.name, lambda i: run(given, weights[i % len(weights)]), least=least, estimate=first)


def _checked(entry: Entry, x: torch.Tensor, shape: tuple[int, int]) -> dict[str, Any]:
    """What is known of an entry before it is timed, its error included. Raises `WrongResultError`."""
    n, k = shape
    given = entry.input(x)
    began = time.perf_counter()
    y = entry.run(given, entry.weights[0])
    first = time.perf_counter() - began
    fact: dict[str, Any] = {
        "name": entry.name,
        "ours": entry.kernel is not None,
        "error": entry.check(given if given.is_floating_point() else x, y),
        "bytes": entry.nbytes,
        "copies": len(entry.weights),
        "work": 2 * x.shape[0] * n * k,
        "first": first,
    }
    if entry.kernel is not None:
        kernel = entry.kernel(given)
        fact["kernel"] = {
            "name": kernel.name,
            "backend": kernel.backend,
            "layout": entry.layout,
            "isa": cpu_machine.instruction_set() if kernel.backend == "cpu" else None,
            "tolerance": kernel.tolerance,
        }
    return fact


def _rows(entries: Sequence[Entry], contenders: Sequence[Contender], known: Sequence[dict[str, Any]]) -> list[dict]:
    """One row an entry: speeds, and for ours the ratios to its peers."""
    rows = []
    for entry, contender, fact in zip(entries, contenders, known, strict=True):
        seconds, work = contender.median, fact.pop("work")
        row = {
            **fact,
            "seconds": seconds,
            "quartiles": quartiles(contender.times),
            "rounds": len(contender.times),
            "gflop_s": work / seconds / 1e9,
            "gb_s": entry.nbytes / seconds / 1e9,
        }
        if entry.kernel is not None:
            row["ratios"] = {
                peer.name: ratio(contender, other)
                for peer, other in zip(entries, contenders, strict=True)
                if peer.kernel is None and (not peer.of or entry.name in peer.of)
            }
        rows.append(row)
    return rows


def show_group(console: Console, group: dict[str, Any]) -> None:
    """The table of one shape and number of tokens."""
    n, k = group["shape"]
    table = Table(title=f"{n} x {k}, {group['tokens']} tokens; memory reads {group['read_gb_s']:.1f} GB/s")
    for head in ("what", "kernel", "ms", "GFLOP/s", "GB/s", "of reading", *(f"x {name}" for name in ALL_PEERS), PEERS):
        table.add_column(head, justify="left" if head in {"what", "kernel", PEERS} else "right")
    for row in group["rows"]:
        kernel = row.get("kernel")
        ratios = {name: spread(one) for name, one in row.get("ratios", {}).items()}
        dense = [ratios.pop(name, "") for name in ALL_PEERS]
        peers = "\n".join(f"{value} {name}" for name, value in ratios.items())
        ran = kernel["name"] + (f" {kernel['isa']}" if kernel["isa"] else "") if kernel else ""
        table.add_row(
            row["name"], ran, f"{1e3 * row['seconds']:.3f}", f"{row['gflop_s']:.0f}", f"{row['gb_s']:.1f}",
            f"{row['share']:.0%}", *dense, peers, style="bold" if row["ours"] else "",
        )  # fmt: skip
    console.print(table)
    for name, wait in group["too_slow"].items():
        console.print(f"{name} is left out: about {wait:.0f} s a call, as fewer tokens tell")


def show_codecs(console: Console, codecs: dict[str, Any]) -> None:
    """The table of encoders and decoders."""
    n, k = codecs["shape"]
    copied = f"copying {codecs['copy_gb_s']:.1f}, cloning into fresh memory {codecs['clone_gb_s']:.1f} GB/s"
    table = Table(title=f"{n} x {k} bfloat16; {copied}, read and written")
    heads = (
        "format",
        "what",
        "kernel",
        "rows",
        "M weights/s",
        "GB/s",
        "of copying",
        "fresh: M weights/s",
        "of cloning",
    )
    for head in heads:
        table.add_column(head, justify="left" if head in {"format", "what", "kernel"} else "right")
    for row in codecs["rows"]:
        table.add_row(
            row["format"], row["what"], row["kernel"], str(row["rows"]), f"{row['weights_s'] / 1e6:.0f}",
            f"{row['gb_s']:.1f}", f"{row['share']:.0%}", f"{row['fresh']['weights_s'] / 1e6:.0f}",
            f"{row['fresh']['share']:.0%}",
        )  # fmt: skip
    if not codecs["reused"]:
        console.print("this system's allocator cannot be told to reuse memory: the first figures may be of fresh pages")
    console.print(table)


def spread(found: dict[str, Any]) -> str:
    """A ratio with its quartiles."""
    low, high = found["quartiles"]
    return f"{found['ratio']:.2f} [{low:.2f}, {high:.2f}]"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with what --quick and --isa change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="NxK", help=f"weights; default: {' '.join(SHAPES)}")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M", help=f"default: {' '.join(map(str, TOKENS))}")
    parser.add_argument("--formats", nargs="+", metavar="SPEC", help="of the linears; default: all with kernels")
    parser.add_argument("--all", action="store_true", help=f"also {', '.join(MORE)}")
    parser.add_argument("--isa", help="force an instruction set of the cpu backend (LOWBIT_CPU_ISA)")
    parser.add_argument("--quick", action="store_true", help="one shape, 1 and 64 tokens, few rounds, no others")
    parser.add_argument("--no-others", action="store_true", help="without comfy-kitchen and torchao (slow)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=["linears", "codecs"])
    parser.add_argument("--read-mb", type=int, default=cpu_machine.READ_MB, help="the buffer that is read")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--json", type=Path, help="where the results go; default: results/cpu.json, with --isa cpu_ISA.json"
    )
    given = parser.parse_args(arguments)
    given.shapes = given.shapes or list(SHAPES[:1] if given.quick else SHAPES)
    given.tokens = given.tokens or list(TOKENS[::2] if given.quick else TOKENS)
    given.formats = given.formats or [*SPECS, *(MORE if given.all else ())]
    given.json = given.json or RESULTS / (f"cpu_{given.isa}.json" if given.isa else "cpu.json")
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    given = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    if given.isa:
        os.environ["LOWBIT_CPU_ISA"] = given.isa
    why = dispatch.load("cpu")
    if given.isa and why is not None:
        sys.exit(f"--isa {given.isa}: {why}")
    torch.set_num_threads(given.threads)
    if why is not None:
        console.print(f"the cpu backend is not there ({why}): every kernel below is eager", style="bold red")
    result = json.loads(given.json.read_text()) if given.json.is_file() else {}
    try:
        for section in given.sections:
            result[section] = {"machine": cpu_machine.about(), **_section(section, given, console)}
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(result, indent=1) + "\n")
    except WrongResultError as error:
        sys.exit(str(error))


def _section(section: str, given: argparse.Namespace, console: Console) -> dict[str, Any]:
    if section == "codecs":
        n, k = (int(size) for size in given.shapes[0].split("x"))
        specs = cpu_codecs.SPECS[:3] if given.quick else cpu_codecs.SPECS
        codecs = cpu_codecs.measure(specs, (n, k), *((5.0, 3) if given.quick else (30.0, 7)))
        show_codecs(console, codecs)
        return codecs
    peaks = cpu_machine.peaks(256 if given.quick else cpu_machine.PEAK_SIZE)
    console.print("largest products: " + ", ".join(f"{name} {speed:.0f} GFLOP/s" for name, speed in peaks.items()))
    curve = section == "curve"
    rounds, budget = (3, 2.0) if given.quick else (CURVE_ROUNDS, CURVE_BUDGET) if curve else (ROUNDS, BUDGET)
    groups = []
    for shape in given.shapes[:1] if curve else given.shapes:
        specs = [spec for spec in given.formats if spec in CURVE_SPECS] if curve else given.formats
        made = measure_shape(
            shape, CURVE if curve else given.tokens, specs,
            rounds=rounds, budget=budget, others=not (curve or given.quick or given.no_others),
            read_mb=given.read_mb,
        )  # fmt: skip
        for group in made:
            show_group(console, group)
        groups += made
    return {"peaks": peaks, "missing": cpu_peers.missing(), "groups": groups}


if __name__ == "__main__":
    main()
