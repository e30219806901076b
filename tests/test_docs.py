"""The code in README, docs and docstrings runs, and tables made from the registry are up to date."""

import ast
import doctest
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import typer

import lowbit
from lowbit import dispatch
from lowbit.checkpoint.dialects import base as dialects
from lowbit.cli import app
from lowbit.errors import DependencyError
from lowbit.formats import registry
from lowbit.solvers import base as solvers, refinement
from lowbit.tensor import handlers
from tests.checkpoint.dialects.comfy_files import every_spec

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [page for page in [ROOT / "README.md", *DOCS] if page.exists()]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"^```py\n(.*?)^```", re.MULTILINE | re.DOTALL)
BASH = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"^<!-- needs: (.+) -->$", re.MULTILINE)
GAP = "…"  # what a message has of its own
MODULES = [
    m.name
    for m in pkgutil.walk_packages(lowbit.__path__, "lowbit.")
    # Compiled modules have no examples, and those for another processor's instructions end the process.
    if not m.name.rpartition(".")[2].startswith(("__main__", "_native_", "_machine"))
]


@pytest.fixture
def registries(monkeypatch):
    """What a page registers is gone afterwards."""
    for module in (registry, dialects, solvers, refinement):
        monkeypatch.setattr(module, "_REGISTRY", dict(module._REGISTRY))
    state = dispatch._State(
        {key: list(row) for key, row in dispatch._STATE.kernels.items()}, dict(dispatch._STATE.loaded)
    )
    monkeypatch.setattr(dispatch, "_STATE", state)
    yield
    registry.parse_spec.cache_clear()


def name_of(page):
    """A page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if PYTHON.search(page.read_text())], ids=name_of)
def test_python_blocks_run(page, registries, tmp_path, monkeypatch):
    """Every ```python block of a page runs, one after the other, in an empty folder."""
    monkeypatch.setattr(handlers, "_FALLBACKS", Counter())  # a reader begins with a new process
    text = page.read_text()
    for needed in ", ".join(NEEDS.findall(text)).split(", "):
        package, _, version = needed.partition(">=")
        if package:
            pytest.importorskip(package, version or None, reason=f"needs {needed}", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": f"{page.stem.replace('-', '_')}_page"}
    sys.modules[namespace["__name__"]] = type(sys)(namespace["__name__"])  # dataclasses look their module up
    for block in PYTHON.findall(text):
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_blocks_that_do_not_run_say_so(page):
    """A ```py block, which is not run here, begins with why; no other fence is Python under another name."""
    text = page.read_text()
    for block in NOT_RUN.findall(text):
        assert block.startswith("# not run by the tests"), block
        compile(block, page.name, "exec")
    assert set(re.findall(r"^```(\w+)$", text, re.MULTILINE)) <= {"python", "py", "pycon", "bash", "text", "json"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    """Relative links point to files that exist."""
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", PYTHON.sub("", page.read_text())):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def commands_in(text):
    """The words of every `lowbit` command in a page, whether in a block or in a line."""
    lines = [line for block in BASH.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *re.findall(r"`(lowbit [a-z]+ [^`]+)`", BASH.sub("", text))]:
        words = shlex.split(line, comments=True)
        if words[:1] == ["lowbit"] and words[1] != "--version":
            yield words[1:]


@pytest.mark.parametrize("page", [page for page in PAGES if "lowbit " in page.read_text()], ids=name_of)
def test_commands_exist(page):
    """Every `lowbit` command in a page exists, and has the options that it is given."""
    for words in commands_in(page.read_text()):
        command = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= known | {"--help"}, words


def messages():
    """Every string in the sources, with a gap for each value that is put into it; of C++ the sources as they are."""
    for path in sorted((ROOT / "src/lowbit/backends/cpu/native").glob("*.h")):
        yield path.read_text()
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(piece.value if isinstance(piece, ast.Constant) else GAP for piece in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_quoted_messages_are_those_of_the_sources():
    """Every message that the page on troubleshooting quotes is one that lowbit has, word for word."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    known = "\n".join(messages())

    assert len(quoted) > 40
    assert [text for text in quoted if text not in known] == []


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    """The examples in a module's docstrings give what they show."""
    if name.startswith("lowbit.backends.cpu") and dispatch.load("cpu") is not None:
        pytest.skip("no compiled kernels")
    torch.manual_seed(0)
    try:
        module = importlib.import_module(name)
    except DependencyError as error:  # the newest that supports this Python may be too old
        pytest.skip(str(error))

    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)

    assert failed == 0


def test_what_is_made_is_up_to_date():
    """README, docs and mkdocs.yml hold what scripts/docs.py makes from the registries and results."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/docs.py", "--check"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_matrix_claims_what_is_tested():
    """Every spec in the matrix of dialects and formats is one that test_every_pair.py tries with every dialect."""
    claimed = re.findall(
        r"^\| `([^`]+)` \| (?:no|tested)", (ROOT / "docs/dialects/matrix.md").read_text(), re.MULTILINE
    )

    assert len(claimed) > 40
    assert set(claimed) <= set(every_spec())
