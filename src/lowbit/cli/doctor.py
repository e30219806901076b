"""`lowbit doctor`: what is installed, what can run, and which kernel a layer would get."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lowbit import __version__
from lowbit.checkpoint.eligibility import dtype_name
from lowbit.checkpoint.plan_rules import other_when_converted
from lowbit.checkpoint.stored_format import StoredFormat
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
    show_notes,
    size,
    table,
)
from lowbit.dispatch import BACKENDS, UNPACKS, explain, load, preferred_layout, table as kernels
from lowbit.errors import LowbitError, PlanError
from lowbit.formats.parts import FLOATS, raw_bytes
from lowbit.layouts.base import get_layout

EPILOG = epilog(
    "lowbit doctor",
    "lowbit doctor --format nvfp4 --shape 3072x12288 -M 1",
    "lowbit doctor --format 'fp8_e4m3(granularity=row)' --shape 3072x3072 -M 4096 --device cuda",
)
_PACKAGES = ("torch", "numpy", "safetensors", "triton", "cuda-bindings", "transformers", "diffusers", "comfy-kitchen")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16")
_DTYPES = {dtype_name(dtype): dtype for dtype in FLOATS}


@command
def doctor(
    format: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            metavar="SPEC",
            help="Say which kernel a layer in this format would get.",
            show_default=False,
        ),
    ] = "",
    shape: Annotated[str, typer.Option(metavar="NxK", help="Its out and in features.")] = "3072x3072",
    tokens: Annotated[int, typer.Option("-M", min=1, metavar="M", help="Rows of the input.")] = 1,
    device: Annotated[str, typer.Option(metavar="NAME", help="Device of weight and input.")] = "cpu",
    dtype: Annotated[str, typer.Option(metavar="NAME", help=f"Dtype of the input: {', '.join(_DTYPES)}.")] = "bfloat16",
    as_json: options.AsJson = False,
) -> None:
    """Show versions, devices and backends; with --format, which kernel would run and why the others would not."""
    found: dict[str, Any] = {
        "lowbit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": _devices(),
        "backends": {name: load(name) or "available" for name in BACKENDS},
        "cpu_kernels": _cpu_kernels(),
        "cuda_kernels": _cuda_kernels(),
        "kernels": [
            {"op": k.op, "format": k.format, "backend": k.backend, "layout": k.layout, "name": k.name}
            for k in kernels()
        ],
    }
    if format:
        found["choice"] = _choose(format, shape, tokens, device, dtype)
    if as_json:
        print_json(found)
    else:
        _show(found)
    if format and found["choice"]["runs"] is None:
        raise typer.Exit(Exit.FOUND)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    """The processor and every accelerator that torch sees."""
    found = [_processor()]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": about.name,
                "capability": f"{about.major}.{about.minor}",
                "memory_bytes": about.total_memory,
            }
        )
    for kind in ("xpu", "mps"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            found.append({"device": kind, "name": kind})
    return found


def _processor() -> dict[str, Any]:
    """The name of the processor and those of its features that kernels ask for, from Linux where that tells them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        text = ""
    info = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
    flags = (info.get("flags") or info.get("Features") or "").split()
    return {
        "device": "cpu",
        "name": info.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": [flag for flag in _FLAGS if flag in flags],
    }


def _cpu_kernels() -> dict[str, Any]:
    """Which instruction set the compiled kernels use, which they could use, and on whose threads they run.

    The set is None where the backend cannot be used; its state says why.
    """
    native: Any = sys.modules.get("lowbit.backends.cpu.native")  # there even where the import of its package failed
    if load("cpu") is not None:
        return {"instruction_set": None, "usable": list(native.available()) if native else [], "pool": None}
    return {"instruction_set": native.isa(), "usable": list(native.available()), "pool": native.pool()}


def _cuda_kernels() -> dict[str, Any] | None:
    """What compiles CUDA kernels, whether GPUs run them, and what is kept; None where they are not in the build."""
    load("cuda")
    # Its modules are there even where the import of their package failed.
    compiler: Any = sys.modules.get("lowbit.backends.cuda.compiler")
    check: Any = sys.modules.get("lowbit.backends.cuda.device_check")
    if compiler is None:
        return None
    try:
        driver, no_driver = compiler.driver_version(), None
    except LowbitError as error:
        driver, no_driver = None, str(error)
    devices = range(torch.cuda.device_count() if check and torch.cuda.is_available() else 0)
    kept = compiler.kept()
    return {
        "packages": {name: _version(name) for name in compiler.PACKAGES},
        "driver": driver,
        "no_driver": no_driver,
        "hopper": _hopper(devices),
        "refusals": {f"cuda:{index}": check.usable(torch.device("cuda", index)) for index in devices},
        "cache": {
            "folder": str(kept.folder),
            "writable": kept.writable,
            "entries": sum(kept.entries.values()),
            "bytes": kept.bytes,
            "architectures": kept.entries,
            "broken": list(kept.broken),
        },
    }


def _hopper(devices: range) -> dict[str, str | None]:
    """For each GPU of the Hopper kind, why kernels for its own products are not taken there, or None."""
    check: Any = sys.modules.get("lowbit.backends.cuda.hopper_check")
    if check is None:
        return {}
    found = {index: torch.device("cuda", index) for index in devices}
    return {f"cuda:{index}": check.refuses(device) for index, device in found.items() if check.is_hopper(device)}


def _choose(spec: str, shape: str, tokens: int, device: str, dtype: str) -> dict[str, Any]:
    """What every backend says to the linear of one layer, packed as loading does it, and which runs."""
    with asking():
        stored, (n, k) = StoredFormat.parse(spec), parse_shape(shape)
        x_dtype, x_device = parse_dtype(dtype, _DTYPES), _device(device)
    about = {"tokens": tokens, "device": device, "dtype": dtype_name(x_dtype)}
    notes = [note] if (note := other_when_converted(stored, k)) else []
    asked: dict[str, Any] = {"format": stored.spec, "shape": [n, k], **about, "notes": notes}
    if why := stored.refuses(n, k):
        return {**asked, "runs": None, "reasons": {"the format": f"a weight of {n}x{k} {why}"}}
    layout = stored.layout or preferred_layout("linear", stored.format.plain, n, k, x_device.type)
    asked["layout"] = layout
    x = torch.zeros((tokens, k), dtype=x_dtype, device=x_device)
    reasons = _reasons(StoredFormat(stored.format, layout), (n, k), x)
    runs = next((name for name, why in reasons.items() if why in ("runs", UNPACKS)), None)
    return {**asked, "runs": runs, "reasons": reasons}


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        raise PlanError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _reasons(stored: StoredFormat, shape: tuple[int, int], x: torch.Tensor) -> dict[str, str]:
    fmt = stored.format.plain
    parts = fmt.empty_parts(shape, x.device, x.dtype)
    if stored.layout:
        for part in parts.values():
            raw_bytes(part).zero_()  # not every content has every layout
        parts = get_layout(stored.layout, fmt).packed(fmt, parts)
    return explain("linear", fmt.name, stored.layout, x.device.type, (fmt, x, parts, None))


def _show(found: dict[str, Any]) -> None:
    say(f"lowbit {found['lowbit']}, Python {found['python']}, {found['platform']}", "bold")
    say(", ".join(f"{name} {version}" for name, version in found["packages"].items() if version))
    missing = [name for name, version in found["packages"].items() if not version]
    say(f"not installed: {', '.join(missing)}\n" if missing else "", "dim")
    for device in found["devices"]:
        about = [
            f"{key} {', '.join(value) if isinstance(value, list) else value}"
            for key, value in device.items()
            if key not in ("device", "name") and value
        ]
        say(f"{device['device']}: {device['name']}" + (f" ({'; '.join(about)})" if about else ""))
    native = found["cpu_kernels"]
    say(
        f"cpu kernels: instruction set {native['instruction_set'] or 'none'}"
        f" (usable: {', '.join(native['usable']) or 'none'}); threads: {native['pool'] or 'none'}"
    )
    _show_cuda(found["cuda_kernels"])
    rows = table("backend", "state", "kernels", title="\nbackends", right=("kernels",))
    present = {device["device"].partition(":")[0] for device in found["devices"]}
    for name, loaded in found["backends"].items():
        count = sum(kernel["backend"] == name for kernel in found["kernels"])
        idle = loaded == "available" and BACKENDS[name] and not present & set(BACKENDS[name])
        state = "its kernels compile, but there is no GPU here to run them" if idle else loaded
        rows.add_row(name, state, str(count), style="" if state == "available" else "dim")
    show(rows)
    if "choice" in found:
        choice = found["choice"]
        say(
            "linear of {format}, weight {shape[0]}x{shape[1]}, {tokens} x {dtype} tokens on {device}".format(**choice)
            + (f", packed as {choice['layout']}" if choice.get("layout") else ""),
            "bold",
        )
        for name, why in choice["reasons"].items():
            say(f"  {name}: {why}", "green" if name == choice["runs"] else "")
        say(f"runs: {choice['runs']}" if choice["runs"] else "no kernel can run this", "bold")
        show_notes(choice["notes"])


def _show_cuda(cuda: dict[str, Any] | None) -> None:
    if cuda is None:
        return
    driver = f"driver for CUDA {cuda['driver']}" if cuda["driver"] else cuda["no_driver"]
    packages = ", ".join(f"{name} {version or 'not of pip'}" for name, version in cuda["packages"].items())
    say(f"cuda kernels: {packages}; {driver}")
    for name, why in cuda["refusals"].items():
        say(f"  {name}: {why or 'runs them'}", "yellow" if why else "")
    for name, why in cuda["hopper"].items():
        if why:
            say(f"  {name}, products of a warpgroup: {why}; those of a warp run instead", "yellow")
    cache = cuda["cache"]
    counts = ", ".join(f"{name} {count}" for name, count in cache["architectures"].items())
    say(
        f"  cache {cache['folder']}: {cache['entries']} kernels, {size(cache['bytes'])}"
        + (f" ({counts})" if counts else "")
        + ("" if cache["writable"] else "; it cannot be written: they are compiled in every process")
    )
    if cache["broken"]:
        say(f"  broken, compiled again when they are needed: {', '.join(cache['broken'])}", "yellow")
