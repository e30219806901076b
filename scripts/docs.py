"""Write what the docs say of formats, dialects and measurements from the registries and results; --check compares.

Whole files: docs/formats/*.md, docs/dialects/*.md, docs/cpu.svg. Marked places: README.md, docs/*.md, the navigation
in mkdocs.yml. Nothing is kept between runs, and two runs give the same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from docs_cpu import cpu_codecs, cpu_linears, cpu_machine, cpu_models, cpu_peers, cpu_plot, cpu_zen4
from docs_dialects import dialect_pages, every_dialect_table
from docs_formats import every_format, every_spec, format_pages
from docs_measured import diffusion, genres, layers, peers, peers_by_genre, sentences
from docs_presets import every_preset

from lowbit.checkpoint.dialects import dialects
from lowbit.formats import formats

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs/formats", "docs/dialects")


def _nav(folder: str, names: Callable[[], dict]) -> Callable[[], str]:
    return lambda: "\n".join(f"      - {name}: {folder}/{name}.md" for name in names())


# file, name of the place in it -> what stands there
PLACES: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "formats"): every_format,
    ("docs/formats.md", "formats"): every_spec,
    ("docs/dialects.md", "dialects"): every_dialect_table,
    ("docs/manual.md", "presets"): every_preset,
    ("docs/which-format.md", "sentences"): sentences,
    ("docs/which-format.md", "diffusion"): diffusion,
    ("docs/solvers.md", "genres"): genres,
    ("docs/solvers.md", "layers"): layers,
    ("docs/solvers.md", "peers"): peers,
    ("docs/solvers.md", "peers_by_genre"): peers_by_genre,
    ("docs/cpu.md", "cpu_machine"): cpu_machine,
    ("docs/cpu.md", "cpu_linears"): cpu_linears,
    ("docs/cpu.md", "cpu_zen4"): cpu_zen4,
    ("docs/cpu.md", "cpu_peers"): cpu_peers,
    ("docs/cpu.md", "cpu_codecs"): cpu_codecs,
    ("docs/cpu.md", "cpu_models"): cpu_models,
    ("mkdocs.yml", "formats"): _nav("formats", formats),
    ("mkdocs.yml", "dialects"): _nav("dialects", dialects),
}


def marks(file: str, place: str) -> tuple[str, str]:
    """What stands before and after a place."""
    if file.endswith(".yml"):
        return f"      # {place}: made by scripts/docs.py", f"      # {place}: end"
    return f"<!-- {place}: made by scripts/docs.py -->", f"<!-- {place}: end -->"


def filled(file: str, place: str, text: str, made: str) -> str:
    """The text of a file with a place filled."""
    begin, end = marks(file, place)
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        sys.exit(f"{file}: lacks the marks {begin} and {end}")
    return f"{head}{begin}\n{made}\n{end}{tail}"


def wanted() -> dict[str, str]:
    """Path -> what should stand in it, of every file that is made or has a place."""
    texts = {**format_pages(), **dialect_pages(), "docs/cpu.svg": cpu_plot()}
    for (file, place), make in PLACES.items():
        texts[file] = filled(file, place, texts.get(file) or (ROOT / file).read_text(), make())
    return texts


def main() -> int:
    """Update the files, or compare; the exit code says whether they were (or are) right."""
    torch.set_num_threads(1)  # small tensors: a busy machine makes threads wait for each other
    texts = wanted()
    stale = [name for name, text in texts.items() if not (ROOT / name).is_file() or (ROOT / name).read_text() != text]
    extra = [
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).glob("*.md")
        if path.relative_to(ROOT).as_posix() not in texts
    ]
    if "--check" in sys.argv:
        if stale or extra:
            print(f"{', '.join(sorted(stale + extra))}: out of date; run python scripts/docs.py")
        return 1 if stale or extra else 0
    for name in extra:
        (ROOT / name).unlink()
    for name in stale:
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_text(texts[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
