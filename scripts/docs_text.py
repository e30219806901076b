"""Markdown from docstrings: paragraphs stay prose, tables of columns and formulas stay as they are typed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence

MADE = "<!-- made by scripts/docs.py: change the docstrings and registries that it reads, not this page -->"
_COLUMNS = re.compile(r"\S {3,}\S")
_SPANS = re.compile(r"(`[^`]*`)")


def from_docstring(text: str) -> str:
    """A docstring as Markdown."""
    return "\n\n".join(_block(block) for block in re.split(r"\n\s*\n", inspect.cleandoc(text)) if block.strip())


def first_sentence(text: str | None) -> str:
    """The first line of a docstring, on one line."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


def _block(block: str) -> str:
    lines = block.split("\n")
    if lines[0].startswith(">>>"):
        return fenced("pycon", block)
    if any(line.startswith(" ") or _COLUMNS.search(line) for line in lines) and not lines[0].startswith("- "):
        return fenced("text", inspect.cleandoc(block))
    return escaped(block)


def fenced(language: str, text: str) -> str:
    """Text in a fence."""
    return f"```{language}\n{text}\n```"


def escaped(text: str) -> str:
    """Prose whose stars and angle brackets are meant as such, but within backticks."""
    pieces = _SPANS.split(text)
    pieces[::2] = [re.sub(r"([*<])", r"\\\1", piece) for piece in pieces[::2]]
    return "".join(pieces)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def code(words: Iterable[str]) -> str:
    """Words as code, with commas."""
    return ", ".join(f"`{word}`" for word in words)
