"""The table of dialects, a page for each of them, and the matrix of dialects and formats."""

from __future__ import annotations

import inspect
from types import ModuleType

from docs_pairs import NOT_HELD, READ_ONLY, by_format, every_dialect, grouped, modules_of, specs, verdict
from docs_text import MADE, code, first_sentence, from_docstring, table

from lowbit.checkpoint.dialects import Dialect

PROOF = "tests/checkpoint/dialects/test_every_pair.py"


def every_dialect_table() -> str:
    """One row a dialect."""
    rows = [
        (
            f"[`{dialect.name}`](dialects/{dialect.name}.md)",
            dialect.summary,
            "read and written" if dialect.writes else "read",
            "folder" if dialect.needs_folder else "file",
        )
        for dialect in every_dialect()
    ]
    return table(("dialect", "what it is", "", "described in"), rows)


def dialect_page(dialect: Dialect) -> str:
    """The page of one dialect."""
    module, *helpers = modules_of(dialect)
    held, refused = grouped(dialect, specs())
    sections = [
        MADE,
        f"# {dialect.name}",
        f"{dialect.summary}.",
        _facts(dialect),
        from_docstring(module.__doc__ or ""),
        *(_section(helper) for helper in helpers),
        "## Formats",
        _held(dialect, held),
        _refused(dialect, refused),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _facts(dialect: Dialect) -> str:
    detected = first_sentence(inspect.getdoc(dialect.detect)).removeprefix("Whether ")
    rows = [
        ("read", f"yes; to name it: `--source-dialect {dialect.name}`"),
        ("written", f"`--dialect {dialect.name}`, `lowbit migrate --to {dialect.name}`" if dialect.writes else "no"),
        ("layers are described", "in JSON files of a model folder" if dialect.needs_folder else "in the file itself"),
        ("detected by", detected.rstrip(".")),
    ]
    if dialect.owned_metadata:
        rows.append(("header entries of its own", code(dialect.owned_metadata)))
    if dialect.owned_configs:
        owned = [f"`{file}`: {code(fields) or 'all of it'}" for file, fields in dialect.owned_configs.items()]
        rows.append(("JSON fields of its own", "; ".join(owned)))
    return table(("", ""), rows)


def _section(module: ModuleType) -> str:
    title, _, rest = inspect.cleandoc(module.__doc__ or "").partition("\n\n")
    return f"## {' '.join(title.split()).rstrip('.')}\n\n{from_docstring(rest)}" if rest else ""


def _held(dialect: Dialect, held: list[str]) -> str:
    linked = {f"[`{name}`](../formats/{name}.md)": variants for name, variants in by_format(held).items()}
    if not dialect.writes:
        return f"Read: {', '.join(linked)}. Nothing is written in this dialect."
    rows = [(name, code(variants)) for name, variants in linked.items()]
    return f"Written and read back bit for bit ([proof](../../{PROOF})):\n\n" + table(("format", "variants"), rows)


def _refused(dialect: Dialect, refused: dict[str, list[str]]) -> str:
    if not dialect.writes:
        return ""
    if not refused:
        return "Every format has a place here."
    rows = [(why, code(specs)) for why, specs in refused.items()]
    return "Refused before anything is written:\n\n" + table(("reason", "formats"), rows)


def matrix_page() -> str:
    """Every dialect with every spec."""
    columns = every_dialect()
    reasons: dict[tuple[str, str], int] = {}
    first = {name: variants[0] for name, variants in by_format(specs()).items()}
    rows = []
    for spec in specs():
        cells = []
        for dialect in columns:
            found, why = verdict(dialect, spec)
            if found == NOT_HELD and dialect.writes:
                found = f"no [{reasons.setdefault((dialect.name, why), len(reasons) + 1)}]"
            listed = found == READ_ONLY and spec != first[spec.partition("(")[0]]
            cells.append("" if found == NOT_HELD or listed else found)
        rows.append((f"`{spec}`", *cells))
    legend = f"""- **tested**: written and read back with the same bits, by the file alone ([proof](../../{PROOF})).
- **no [n]**: impossible; the number leads to the reason below. It is refused before anything is written.
- **read only**: files of this kind hold the format and are read, and lowbit does not write them. It stands in the
  first row of a format, whatever variants the files have.
- empty, in dialects that are only read: there are no such files."""
    sections = [
        MADE,
        "# Dialects and formats",
        legend,
        table(("spec", *(f"[{d.name}]({d.name}.md)" for d in columns)), rows),
        "## Why not",
        table(("", "dialect", "reason"), [(str(n), f"`{name}`", why) for (name, why), n in reasons.items()]),
    ]
    return "\n\n".join(sections) + "\n"


def dialect_pages() -> dict[str, str]:
    """Path -> text of the pages of all dialects, and of the matrix."""
    pages = {f"docs/dialects/{dialect.name}.md": dialect_page(dialect) for dialect in every_dialect()}
    return {**pages, "docs/dialects/matrix.md": matrix_page()}
