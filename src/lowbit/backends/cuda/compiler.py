"""CUDA C++ to machine code by NVRTC, kept on disk: no CUDA toolkit, and no GPU where nothing runs.

What a kernel was compiled from is its key: the source with every header of this folder, the template arguments, the
architecture and the compiler's version. Entries are written as a whole and carry a digest, so that one cut short, or
changed, is compiled again. `LOWBIT_CACHE` names the folder.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import re
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lowbit.backends.cache import cache_folder, write_whole
from lowbit.errors import UnsupportedError

FOLDER = Path(__file__).parent
_HEADERS = FOLDER / "device"
_DIGEST = hashlib.sha256().digest_size
_TOOLKIT = Path("/usr/local/cuda/include")
INSTALL = "pip install 'lowbit[cuda]'"
PACKAGES = ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime")
"""What the code that comes out depends on."""


def check() -> None:
    """Raise `ImportError`, saying what to install, unless there is a compiler."""
    if not _is_there("cuda.core"):
        raise ImportError(f"cuda.core is not installed, which compiles and launches CUDA kernels; {INSTALL}")
    if _headers() is None:
        raise ImportError(f"no CUDA headers: the package nvidia-cuda-runtime is not installed; {INSTALL}")
    if why := _no_nvrtc():
        raise ImportError(f"NVRTC, the compiler, is not there ({why}); {INSTALL}")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


@cache
def _headers() -> Path | None:
    """The folder with cuda_fp16.h, of the pip packages or of a toolkit."""
    found = next(_installed_files("nvidia-cuda-runtime", "cuda_fp16.h"), None)
    if found is not None:
        return found.parent
    return _TOOLKIT if (_TOOLKIT / "cuda_fp16.h").exists() else None


def _installed_files(package: str, start: str) -> Iterator[Path]:
    """The files of a pip package, under any of its names, whose own names begin so, and which are there."""
    for name in (package, f"{package}-cu13", f"{package}-cu12"):
        try:
            files = importlib.metadata.files(name) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            place = Path(str(file.locate()))
            if file.name.startswith(start) and place.exists():
                yield place


def _no_nvrtc() -> str | None:
    """Why there is no NVRTC, or None. Where pip brought it, it is looked for, not loaded: what is kept needs it not."""
    if any(next(_installed_files("nvidia-cuda-nvrtc", name), None) for name in ("libnvrtc.so", "nvrtc64")):
        return None
    try:
        nvrtc_version()
    except Exception as error:  # noqa: BLE001  (cuda.bindings raises kinds of its own, by its version)
        return _first_line(error)
    return None


def nvrtc_version() -> str:
    """The version of CUDA that the compiler is of, such as 13.0; loads it. Raises what cuda.bindings raises."""
    status, major, minor = importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    if int(status):
        raise UnsupportedError(f"NVRTC does not tell its version: {status}")
    return f"{major}.{minor}"


def supported() -> list[int]:
    """The compute capabilities that the compiler knows, as 75 for 7.5. Raises what cuda.bindings raises."""
    nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")
    status, found = nvrtc.nvrtcGetSupportedArchs()
    if int(status):
        raise UnsupportedError(f"NVRTC does not tell what it compiles for: {status}")
    return list(found)


def driver_version() -> str:
    """The version of CUDA that the driver supports, such as 12.4. Raises `UnsupportedError` without a driver."""
    try:
        status, number = importlib.import_module("cuda.bindings.driver").cuDriverGetVersion()
    except Exception as error:  # cuda.bindings raises kinds of its own, by its version
        raise UnsupportedError(f"no NVIDIA driver: {_first_line(error)}") from error
    if int(status) or not number:
        raise UnsupportedError(f"the NVIDIA driver does not tell its version: {status}")
    return f"{number // 1000}.{number % 1000 // 10}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


@dataclass(frozen=True)
class Binary:
    """A compiled kernel. `log` is what the assembler said, of registers and spills; "" for one read from disk."""

    code: bytes
    symbol: str
    log: str = ""

    @property
    def registers(self) -> int:
        """Registers a thread, from the log."""
        return max(_numbers(r"Used (\d+) registers", self.log))

    @property
    def spills(self) -> int:
        """Bytes a thread that left the registers, stores and loads, from the log; those of called functions count."""
        return sum(_numbers(r"(\d+) bytes spill (?:stores|loads)", self.log))

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a block has beside what its launch adds, from the log."""
        return max(_numbers(r"Used \d+ registers(?:.*?, (\d+) bytes smem)?", self.log))

    @property
    def warnings(self) -> list[str]:
        """Lines of the log that warn."""
        return [line for line in self.log.splitlines() if "warning" in line.lower()]


def _numbers(pattern: str, text: str) -> list[int]:
    found = re.findall(pattern, text)
    if not found:
        raise ValueError(f"the compiler's log does not say {pattern!r}")
    return [int(number or 0) for number in found]


def compiled(source: str, name: str, architecture: str) -> Binary:
    """The kernel `name` (a C++ expression such as `f<8>`) of a file of this folder, from disk or the compiler.

    Raises `UnsupportedError` with the compiler's words when it does not compile.
    """
    entry = _entry(source, name, architecture)
    found = _read(entry)
    if found is None:
        found = compile_now(source, name, architecture)
        content = found.symbol.encode() + b"\0" + found.code
        write_whole(entry, hashlib.sha256(content).digest() + content)
    return found


def is_kept(source: str, name: str, architecture: str) -> bool:
    """Whether `compiled` would find it on disk."""
    return _read(_entry(source, name, architecture)) is not None


def _entry(source: str, name: str, architecture: str) -> Path:
    return cache_folder("cuda") / f"{Path(source).stem}-{architecture}-{_key(source, name, architecture)}.bin"


def compile_now(source: str, name: str, architecture: str) -> Binary:
    """The same without the disk, and with the assembler's log."""
    cuda = core()
    headers = _headers()
    if headers is None:
        raise UnsupportedError(f"{source} cannot be compiled: there are no CUDA headers; {INSTALL}")
    options = cuda.ProgramOptions(
        arch=architecture, std="c++17", include_path=[str(_HEADERS), str(headers), str(headers / "cccl")],
        ptxas_options=["-v"], minimal=False,
    )  # fmt: skip
    log = io.StringIO()
    try:
        program = cuda.Program((FOLDER / source).read_text(), "c++", options=options)
        made = program.compile("cubin", name_expressions=(name,), logs=log)
    except Exception as error:  # cuda.core raises its own kinds, which differ between versions
        raise UnsupportedError(
            f"the CUDA kernel {name} of {source} does not compile for {architecture}: {error}\n{log.getvalue()}"
        ) from error
    symbol = made.symbol_mapping[name]
    return Binary(bytes(made.code), symbol if isinstance(symbol, str) else symbol.decode(), log.getvalue())


def _read(entry: Path) -> Binary | None:
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    body = content[_DIGEST:]
    if hashlib.sha256(body).digest() != content[:_DIGEST]:
        return None
    symbol, _, code = body.partition(b"\0")
    return Binary(code, symbol.decode())


@cache
def _key(source: str, name: str, architecture: str) -> str:
    digest = _digest_of_headers().copy()
    digest.update(f"{name}\0{architecture}\0{versions()}\0".encode() + (FOLDER / source).read_bytes())
    return digest.hexdigest()[:24]


@cache
def _digest_of_headers() -> Any:
    """Read once in a process, not once a kernel."""
    digest = hashlib.sha256()
    for header in sorted(_HEADERS.glob("*.cuh")):
        digest.update(header.read_bytes() + b"\0")
    return digest


@cache
def versions() -> str:
    """The versions that what is compiled depends on."""
    return ", ".join(f"{package} {_installed(package)}" for package in PACKAGES)


def _installed(package: str) -> str:
    """The version of a package; of a compiler that pip did not bring, that which it says it has."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"of the system, {nvrtc_version()}" if package == "nvidia-cuda-nvrtc" else "of the system"


@dataclass(frozen=True)
class Kept:
    """What the folder of compiled kernels holds: `entries` by architecture, their `bytes`, and the broken ones."""

    folder: Path
    writable: bool
    entries: dict[str, int]
    bytes: int
    broken: tuple[str, ...]


def kept() -> Kept:
    """Look through the folder of compiled kernels. What is broken there is compiled again when it is needed."""
    folder = cache_folder("cuda")
    entries: dict[str, int] = {}
    broken, size = [], 0
    for place in sorted(folder.glob("*.bin")) if folder.is_dir() else ():
        if _read(place) is None:
            broken.append(place.name)
            continue
        architecture = place.name.rsplit("-", 2)[-2]
        entries[architecture] = entries.get(architecture, 0) + 1
        size += place.stat().st_size
    return Kept(folder, _is_writable(folder), entries, size, tuple(broken))


def _is_writable(folder: Path) -> bool:
    """Whether entries can be added, with the folders above them where these are not there yet."""
    there = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            return True
    except OSError:
        return False


_IMPORTING = threading.Lock()


@cache
def core() -> Any:
    """The module cuda.core, under the name that it had before its first release, too."""
    with _IMPORTING:  # a second thread would see it half made
        core = importlib.import_module("cuda.core")
        return core if hasattr(core, "Program") else importlib.import_module("cuda.core.experimental")
