"""Print how large files and functions are, and which are past the habit. Never a gate: a long file is a question."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FUNCTION_LINES = 40
FILE_LINES = (  # the first that a path starts with and ends with
    ("src/lowbit/formats/", ".py", 250),
    ("src/lowbit/backends/", ".py", 400),
    ("src/", ".cpp", 800),
    ("src/", ".cu", 800),
    ("src/", ".py", 350),
    ("tests/", ".py", 400),
    ("benchmarks/", ".py", 350),
    ("examples/", ".py", 60),
    ("scripts/", ".py", 350),
)


def files() -> Iterator[tuple[str, int, int]]:
    """Path, number of lines and ceiling of every source file."""
    seen = set()
    for prefix, suffix, ceiling in FILE_LINES:
        for path in sorted((ROOT / prefix).rglob(f"*{suffix}")):
            if path not in seen:
                seen.add(path)
                yield path.relative_to(ROOT).as_posix(), len(path.read_text(encoding="utf-8").splitlines()), ceiling


def functions(path: str) -> Iterator[tuple[str, int]]:
    """Place and number of lines of every function in a Python file, its docstring and decorators included."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield f"{path}:{node.lineno} {node.name}()", (node.end_lineno or node.lineno) - first + 1


def summary(name: str, sizes: list[int]) -> str:
    """One line: how many, how many lines in all, the median and the largest."""
    return (
        f"sizes: {name}: {len(sizes)}, {sum(sizes)} lines, median {statistics.median(sizes):.0f}, largest {max(sizes)}"
    )


def main() -> None:
    """Print a summary a tree, then what is past its ceiling."""
    found = list(files())
    past = [(path, lines, ceiling) for path, lines, ceiling in found if lines > ceiling]
    for tree in ("src", "tests"):
        if sizes := [lines for path, lines, _ in found if path.startswith(f"{tree}/")]:
            print(summary(f"files in {tree}", sizes))
    measured = [
        entry for path, _, _ in found if path.startswith("src/") and path.endswith(".py") for entry in functions(path)
    ]
    if measured:
        print(summary("functions in src", [lines for _, lines in measured]))
    past += [(place, lines, FUNCTION_LINES) for place, lines in measured if lines > FUNCTION_LINES]
    for place, lines, ceiling in past:
        print(f"sizes: {place}: {lines} lines, the habit is {ceiling}")


if __name__ == "__main__":
    main()
