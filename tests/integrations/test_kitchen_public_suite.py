"""comfy_kitchen's public tests of quantization pass against lowbit.integrations.kitchen, on a CPU.

They are not part of its wheel: LOWBIT_KITCHEN_TESTS names the `tests` folder of a source tree.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUITES = (
    "test_qdq",
    "test_convrot_w4a4",
    "test_svdquant_w4a4",
    "test_int8",
    "test_int8_input_act",
    "test_tensor",
)
# What they ask of its own CUDA launcher, and of a CUDA device by name; that a product is that of the weight rounded to
# bfloat16 first, to the bit (`test_a_product_rounds_once` in test_kitchen_layouts.py is nearer to the truth).
NOT_OURS = (
    "not shared_memory_bytes and not test_get_cuda_capability and not test_get_requirements "
    "and not test_fp8_linear_single_quantized_fallback"
)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def suite(tmp_path):
    """A copy of its tests. Those of the tensor ask for CUDA though nothing in them needs it."""
    pytest.importorskip("comfy_kitchen")
    source = os.environ.get("LOWBIT_KITCHEN_TESTS")
    if not source:
        pytest.skip("LOWBIT_KITCHEN_TESTS does not name comfy-kitchen's tests")
    for name in ("__init__", "conftest", *SUITES):
        shutil.copy(Path(source) / f"{name}.py", tmp_path)
    on_cuda = tmp_path / "test_tensor.py"
    text = on_cuda.read_text().replace('"cuda"', '"cpu"').replace("not torch.cuda.is_available()", "False")
    on_cuda.write_text(text)
    return shutil.copytree(tmp_path, tmp_path / "suite" / "tests", ignore=shutil.ignore_patterns("suite"))


@pytest.mark.parametrize("name", SUITES)
def test_its_tests_pass(suite, name):
    """Every test of the file that runs on a CPU passes, and there are some."""
    paths = [str(ROOT / "tests" / "support"), str(ROOT / "src"), *sys.path]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "kitchen_stand_in", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [
            *command,
            "--rootdir",
            str(suite.parent),
            "--import-mode=importlib",
            "-k",
            NOT_OURS,
            str(suite / f"{name}.py"),
        ],
        cwd=suite.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", run.stdout).group(1)) >= 1
