"""The vector operations that kernels are written in, and tiles, against plain C++: tests/native/test_*.cpp."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

cpu = pytest.importorskip("lowbit.backends.cpu", reason="no compiled kernels here", exc_type=ImportError)

ROOT = Path(__file__).resolve().parents[3]
TOOLS = [shutil.which(tool) for tool in ("cmake", "ninja", "ctest")]


@pytest.mark.slow
@pytest.mark.skipif(not all(TOOLS) or not (ROOT / "CMakeLists.txt").is_file(), reason="no CMake")
def test_operations_of_the_set_in_use(tmp_path):
    """Every operation of the instruction set gives what plain C++ does: ties, limits, subnormals, infinities, NaN."""
    cmake, _, ctest = TOOLS
    isa = cpu.native.isa()
    options = ["MODULES=OFF", "TESTS=ON", f"ISAS={isa}", f"EMULATE={'ON' if isa in cpu.native.EMULATED else 'OFF'}"]
    for command in (
        [cmake, "-G", "Ninja", "-S", ROOT, "-B", tmp_path, *(f"-DLOWBIT_{option}" for option in options)],
        [cmake, "--build", tmp_path],
        [ctest, "--test-dir", tmp_path, "--no-tests=error", "--output-on-failure"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
