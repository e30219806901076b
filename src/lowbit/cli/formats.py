"""`lowbit formats`: what weights can be converted to."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from lowbit.checkpoint.dialects import Dialect, dialects
from lowbit.cli import options
from lowbit.cli.output import command, epilog, print_json, say, show, table
from lowbit.formats import Format, formats as registered, parse_spec
from lowbit.layouts.base import layouts

EPILOG = epilog("lowbit formats", "lowbit convert m.safetensors -o out.safetensors --format 'int8(rotation=256)'")
_SHAPE = (3072, 3072)  # bits per weight are told for a layer of this shape


@command
def formats(as_json: options.AsJson = False) -> None:
    """List the formats, what each is for and how close it comes to Gaussian weights, and the dialects of files."""
    described = [_describe(cls) for cls in registered().values()]
    conventions = [_describe_dialect(dialect) for dialect in dialects().values()]
    if as_json:
        print_json({"formats": described, "shape": list(_SHAPE), "dialects": conventions})
        return
    rows = table("spec", "bits/weight", "SQNR", "solver by default", right=("bits/weight", "SQNR"))
    for entry in described:
        for variant in entry["variants"]:
            rows.add_row(
                variant["spec"],
                f"{variant['bits_per_weight']:.2f}",
                f"{variant['sqnr']:.1f} dB",
                entry["default_solver"],
            )
    show(rows, names=False)
    for entry in described:
        fields = ", ".join(f"{field}={value}" for field, value in entry["fields"].items()) or "no fields"
        say(f"{entry['name']} ({fields})", "bold")
        say(f"  {entry['about']}")
        for layout in entry["layouts"]:
            say(f"  also stored as {entry['name']}@{layout}")
    say("dialects (--dialect, --source-dialect)", "bold")
    for entry in conventions:
        say(f"  {entry['name']}: {entry['about']}{'' if entry['writes'] else ' (only read)'}")
    say("")
    say(
        f"SQNR: signal to noise of Gaussian weights, 6 dB are one bit. Bits for a layer of {_SHAPE[0]}x{_SHAPE[1]}.",
        "dim",
    )


def _describe_dialect(dialect: Dialect) -> dict[str, Any]:
    """A dialect as JSON data."""
    return {
        "name": dialect.name,
        "about": dialect.summary,
        "writes": dialect.writes,
        "needs_folder": dialect.needs_folder,
    }


def _describe(cls: type[Format]) -> dict[str, Any]:
    """A format as JSON data: its fields with their defaults, and the variants whose accuracy is known."""
    common = {field.name for field in dataclasses.fields(Format)}
    fields = {k: v for k, v in cls().config().items() if k != "format" and k not in common}
    variants = [
        {"spec": spec, "bits_per_weight": _bits_per_weight(parse_spec(spec)), "sqnr": sqnr}
        for spec, sqnr in cls.golden_sqnr.items()
    ]
    about = " ".join((inspect.getdoc(cls) or "").split())
    return {
        "name": cls.name,
        "about": about,
        "fields": fields,
        "default_solver": cls.data_free_solver,
        "stochastic_rounding": cls.stochastic,
        "embedding": cls.supports_embedding,
        "layouts": [name for name, layout in layouts().items() if layout.stored and cls.name in layout.formats],
        "variants": variants,
    }


def _bits_per_weight(fmt: Format) -> float:
    return round(8 * fmt.nbytes(*_SHAPE) / (_SHAPE[0] * _SHAPE[1]), 3)
