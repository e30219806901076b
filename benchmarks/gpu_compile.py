"""Compile what a benchmark of linears will launch, in many processes: one alone would take most of the time for that.

    python -m benchmarks.gpu_compile --shard I/N --shapes NxK... --tokens M... --formats SPEC...

Launches are recorded on tensors without values, and compiled as Triton would at their first call, into its cache on
disk; nothing is run or timed. A launch that does not compile is left to the benchmark, which reports it.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch

from benchmarks.cpu_linears import W4A8, group_of
from benchmarks.gpu_linears import W4A8_FORMAT
from lowbit import dispatch
from lowbit.backends.triton.device import Target, assume, target_of
from lowbit.backends.triton.tuning import Config, Launch, record
from lowbit.errors import LowbitError
from lowbit.formats import Parts, parse_spec
from lowbit.layouts import coalesced_int4
from lowbit.layouts.base import get_layout
from tests.support.kernel_examples import META
from tests.support.triton_launches import variant_of

Job = tuple[Launch, Config]


def jobs(target: Target, formats: Sequence[str], shapes: Sequence[tuple[int, int]], tokens: Sequence[int]) -> list[Job]:
    """Each config of each launch that the compiler would see as another one, once."""
    found: dict[Any, Job] = {}
    for spec in formats:
        for n, k in shapes:
            for m in tokens:
                x = torch.empty(m, k, dtype=torch.bfloat16, device=META)
                with assume(target), record() as launches, contextlib.suppress(LowbitError, RuntimeError):
                    _run(spec, x, n, k)
                for launch in launches:
                    variant = variant_of(launch)
                    for config in launch.configs:
                        found.setdefault((variant, config), (launch, config))
    return list(found.values())


def _run(spec: str, x: torch.Tensor, n: int, k: int) -> None:
    """What dispatch would run on a GPU of the backend triton, with a weight without values."""
    if spec == W4A8:
        fmt = parse_spec(W4A8_FORMAT)
        plain = fmt.empty_parts((n, k), META, x.dtype)
        operands = coalesced_int4.operands(coalesced_int4.pack(fmt, plain))
        args: tuple[Any, ...] = (x, *operands, None, group_of(fmt))
        entries = _entries(W4A8, dispatch.ANY_FORMAT, "")
    else:
        fmt = parse_spec(spec)
        layout, parts = _packed(spec, n, k, x.dtype)
        args = (fmt, x, parts, None)
        entries = _entries("linear", fmt.name, layout)
    for entry in entries:
        if entry.refuses is None or entry.refuses(*args) is None:
            entry.run(*args)
            return


@cache
def _packed(spec: str, n: int, k: int, dtype: torch.dtype) -> tuple[str, Parts]:
    """The layout that a format's linear prefers, and parts in it. To pack them takes seconds, also without values."""
    fmt = parse_spec(spec)
    layout = dispatch.preferred_layout("linear", fmt, n, k, "cuda")
    if layout:
        return layout, get_layout(layout, fmt).empty_parts(fmt, (n, k), META, dtype)
    return layout, fmt.empty_parts((n, k), META, dtype)


def _entries(op: str, format: str, layout: str) -> Iterator[dispatch.Kernel]:
    for entry in dispatch.candidates(op, format, "cuda"):
        if entry.backend == "triton" and entry.reads(layout):
            yield entry


def compile_job(job: Job) -> bool:
    """Compile one as its first call would; whether it could be."""
    launch, config = job
    given = {**launch.arguments, **config.constants, **config.options}
    try:
        launch.kernel.function.warmup(grid=(1,), **given)
    except Exception:  # noqa: BLE001  (Triton raises many kinds; the benchmark will say it)
        return False
    return True


def in_processes(count: int, arguments: Sequence[str], seconds: float) -> float:
    """Start so many processes and wait for them, at most so long. Returns the seconds it took."""
    began = time.monotonic()
    words = [sys.executable, "-m", "benchmarks.gpu_compile", *arguments]
    started = [subprocess.Popen([*words, "--shard", f"{index}/{count}"]) for index in range(count)]
    for process in started:
        try:
            process.wait(max(0.1, began + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:  # noqa: PERF203  (each one is waited for)
            process.kill()
            process.wait()
    return time.monotonic() - began


def options(shapes: Sequence[tuple[int, int]], tokens: Sequence[int], formats: Sequence[str]) -> list[str]:
    """The arguments of a process."""
    named = [f"{n}x{k}" for n, k in shapes]
    return ["--shapes", *named, "--tokens", *map(str, tokens), "--formats", *formats]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile a share of the jobs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--shapes", nargs="+", required=True)
    parser.add_argument("--tokens", nargs="+", type=int, required=True)
    parser.add_argument("--formats", nargs="+", required=True)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    dispatch.load("triton")
    index, count = (int(number) for number in given.shard.split("/"))
    shapes = [tuple(int(size) for size in one.split("x")) for one in given.shapes]
    target = target_of(torch.device("cuda", torch.cuda.current_device()))
    for job in jobs(target, given.formats, shapes, given.tokens)[index::count]:
        compile_job(job)
    return 0


if __name__ == "__main__":
    sys.exit(main())
