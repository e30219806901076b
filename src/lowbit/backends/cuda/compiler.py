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
import re
import tempfile
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
INSTALL = "pip install 'lowbit[cuda]'"
PACKAGES = ("cuda-bindings", "nvidia-cuda-nvrtc")
"""What the code that comes out depends on."""


def check() -> None:
    """Raise `ImportError`, saying what to install, unless there is a compiler."""
    if not _is_there("cuda.bindings"):
        raise ImportError(f"cuda.bindings is not installed, which compiles and launches CUDA kernels; {INSTALL}")
    if why := _no_nvrtc():
        raise ImportError(f"NVRTC, the compiler, is not there ({why}); {INSTALL}")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


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
    status, major, minor = _nvrtc().nvrtcVersion()
    if int(status):
        raise UnsupportedError(f"NVRTC does not tell its version: {status}")
    return f"{major}.{minor}"


def supported() -> list[int]:
    """The compute capabilities that the compiler knows, as 75 for 7.5. Raises what cuda.bindings raises."""
    status, found = _nvrtc().nvrtcGetSupportedArchs()
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
    options = (
        f"--gpu-architecture={architecture}", "--std=c++17", f"--include-path={_HEADERS}", "--ptxas-options=-v",
        "--device-as-default-execution-space",  # before 13.4 a lambda with `auto` is taken for the host's
    )  # fmt: skip
    text = (FOLDER / source).read_text().encode()
    try:
        return _compile(_nvrtc(), text, name.encode(), [option.encode() for option in options])
    except Exception as error:  # cuda.bindings raises kinds of its own, by its version
        raise UnsupportedError(
            f"the CUDA kernel {name} of {source} does not compile for {architecture}: {error}"
        ) from error


def _compile(nvrtc: Any, text: bytes, name: bytes, options: list[bytes]) -> Binary:
    """The kernel by NVRTC's own functions: what is around them in Python has changed from version to version."""

    def done(result: tuple[Any, ...]) -> Any:
        if result[0]:
            raise UnsupportedError(f"NVRTC says {result[0].name}")
        return result[1] if len(result) > 1 else None

    def filled(size: Any, fill: Any) -> bytes:
        there = bytes(max(2, done(size(program))))  # of one byte Python has a single one, which must stay as it is
        done(fill(program, there))
        return there

    program = done(nvrtc.nvrtcCreateProgram(text, b"kernel.cu", 0, [], []))
    try:
        done(nvrtc.nvrtcAddNameExpression(program, name))
        compiled = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = filled(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).rstrip(b"\0").decode(errors="replace")
        if compiled[0]:
            raise UnsupportedError(f"NVRTC says {compiled[0].name}\n{log}")
        symbol = done(nvrtc.nvrtcGetLoweredName(program, name)).decode()
        return Binary(filled(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), symbol, log)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


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


@cache
def _nvrtc() -> Any:
    return importlib.import_module("cuda.bindings.nvrtc")
