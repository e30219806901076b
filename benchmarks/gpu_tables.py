"""The tables that the GPU benchmark prints."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu_peers import CUBLAS


def show_linears(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Ratios to cuBLAS by format and tokens, one line a shape; and the best peer where ours is slower than it."""
    done = [row for row in rows if "ratios" in row]
    if not done:
        return
    tokens = sorted({row["tokens"] for row in done})
    table = Table(
        title="times as fast as cuBLAS bf16 [quartiles]; share of copying at M = 1, of the bf16 peak at the last"
    )
    for head in ("format", "N x K", *(f"M = {m}" for m in tokens), "copy", "peak", "slower than"):
        table.add_column(head, justify="left" if head in {"format", "N x K", "slower than"} else "right")
    groups = itertools.groupby(done, key=lambda row: (row["format"], tuple(row["shape"])))
    for (spec, (n, k)), group in groups:
        by = {row["tokens"]: row for row in group}
        first, last = by[min(by)], by[max(by)]
        behind = {
            f"{name} (M = {m}: {found['ratio']:.2f})"
            for m, row in by.items()
            for name, found in row["ratios"].items()
            if name != CUBLAS and found["ratio"] < 1
        }
        table.add_row(
            spec, f"{n} x {k}", *(_spread(by[m]["ratios"][CUBLAS]) if m in by else "" for m in tokens),
            f"{first['of_copy']:.0%}", f"{last['of_peak']:.0%}", "\n".join(sorted(behind)),
        )  # fmt: skip
    console.print(table)


def _spread(found: dict[str, Any]) -> str:
    low, high = found["quartiles"]
    return f"{found['ratio']:.2f} [{low:.2f}, {high:.2f}]"


def show_codecs(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Encoders and decoders."""
    done = [row for row in rows if "seconds" in row]
    if not done:
        return
    table = Table(title="{} x {} bfloat16".format(*done[0]["shape"]))
    for head in ("what", "kernel", "us", "of copying"):
        table.add_column(head, justify="left" if head in {"what", "kernel"} else "right")
    for row in done:
        table.add_row(row["name"], row["kernel"], f"{1e6 * row['seconds']:.0f}", f"{row['of_copy']:.0%}")
    console.print(table)


def show_crossovers(console: Console, spec: str, rows: Sequence[dict[str, Any]]) -> None:
    """Microseconds by route."""
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    table = Table(title=f"{spec}: microseconds by route")
    for head in ("M", *names, "best", "faults"):
        table.add_column(head, justify="left" if head in {"best", "faults"} else "right")
    for row in rows:
        times = (f"{1e6 * row['seconds'][name]:.1f}" if name in row["seconds"] else "" for name in names)
        faults = "\n".join(f"{name}: {why}" for name, why in row["faults"].items())
        table.add_row(str(row["tokens"]), *times, row["best"] or "", faults)
    console.print(table)


def show_rest(console: Console, result: Mapping[str, Any]) -> None:
    """What has no speed, and why."""
    rows = [row for section in ("linears", "codecs", "start") for row in result.get(section, ())]
    for word, style in (("fault", "red"), ("skipped", "dim")):
        by: dict[str, list[str]] = {}
        for row in rows:
            if word in row:
                by.setdefault(row[word], []).append(_title(row))
        for why, names in by.items():
            console.print(f"{word}: {why}: {', '.join(names)}", style=style, markup=False)
    for name, why in {**result.get("missing", {}), **result.get("failures", {})}.items():
        console.print(f"peer {name}: {why}", style="dim", markup=False)


def _title(row: Mapping[str, Any]) -> str:
    if row["section"] != "linears":
        return row["name"]
    n, k = row["shape"]
    return f"{row['format']} {n}x{k}" + (f" M={row['tokens']}" if row["tokens"] else "")
