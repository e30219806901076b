"""`lowbit warmup`: compile ahead what a checkpoint's linears will launch, for the GPU at hand or for another one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from lowbit.checkpoint.banks import experts_of
from lowbit.checkpoint.eligibility import dtype_name
from lowbit.checkpoint.plan_rules import other_when_converted
from lowbit.checkpoint.quantized_source import look_for_layers
from lowbit.checkpoint.source import open_source
from lowbit.checkpoint.stored_format import StoredFormat
from lowbit.checkpoint.weight_shape import KERNEL
from lowbit.cli import options
from lowbit.cli.output import (
    Exit,
    asking,
    command,
    epilog,
    parse_dtype,
    parse_shape,
    print_json,
    say,
    show,
    size,
    stderr,
    table,
)
from lowbit.dispatch import load, preferred_layout
from lowbit.errors import CheckpointError, PlanError, UnsupportedError, WriteError
from lowbit.formats.parts import HALVES

EPILOG = epilog(
    "lowbit warmup llama-int4.safetensors",
    "lowbit warmup llama-int4.safetensors --arch sm_90a,sm_80 -M 1,16,256",
    "lowbit warmup --format awq_w4a16 --shape 18432x3072 --shape 3072x12288 --arch sm_120a --dry-run",
)
_TOKENS = "1,2,3,4,5,6,7,8,16,32,64,128,256,512,1024,2048,4096,8192,16384"
_Served = dict[str, dict[Any, list[int]]]  # kernel -> linear -> numbers of tokens
_DTYPES = {dtype_name(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


@dataclass
class _Asked:
    """What is to be warmed up: linears for numbers of tokens, and the GPUs by the name of their architecture."""

    linears: list[Any]
    tokens: list[int]
    targets: dict[str, list[Any]]
    notes: list[str] = field(default_factory=list)
    at_hand: bool = False

    @property
    def calls(self) -> list[tuple[Any, int]]:
        """Every linear with every number of tokens."""
        return [(linear, m) for linear in self.linears for m in self.tokens]


@command
def warmup(
    src: Annotated[
        Path | None,
        typer.Argument(
            readable=False,
            metavar="[SRC]",
            help="A quantized checkpoint: a safetensors file, a *.safetensors.index.json, or a model folder.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(
            "--format", "-f", metavar="SPEC", help="A format, for each --shape; may be repeated.", show_default=False
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NxK", help="Out and in features of a linear; may be repeated.", show_default=False),
    ] = None,
    arch: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Architectures to compile for, such as sm_90a,sm_80; no GPU is needed. By default the GPU at hand.",
            show_default=False,
        ),
    ] = "",
    tokens: Annotated[str, typer.Option("-M", metavar="NUMBERS", help="Rows of the input.")] = _TOKENS,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help=f"Dtypes of the input: {', '.join(_DTYPES)}; by default those of a checkpoint's layers, or bfloat16.",
            show_default=False,
        ),
    ] = "",
    source_dialect: options.SourceDialect = None,
    jobs: options.Jobs = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be compiled; compile nothing.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Compile ahead the CUDA kernels that a checkpoint, or linears of given formats and shapes, will launch.

    They go into the cache (LOWBIT_CACHE), where the first call then finds them: in an image for containers, or before a
    service starts. Weights are taken to be packed as loading packs them. What Triton serves is compiled and tuned with
    one call a shape where the GPU is at hand; for another one it is compiled at the first call.
    """
    ahead = _ahead()
    asked = _ask(ahead, src, format or [], shape or [], arch, tokens, dtype, source_dialect)
    served, wanted = _record(ahead, asked)
    state = _kept(writes=not dry_run)
    if dry_run:
        made = [ahead.Made(launch, name, ahead.is_kept(launch, name)) for launch, name in wanted]
    else:
        made = list(_shown(ahead.compile_all(wanted, jobs or os.cpu_count() or 1), len(wanted), "compiling"))
        _check_written(ahead, made, state.folder)
    ran = _run_others(ahead, asked, served, asked.notes) if asked.at_hand and not dry_run else 0
    found = _found(asked, served, made, ran, state.folder, dry_run=dry_run)
    if as_json:
        print_json(found)
    else:
        _show(found)
    if found["problems"]:
        raise typer.Exit(Exit.FOUND)


def _ahead() -> Any:
    """The module of the CUDA backend that compiles ahead. Raises where the backend is not there."""
    with asking():
        if why := load("cuda"):
            raise UnsupportedError(f"nothing can be compiled ahead, the cuda backend cannot be used: {why}")
    return sys.modules["lowbit.backends.cuda.ahead"]


# ---- what is asked for ----------------------------------------------------------------------------------------------


def _ask(
    ahead: Any, src: Path | None, specs: list[str], shapes: list[str], arch: str, tokens: str, dtype: str,
    dialect: str | None,
) -> _Asked:  # fmt: skip
    with asking():
        if (src is None) == (not specs) or bool(specs) != bool(shapes):
            raise PlanError("name a checkpoint, or formats and shapes: --format SPEC --shape NxK")
        dtypes = [parse_dtype(name, _DTYPES) for name in _split(dtype)]
        counts = [_count(text) for text in _split(tokens)]
        if not counts:
            raise PlanError("-M: name at least one number of tokens, such as 1,16,256")
        asked = _Asked([], list(dict.fromkeys(counts)), *_targets(ahead, arch))
        if src is None:
            asked.linears = _given(ahead, specs, shapes, dtypes or [torch.bfloat16], asked.notes)
    if src is not None:
        asked.linears = _of_checkpoint(ahead, src, dialect, dtypes, asked.notes)
    return asked


def _split(text: str) -> list[str]:
    return [piece.strip() for piece in text.split(",") if piece.strip()]


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise PlanError(f"-M {text!r} is no number of tokens; write them as 1,16,256")
    return int(text)


def _targets(ahead: Any, arch: str) -> tuple[dict[str, list[Any]], list[str], bool]:
    """The GPUs to record for by architecture, notes, and whether it is the one at hand."""
    if arch:
        targets = {}
        for name in _split(arch):
            target = ahead.target(name)
            several = [type(target)("cuda", target.capability, count) for count in ahead.PROCESSORS]
            targets[ahead.architecture(target.capability)] = several
        return targets, [], False
    if not torch.cuda.is_available():
        raise PlanError("there is no GPU here; name the architectures to compile for, such as --arch sm_90a,sm_80")
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    target = ahead.Target("cuda", (about.major, about.minor), about.multi_processor_count)
    return {ahead.architecture(target.capability): [target]}, [], True


def _given(
    ahead: Any, specs: list[str], shapes: list[str], dtypes: Sequence[torch.dtype], notes: list[str]
) -> list[Any]:
    linears = []
    for stored in map(StoredFormat.parse, specs):
        for n, k in map(parse_shape, shapes):
            if why := stored.refuses(n, k):
                raise PlanError(f"{stored.spec}: a weight of {n}x{k} {why}; choose another shape or format")
            if (note := other_when_converted(stored, k)) and note not in notes:
                notes.append(note)
            layout = stored.layout or preferred_layout("linear", stored.format.plain, n, k, "cuda")
            linears += [
                ahead.Linear(stored.format.plain, layout, n, k, dtype, bias)
                for dtype in dtypes
                for bias in (False, True)
            ]
    return list(dict.fromkeys(linears))


def _of_checkpoint(
    ahead: Any, src: Path, dialect: str | None, dtypes: list[torch.dtype], notes: list[str]
) -> list[Any]:
    linears: dict[Any, None] = {}
    convolutions = 0
    with open_source(src, dialect) as source:
        for component in source.components:
            held = look_for_layers(source, component)
            for name, stored in held.layers.items():
                if stored.options.get(KERNEL):
                    convolutions += 1
                    continue
                (n, k), fmt = stored.shape, stored.format.plain
                layout = "" if experts_of(stored) else preferred_layout("linear", fmt, n, k, "cuda")
                known = tuple(sorted((part, found) for part, found in stored.dtypes.items() if part in fmt.part_names))
                for dtype in dtypes or [stored.dtype if stored.dtype in HALVES else torch.bfloat16]:
                    bias = held.bias_key(name) is not None or stored.format.folds_bias
                    linears[ahead.Linear(fmt, layout, n, k, dtype, bias, known)] = None
        if not linears:
            raise CheckpointError(
                f"{source.place}: holds no quantized linear; convert it first (lowbit convert), or name --format and "
                "--shape"
            )
    if convolutions:
        notes.append(f"{convolutions} convolutions are decoded at each call: there is nothing to compile for them")
    return list(linears)


# ---- what is done ---------------------------------------------------------------------------------------------------


def _record(ahead: Any, asked: _Asked) -> tuple[_Served, list[tuple[Any, str]]]:
    """By kernel the linears that it serves, with numbers of tokens; and the launches to compile, with architectures."""
    served: _Served = {}
    wanted: dict[tuple[Any, str], None] = {}
    for name, targets in asked.targets.items():
        wanted |= {(probe, name): None for probe in ahead.probes(name)}
        for linear, m in _shown(asked.calls, len(asked.calls), f"recording {name}"):
            for target in targets:
                answer = ahead.answer(linear, m, target)
                wanted.update(dict.fromkeys((launch, name) for launch in answer.launches))
                counts = served.setdefault(answer.kernel, {}).setdefault(linear, [])
                if m not in counts:
                    counts.append(m)
    once = {(launch.source, launch.name, name): (launch, name) for launch, name in wanted}
    return served, list(once.values())


def _shown(steps: Any, total: int, what: str) -> Iterator[Any]:
    """The same, with a bar on stderr where that is a terminal."""
    return iter(track(steps, what, total, console=stderr(), transient=True, disable=not sys.stderr.isatty()))


def _kept(*, writes: bool) -> Any:
    """The folder of compiled kernels and what it holds. Raises `WriteError` where it cannot be written."""
    state = sys.modules["lowbit.backends.cuda.compiler"].kept()
    if writes and not state.writable:
        raise WriteError(f"{state.folder}: the cache cannot be written; let LOWBIT_CACHE name a folder that can")
    return state


def _check_written(ahead: Any, made: Sequence[Any], folder: Path) -> None:
    for one in made:
        if not one.fault and not one.kept and not ahead.is_kept(one.launch, one.architecture):
            raise WriteError(f"{folder}: a compiled kernel could not be written; see whether the disk is full")


def _run_others(ahead: Any, asked: _Asked, served: _Served, notes: list[str]) -> int:
    """Call what Triton serves once a shape, on zeros, so that it is compiled and tuned; returns how many calls."""
    calls = [
        (linear, m)
        for kernel, linears in served.items()
        if kernel.startswith("triton:")
        for linear, counts in linears.items()
        for m in counts
    ]
    device, done = torch.device("cuda", torch.cuda.current_device()), 0
    for linear, m in _shown(calls, len(calls), "tuning Triton"):
        with _short_of_memory(f"{linear.format.spec} {linear.n}x{linear.k}, {m} tokens", notes):
            ahead.run_once(linear, m, device)
            torch.cuda.synchronize(device)
            done += 1
    return done


@contextmanager
def _short_of_memory(what: str, notes: list[str]) -> Iterator[None]:
    """A call that does not fit beside what is there is noted: it will be tuned when it is made."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        notes.append(f"{what}: not enough GPU memory here; compiled and tuned at the first call")
    except UnsupportedError as error:
        notes.append(f"{what}: {error}")


# ---- what is said ---------------------------------------------------------------------------------------------------


def _found(
    asked: _Asked,
    served: _Served,
    made: Sequence[Any],
    ran: int,
    folder: Path,
    *,
    dry_run: bool,
) -> dict[str, Any]:
    by_triton = sorted(
        {linear.format.spec for kernel, linears in served.items() if kernel.startswith("triton:") for linear in linears}
    )
    notes = list(asked.notes)
    if by_triton and not ran:
        formats = ", ".join(by_triton)
        notes.append(f"Triton serves calls of {formats}: its kernels are compiled and tuned at the first call on a GPU")
    return {
        "cache": str(folder),
        "cache_bytes": _kept(writes=False).bytes,
        "dry_run": dry_run,
        "architectures": list(asked.targets),
        "linears": [
            {
                "kernel": kernel,
                "format": linear.format.spec,
                "layout": linear.layout,
                "shape": [linear.n, linear.k],
                "dtype": dtype_name(linear.dtype),
                "bias": linear.bias,
                "tokens": counts,
            }
            for kernel, linears in served.items()
            for linear, counts in linears.items()
        ],
        "kernels": [
            {
                "source": one.launch.source,
                "name": one.launch.name,
                "architecture": one.architecture,
                "state": _state(one, dry_run=dry_run),
                "seconds": round(one.seconds, 3),
            }
            for one in made
        ],
        "triton_calls": ran,
        "notes": notes,
        "problems": [one.fault for one in made if one.fault],
    }


def _state(one: Any, *, dry_run: bool) -> str:
    if one.fault:
        return "failed"
    return "kept" if one.kept else "wanted" if dry_run else "compiled"


def _show(found: dict[str, Any]) -> None:
    linears = table("kernel", "format", "packed as", "shape", "x", "tokens")
    for one in found["linears"]:
        row = (one["kernel"], one["format"], one["layout"] or "plain", "x".join(map(str, one["shape"])), one["dtype"])
        if not one["bias"] or not any({**one, "bias": False} == other for other in found["linears"]):
            linears.add_row(*row, ", ".join(map(str, one["tokens"])))
    show(linears)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in found["kernels"]:
        function = one["name"].partition("<")[0].rpartition("::")[2]
        groups.setdefault((f"{one['source']}: {function}", one["architecture"]), []).append(one)
    new = "to compile" if found["dry_run"] else "compiled"
    kernels = table("CUDA kernel", "for", "variants", new, "kept", "s", right=("variants", new, "kept", "s"))
    for (kernel, name), many in sorted(groups.items()):
        states = [one["state"] for one in many]
        seconds = f"{sum(one['seconds'] for one in many):.2f}"
        counts = (len(many), states.count("wanted") + states.count("compiled"), states.count("kept"))
        kernels.add_row(kernel, name, *map(str, counts), seconds)
    show(kernels)
    if found["triton_calls"]:
        say(f"{found['triton_calls']} calls of Triton's kernels compiled and tuned")
    for note in found["notes"]:
        say(f"note: {note}", "yellow")
    for problem in found["problems"]:
        say(f"problem: {problem}", "red")
    say(f"{size(found['cache_bytes'])} of CUDA kernels in {found['cache']}")
