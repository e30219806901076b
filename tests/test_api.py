"""What `import lowbit` gives, and what it costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

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


def test_import_is_quick_and_light():
    """`import lowbit` takes at most 0.3 s above `import torch`, and brings in nothing that only the command needs."""
    runs = []
    for _ in range(5):  # the best of several: a busy machine delays a run, nothing makes one too fast
        runs.append(measure_import())
        if runs[-1][0] <= 0.3:
            break

    assert min(seconds for seconds, _ in runs) <= 0.3
    assert runs[-1][1] == []
