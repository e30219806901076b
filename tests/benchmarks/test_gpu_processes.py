"""The processes that scripts/gpu starts: what dies, hangs or takes long loses its own row or file, and no other."""

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import gpu, gpu_first_use
from lowbit import dispatch
from lowbit.backends.gpu import Target, assume
from lowbit.errors import UnsupportedError
from lowbit.formats import parse_spec
from lowbit.layouts.base import get_layout
from scripts import gpu_tests

ROOT = Path(__file__).parents[2]


def test_first_use(monkeypatch):
    """The first process compiles, later ones find the kernels; the fastest of those counts."""
    runs = iter([{"a": 2.0}, {"a": 0.05}, {"a": 0.04}])
    folders = []
    monkeypatch.setattr(gpu_first_use, "_process", lambda folder: folders.append(folder) or next(runs))
    (row,) = gpu_first_use.measure()
    assert (row["name"], row["first_seconds"], row["later_seconds"]) == ("a", 2.0, 0.04)
    assert len(folders) == 3
    assert len(set(folders)) == 1
    shown = StringIO()
    gpu_first_use.show(Console(file=shown, width=200), [row, {"section": "start", "fault": "none"}])
    assert "2000" in shown.getvalue()
    assert "40.0" in shown.getvalue()


PROCESS = """
import json, os, sys, time
path, how = sys.argv[1:3]
found = json.load(open(path)) if os.path.exists(path) else {"linears": []}
if found["linears"]:
    found["finished"] = True
    found["linears"].append({"tokens": 16})
else:
    found["linears"].append({"tokens": 1})
    found["running"] = {"section": "linears", "tokens": 4}
json.dump(found, open(path, "w"))
if "running" in found:
    os.abort() if how == "dies" else time.sleep(60)
"""


@pytest.mark.parametrize(("how", "why"), [("dies", "ended with -6"), ("hangs", "did not end within")])
def test_a_process_that_dies_or_hangs_loses_one_row(tmp_path, how, why):
    """The row that a process died of is a fault; those before it are kept, and those after it are measured."""
    path = tmp_path / "gpu.json"
    command = [sys.executable, "-S", "-c", PROCESS, str(path), how]
    result = gpu.supervise(command, path, 60.0, stall=0.5, every=0.05)
    assert [row["tokens"] for row in result["linears"]] == [1, 4, 16]
    assert why in result["linears"][1]["fault"]
    assert "failures" not in result


FILES = {
    "triton/test_ends.py": "import time\ndef test_bad(): assert 0\ndef test_hangs(): time.sleep(60)\n",
    "cuda/test_dies.py": "import os\ndef test_good(): pass\ndef test_dies(): os.abort()\ndef test_next(): pass\n",
    "cuda/test_fine.py": "def test_fine(): pass\n",
}


STAYS = """
import sys, time, types
def test_stays(): time.sleep(60)
def test_breaks():
    def broken(): raise RuntimeError("an illegal memory access")
    cuda = types.SimpleNamespace(is_available=lambda: True, synchronize=broken)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
    assert 0, "the first of many"
def test_fails(): assert 0
def test_next(): pass
"""


@pytest.mark.slow
def test_tests_behind_one_that_stays_or_loses_the_gpu_are_run(tmp_path):
    """A process ends when a test stays in it or leaves the GPU unusable, not when one fails; another does the rest."""
    path = tmp_path / "tests/backends/triton/test_stays.py"
    path.parent.mkdir(parents=True)
    path.write_text(STAYS)
    log = tmp_path / "log"
    command = [sys.executable, "scripts/gpu_tests.py", str(log), "--root", str(tmp_path), "--seconds", "60"]
    env = {**os.environ, "LOWBIT_TEST_LONGEST": "1"}
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "tests: 1 passed; of 3 processes 3 failed; 0 files had no time" in found.stdout.splitlines()[-1]
    assert found.stdout.count("test_stays.py: ended in the middle") == 2
    text = log.read_text()
    for line in ("test_next PASSED", "test_fails FAILED", "the first of many", "errors: an illegal memory access"):
        assert line in text
    assert text.count("::test_stays") == 1


def test_each_shape_of_a_test_takes_one_tile(monkeypatch):
    """None is timed: shapes draw tiles, always the same ones, of which the next that runs is taken."""

    class Kernel:
        name, key = "kernel", ("n",)

        def _measure(self, grid, arguments, configs):
            assert len(configs) == 1
            if configs[0] == arguments["broken"]:
                raise UnsupportedError("too much shared memory")
            return configs[0], True

    fake = SimpleNamespace(TunedKernel=Kernel, _plain=lambda n: n, UnsupportedError=UnsupportedError, do_bench=None)
    gpu_tests._take_any_tile(fake)
    found = [Kernel()._measure(None, {"n": n, "broken": None}, (1, 2, 3)) for n in range(50)]
    assert {tile for tile, _ in found} == {1, 2, 3}
    assert not any(timed for _, timed in found)
    assert found == [Kernel()._measure(None, {"n": n, "broken": None}, (1, 2, 3)) for n in range(50)]
    assert {Kernel()._measure(None, {"n": n, "broken": 2}, (1, 2))[0] for n in range(9)} == {1}
    with pytest.raises(UnsupportedError):
        Kernel()._measure(None, {"n": 1, "broken": 1}, (1,))
    assert fake.do_bench(lambda: None, warmup=1) == 0.0


@pytest.mark.slow
def test_a_test_that_hangs_or_dies_hides_no_other(tmp_path):
    """At the end of the time the failures until then are there, beside the tests of files that ended as they should."""
    for name, text in FILES.items():
        path = tmp_path / "tests/backends" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    log = tmp_path / "log"
    command = [
        sys.executable,
        "scripts/gpu_tests.py",
        str(log),
        "--root",
        str(tmp_path),
        "--seconds",
        "20",
        "--jobs",
        "3",
    ]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    for line in ("test_ends.py: cut off", "test_dies.py: died of signal 6", "test_bad", "test_hangs", "::test_dies"):
        assert line in found.stdout
    assert "tests: 3 passed; of 4 processes 2 failed; 0 files had no time" in found.stdout.splitlines()[-1]
    for name in ("test_fine", "test_next"):
        assert f"{name} PASSED" in log.read_text()


def test_processes_share_a_file_that_takes_long(monkeypatch):
    """Every test of the file is in one share, and the shares differ by one test at most."""
    shares = [list(range(17)) for _ in range(6)]
    for index, items in enumerate(shares):
        monkeypatch.setenv(gpu_tests.SHARE, f"{index}/6")
        gpu_tests.pytest_collection_modifyitems(items)
    assert sorted(item for items in shares for item in items) == list(range(17))
    assert {len(items) for items in shares} == {2, 3}
    assert all(list(ROOT.glob(f"tests/backends/*/{name}")) for name in gpu_tests.SHARES)


def test_the_end_of_the_time_keeps_what_was_measured(tmp_path):
    """A process that is far over the budget is ended; its rows stay, and the result says that some are missing."""
    path = tmp_path / "gpu.json"
    command = [sys.executable, "-S", "-c", PROCESS, str(path), "hangs"]
    result = gpu.supervise(command, path, 0.3, grace=0.2, every=0.05)
    assert result["linears"][0] == {"tokens": 1}
    assert "time was over" in result["linears"][1]["skipped"]
    assert "measuring" in result["failures"]


def test_first_uses_are_of_calls_that_the_backend_takes():
    """On Hopper, by which the numbers are meant, none is refused: the process would end there."""
    if (why := dispatch.load("cuda")) is not None:
        pytest.skip(why)
    meta, (n, k) = torch.device("meta"), gpu_first_use.SHAPE
    for spec, many in gpu_first_use.CALLS.items():
        fmt = parse_spec(spec)
        with assume(Target("cuda", (9, 0))), dispatch.use_backend("cuda"):
            layout = dispatch.preferred_layout("linear", fmt, n, k, "cuda")
            make = get_layout(layout, fmt).empty_parts if layout else fmt.empty_parts
            parts = make(*((fmt,) if layout else ()), (n, k), meta, torch.bfloat16)
            for m in many:
                x = torch.empty(m, k, dtype=torch.bfloat16, device=meta)
                found = dispatch.select("linear", fmt.name, layout, "cuda", (fmt, x, parts, None))
                assert found.backend == "cuda"
