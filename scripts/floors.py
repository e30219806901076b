"""The order of the floors: who may import whom inside the package. Run as a program it prints what breaks it.

A module imports only from floors with a smaller number, from its own folder and from the few neighbours of BESIDE, and
never inside a function, so that the import lines at the top of a file say all that it rests on. All import `errors`.
The top-level `__init__.py` may import anything, and only the highest floor may import from it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "lowbit"
FLOORS = {
    "errors": 0,
    "devices": 0,
    "starting": 0,
    "memory": 0,
    "text_files": 0,
    "numerics": 0,
    "formats": 1,
    "layouts": 1,
    "ops": 2,
    "dispatch": 2,
    "backends": 3,
    "solvers": 3,
    "tensor": 4,
    "tensor_ops": 4,
    "layer_kinds": 4,
    "layer_policy": 4,
    "nn": 4,
    "experts": 4,
    "smoothing": 4,
    "checkpoint": 5,
    "calibration": 5,
    "lora": 5,
    "report": 5,
    "integrations": 6,
    "cli": 6,
    "__main__": 6,
}
TOP = 6
EVERYWHERE = {"errors"}
BESIDE = {  # who may import a neighbour on the same floor; never both ways
    "layouts": {"formats"},  # a layout rearranges a format's parts
    "ops": {"dispatch"},  # an op's body asks for its kernel
    "tensor_ops": {"tensor"},  # the handlers of QuantizedTensor's operations
    "experts": {"tensor", "tensor_ops"},  # a bank's experts are quantized weights
    "layer_kinds": {"tensor"},  # a layer is quantized if its weight is
    "layer_policy": {"layer_kinds", "tensor"},  # what a kind of layer cannot hold is refused
    "nn": {"layer_kinds", "layer_policy", "tensor"},  # a module's weights are replaced by quantized ones
    "calibration": {"checkpoint"},  # the statistics file is written and resumed as checkpoints are
    "lora": {"checkpoint"},  # adapters are read, and baked into files, as checkpoints are
    "cli": {"integrations"},  # a subcommand that shows an integration
    "__main__": {"cli"},  # `python -m lowbit` is the command
}
DYNAMIC = {"dispatch"}  # imports a backend when a tensor of its device first needs it: the only import on demand


def check_tree(source: Path) -> list[str]:
    """Every broken rule in the package folder `source`, one line each: `file:line: what is wrong`."""
    found = []
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found += [
            f"{path}:{line}: {what}" for line, what in check_source(text, name, package=path.name == "__init__.py")
        ]
    return found


def check_source(text: str, name: str, *, package: bool = False) -> list[tuple[int, str]]:
    """Broken rules in one module, as (line, what is wrong), in order of lines.

    `name` is the module's name inside the package, such as `formats.fp8`, empty for the package itself;
    `package` says that the text is an `__init__.py`.
    """
    if not name:
        return []
    home = name.split(".", maxsplit=1)[0]
    if home not in FLOORS:
        return [(1, f"{home} has no floor: give it one in scripts/floors.py")]
    tree = ast.parse(text, filename=name)
    found = []
    for node, inside in _imports(tree, inside=False):
        for target in _targets(node, name, package=package):
            if inside:
                found.append((node.lineno, f"import of our own {target or PACKAGE} inside a function"))
            if why := _refusal(home, target):
                found.append((node.lineno, why))
    if home not in DYNAMIC:
        found += [(line, "import on demand of our own code: only dispatch may") for line in _dynamic(tree)]
    return sorted(set(found))


def _refusal(home: str, target: str) -> str | None:
    """Why a module of `home` may not import `target` (a dotted name inside the package), or None."""
    head = target.split(".", maxsplit=1)[0]
    if head == home or head in EVERYWHERE:
        return None
    if head not in FLOORS:  # a name of the package itself
        return None if FLOORS[home] == TOP else f"{home} (F{FLOORS[home]}) imports from the package's own __init__.py"
    if FLOORS[head] < FLOORS[home] or head in BESIDE.get(home, ()):
        return None
    return f"{home} (F{FLOORS[home]}) imports {target} (F{FLOORS[head]})"


def _imports(tree: ast.AST, *, inside: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements, each with whether it stands inside a function (a class body runs at import: outside)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, inside
        else:
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(node, inside=inside or function)


def _targets(node: ast.Import | ast.ImportFrom, name: str, *, package: bool) -> Iterator[str]:
    """What an import statement takes from our package, as dotted names inside it; nothing for other people's code."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            first, _, rest = alias.name.partition(".")
            if first == PACKAGE:
                yield rest
        return
    if node.level:
        here = name.split(".") if package else name.split(".")[:-1]
        base = here[: len(here) - (node.level - 1)]
        module = ".".join([*base, node.module] if node.module else base)
    else:
        first, _, module = (node.module or "").partition(".")
        if first != PACKAGE:
            return
    for alias in node.names:
        yield module or alias.name


def _dynamic(tree: ast.AST) -> Iterator[int]:
    """Lines that import by a name that is ours or that is not written out."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called not in {"import_module", "__import__"}:
            continue
        name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
        if not isinstance(name, str) or name.startswith(".") or name.split(".")[0] == PACKAGE:
            yield node.lineno


def main() -> int:
    """Print what breaks the order of the floors; 1 if anything does."""
    found = check_tree(Path(__file__).resolve().parent.parent / "src" / PACKAGE)
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
