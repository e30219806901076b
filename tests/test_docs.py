"""The code in README, docs and docstrings runs, and tables made from the registry are up to date."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit import dispatch
from lowbit.formats import registry

ROOT = Path(__file__).parents[1]
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if page.exists()]
MODULES = [m.name for m in pkgutil.walk_packages(lowbit.__path__, "lowbit.") if not m.name.endswith("__main__")]


@pytest.fixture
def registries(monkeypatch):
    """Formats and kernels that a page registers are gone afterwards."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    state = dispatch._State(
        {key: list(row) for key, row in dispatch._STATE.kernels.items()}, dict(dispatch._STATE.loaded)
    )
    monkeypatch.setattr(dispatch, "_STATE", state)
    yield
    registry.parse_spec.cache_clear()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, registries, tmp_path, monkeypatch):
    """Every ```python block of a page runs, one after the other, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": f"{page.stem}_page"}
    sys.modules[namespace["__name__"]] = type(sys)(namespace["__name__"])  # dataclasses look their module up
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Relative links point to files that exist."""
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    """The examples in a module's docstrings give what they show."""
    torch.manual_seed(0)

    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)

    assert failed == 0


def test_the_format_table_is_up_to_date():
    """README and docs/formats.md hold the tables that scripts/docs.py makes from the registry."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/docs.py", "--check"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
