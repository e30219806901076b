"""What `import lowbit` gives, and what it costs."""

from __future__ import annotations

import inspect
import json
import os
import pkgutil
import subprocess
import sys

import pytest

import lowbit

OPTIONAL = ("jinja2", "pydantic", "rich", "transformers", "triton", "typer")

# In one process, so that the time of `import torch` and its spread are not in the difference. Nor is that of walking
# torch's half a million objects, which the garbage collector does once at about this time: 70 ms in whatever import it
# happens to fall. Processor time: other tests run beside this one.
MEASURE = f"""
import gc, json, sys, time
import torch
gc.freeze()
before = set(sys.modules)
start = time.process_time()
import lowbit
seconds = time.process_time() - start
heavy = sorted({{name.split(".")[0] for name in set(sys.modules) - before}} & set({OPTIONAL!r}))
print(json.dumps([seconds, heavy]))
"""


def measure_import() -> tuple[float, list[str]]:
    """Seconds that `import lowbit` takes after `import torch` in a new process, and the heavy packages it loads.

    The process may write bytecode, whatever the environment says: what pip installs is compiled, and a checkout is from
    its second import on. Otherwise this would measure Python's compiler.
    """
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    program = [sys.executable, "-c", MEASURE]
    run = subprocess.run(program, capture_output=True, text=True, check=True, timeout=120, env=env)
    seconds, heavy = json.loads(run.stdout)
    return seconds, heavy


def test_exported_names_exist_and_are_sorted():
    """`lowbit.__all__` is sorted, without doubles, and every name in it is there."""
    assert list(lowbit.__all__) == sorted(set(lowbit.__all__))
    for name in lowbit.__all__:
        assert hasattr(lowbit, name), name
        assert name in dir(lowbit)


def test_what_works_on_checkpoints_is_at_hand():
    """A program that converts needs no deep module; the names are those of the functions, and not of modules."""
    from lowbit.checkpoint.convert import convert

    assert lowbit.convert is convert
    for name in ("compare", "convert", "export_gguf", "make_plan", "migrate", "open_source", "verify"):
        assert name in lowbit.__all__
        assert inspect.isfunction(getattr(lowbit, name))
    with pytest.raises(AttributeError, match="no attribute 'konvert'"):
        lowbit.konvert  # noqa: B018


def test_no_module_has_the_name_of_what_is_exported():
    """An import of a module `lowbit.convert`, say, would take the place of the function."""
    modules = {found.name for found in pkgutil.iter_modules(lowbit.__path__)}

    assert sorted(modules & set(lowbit.__all__)) == ["ops", "tensor_ops"]


def test_what_works_on_checkpoints_is_imported_when_asked_for():
    """`import lowbit` does without it, and `lowbit.convert` brings it in."""
    program = (
        "import sys, lowbit\n"
        "names = ('compare', 'convert', 'export_gguf', 'migrate', 'plan', 'verify')\n"
        "later = {f'lowbit.checkpoint.{name}' for name in names}\n"
        "assert not later & set(sys.modules), later & set(sys.modules)\n"
        "from lowbit import convert\n"
        "assert 'lowbit.checkpoint.convert' in sys.modules\n"
        "assert lowbit.convert is convert\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_dir_lists_names_for_users():
    """All of them, those that are imported later too, and none of the module's own."""
    assert {name for name in dir(lowbit) if not name.startswith("_")} == {*lowbit.__all__} - {"__version__"}


def test_import_is_quick_and_light():
    """`import lowbit` takes at most 0.3 s above `import torch`, and brings in nothing that only the command needs."""
    runs = []
    for _ in range(5):  # the best of several: a busy machine delays a run, nothing makes one too fast
        runs.append(measure_import())
        if runs[-1][0] <= 0.3:
            break

    assert min(seconds for seconds, _ in runs) <= 0.3
    assert runs[-1][1] == []
