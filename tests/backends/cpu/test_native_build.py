"""Building: a package without kernels where there is no compiler, and without one set where a compiler is too old."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("nanobind")
pytest.importorskip("scikit_build_core")

ROOT = Path(__file__).resolve().parents[3]
CMAKE, NINJA, COMPILER = (shutil.which(tool) for tool in ("cmake", "ninja", os.environ.get("CXX") or "c++"))
WHEEL = "import scikit_build_core.build as build, sys; print(build.build_wheel(sys.argv[1]))"

pytestmark = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").is_file() or not CMAKE or not NINJA, reason="no CMake")


def configure(folder, compiler):
    """The lines of lowbit's own that CMake says, and its exit code."""
    command = [CMAKE, "-G", "Ninja", "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"]
    env = {**os.environ, "CXX": str(compiler)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("lowbit: ")]
    return done.returncode, said


def script(path, text):
    """An executable file."""
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_no_compiler_is_one_line_that_says_what_to_do(tmp_path):
    """Where no compiler works, CMake stops at once with one line that names the remedy."""
    code, said = configure(tmp_path / "build", tmp_path / "no-compiler")

    assert code != 0
    assert said == ["lowbit: no working C++ compiler: install g++ or clang++, or name one: CXX=..."]


@pytest.mark.skipif(not COMPILER or os.uname().machine != "x86_64", reason="needs a compiler for x86-64")
def test_a_set_that_the_compiler_does_not_know_is_left_out(tmp_path):
    """A compiler without AVX-512 VNNI builds the other sets, and one line says what is missing."""
    old = script(tmp_path / "old-c++", f'case "$*" in *-mavx512vnni*) exit 1;; esac\nexec {COMPILER} "$@"')
    code, said = configure(tmp_path / "build", old)

    assert code == 0
    assert (tmp_path / "build/generated/sets").read_text(encoding="utf-8").split() == ["portable", "avx2"]
    assert [line.split(" kernels:")[0] for line in said] == ["lowbit: no avx512", "lowbit: no amx"]


def test_a_wheel_without_a_compiler_is_pure_python_and_says_so(tmp_path):
    """The build succeeds without kernels, in a wheel for any machine with every data file, and one line says it."""
    command = [sys.executable, "-c", WHEEL, tmp_path]
    env = {**os.environ, "CXX": str(tmp_path / "no-compiler")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    listing = ["git", "ls-files", "-z", "--cached", "src/lowbit"]
    tracked = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\0")
    wanted = {name[len("src/") :] for name in tracked if name and not name.endswith((".cpp", ".h"))}

    assert wheel.name.endswith("-py3-none-any.whl")
    assert "no CPU kernels were compiled" in done.stdout + done.stderr
    assert wanted <= held
    assert "lowbit/py.typed" in held
    assert not [name for name in held if name.endswith((".so", ".cpp", ".h", ".pyc"))]
