from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import compiler
from lowbit.errors import UnsupportedError

SOURCE, NAME = "device_check.cu", "lowbit::nothing"


def test_kept_on_disk(tmp_path, monkeypatch):
    """A kernel is compiled once; an entry that was cut short or changed is compiled again, and replaced."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    first = compiler.compiled(SOURCE, NAME, "sm_80")
    (entry,) = (tmp_path / "cuda").iterdir()
    whole = entry.read_bytes()
    monkeypatch.setattr(compiler, "compile_now", lambda *_: pytest.fail("compiled again"))
    assert compiler.compiled(SOURCE, NAME, "sm_80") == compiler.Binary(first.code, first.symbol)
    monkeypatch.undo()
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    for broken in (whole[:-7], b"", whole[:40] + b"\0" + whole[41:]):
        entry.write_bytes(broken)
        again = compiler.compiled(SOURCE, NAME, "sm_80")  # not the same bytes: the compiler numbers its runs
        assert again.symbol == first.symbol
        assert len(entry.read_bytes()) > len(again.code) > 1000
        assert again.code in entry.read_bytes()


def test_unwritable_cache(tmp_path, monkeypatch):
    """A cache folder that cannot be written is no error."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "file"))
    assert compiler.compiled(SOURCE, NAME, "sm_80").code


def test_errors_name_the_kernel(tmp_path, monkeypatch):
    """What does not compile is an error with the kernel, the architecture and the compiler's words."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    with pytest.raises(UnsupportedError, match=r"(?s)nothing<9> of device_check.cu does not compile for sm_90a.*error"):
        compiler.compiled(SOURCE, "lowbit::nothing<9>", "sm_90a")
    assert not (tmp_path / "cuda").exists()


def test_missing_compiler(monkeypatch):
    """Without the compiler the import says what to install."""
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"cuda\.bindings is not installed.*pip install"):
        compiler.check()


def test_headers_of_our_own_alone():
    """No header is included but those beside the kernels: CUDA's are in packages that are not always there."""
    sources = [*compiler.FOLDER.glob("*.cu"), *(compiler.FOLDER / "device").glob("*.cuh")]
    included = {name for source in sources for name in re.findall(r"#include (\S+)", source.read_text())}
    ours = {f'"{path.name}"' for path in (compiler.FOLDER / "device").iterdir()}
    assert included - ours == {'"simulator.h"'}


def test_missing_library(monkeypatch):
    """Packages that are there, with a library that is not, are found out at the import, in the loader's words."""
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")

    def cannot_be_loaded():
        raise RuntimeError("Failure finding libnvrtc.so\nlooked in many places")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", cannot_be_loaded)
    compiler.check()  # the file is there: it is not loaded before it is needed
    monkeypatch.setattr(compiler, "_installed_files", lambda *_: iter(()))
    with pytest.raises(ImportError, match=r"NVRTC.*is not there \(Failure finding libnvrtc.so\); pip install"):
        compiler.check()
    monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda: (0, 12, 9))
    compiler.check()  # one of the system's
    assert compiler.nvrtc_version() == "12.9"


def test_installed_files():
    """Of a package that pip has, the files that are on the disk; of others none."""
    assert {file.name for file in compiler._installed_files("pytest", "py.typed")} == {"py.typed"}
    assert not list(compiler._installed_files("no-such-package", ""))


def test_driver_version(monkeypatch):
    """The driver's version as CUDA counts them; without a driver an error that says so."""
    driver = importlib.import_module("cuda.bindings.driver")
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (0, 12040))
    assert compiler.driver_version() == "12.4"
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (34, 0))
    with pytest.raises(UnsupportedError, match="does not tell its version: 34"):
        compiler.driver_version()

    def none():
        raise RuntimeError('"cuda" can only be found via system search.')

    monkeypatch.setattr(driver, "cuDriverGetVersion", none)
    with pytest.raises(UnsupportedError, match='no NVIDIA driver: "cuda" can only be found'):
        compiler.driver_version()


def test_too_old_an_architecture():
    """The compiler knows none below 7.5 and says so."""
    assert {75, 80, 86, 89, 90, 100, 120} <= set(compiler.supported())
    with pytest.raises(UnsupportedError, match=r"(?s)does not compile for sm_70.*invalid value"):
        compiler.compile_now(SOURCE, NAME, "sm_70")


def test_what_is_kept(tmp_path, monkeypatch):
    """Entries are counted by architecture, broken ones are named, and whether more can be written is found out."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "made later"))
    assert compiler.kept() == compiler.Kept(tmp_path / "made later" / "cuda", True, {}, 0, ())
    assert not compiler.is_kept(SOURCE, NAME, "sm_90a")
    compiler.compiled(SOURCE, NAME, "sm_90a")
    compiler.compiled(SOURCE, NAME, "sm_80")
    assert compiler.is_kept(SOURCE, NAME, "sm_90a")
    broken = compiler.kept().folder / "other-sm_80-1234.bin"
    broken.write_bytes(b"cut short")
    found = compiler.kept()
    assert found.entries == {"sm_80": 1, "sm_90a": 1}
    assert found.bytes == sum(file.stat().st_size for file in found.folder.iterdir() if file != broken)
    assert found.broken == (broken.name,)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "file"))
    assert not compiler.kept().writable


def test_resources():
    """The compiler's log tells registers, spills and shared memory, of called functions, too."""
    one = "ptxas . 0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\nUsed 40 registers, used 1 barriers\n"
    two = "ptxas . 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nUsed 90 registers, 2048 bytes smem\n"
    made = compiler.Binary(b"", "f", one + two)
    assert (made.registers, made.spills, made.shared) == (90, 12, 2048)
    assert compiler.Binary(b"", "f", one).shared == 0
    with pytest.raises(ValueError, match="does not say"):
        compiler.Binary(b"", "f").registers  # noqa: B018


def test_several_threads_compile_at_once():
    """The first time, too: none sees the bindings before they are whole, or another one's program."""
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from lowbit.backends.cuda.compiler import compile_now\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        f"    made = list(pool.map(lambda _: compile_now({SOURCE!r}, {NAME!r}, 'sm_90a'), range(4)))\n"
        "assert {one.symbol for one in made} == {'_ZN6lowbit7nothingEv'}\n"
        "assert all(one.code.startswith(b'\\x7fELF') for one in made)\n"
    )
    assert not subprocess.run([sys.executable, "-c", code], check=False).returncode
