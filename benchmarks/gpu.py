"""Every format's kernels on this GPU: linears against cuBLAS and other people's, encoders against copying, and a model.

    scripts/gpu [--quick] [--shapes NxK...] [--tokens M...] [--formats SPEC...] [--sections linears codecs model start]
                [--budget SECONDS] [--json FILE]
    scripts/gpu --crossovers SPEC

Kernels are those that the dispatch table chooses, and named. Ours, cuBLAS and the peers that are installed take turns
in one process, on bfloat16 inputs, inputs and weights in so many copies that no L2 holds them. A result is compared
with the float64 product before it is timed: a wrong one has no speed, and makes the exit code 1. Rows are measured in
the order of their importance; those for which the budget leaves no time are named. Above 1, a ratio says that ours is
faster. A process of its own measures, and writes the JSON after every row: when it dies, or stays in a row, that row is
a fault, and another process goes on with the next.

--crossovers times every way that a launcher can go (`ROUTES`), whatever it would choose, for 1 to 4096 tokens.
Without a GPU it says so, with exit code 3.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import gpu_codecs, gpu_compile, gpu_first_use, gpu_linears, gpu_machine, gpu_model, gpu_peers
from benchmarks.cpu_linears import Drawn, Entry, WrongResultError
from benchmarks.cpu_timing import alternate, quartiles, ratio
from benchmarks.gpu_peers import CUBLAS, Dense, reason
from benchmarks.gpu_tables import show_codecs, show_crossovers, show_linears, show_rest
from benchmarks.gpu_timing import GpuContender, copies_for
from lowbit import dispatch
from lowbit.dispatch import Kernel
from lowbit.errors import LowbitError

RESULTS = Path(__file__).parent / "results"
SHAPES = ("12288x3072", "3072x12288", "18432x3072", "4096x14336")
TOKENS = (1, 4096, 16, 256, 64)  # the most important first
CROSSOVER_TOKENS = tuple(1 << i for i in range(13))
SECTIONS = ("linears", "codecs", "model", "start")
SHARES = {"linears": 0.7, "codecs": 0.8, "model": 0.9, "start": 0.95}  # of the budget that is over after each section
WHOLE = {"model": "the model", "start": "first use"}  # sections that are measured as a whole
ROUNDS, ROUND_BUDGET = 7, 0.5  # of a row; seconds
COMPILE_SECONDS = 75.0  # at most, before anything is measured; part of the budget
NO_GPU = 3
MOST_PROCESSES = 6  # that measure, one after the other
STALL = 90.0  # seconds after which a row is given up
GRACE = 30.0  # seconds beyond the budget after which all is
Seconds = Callable[[], float]


@dataclass
class Bench:
    """What all measurements share: the device, its limits, the clock, and how calls are timed."""

    device: torch.device
    l2: int
    copy_bandwidth: float
    peaks: Mapping[str, float]
    clock: Seconds = time.perf_counter
    contender: Callable[..., GpuContender] = GpuContender
    rounds: int = ROUNDS
    others: bool = True
    begin: Callable[[dict[str, Any]], None] = lambda _: None
    """Called with what says which row, before it is measured."""
    takes_eager: bool = False
    """Whether what eager runs is measured, too: where there are no other kernels to try this program with."""

    def lacks(self, kernel: Kernel | None) -> bool:
        """Whether this is no kernel worth measuring."""
        return kernel is not None and kernel.backend == "eager" and not self.takes_eager

    def race(self, entries: Sequence[tuple[str, Callable[[int], object], int]]) -> dict[str, GpuContender]:
        """Time (name, call, copies) in turn."""
        made = {name: self.contender(name, call, copies=copies) for name, call, copies in entries}
        alternate(list(made.values()), self.rounds, ROUND_BUDGET, self.clock)
        return made


@dataclass
class Shape:
    """A weight [n, k] in every format that was asked for so far, and in bfloat16."""

    bench: Bench
    n: int
    k: int
    failures: dict[str, str] = field(default_factory=dict)

    @cached_property
    def dense(self) -> Dense:
        """The bfloat16 weight."""
        return Dense.make(self.n, self.k, self.bench.device)

    @cached_property
    def cublas(self) -> Entry:
        """The product that ratios are to."""
        return gpu_peers.cublas(self.dense, self.bench.l2)

    def drawn(self, spec: str) -> Drawn:
        """The weight of a format."""
        return _drawn(self.bench.device, spec, self.n, self.k)

    def entries(self, spec: str) -> tuple[Entry, list[Entry]]:
        """Ours and its peers."""
        mine = gpu_linears.ours(spec, self.drawn(spec), self.bench.l2)
        if not self.bench.others:
            return mine, []
        own = gpu_linears.rivals(spec, self.drawn(spec), self.bench.l2, self.failures)
        return mine, [*own, *gpu_peers.peers([spec], self.dense, self.drawn, self.bench.l2, self.failures)]


@cache
def _drawn(device: torch.device, spec: str, n: int, k: int) -> Drawn:
    return gpu_linears.drawn_on(device, spec, n, k)


def inputs(bench: Bench, m: int, k: int, copies: int) -> list[torch.Tensor]:
    """Activations [m, k] in so many copies."""
    generator = torch.Generator(bench.device).manual_seed(2)
    x = torch.randn(m, k, generator=generator, device=bench.device).bfloat16()
    return [x, *(x.clone() for _ in range(copies - 1))]


def _call(entry: Entry, given: Sequence[Any]) -> tuple[Callable[[int], object], int]:
    """The call of an entry by the number of a copy, and how many copies there are."""
    count = len(entry.weights)
    return lambda i: entry.run(given[i % len(given)], entry.weights[i % count]), count


def measure_linear(shape: Shape, spec: str, tokens: Sequence[int], is_over: Callable[[], bool]) -> Iterator[dict]:
    """One row for each number of tokens, until the time is over."""
    about = {"section": "linears", "format": spec, "shape": [shape.n, shape.k]}
    if is_over():  # making the weight takes time, too
        yield from ({**about, "tokens": m, "skipped": "the budget is used up"} for m in tokens)
        return
    shape.bench.begin({**about, "tokens": None})
    try:
        mine, peers = shape.entries(spec)
    except (LowbitError, RuntimeError) as error:
        yield {**about, "tokens": None, "fault": reason(error)}
        return
    for m in tokens:
        if is_over():
            yield {**about, "tokens": m, "skipped": "the budget is used up"}
            continue
        shape.bench.begin({**about, "tokens": m})
        yield {**about, "tokens": m, **_linear_row(shape, mine, peers, m)}
        if shape.bench.device.type == "cuda":
            torch.cuda.empty_cache()  # graphs keep the memory of their calls


def _linear_row(shape: Shape, mine: Entry, peers: Sequence[Entry], m: int) -> dict[str, Any]:
    bench = shape.bench
    xs = inputs(bench, m, shape.k, copies_for(2 * m * shape.k, bench.l2))
    try:
        kernel = mine.kernel(xs[0]) if mine.kernel else None
        if bench.lacks(kernel):
            return {"skipped": "no kernel: it would run eager"}
        result = mine.run(xs[0], mine.weights[0])
        error = mine.check(xs[0], result)
    except WrongResultError as wrong:
        return {"fault": str(wrong)}
    except (LowbitError, RuntimeError) as failed:
        return {"fault": reason(failed)}
    rivals = {f"lowbit {name}" for name in gpu_linears.RIVALS if kernel is None or name != kernel.backend}
    own = {f"lowbit {kernel.backend}"} if kernel is not None else set()
    peers = [peer for peer in peers if peer.name not in own]
    largest: dict[str, float] = {}
    present, errors, absent = [mine, shape.cublas], {mine.name: error}, {}
    given: dict[str, list[Any]] = {mine.name: xs, CUBLAS: xs}
    for peer in peers:
        try:
            given[peer.name] = [peer.input(x) for x in xs]
            theirs = peer.run(given[peer.name][0], peer.weights[0])
            errors[peer.name] = peer.check(xs[0] if given[peer.name][0].is_floating_point() else given[peer.name][0],
                                           theirs)  # fmt: skip
            if peer.name in rivals:  # the largest difference, of the largest result
                largest[peer.name] = float((result.float() - theirs.float()).abs().max() / theirs.float().abs().max())
            present.append(peer)
        except Exception as failed:  # noqa: BLE001, PERF203  (other people's code raises anything)
            absent[peer.name] = reason(failed)
    try:
        made = bench.race([(one.name, *_call(one, given[one.name])) for one in present])
    except RuntimeError as failed:
        return {"fault": reason(failed)}
    return {
        "kernel": f"{kernel.name}@{mine.layout}" if kernel and mine.layout else kernel.name if kernel else None,
        "error": error,
        **_speed(bench, made[mine.name], mine.nbytes + 2 * m * (shape.k + shape.n), 2 * m * shape.n * shape.k),
        "cublas_seconds": made[CUBLAS].median,
        "ratios": {name: ratio(made[mine.name], other) for name, other in made.items() if name != mine.name},
        "peer_errors": {name: errors[name] for name in made if name in errors and name != mine.name},
        "largest_difference": largest,
        "absent": absent,
    }


def _speed(bench: Bench, timed: GpuContender, nbytes: int, work: int = 0) -> dict[str, Any]:
    seconds = timed.median
    found = {
        "seconds": seconds,
        "quartiles": quartiles(timed.times),
        "rounds": len(timed.times),
        "timed_by": timed.runner.how if timed.runner else None,
        "copies": timed.copies,
        "bytes": nbytes,
        "of_copy": nbytes / seconds / bench.copy_bandwidth,
    }
    if work:
        found["of_peak"] = work / seconds / bench.peaks["bfloat16"]
    return found


def measure_codecs(
    bench: Bench, shape: tuple[int, int], is_over: Callable[[], bool], done: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """One row an encoder or decoder that is not done, until the time is over."""
    for name, make in gpu_codecs.codecs(bench.device, bench.l2, shape):
        if name in done:
            continue
        about = {"section": "codecs", "name": name, "shape": list(shape)}
        if is_over():
            yield {**about, "skipped": "the budget is used up"}
            continue
        bench.begin(about)
        try:
            codec = make()
        except WrongResultError as wrong:
            yield {**about, "fault": str(wrong)}
            continue
        except (LowbitError, RuntimeError) as failed:
            yield {**about, "fault": reason(failed)}
            continue
        if bench.lacks(codec.kernel):
            yield {**about, "skipped": "no kernel: it would run eager"}
            continue
        timed = bench.race([(name, lambda i, own=codec: own.run(own.inputs[i % len(own.inputs)]), len(codec.inputs))])
        speed = _speed(bench, timed[name], codec.nbytes)
        reading = codec.inputs[0].nbytes / bench.copy_bandwidth if isinstance(codec.inputs[0], torch.Tensor) else 0.0
        times = {"times_reading": speed["seconds"] / reading} if reading else {}
        yield {**about, "kernel": codec.kernel.name, **speed, **times}


def crossovers(bench: Bench, spec: str, shape: tuple[int, int], tokens: Sequence[int]) -> list[dict[str, Any]]:
    """The seconds of every route of a format, and of cuBLAS, by tokens; wrong or closed ones have none."""
    here, rows = Shape(bench, *shape), []
    drawn, packed = here.drawn(spec), {}
    for backend in {route.backend for route in gpu_linears.routes(spec).values()}:  # each has a layout of its own
        with contextlib.nullcontext() if dispatch.load(backend) else dispatch.use_backend(backend):
            packed[backend] = gpu_linears.ours(spec, drawn, bench.l2)
    for m in tokens:
        xs = inputs(bench, m, shape[1], copies_for(2 * m * shape[1], bench.l2))
        row: dict[str, Any] = {"tokens": m, "seconds": {}, "faults": {}}
        timed = [(CUBLAS, *_call(here.cublas, xs))]
        for name, route in gpu_linears.routes(spec).items():
            mine = packed[route.backend]
            entry = replace(mine, run=gpu_linears.along(route, mine))
            try:
                with contextlib.nullcontext() if route.decodes else gpu_linears.forced(route):
                    mine.check(xs[0], entry.run(xs[0], entry.weights[0]))
            except (WrongResultError, LowbitError, RuntimeError) as error:
                row["faults"][name] = reason(error)
                continue
            timed.append((name, *_call(entry, xs)))
        row["seconds"] = {name: one.median for name, one in bench.race(timed).items()}
        own = {name: value for name, value in row["seconds"].items() if name != CUBLAS}
        row["best"] = min(own, key=lambda name: own[name]) if own else None
        rows.append(row)
    return rows


# ---- the program ----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with what --quick changes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="NxK", help=f"weights; default: {' '.join(SHAPES)}")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M", help=f"default: {' '.join(map(str, TOKENS))}")
    parser.add_argument("--formats", nargs="+", metavar="SPEC", help=f"default: {' '.join(gpu_linears.SPECS)}")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="one shape, 1 and 4096 tokens, few rounds, no peers")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds in all; what is left over is named")
    parser.add_argument("--crossovers", metavar="SPEC", help="time every route of a format instead")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # the process that measures
    default = Path(os.environ["OUT"]) / "gpu.json" if os.environ.get("OUT") else RESULTS / "gpu.json"
    parser.add_argument("--json", type=Path, default=default, help="default: gpu.json in $OUT, or in results/")
    given = parser.parse_args(arguments)
    given.shapes = [
        tuple(int(size) for size in one.split("x")) for one in given.shapes or SHAPES[: 1 if given.quick else 4]
    ]
    given.tokens = given.tokens or list(TOKENS[:2] if given.quick else TOKENS)
    given.formats = given.formats or [spec for spec in gpu_linears.SPECS if gpu_linears.known(spec)]
    return given


def measure(
    bench: Bench,
    given: argparse.Namespace,
    write: Callable[[dict[str, Any]], None],
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All sections, each within its share of the budget; `write` gets the result before and after every row.

    before: a result that another process began, whose rows are kept. Raises when a row leaves the GPU unusable.
    """
    began = bench.clock()
    result: dict[str, Any] = {"missing": gpu_peers.missing() if bench.others else {}, "failures": {}, **(before or {})}

    def begin(about: dict[str, Any]) -> None:
        write({**result, "running": about})

    def keep(section: str, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            result[section].append(row)
            write(result)
            if "fault" in row and bench.device.type == "cuda":
                torch.cuda.synchronize()  # a broken context breaks all that follows

    bench = replace(bench, begin=begin)
    for section in given.sections:
        end = began + given.budget * SHARES[section]

        def is_over(end: float = end) -> bool:
            return bench.clock() > end

        done = result.setdefault(section, [])
        if section == "linears":
            keep(section, _linears(bench, given, is_over, result["failures"], list(done)))
        elif section == "codecs":
            shape = gpu_codecs.SHAPE if bench.device.type == "cuda" else given.shapes[0]
            keep(section, measure_codecs(bench, shape, is_over, {row["name"] for row in done}))
        elif not done and is_over():
            keep(section, [{"section": section, "name": WHOLE[section], "skipped": "the budget is used up"}])
        elif not done:
            begin({"section": section, "name": WHOLE[section]})
            keep(section, gpu_model.measure(bench, quick=given.quick) if section == "model" else _first_uses(bench))
        write(result)
    return result


def _first_uses(bench: Bench) -> Iterator[dict[str, Any]]:
    why = dispatch.load("cuda") if bench.device.type == "cuda" else "no GPU"
    if why is not None:
        yield {"section": "start", "name": WHOLE["start"], "skipped": why}
        return
    try:
        yield from gpu_first_use.measure()
    except RuntimeError as failed:
        yield {"section": "start", "name": WHOLE["start"], "fault": reason(failed)}


def _linears(
    bench: Bench,
    given: argparse.Namespace,
    is_over: Callable[[], bool],
    failures: dict[str, str],
    done: Sequence[Mapping[str, Any]],
) -> Iterator[dict[str, Any]]:
    known = {(row["format"], *row["shape"], row["tokens"]) for row in done}
    for n, k in given.shapes:
        shape = Shape(bench, n, k, failures)
        for spec in given.formats:
            left = [m for m in given.tokens if (spec, n, k, m) not in known]
            if left and (spec, n, k, None) not in known:
                yield from measure_linear(shape, spec, left, is_over)
        _drawn.cache_clear()


def read(path: Path) -> dict[str, Any]:
    """What a process has written so far; empty where there is nothing."""
    return json.loads(path.read_text()) if path.exists() else {}


def ended(result: dict[str, Any], why: str, word: str = "fault") -> bool:
    """Make a row of the one in which a process ended, if it was in one; whether it was."""
    about = result.pop("running", None)
    if about is not None:
        result.setdefault(about["section"], []).append({**about, word: why})
    return about is not None


def supervise(
    command: Sequence[str], path: Path, budget: float, *, stall: float = STALL, grace: float = GRACE, every: float = 0.5
) -> dict[str, Any]:
    """Run the process that measures until it has finished, again where it died: see the module. Returns its JSON."""
    path.unlink(missing_ok=True)
    began = time.monotonic()
    result: dict[str, Any] = {}
    for _ in range(MOST_PROCESSES):
        left = budget - (time.monotonic() - began)
        process = subprocess.Popen([*command, "--budget", str(max(0.0, left))])
        started, why, word = time.time(), "", "fault"
        while process.poll() is None:
            time.sleep(every)
            if time.monotonic() - began > budget + grace:
                why, word = "the time was over in the middle of it", "skipped"
            elif time.time() - max(started, path.stat().st_mtime if path.exists() else 0.0) > stall:
                why = f"did not end within {stall:.0f} s"
            if why:
                process.kill()
                process.wait()
        result = read(path)
        if result.pop("finished", False):
            return result
        within = ended(result, why or f"the process ended with {process.returncode} in it", word)
        _write(path, result)
        if word == "skipped" or (not within and not _has_faults(result)):
            break
    result["failures"] = {**result.get("failures", {}), "measuring": "ended before all rows were there"}
    return result


def _has_faults(result: Mapping[str, Any]) -> bool:
    return any("fault" in row for section in SECTIONS for row in result.get(section, ()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    given = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    if not torch.cuda.is_available():
        console.print("no GPU: torch.cuda.is_available() says so; nothing was measured")
        return NO_GPU
    if (why := dispatch.load("triton")) is not None:
        console.print(f"the triton backend is not there: {why}", style="bold red")
        return 1
    torch.set_grad_enabled(False)
    if ("linears" in given.sections or given.crossovers) and not given.child:
        tokens = CROSSOVER_TOKENS if given.crossovers else given.tokens
        wanted = gpu_compile.options(given.shapes, tokens, [given.crossovers] if given.crossovers else given.formats)
        took = gpu_compile.in_processes(min(os.cpu_count() or 1, 16), wanted, COMPILE_SECONDS)
        given.budget -= took
        console.print(f"compiled the linears in {took:.0f} s")
    if not given.crossovers and not given.child:
        words = list(sys.argv[1:] if arguments is None else arguments)
        command = [sys.executable, "-m", "benchmarks.gpu", *words, "--child", "--json", str(given.json)]
        result = supervise(command, given.json, given.budget)
        _write(given.json, result)
        if "machine" not in result:
            console.print("nothing was measured: see what the process said above", style="bold red")
            return 1
        return max(report(console, result), int("measuring" in result["failures"]))
    bench = Bench(
        torch.device("cuda", torch.cuda.current_device()), gpu_machine.l2_bytes(), gpu_machine.copy_bandwidth(),
        gpu_machine.peaks(), rounds=3 if given.quick else ROUNDS, others=not given.quick,
    )  # fmt: skip
    about = {
        "machine": gpu_machine.about(), "copy_bytes_s": bench.copy_bandwidth, "peaks_flop_s": dict(bench.peaks),
    }  # fmt: skip
    if given.crossovers:
        found = {str(shape): crossovers(bench, given.crossovers, shape, CROSSOVER_TOKENS) for shape in given.shapes}
        for shape, rows in found.items():
            show_crossovers(console, f"{given.crossovers} {shape}", rows)
        path = given.json.with_name(f"gpu_crossovers_{given.crossovers.partition('(')[0]}.json")
        _write(path, {**about, "crossovers": found})
        return 0
    result = measure(bench, given, lambda so_far: _write(given.json, {**about, **so_far}), read(given.json))
    _write(given.json, {**about, **result, "finished": True})
    return 0


def report(console: Console, result: Mapping[str, Any]) -> int:
    """Print the tables, the shortest last; 1 if a result was wrong."""
    show_rest(console, result)
    if "codecs" in result:
        show_codecs(console, result["codecs"])
    if "model" in result:
        gpu_model.show(console, result["model"])
    gpu_first_use.show(console, result.get("start", ()))
    if "linears" in result:
        show_linears(console, result["linears"])
    machine, peaks = result["machine"], result["peaks_flop_s"]
    console.print(
        f"{machine['gpu']}, driver {machine['driver']}, torch {machine['packages']['torch']}, triton "
        f"{machine['packages']['triton']}, commit {machine['commit']}; copies {result['copy_bytes_s'] / 1e9:.0f} GB/s; "
        + ", ".join(f"{name} {speed / 1e12:.0f} T/s" for name, speed in peaks.items())
    )
    rows = [row for section in ("linears", "codecs") for row in result.get(section, ())]
    rows += [row for section in WHOLE for row in result.get(section, ())]
    faults = [row for row in rows if "fault" in row]
    return 1 if faults else 0


def _write(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".new")  # a process that is killed leaves no half of a file
    whole.write_text(json.dumps(result, indent=1) + "\n")
    whole.replace(path)


if __name__ == "__main__":
    sys.exit(main())
