"""What it costs to take turns with torch: a loop of a torch operation and a native one, against each of them apart.

The same loop with two operations of torch shows what taking turns costs by itself, in caches.

Kernels that had threads of their own would wait for cores on which torch's threads still spin, and the loop would take
longer than its parts. On torch's own threads it must not.

    python -m benchmarks.cpu_pool [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cpu_machine import about
from benchmarks.cpu_timing import Contender, alternate, quartiles
from lowbit.backends.cpu import native, read_bandwidth

RESULT = Path(__file__).parent / "results" / "cpu_pool.json"
SIZES_KB = (256, 4096, 65536)
ROUNDS = 41
BUDGET = 15.0  # seconds a size


def measure(kilobytes: int) -> dict[str, object]:
    """One size: torch changes one such buffer in place; another is read, natively or (to compare) by torch."""
    x, z = torch.randn(kilobytes * 256), torch.randn(kilobytes * 256)
    words = z.view(torch.int64)
    if read_bandwidth(z) != int(words.sum()) % 2**64:
        raise AssertionError("the native operation reads something else")
    parts: dict[str, Callable[[], object]] = {
        "torch": lambda: x.mul_(1.0),
        "native": lambda: read_bandwidth(z),
        "torch's sum": words.sum,
    }
    contenders = {name: Contender(name, _call(part), least=ROUNDS) for name, part in parts.items()}
    for name in ("native", "torch's sum"):
        turns = f"torch, {name}"
        contenders[turns] = Contender(turns, _call(parts["torch"], parts[name]), least=ROUNDS)
    alternate(list(contenders.values()), ROUNDS, BUDGET)
    row: dict[str, object] = {
        "kilobytes": kilobytes,
        "microseconds": {name: each.median * 1e6 for name, each in contenders.items()},
    }
    for name in ("native", "torch's sum"):
        times = (contenders[which].times for which in ("torch", name, f"torch, {name}"))
        ratios = [turns / (first + second) for first, second, turns in zip(*times, strict=True)]
        row[f"torch, {name}"] = {"ratio": statistics.median(ratios), "quartiles": quartiles(ratios)}
    return row


def _call(*parts: Callable[[], object]) -> Callable[[int], object]:
    def call(_: int) -> None:
        for part in parts:
            part()

    return call


def main() -> None:
    """Measure, print and write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, default=RESULT)
    given = arguments.parse_args()
    print(f"{native.isa()}, {native.threads()} threads, {native.pool()}")
    rows = []
    for size in SIZES_KB:
        row = measure(size)
        times = ", ".join(f"{name} {value:.1f} us" for name, value in row["microseconds"].items())
        print(f"{size} KB: {times}")
        for name in ("torch, native", "torch, torch's sum"):
            low, high = row[name]["quartiles"]
            print(f"  {name}: in turns / apart {row[name]['ratio']:.3f} ({low:.3f} to {high:.3f})", flush=True)
        rows.append(row)
    given.json.write_text(json.dumps({"machine": about(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
