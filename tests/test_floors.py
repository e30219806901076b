"""The order of the floors holds, and its checker notices each way to break it."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.floors import FLOORS, check_source, check_tree

SOURCE = Path(__file__).resolve().parent.parent / "src" / "lowbit"


def test_package_keeps_the_order_of_its_floors():
    """No module imports from a higher floor, and none imports our own code inside a function."""
    assert check_tree(SOURCE) == []


def test_the_whole_package_was_looked_at():
    """Every file and folder of the package stands on a floor, so none escapes the check."""
    names = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or any(path.glob("**/*.py"))}

    assert names - {"__init__", "__pycache__"} <= FLOORS.keys()


@pytest.mark.parametrize(
    ("module", "text", "complaint"),
    [
        ("numerics.floats", "from lowbit.formats.base import Format", "numerics (F0) imports formats.base (F1)"),
        ("formats.fp8", "import lowbit.ops", "formats (F1) imports ops (F2)"),
        ("formats.fp8", "from ..tensor import QuantizedTensor", "formats (F1) imports tensor (F4)"),
        ("formats.fp8", "from lowbit import tensor", "formats (F1) imports tensor (F4)"),
        ("formats.fp8", "from .. import tensor", "formats (F1) imports tensor (F4)"),
        ("formats.fp8", "from lowbit import quantize_", "formats (F1) imports from the package's own __init__.py"),
        ("formats.fp8", "import lowbit", "formats (F1) imports from the package's own __init__.py"),
        ("formats.fp8", "from lowbit.layouts import tiles", "formats (F1) imports layouts (F1)"),
        ("solvers.rtn", "from lowbit.backends.eager import linear", "solvers (F3) imports backends.eager (F3)"),
        ("tensor", "from lowbit.calibration import hooks", "tensor (F4) imports calibration (F5)"),
        ("formats.base", "from lowbit.layouts.base import Layout", "formats (F1) imports layouts.base (F1)"),
        ("dispatch", "from lowbit import ops", "dispatch (F2) imports ops (F2)"),
        ("ops", "from .tensor import QuantizedTensor", "ops (F2) imports tensor (F4)"),
        ("checkpoint.read", "if TYPE_CHECKING:\n    from lowbit.cli import app", "checkpoint (F5) imports cli (F6)"),
        ("checkpoint.dialects.comfy", "from ...report import metrics", "checkpoint (F5) imports report (F5)"),
        ("nn", "def f():\n    from lowbit.formats import base", "import of our own formats inside a function"),
        ("nn", "def f():\n    import lowbit.ops", "import of our own ops inside a function"),
        ("nn", "async def f():\n    if x:\n        from . import ops", "import of our own ops inside a function"),
        ("nn", "class C:\n    def f(self):\n        from .ops import y", "import of our own ops inside a function"),
        ("cli.main", "def f():\n    from lowbit import load", "import of our own load inside a function"),
        ("nn", "import importlib\nimportlib.import_module('lowbit.ops')", "import on demand of our own code"),
        ("nn", "from importlib import import_module\nimport_module(name)", "import on demand of our own code"),
        ("extras", "import torch", "extras has no floor"),
    ],
)
def test_a_broken_rule_is_noticed(module, text, complaint):
    """Each kind of broken rule gives exactly one complaint, which names it."""
    found = check_source(text, module)

    assert len(found) == 1
    assert complaint in found[0][1]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("formats.fp8", "from lowbit.errors import FormatError\nfrom lowbit.numerics import floats"),
        ("formats.fp8", "from .base import Format\nfrom lowbit.formats.parts import Part"),
        ("numerics.floats", "from lowbit.errors import WeightError"),
        ("ops", "from lowbit import dispatch"),
        ("ops.generic", "from lowbit.dispatch import select"),
        ("layouts.tiles", "from ..formats.base import Format"),
        ("nn", "from .tensor import QuantizedTensor"),
        ("cli.app", "from lowbit import load, __version__\nimport lowbit"),
        ("checkpoint.dialects.comfy", "from ..read import Reader"),
        ("nn", "def f():\n    import transformers\n    importlib.import_module('transformers')"),
        ("nn", "class C:\n    from lowbit.formats import base"),
        ("dispatch", "import importlib\nimportlib.import_module(f'lowbit.backends.{name}')"),
        ("", "from lowbit.cli import main\nfrom lowbit.tensor import QuantizedTensor"),
    ],
)
def test_what_is_allowed_passes(module, text):
    """Imports from below, from the own folder, of other people's code anywhere, and all in the package's own init."""
    assert check_source(text, module) == []


def test_relative_imports_of_a_package_start_at_itself():
    """In `formats/__init__.py` one dot is `lowbit.formats`, in `formats/fp8.py` it is too, two dots are `lowbit`."""
    assert check_source("from .base import Format", "formats", package=True) == []
    assert "imports tensor" in check_source("from ..tensor import QuantizedTensor", "formats", package=True)[0][1]
