"""The tables of formats, and a page for each of them."""

from __future__ import annotations

import ast
import dataclasses
import math
import sys
from functools import cache
from pathlib import Path

import torch
from docs_pairs import every_dialect, grouped, specs
from docs_text import MADE, code, fenced, first_sentence, from_docstring, table

import lowbit
from lowbit.dispatch import ANY_FORMAT, BACKENDS
from lowbit.formats import Format, formats
from lowbit.formats.parts import Dim
from lowbit.layouts.base import layouts
from lowbit.solvers import AUTO, pick_solver, solver

ROOT = Path(__file__).parents[1]
SHAPE = (3072, 3072)
SOME_FORMATS = "some"
GENERIC_OPS = ("linear", "linear_input_gradient", "embedding", "dequantize", "quantize")
USES = {
    "awq_w4a16": "4-bit weights, 16-bit activations: layers that see few tokens",
    "convrot_w4a4": "rotated 4-bit weights with one scale a row, 4-bit inputs (ConvRot); also int4_tensorwise",
    "fp8_e4m3": "8-bit float; a scale for the tensor, each row or each block of any size",
    "fp8_e5m2": "the same with more range and less precision",
    "gguf": "the blocks of llama.cpp's files, K-quants among them, 2.6 to 8.5 bits",
    "int8": "8-bit integer with 8-bit activations; row, tensor, block, or rotated (ConvRot)",
    "mxfp4": "4-bit float with a power-of-two scale every 32 weights",
    "mxfp8": "8-bit float with a power-of-two scale every 32 weights",
    "nvfp4": "4-bit float with an 8-bit scale every 16 weights",
    "svdquant_w4a4": "4-bit weights and activations with a 16-bit low-rank branch",
    "w4a8_codebook": "rotated 4- or 6-bit weights that expand to int8, 8-bit activations (asym_w4a8_int8)",
    "wna16": "integers of 2 to 8 bits with a scale a group, 16-bit inputs: GPTQ, AWQ, llm-compressor",
}

_NOTES = {
    "gguf": "GGUF files themselves are written by `lowbit export`: see [llama.cpp](../recipes/llama-cpp.md).",
}
_KINDS = {bool: "False, True", int: "a whole number", tuple: "rows x columns", str: "text"}
_MEASURED = (
    "Bits are those of a 3072 x 3072 bfloat16 weight with all its side tensors. The SQNR is that of rounding "
    "to nearest on a Gaussian 1024 x 1024 weight."
)
_COMMON = {
    "pre_quant_scale": "every format has it: stores a vector [K] that the input is multiplied by",
    "input_scale": "every format has it: stores a static scale of the input, for runtimes that use one",
}


def bits(fmt: Format) -> float:
    """Bits a weight of a 3072 x 3072 bfloat16 matrix takes, side tensors included."""
    return fmt.nbytes(*SHAPE) * 8 / (SHAPE[0] * SHAPE[1])


def every_spec() -> str:
    """One row for each spec that a format gives a golden number for."""
    rows = []
    for cls in formats().values():
        for spec, decibels in cls.golden_sqnr.items():
            fmt = lowbit.parse_spec(spec)
            named = f"[`{spec}`](formats/{cls.name}.md)"
            rows.append((named, f"{bits(fmt):.2f}", f"{decibels:.1f}", ", ".join(fmt.part_names)))
    return table(("spec", "bits a weight", "SQNR, dB", "stored tensors"), rows)


def every_format() -> str:
    """One row a format: size, error by rounding and by the solver that `auto` takes, use."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    rows = []
    for name, cls in formats().items():
        fmt = cls()
        shown = []
        for chosen in dict.fromkeys(("rtn", pick_solver(AUTO, fmt)[0])):
            back = fmt.dequantize(solver(chosen)(weight, fmt), (1024, 1024), torch.float32)
            shown.append(f"{20 * math.log10(weight.norm() / (weight - back).norm()):.1f}")
        use = USES.get(name) or first_sentence(cls.__doc__).rstrip(".")
        rows.append((f"[`{name}`](docs/formats/{name}.md)", f"{bits(fmt):.2f}", " -> ".join(shown), use))
    return table(("format", "bits a weight", "SQNR, dB", "what it is"), rows)


def format_page(cls: type[Format]) -> str:
    """The page of one format."""
    module = sys.modules[cls.__module__]
    example = f"lowbit convert model.safetensors -o out.safetensors --format {next(iter(cls.golden_sqnr), cls.name)!r}"
    sections = [
        MADE,
        f"# {cls.name}",
        from_docstring(cls.__doc__ or ""),
        fenced("bash", example.replace("'" + cls.name + "'", cls.name)),
        _NOTES.get(cls.name, ""),
        from_docstring(module.__doc__ or ""),
        f"All in one file: [`{_source(module.__file__)}`](../../{_source(module.__file__)}).",
        "## Variants",
        _variants(cls),
        _MEASURED,
        "## Fields",
        _fields(cls),
        "## Stored tensors",
        f"Of `{cls()}`; N is the number of outputs, K of inputs{', R the rank' if 'rank' in cls().config() else ''}.",
        _parts(cls()),
        "## In files",
        _files(cls.name),
        "[Every pair](../dialects/matrix.md) is tested bit for bit, or refused before anything is written.",
        "## Kernels",
        _kernels(cls.name),
        _layouts(cls.name),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _source(file: str | None) -> str:
    return Path(file or "").resolve().relative_to(ROOT.resolve()).as_posix()


def _variants(cls: type[Format]) -> str:
    rows = []
    for spec, decibels in cls.golden_sqnr.items():
        fmt = lowbit.parse_spec(spec)
        solved = pick_solver(AUTO, fmt)[0]
        rows.append((f"`{spec}`", f"{bits(fmt):.2f}", f"{decibels:.2f}", f"`{solved}`", code(fmt.part_names)))
    return table(("spec", "bits a weight", "SQNR, dB", "solver without data", "stored tensors"), rows)


def _fields(cls: type[Format]) -> str:
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    stated, rows = _stated_values(cls), []
    for name, default in fields.items():
        if name not in _COMMON:
            values = stated.get(name) or _KINDS[type(default)]
            rows.append((f"`{name}`", f"`{_value(default)}`", values))
    rows += [(f"`{name}`", f"`{_value(fields[name])}`", what) for name, what in _COMMON.items()]
    return table(("field", "default", "values"), rows)


def _stated_values(cls: type[Format]) -> dict[str, str]:
    """Field -> its values, of those for which the class says `one_of(self, field, values)`."""
    found: dict[str, str] = {}
    for module in reversed([sys.modules[base.__module__] for base in cls.__mro__ if issubclass(base, Format)]):
        for node in ast.walk(ast.parse(Path(module.__file__ or "").read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "one_of":
                values = eval(compile(ast.Expression(node.args[2]), cls.name, "eval"), vars(module))  # noqa: S307
                found[ast.literal_eval(node.args[1])] = ", ".join(map(_value, values))
    return found


def _value(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _parts(fmt: Format) -> str:
    rows = []
    for part in fmt.rules:
        shape = ", ".join(str(dim) if isinstance(dim, int) else _length(dim) for dim in part.dims)
        rows.append((f"`{part.name}`", f"[{shape}]", ", ".join(str(d).removeprefix("torch.") for d in part.dtypes)))
    return table(("tensor", "shape", "dtype"), rows)


def _length(dim: Dim) -> str:
    size = dim.axis if dim.per == 1 else f"ceil({dim.axis} / {dim.per})"
    return size if dim.times == 1 else f"{dim.times} {size}"


def _files(name: str) -> str:
    mine = [spec for spec in specs() if lowbit.parse_spec(spec).name == name]
    rows = []
    for dialect in every_dialect():
        held, refused = grouped(dialect, mine)
        if not held:
            continue
        what = "all variants" if not refused else code(held)
        rows.append((f"[`{dialect.name}`](../dialects/{dialect.name}.md)", "yes" if dialect.writes else "no", what))
    return table(("dialect", "written", "variants"), rows)


@cache
def kernels() -> tuple[tuple[str, str, str], ...]:
    """(op, format, backend) of every kernel, from the decorators in the sources: no backend need be installed."""
    found = []
    for path in sorted((ROOT / "src/lowbit/backends").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        calls = [call for node in nodes for call in getattr(node, "decorator_list", ()) if isinstance(call, ast.Call)]
        found += [_registered(call, path) for call in calls if getattr(call.func, "id", "") == "kernel"]
    return tuple(found)


def _registered(decorator: ast.Call, path: Path) -> tuple[str, str, str]:
    """SOME_FORMATS stands for a format that is computed."""
    said = {word.arg: word.value for word in decorator.keywords}
    fmt = said.get("format", ast.Constant(ANY_FORMAT))
    try:
        named = fmt.value if isinstance(fmt, ast.Constant) else SOME_FORMATS
        return ast.literal_eval(decorator.args[0]), named, ast.literal_eval(said["backend"])
    except ValueError:
        sys.exit(f"{path}:{decorator.lineno}: scripts/docs.py reads the op and the backend of a kernel as literals")


def _kernels(name: str) -> str:
    rows = []
    for op in dict.fromkeys((*GENERIC_OPS, *(op for op, *_ in kernels() if name.partition("_")[0] in op))):
        theirs = [(fmt, backend) for other, fmt, backend in kernels() if other == op]
        mine = {(fmt != SOME_FORMATS, b) for fmt, b in theirs if fmt in {ANY_FORMAT, name, SOME_FORMATS}}
        cells = [b if (True, b) in mine else f"{b} (some formats)" for b in BACKENDS if {(True, b), (False, b)} & mine]
        if cells:
            rows.append((f"`{op}`", ", ".join(cells)))
    note = "`eager` is plain PyTorch: it runs on every device, and is the reference rather than a fast kernel."
    if {backend for *_, backend in kernels()} == {"eager"}:
        note += " This build has no other backend."
    return table(("op", "backends, the preferred one first"), rows) + f"\n\n{note}"


def _layouts(name: str) -> str:
    found = [
        (layout.name, sys.modules[layout.pack.__module__]) for layout in layouts().values() if name in layout.formats
    ]
    lines = [f"- `{name}@{known}`: {first_sentence(module.__doc__)}" for known, module in found]
    return "\n".join(["Kernel layouts:", "", *lines]) if lines else ""


def format_pages() -> dict[str, str]:
    """Path -> text of the pages of all formats."""
    return {f"docs/formats/{name}.md": format_page(cls) for name, cls in formats().items()}
